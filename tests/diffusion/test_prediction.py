"""Each prediction recovers x0 from its own target, and inverts."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor

from mezzotint.config import ScheduleConfig
from mezzotint.diffusion.prediction import PREDICTIONS, Prediction, edm_prediction
from mezzotint.errors import RequestError

ALL = {**PREDICTIONS, "edm": edm_prediction(0.5), "edm v": edm_prediction(0.7, -1.0)}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6, torch.tensor([0.1, 5.0], dtype=torch.float64).reshape(2, 1, 1, 1)])
def test_target_gives_x0_back(name: str, sigma: float | Tensor) -> None:
    prediction = ALL[name]
    x0, noise = torch.randn(2, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x0 + sigma * noise
    target = prediction.target(x0, noise, sigma)
    torch.testing.assert_close(prediction.denoised(target, x, sigma), x0)
    torch.testing.assert_close(prediction.output(x0, x, sigma), target)


def test_v_is_diffusers_velocity() -> None:
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x0, noise = torch.randn(2, 1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    for timestep in (0, 300, 999):
        alpha = float(scheduler.alphas_cumprod[timestep])
        sigma = ((1 - alpha) / alpha) ** 0.5
        expected = scheduler.get_velocity(x0, noise, torch.tensor([timestep]))
        torch.testing.assert_close(PREDICTIONS["v_prediction"].target(x0, noise, sigma), expected, rtol=1e-4, atol=1e-4)


def test_keeps_float32() -> None:
    x = torch.ones(1, 4, 2, 2)
    for prediction in ALL.values():
        assert prediction.denoised(x, x, 2.0).dtype == torch.float32


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edm_is_that_of_diffusers(kind: str) -> None:
    config = {"sigma_data": 0.7, "prediction_type": kind}
    scheduler = diffusers.EDMEulerScheduler(**config)
    prediction = Prediction.from_config(ScheduleConfig.model_validate(config))
    x, output = torch.randn(2, 1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    for sigma in (0.003, 1.0, 70.0):
        expected = scheduler.precondition_outputs(x, output, sigma)
        torch.testing.assert_close(prediction.denoised(output, x, sigma), expected)
        scaled = scheduler.precondition_inputs(x, torch.tensor(sigma))
        torch.testing.assert_close(x / (sigma**2 + prediction.sigma_data**2) ** 0.5, scaled)


def test_v_prediction_is_edm_of_unit_data() -> None:
    """The network's first answer should be small: c_out and the target have unit variance for x0 of sigma_data's."""
    x0, noise = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    for sigma_data in (0.5, 1.0):
        for sigma in (0.05, 1.0, 20.0):
            target = edm_prediction(sigma_data).target(x0 * sigma_data, noise, sigma)
            assert float(target.std()) == pytest.approx(1.0, rel=0.02)


def test_the_configuration_selects_the_prediction() -> None:
    assert Prediction.from_config(ScheduleConfig(prediction_type="sample")) is PREDICTIONS["sample"]
    assert Prediction.from_config(ScheduleConfig(sigma_data=0.5)).sigma_data == 0.5
    with pytest.raises(RequestError, match="prediction_type is 'sample'; with EDM's preconditioning"):
        Prediction.from_config(ScheduleConfig(sigma_data=0.5, prediction_type="sample"))
