"""Spacings, the noise levels of a run of n steps: `SPACINGS[name](schedule, steps, **options) -> list[float]`.

The list decreases, holds n + 1 Python floats (no device synchronization) and ends at the level where the run stops. A
spacing depends only on the schedule and its own options, never on the solver. All of them have two options:

    points   "n": this many levels are spaced; "n+1": one more, and the lowest is dropped (A1111's "discard the
             penultimate sigma")
    last     the level after the last step: "zero"; "sigma_min" of the schedule; "repeat", the lowest level again;
             "own", the lowest level itself (so one step fewer); or a number

The other options cover the differences between programs:

    offset   added to every timestep (diffusers' `steps_offset`)
    round    round to integer timesteps
    range    for karras, exponential, polyexponential, lu and beta: "table", the ends of the schedule, or the name of
             the spacing whose ends to use; sigma_max and sigma_min replace them
    calls    for DPM-Solver-fast: calls of the network in an interval. `steps` then counts calls, and the list has
             steps // calls + 1 intervals

Two lists follow ComfyUI and may differ in length: beta with `index` drops duplicates, and ddim_uniform may have more
levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mezzotint.diffusion.schedule import Interpolated, Schedule
from mezzotint.errors import RequestError

Points = Literal["n", "n+1"]
Last = Literal["zero", "sigma_min", "repeat", "own"] | float
Range = Literal["table", "leading", "linspace", "trailing"]
Spacing = Callable[..., list[float]]


def _from_levels(levels: Callable[..., Iterable[float]]) -> Spacing:
    """Make a spacing of a function `levels(schedule, count, **options)` that returns `count` decreasing levels."""

    def spacing(
        schedule: Schedule,
        steps: int,
        *,
        points: Points = "n",
        last: Last = "zero",
        calls: int | None = None,
        **options: Any,
    ) -> list[float]:
        if steps < 1:
            raise RequestError(f"steps is {steps}; it must be at least 1")
        count = steps + (points == "n+1") if calls is None else steps // calls + 2
        spaced = list(levels(schedule, count, **options))
        if len(spaced) > 1 and points == "n+1":
            spaced.pop()
        if any(upper <= lower for upper, lower in pairwise(spaced)):
            raise RequestError(
                f"steps is {steps}, but this spacing has fewer distinct noise levels in the "
                f"{schedule.num_train_timesteps} timesteps of the model; use fewer steps, or the spacing karras"
            )
        return _append_last(schedule, spaced, last)

    spacing.__name__, spacing.__doc__ = levels.__name__, levels.__doc__
    return spacing


def _append_last(schedule: Schedule, spaced: Sequence[float], last: Last) -> list[float]:
    """Return the levels and the one after the last step."""
    levels = [float(sigma) for sigma in spaced]
    if last == "own" and len(levels) > 1:
        return levels
    ends = {"zero": 0.0, "sigma_min": min(schedule.sigma_min, levels[-1]), "repeat": levels[-1], "own": 0.0}
    return [*levels, ends[last] if isinstance(last, str) else last]


# ---- in timesteps ----------------------------------------------------------------------------------------------------


@_from_levels
def leading(schedule: Schedule, count: int, *, offset: int = 0) -> Iterable[float]:
    """Every k-th timestep from the lowest, where k = T // count (Song et al. 2021, "linear")."""
    stride = schedule.num_train_timesteps // count
    return [schedule.sigma(i * stride + offset) for i in reversed(range(count))]


@_from_levels
def linspace(schedule: Schedule, count: int, *, round: bool = False) -> Iterable[float]:
    """Evenly spaced from the last timestep to the first, both included; a single one is the first, as in diffusers."""
    timesteps = np.linspace(0, schedule.num_train_timesteps - 1, count)[::-1]
    return [schedule.sigma(float(t)) for t in (timesteps.round() if round else timesteps)]


@_from_levels
def trailing(
    schedule: Schedule, count: int, *, original: int | None = None, round_last: bool = False
) -> Iterable[float]:
    """Every T/n-th timestep from the highest (Lin et al. 2023, table 2).

    With `original`, choose `count` of that many timesteps, those that a consistency model was distilled on (LCM, TCD).
    With `round_last`, subtract one before rounding, in float32 (Forge's Turbo): halves are rounded the other way.
    """
    length = schedule.num_train_timesteps
    if round_last:
        timesteps = (np.arange(count, 0, -1, dtype=np.float32) * np.float32(length / count) - 1).round()
    elif original is None:
        timesteps = np.arange(length, 0, -length / count)[:count].round() - 1
    elif count > original:
        raise RequestError(f"steps is {count}; it must be at most {original}, the timesteps of this distilled model")
    else:
        picked = np.floor(np.linspace(0, original, count, endpoint=False))
        timesteps = (original - picked) * (length // original) - 1
    return [schedule.sigma(float(t)) for t in timesteps]


@_from_levels
def normal(
    schedule: Schedule,
    count: int,
    *,
    top: float | None = None,
    original: int | None = None,
    interpolate: Interpolated = "log_sigma",
) -> Iterable[float]:
    """Like linspace, as in k-diffusion: from the timestep `top`, or the highest, to the lowest.

    The levels are interpolated in log sigma, or, as in A1111's UniPC, in the logarithm of alpha_bar. With `original`,
    the schedule is only that many of its timesteps, as in A1111's LCM.
    """
    schedule = schedule if original is None else schedule.distilled(original)
    top = schedule.num_train_timesteps - 1 if top is None else top
    return [schedule.sigma(float(t), interpolate) for t in np.linspace(top, 0, count)]


@_from_levels
def sgm_uniform(schedule: Schedule, count: int) -> Iterable[float]:
    """Like normal with one more level, which is dropped (Stability AI's generative-models)."""
    timesteps = np.linspace(schedule.num_train_timesteps - 1, 0, count + 1)[:-1]
    return [schedule.sigma(float(t), "log_sigma") for t in timesteps]


@_from_levels
def simple(schedule: Schedule, count: int) -> Iterable[float]:
    """Like trailing, on integer timesteps that are truncated instead of rounded (ComfyUI)."""
    stride = schedule.num_train_timesteps / count
    return [schedule.sigma(schedule.num_train_timesteps - 1 - int(i * stride)) for i in range(count)]


@_from_levels
def ddim_uniform(schedule: Schedule, count: int) -> Iterable[float]:
    """Like leading with offset 1, but up to the highest timestep (ComfyUI).

    There are more levels than `count` if T / count has a remainder.
    """
    stride = max(schedule.num_train_timesteps // count, 1)
    return [schedule.sigma(t) for t in reversed(range(1, schedule.num_train_timesteps, stride))]


# ---- in sigma --------------------------------------------------------------------------------------------------------


def _sigma_spacing(levels: Callable[..., Iterable[float]]) -> Spacing:
    """Make a spacing of a function `levels(top, bottom, count, **options)`.

    `range`, `sigma_max` and `sigma_min` determine top and bottom.
    """

    @wraps(levels)
    def sigma_levels(
        schedule: Schedule,
        count: int,
        *,
        range: Range = "table",
        offset: int = 0,
        sigma_max: float | None = None,
        sigma_min: float | None = None,
        **options: Any,
    ) -> Iterable[float]:
        ends = schedule.sigma_max, schedule.sigma_min
        if range != "table":
            shift = {"offset": offset} if range == "leading" else {}
            others = SPACINGS[range](schedule, count, last="repeat", **shift)
            ends = others[0], others[-1]
        return levels(sigma_max or ends[0], sigma_min or ends[1], count, **options)

    return _from_levels(sigma_levels)


@_sigma_spacing
def karras(top: float, bottom: float, count: int, *, rho: float = 7.0) -> Iterable[float]:
    """Evenly spaced in sigma^(1/rho) (Karras et al. 2022, eq. 5)."""
    return [float(root**rho) for root in np.linspace(top ** (1 / rho), bottom ** (1 / rho), count)]


@_sigma_spacing
def exponential(top: float, bottom: float, count: int) -> Iterable[float]:
    """Evenly spaced in log sigma: the uniform lambdas of Lu et al. 2022."""
    return [float(sigma) for sigma in np.geomspace(top, bottom, count)]


@_sigma_spacing
def polyexponential(top: float, bottom: float, count: int, *, rho: float = 1.0) -> Iterable[float]:
    """Return a ramp to the power of rho in log sigma (k-diffusion)."""
    return [bottom * (top / bottom) ** float(part) for part in np.linspace(1, 0, count) ** rho]


def beta(schedule: Schedule, steps: int, *, index: bool = False, **options: Any) -> list[float]:
    """Quantiles of the beta distribution, dense at both ends (Lee et al. 2024).

    They are taken between the ends in sigma, as in diffusers and A1111; with `index` among the timesteps, without
    duplicates, as in ComfyUI.
    """
    return (_beta_in_index if index else _beta_in_sigma)(schedule, steps, **options)


@_sigma_spacing
def _beta_in_sigma(top: float, bottom: float, count: int, *, alpha: float = 0.6, beta: float = 0.6) -> Iterable[float]:
    return [float(bottom + q * (top - bottom)) for q in _beta_quantiles(count, alpha, beta)]


@_from_levels
def _beta_in_index(schedule: Schedule, count: int, *, alpha: float = 0.6, beta: float = 0.6) -> Iterable[float]:
    quantiles = _beta_quantiles(count + 1, alpha, beta)[:-1]
    indices = dict.fromkeys(np.rint(quantiles * (schedule.num_train_timesteps - 1)).tolist())
    return [schedule.sigma(index) for index in indices]


def _beta_quantiles(count: int, alpha: float, beta: float) -> NDArray[np.float64]:
    from scipy.special import betaincinv  # type: ignore[import-untyped]

    return np.asarray(betaincinv(alpha, beta, np.linspace(1, 0, count)))


@_from_levels
def kl_optimal(schedule: Schedule, count: int, *, endpoint: bool = True) -> Iterable[float]:
    """Evenly spaced in arctan sigma (Sabour et al. 2024, eq. 7).

    With `endpoint` the lowest level is sigma_min (ComfyUI); without it, sigma_min is the one after (A1111, where the
    run ends there).
    """
    angles = np.linspace(math.atan(schedule.sigma_max), math.atan(schedule.sigma_min), count, endpoint=endpoint)
    return [math.tan(angle) for angle in angles]


@_from_levels
def linear_quadratic(schedule: Schedule, count: int, *, threshold: float = 0.025) -> Iterable[float]:
    """Return the linear-quadratic schedule of Movie Gen (Polyak et al. 2024, section 3.4.2).

    The first half of the steps covers the fraction `threshold` linearly, the second half the rest along a parabola with
    a continuous slope.
    """
    linear = max(count // 2, 1)
    slope, rest = threshold / linear, count - linear
    bend = (1 - threshold - slope * rest) / rest**2 if rest else 0.0
    done = [slope * i + bend * max(i - linear, 0) ** 2 for i in range(count)]
    return [schedule.sigma_max * (1 - part) for part in done]


# The published levels of ten steps, and the final level (Sabour et al. 2024).
ALIGN_YOUR_STEPS: dict[str, tuple[float, ...]] = {
    "sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}


# The same for 31 steps, and the levels of GITS (Chen et al. 2024), both as in Forge.
ALIGN_YOUR_STEPS_32: dict[str, tuple[float, ...]] = {
    "sd1": (
        *(14.615, 11.23951352, 8.64363081, 6.64729424, 5.57250862, 4.71648546, 3.99196065, 3.5195609),
        *(3.13490466, 2.79228788, 2.48773628, 2.21663865, 1.97508351, 1.7793172, 1.61475335, 1.46540953),
        *(1.314849, 1.16642497, 1.03475547, 0.91573744, 0.80748169, 0.71202361, 0.621739, 0.53065202),
        *(0.4529096, 0.37491455, 0.27461819, 0.2011529, 0.14105873, 0.06682881, 0.03166121, 0.015),
    ),
    "sdxl": (
        *(14.615, 11.1491618, 8.50522127, 6.48827151, 5.43707402, 4.60398619, 3.89854704, 3.27407457),
        *(2.74396527, 2.29968659, 1.95448514, 1.67108715, 1.42878152, 1.23181009, 1.06789649, 0.92579443),
        *(0.80290886, 0.69660121, 0.60436903, 0.52852552, 0.46773344, 0.41393379, 0.36258186, 0.31008517),
        *(0.26518925, 0.22326461, 0.17653877, 0.13959192, 0.10587381, 0.05519369, 0.02877334, 0.015),
    ),
}
GITS: dict[str, tuple[float, ...]] = {
    "sd1": (14.615, 4.617, 2.507, 1.236, 0.702, 0.402, 0.240, 0.156, 0.104, 0.094, 0.029),
    "sdxl": (14.615, 4.734, 2.567, 1.529, 0.987, 0.652, 0.418, 0.268, 0.179, 0.127, 0.029),
}
TABLES = {"11": ALIGN_YOUR_STEPS, "32": ALIGN_YOUR_STEPS_32, "gits": GITS}


@_from_levels
def ays(schedule: Schedule, count: int, *, family: str = "sd1", table: str = "11") -> Iterable[float]:
    """Align Your Steps (Sabour et al. 2024), interpolated log-linearly to any number of steps.

    The ten steps of ComfyUI and diffusers are points "n+1", those of A1111 points "n". `table` is "11", "32" or "gits".
    """
    log_levels = np.log(TABLES[table]["sdxl" if family == "sdxl" else "sd1"])
    return [
        math.exp(level) for level in np.interp(np.linspace(0, 1, count), np.linspace(0, 1, len(log_levels)), log_levels)
    ]


def from_timesteps(schedule: Schedule, timesteps: Sequence[float], *, last: Last = "zero") -> list[float]:
    """Return the levels of a user's own decreasing timesteps, from 0 to T - 1, and the one after the last step.

    Raises:
        RequestError: If the first timestep is not one of the schedule's.
    """
    if not 0 <= timesteps[0] < schedule.num_train_timesteps:
        raise RequestError(
            f"timesteps begins with {timesteps[0]}; this model's timesteps are 0 to {schedule.num_train_timesteps - 1}"
        )
    return _append_last(schedule, [schedule.sigma(t) for t in timesteps], last)


SPACINGS: dict[str, Spacing] = {
    "leading": leading,
    "linspace": linspace,
    "trailing": trailing,
    "karras": karras,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "lu": exponential,
    "beta": beta,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "normal": normal,
    "ddim_uniform": ddim_uniform,
    "kl_optimal": kl_optimal,
    "linear_quadratic": linear_quadratic,
    "ays": ays,
}
