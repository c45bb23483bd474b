"""Spacings by hand; against diffusers they are in parity/test_samplers.py."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from mezzotint.config import ScheduleConfig
from mezzotint.diffusion.schedule import Schedule
from mezzotint.diffusion.spacing import SPACINGS, karras, leading, linspace, trailing
from mezzotint.errors import RequestError

SCHEDULE = Schedule.from_config(ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))


def timesteps(sigmas: list[float]) -> list[float]:
    return [round(SCHEDULE.timestep(sigma, log=False), 6) for sigma in sigmas[:-1]]


@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 150])
def test_falls_over_n_steps_to_zero(name: str, steps: int) -> None:
    sigmas = SPACINGS[name](SCHEDULE, steps)
    assert len(sigmas) == steps + 1 and sigmas[-1] == 0.0
    assert all(type(sigma) is float for sigma in sigmas)
    assert sigmas == sorted(set(sigmas), reverse=True)


def test_the_readings() -> None:
    assert timesteps(leading(SCHEDULE, 4)) == [750, 500, 250, 0]
    assert timesteps(leading(SCHEDULE, 4, offset=1)) == [751, 501, 251, 1]
    assert timesteps(leading(SCHEDULE, 4, points="n+1")) == [800, 600, 400, 200]
    assert timesteps(linspace(SCHEDULE, 4)) == [999, 666, 333, 0]
    assert timesteps(linspace(SCHEDULE, 3)) == [999, 499.5, 0]
    assert timesteps(linspace(SCHEDULE, 3, round=True)) == [999, 500, 0]
    assert timesteps(linspace(SCHEDULE, 3, points="n+1")) == [999, 666, 333]
    assert timesteps(trailing(SCHEDULE, 4)) == [999, 749, 499, 249]
    assert linspace(SCHEDULE, 3, log=True)[1] == pytest.approx(math.sqrt(SCHEDULE.sigmas[499] * SCHEDULE.sigmas[500]))


def test_last() -> None:
    for spacing in SPACINGS.values():
        assert spacing(SCHEDULE, 5, last="sigma_min")[-1] == SCHEDULE.sigma_min
        *_, lowest, last = spacing(SCHEDULE, 5, last="repeat")
        assert last == lowest


def test_karras() -> None:
    sigmas = karras(SCHEDULE, 5)
    assert sigmas[0] == pytest.approx(SCHEDULE.sigma_max) and sigmas[4] == pytest.approx(SCHEDULE.sigma_min)
    roots = [sigma ** (1 / 7) for sigma in sigmas[:-1]]
    gaps = [a - b for a, b in pairwise(roots)]
    assert gaps == pytest.approx([gaps[0]] * 4)
    ends = karras(SCHEDULE, 5, range="leading", offset=1)
    assert (ends[0], ends[4]) == pytest.approx((SCHEDULE.sigmas[801], SCHEDULE.sigmas[1]))
    assert karras(SCHEDULE, 3, rho=1.0)[1] == pytest.approx((SCHEDULE.sigma_max + SCHEDULE.sigma_min) / 2)


@pytest.mark.parametrize("name", SPACINGS)
def test_no_steps_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="steps is 0"):
        SPACINGS[name](SCHEDULE, 0)


def test_more_steps_than_levels_are_refused() -> None:
    for crowded in (lambda: leading(SCHEDULE, 2000), lambda: trailing(SCHEDULE, 2000)):
        with pytest.raises(RequestError, match="steps is 2000, more than"):
            crowded()
    with pytest.raises(RequestError, match="steps is 1000, more than"):
        linspace(SCHEDULE, 1000, points="n+1", round=True)
    assert len(karras(SCHEDULE, 2000)) == len(linspace(SCHEDULE, 2000)) == 2001
