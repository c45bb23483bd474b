"""Spacings by hand; against diffusers they are in parity/test_samplers.py."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from diffusers.schedulers import AysSchedules
from scipy import stats

from mezzotint.config import ScheduleConfig
from mezzotint.diffusion.schedule import Schedule
from mezzotint.diffusion.spacing import (
    ALIGN_YOUR_STEPS,
    SPACINGS,
    TABLES,
    ays,
    beta,
    ddim_uniform,
    exponential,
    from_timesteps,
    karras,
    kl_optimal,
    leading,
    linear_quadratic,
    linspace,
    normal,
    polyexponential,
    sgm_uniform,
    simple,
    trailing,
)
from mezzotint.errors import RequestError

SCHEDULE = Schedule.from_config(ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))


def timesteps(sigmas: list[float]) -> list[float]:
    return [round(SCHEDULE.timestep(sigma, "sigma"), 6) for sigma in sigmas[:-1]]


@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 150])
def test_falls_over_n_steps_to_zero(name: str, steps: int) -> None:
    for options in ({}, {"points": "n+1"}, *([{"index": True}] if name == "beta" and steps < 100 else [])):
        sigmas = SPACINGS[name](SCHEDULE, steps, **options)
        if name != "ddim_uniform" or (1000 % steps == 0 and not options):  # whole, however many that makes
            assert len(sigmas) == steps + 1
        assert sigmas[-1] == 0.0
        assert all(type(sigma) is float for sigma in sigmas)
        assert sigmas == sorted(set(sigmas), reverse=True)


def test_timesteps_of_each_spacing() -> None:
    assert timesteps(leading(SCHEDULE, 4)) == [750, 500, 250, 0]
    assert timesteps(leading(SCHEDULE, 4, offset=1)) == [751, 501, 251, 1]
    assert timesteps(leading(SCHEDULE, 4, points="n+1")) == [800, 600, 400, 200]
    assert timesteps(linspace(SCHEDULE, 4)) == [999, 666, 333, 0]
    assert timesteps(linspace(SCHEDULE, 3)) == [999, 499.5, 0]
    assert timesteps(linspace(SCHEDULE, 3, round=True)) == [999, 500, 0]
    assert timesteps(linspace(SCHEDULE, 3, points="n+1")) == [999, 666, 333]
    assert timesteps(trailing(SCHEDULE, 4)) == [999, 749, 499, 249]
    assert normal(SCHEDULE, 3)[1] == pytest.approx(math.sqrt(SCHEDULE.sigmas[499] * SCHEDULE.sigmas[500]))
    assert normal(SCHEDULE, 2, top=19)[:2] == pytest.approx([SCHEDULE.sigmas[19], SCHEDULE.sigmas[0]])
    assert sgm_uniform(SCHEDULE, 4)[:4] == normal(SCHEDULE, 5)[:4]
    assert timesteps(simple(SCHEDULE, 3)) == [999, 666, 333]
    assert timesteps(simple(SCHEDULE, 7)) == [999, 857, 714, 571, 428, 285, 142]
    assert timesteps(ddim_uniform(SCHEDULE, 4)) == [751, 501, 251, 1]
    assert timesteps(ddim_uniform(SCHEDULE, 6)) == [997, 831, 665, 499, 333, 167, 1]
    assert timesteps(trailing(SCHEDULE, 4, original=50)) == [999, 759, 499, 259]


def test_last() -> None:
    for name, spacing in SPACINGS.items():
        end = spacing(SCHEDULE, 5, last="sigma_min")[-1]
        assert end == (pytest.approx(0.029) if name == "ays" else SCHEDULE.sigma_min)  # never above the lowest
        *levels, lowest, last = spacing(SCHEDULE, 5, last="repeat")
        assert last == lowest
        assert spacing(SCHEDULE, 5, last="own") == [*levels, lowest]
        assert spacing(SCHEDULE, 5, last=0.001) == [*levels, lowest, 0.001]


def test_points() -> None:
    for name in set(SPACINGS) - {"leading", "trailing", "ddim_uniform"}:
        spacing = SPACINGS[name]
        assert spacing(SCHEDULE, 5, points="n+1")[:-1] == spacing(SCHEDULE, 6)[:-2], name


def test_calls() -> None:
    for calls in (1, 3, 20):
        fast = exponential(SCHEDULE, calls, calls=3, last="own")
        assert fast == exponential(SCHEDULE, calls // 3 + 2, last="own") and len(fast) == calls // 3 + 2


def test_karras() -> None:
    sigmas = karras(SCHEDULE, 5)
    assert sigmas[0] == pytest.approx(SCHEDULE.sigma_max) and sigmas[4] == pytest.approx(SCHEDULE.sigma_min)
    roots = [sigma ** (1 / 7) for sigma in sigmas[:-1]]
    gaps = [a - b for a, b in pairwise(roots)]
    assert gaps == pytest.approx([gaps[0]] * 4)
    ends = karras(SCHEDULE, 5, range="leading", offset=1)
    assert (ends[0], ends[4]) == pytest.approx((SCHEDULE.sigmas[801], SCHEDULE.sigmas[1]))
    assert karras(SCHEDULE, 3, rho=1.0)[1] == pytest.approx((SCHEDULE.sigma_max + SCHEDULE.sigma_min) / 2)


def test_exponential_and_polyexponential() -> None:
    logs = [math.log(sigma) for sigma in exponential(SCHEDULE, 5)[:-1]]
    assert [a - b for a, b in pairwise(logs)] == pytest.approx([(logs[0] - logs[-1]) / 4] * 4)
    assert polyexponential(SCHEDULE, 5) == pytest.approx(exponential(SCHEDULE, 5))
    bent = math.log(polyexponential(SCHEDULE, 5, rho=2.0)[2])
    assert (bent - logs[-1]) / (logs[0] - logs[-1]) == pytest.approx(0.25)
    assert exponential(SCHEDULE, 3, sigma_max=100.0, sigma_min=0.01)[:3] == pytest.approx([100, 1, 0.01])


def test_beta() -> None:
    low, high = SCHEDULE.sigma_min, SCHEDULE.sigma_max
    sigmas = beta(SCHEDULE, 6)
    expected = [low + (high - low) * stats.beta.ppf(1 - i / 5, 0.6, 0.6) for i in range(6)]
    assert sigmas[:-1] == pytest.approx(expected, rel=1e-9)
    indices = [round(stats.beta.ppf(1 - i / 6, 0.6, 0.6) * 999) for i in range(6)]
    assert timesteps(beta(SCHEDULE, 6, index=True)) == indices
    assert len(beta(SCHEDULE, 300, index=True)) == 293 + 1  # seven repeats
    assert beta(SCHEDULE, 3, alpha=1.0, beta=1.0)[1] == pytest.approx((low + high) / 2)


def test_kl_optimal() -> None:
    ends = math.atan(SCHEDULE.sigma_max), math.atan(SCHEDULE.sigma_min)
    assert kl_optimal(SCHEDULE, 3)[:-1] == pytest.approx([math.tan(a) for a in (ends[0], sum(ends) / 2, ends[1])])
    a1111 = kl_optimal(SCHEDULE, 2, endpoint=False, last="sigma_min")
    assert a1111 == pytest.approx(kl_optimal(SCHEDULE, 3)[:-1])


def test_linear_quadratic() -> None:
    """The first half takes 0.025 of the way; the slope does not jump where the parabola begins; it ends at 1."""
    done = [1 - sigma / SCHEDULE.sigma_max for sigma in linear_quadratic(SCHEDULE, 40)]
    assert done[:21] == pytest.approx([0.025 * i / 20 for i in range(21)])
    seconds = [a - 2 * b + c for a, b, c in zip(done[20:], done[21:], done[22:], strict=False)]
    assert seconds == pytest.approx([seconds[0]] * 19) and seconds[0] > 0
    assert (done[21] - done[20]) - seconds[0] / 2 == pytest.approx(0.025 / 20)
    assert done[40] == 1.0


def test_align_your_steps() -> None:
    """Three tails: A1111's, of 11 levels and 0; ComfyUI's and diffusers', of 10, the eleventh made 0."""
    for family, table in ALIGN_YOUR_STEPS.items():
        assert ays(SCHEDULE, 11, family=family) == pytest.approx([*table, 0.0])
        assert ays(SCHEDULE, 10, family=family, points="n+1") == pytest.approx([*table[:10], 0.0])
        assert ays(SCHEDULE, 21, family=family)[1] == pytest.approx(math.sqrt(table[0] * table[1]))
    assert ays(SCHEDULE, 10, points="n+1") == pytest.approx(AysSchedules["StableDiffusionSigmas"], abs=1e-3)
    sdxl = ays(SCHEDULE, 10, points="n+1", family="sdxl")
    assert sdxl == pytest.approx(AysSchedules["StableDiffusionXLSigmas"], abs=1e-3)


def test_align_your_steps_as_forge_has_it() -> None:
    for table in ("32", "gits"):
        for family, known in TABLES[table].items():
            count = len(known)
            assert ays(SCHEDULE, count, family=family, table=table) == pytest.approx([*known, 0.0])
            assert ays(SCHEDULE, 2 * count - 1, family=family, table=table)[1] == pytest.approx(
                math.sqrt(known[0] * known[1])
            )
            assert all(a > b for a, b in pairwise(known)) and len(known) == (32 if table == "32" else 11)
    # the finer tables go where the coarse ones do, but for the lowest levels
    for family, coarse in ALIGN_YOUR_STEPS.items():
        finer = np.interp(np.linspace(0, 1, 11), np.linspace(0, 1, 31), np.log(TABLES["32"][family][:-1]))
        assert np.abs(finer - np.log(coarse))[:8].max() < 0.15


def test_a_users_own_timesteps() -> None:
    assert from_timesteps(SCHEDULE, [999, 500.5, 0], last="zero") == [
        SCHEDULE.sigma(999),
        SCHEDULE.sigma(500.5),
        SCHEDULE.sigma(0),
        0.0,
    ]
    assert from_timesteps(SCHEDULE, [700, 30], last="sigma_min")[-1] == SCHEDULE.sigma_min
    with pytest.raises(RequestError, match="timesteps begins with 1000; this model's timesteps are 0 to 999"):
        from_timesteps(SCHEDULE, [1000, 0])


def test_steps_beyond_what_a_model_was_distilled_on() -> None:
    with pytest.raises(RequestError, match="steps is 51; it must be at most 50"):
        trailing(SCHEDULE, 51, original=50)


@pytest.mark.parametrize("name", SPACINGS)
def test_no_steps_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="steps is 0"):
        SPACINGS[name](SCHEDULE, 0)


def test_more_steps_than_levels_are_refused() -> None:
    for crowded in (lambda: leading(SCHEDULE, 2000), lambda: trailing(SCHEDULE, 2000)):
        with pytest.raises(RequestError, match="steps is 2000, but this spacing has fewer"):
            crowded()
    with pytest.raises(RequestError, match="steps is 1000, but this spacing has fewer"):
        linspace(SCHEDULE, 1000, points="n+1", round=True)
    assert len(karras(SCHEDULE, 2000)) == len(linspace(SCHEDULE, 2000)) == 2001
