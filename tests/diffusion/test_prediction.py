"""Each prediction recovers x0 from its own target, and inverts."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor

from mezzotint.diffusion.prediction import PREDICTIONS


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6, torch.tensor([0.1, 5.0], dtype=torch.float64).reshape(2, 1, 1, 1)])
def test_target_gives_x0_back(name: str, sigma: float | Tensor) -> None:
    prediction = PREDICTIONS[name]
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
    for prediction in PREDICTIONS.values():
        assert prediction.denoised(x, x, 2.0).dtype == torch.float32
