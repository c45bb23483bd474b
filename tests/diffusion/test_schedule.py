"""The tables, against diffusers' and by hand."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from mezzotint.config import ScheduleConfig
from mezzotint.diffusion.schedule import Interpolated, Schedule

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    "config",
    [
        SD,
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
        SD | {"num_train_timesteps": 50},
    ],
)
def test_alphas_are_those_of_diffusers(config: dict[str, Any]) -> None:
    schedule = Schedule.from_config(ScheduleConfig.model_validate(config))
    theirs = diffusers.DDPMScheduler(**config).alphas_cumprod.double().numpy()
    assert schedule.alphas_cumprod.dtype == np.float64
    assert schedule.num_train_timesteps == len(theirs)
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs, rtol=5e-5)


def test_zero_terminal_snr_ends_at_a_finite_sigma() -> None:
    schedule = Schedule.from_config(ScheduleConfig(**SD, rescale_betas_zero_snr=True))
    theirs = diffusers.EulerDiscreteScheduler(**SD, rescale_betas_zero_snr=True)
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.double().numpy(), rtol=2e-3)
    np.testing.assert_allclose(schedule.alphas_cumprod[:-50], theirs.alphas_cumprod.double().numpy()[:-50], rtol=5e-5)
    assert schedule.sigma_max == pytest.approx(4096, rel=1e-6)
    plain = Schedule.from_config(ScheduleConfig(**SD))
    assert schedule.sigma_min == pytest.approx(plain.sigma_min, rel=1e-12)


def test_stable_diffusion_in_figures() -> None:
    schedule = Schedule.from_config(ScheduleConfig(**SD))
    assert schedule.sigma_min == pytest.approx(0.0291672, rel=1e-5)
    assert schedule.sigma_max == pytest.approx(14.614647, rel=1e-5)
    assert np.all(np.diff(schedule.sigmas) > 0)


@pytest.mark.parametrize("interpolate", ["sigma", "log_sigma", "log_alpha"])
def test_sigma_and_timestep_are_inverse(interpolate: Interpolated) -> None:
    schedule = Schedule.from_config(ScheduleConfig(**SD))
    for timestep in (0.0, 0.25, 17.0, 400.5, 998.9, 999.0):
        sigma = schedule.sigma(timestep, interpolate)
        assert schedule.timestep(sigma, interpolate) == pytest.approx(timestep, abs=1e-9)
    assert schedule.sigma(500) == schedule.sigmas[500]
    lower, upper = schedule.sigmas[400:402]
    alpha = math.sqrt(schedule.alphas_cumprod[400] * schedule.alphas_cumprod[401])
    means = {
        "sigma": (lower + upper) / 2,
        "log_sigma": math.sqrt(lower * upper),
        "log_alpha": math.sqrt((1 - alpha) / alpha),
    }
    assert schedule.sigma(400.5, interpolate) == pytest.approx(means[interpolate], rel=1e-12)


def test_beyond_the_table_is_its_end() -> None:
    schedule = Schedule.from_config(ScheduleConfig(**SD))
    assert schedule.timestep(0.0) == 0.0 and schedule.timestep(1e6) == 999.0
    assert schedule.sigma(-5) == schedule.sigma_min and schedule.sigma(1000) == schedule.sigma_max


def test_the_float32_table_is_diffusers_to_the_last_digit() -> None:
    for beta_schedule in ("scaled_linear", "linear", "squaredcos_cap_v2"):
        config = SD | {"beta_schedule": beta_schedule}
        schedule = Schedule.from_config(ScheduleConfig(**config, float32_table=True))
        theirs = diffusers.DDPMScheduler(**config).alphas_cumprod
        sigmas = ((1 - theirs) / theirs) ** 0.5
        assert np.array_equal(schedule.sigmas.astype(np.float32), sigmas.numpy())


@pytest.mark.parametrize("kind", ["karras", "exponential"])
def test_edm_levels_are_those_of_diffusers(kind: str) -> None:
    config = {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.7, "rho": 5.0, "sigma_schedule": kind}
    schedule = Schedule.from_config(ScheduleConfig.model_validate(config))
    theirs = diffusers.EDMDPMSolverMultistepScheduler(**config).sigmas[:-1].double().numpy()[::-1]
    np.testing.assert_allclose(schedule.sigmas, theirs, rtol=2e-5)
    assert (schedule.sigma_min, schedule.sigma_max) == pytest.approx((0.01, 50.0), rel=1e-9)
    assert Schedule.from_config(ScheduleConfig(sigma_data=0.5)).sigma_max == pytest.approx(80.0)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_tcd_sigma_down_is_floored_as_in_diffusers(share: float) -> None:
    """Their timestep is an integer tensor, so their product is float32's."""
    schedule = Schedule.from_config(ScheduleConfig(**SD))
    for timestep in range(1000):
        theirs = int(torch.floor((1 - share) * torch.tensor(timestep)))
        assert schedule.tcd_sigma_down(schedule.sigma(timestep), share) == schedule.sigma(theirs)


def test_float64_would_floor_elsewhere() -> None:
    schedule = Schedule.from_config(ScheduleConfig(**SD))
    assert math.floor((1 - 0.9) * 10) == 0
    assert schedule.tcd_sigma_down(schedule.sigma(10), 0.9) == schedule.sigma(1)


def test_pndm_midpoint() -> None:
    schedule = Schedule.from_config(ScheduleConfig(**SD))
    assert schedule.pndm_midpoint(schedule.sigma(901), schedule.sigma(801)) == schedule.sigma(851)
    assert schedule.pndm_midpoint(schedule.sigma(859), schedule.sigma(716)) == schedule.sigma(787)


def test_tcd_sigma_down_and_sa_solver_tau() -> None:
    schedule = Schedule.from_config(ScheduleConfig(**SD))
    assert schedule.tcd_sigma_down(schedule.sigma(759), 0.3) == schedule.sigma(531)
    assert schedule.tcd_sigma_down(3.3, 0.0) == 3.3 and schedule.tcd_sigma_down(0.0, 0.5) == 0.0
    inside = [schedule.sa_solver_tau(schedule.sigma(t)) for t in (199, 200, 500, 800, 801)]
    assert inside == [0.0, 1.0, 1.0, 1.0, 0.0]
    options = schedule.bind_options({"tau": "sa_solver_tau", "order": 2, "solver_type": "bh1"})
    assert options["tau"](schedule.sigma(500)) == 1.0 and (options["order"], options["solver_type"]) == (2, "bh1")
