"""Spacings: which noise levels a run of n steps visits. `SPACINGS[name](schedule, steps, **options) -> list[float]`.

The list falls, holds n + 1 Python floats (no device is asked anything) and ends at the level where the run stops. A
spacing sees the schedule and its own options, never the solver. The options are where the programs in use differ:

    points   "n": that many timesteps; "n+1": one more, the lowest of them dropped
    offset   added to every timestep (`steps_offset`)
    round    to whole timesteps
    log      between two timesteps of the table, interpolate log sigma (k-diffusion) instead of sigma (diffusers)
    range    of karras: "table", the ends of the whole schedule, or the name of the spacing whose ends it takes
    last     the level after the last step: "zero", "sigma_min" of the schedule, or "repeat", the lowest once more
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Literal

import numpy as np

from mezzotint.diffusion.schedule import Schedule
from mezzotint.errors import RequestError

Points = Literal["n", "n+1"]
Last = Literal["zero", "sigma_min", "repeat"]
Range = Literal["table", "leading", "linspace", "trailing"]


def leading(
    schedule: Schedule, steps: int, *, points: Points = "n", offset: int = 0, last: Last = "zero"
) -> list[float]:
    """Every k-th timestep from the bottom, k = T // points (Song et al. 2021, "linear")."""
    count = _count(steps, points)
    stride = schedule.num_train_timesteps // count
    timesteps = [i * stride + offset for i in reversed(builtins.range(count))][:steps]
    return _ending(schedule, (schedule.sigma(t) for t in timesteps), last)


def linspace(
    schedule: Schedule,
    steps: int,
    *,
    points: Points = "n",
    round: bool = False,
    log: bool = False,
    last: Last = "zero",
) -> list[float]:
    """Evenly from the last timestep to the first, both included unless `points` drops the first."""
    timesteps = np.linspace(0, schedule.num_train_timesteps - 1, _count(steps, points))[::-1][:steps]
    timesteps = timesteps.round() if round else timesteps
    return _ending(schedule, (schedule.sigma(float(t), log=log) for t in timesteps), last)


def trailing(schedule: Schedule, steps: int, *, last: Last = "zero") -> list[float]:
    """Every T/n-th timestep from the top (Lin et al. 2023, table 2)."""
    length = schedule.num_train_timesteps
    timesteps = np.arange(length, 0, -length / _count(steps, "n"))[:steps].round() - 1
    return _ending(schedule, (schedule.sigma(float(t)) for t in timesteps), last)


def karras(
    schedule: Schedule, steps: int, *, rho: float = 7.0, range: Range = "table", offset: int = 0, last: Last = "zero"
) -> list[float]:
    """Evenly in sigma^(1/rho) (Karras et al. 2022, eq. 5)."""
    top, bottom = schedule.sigma_max, schedule.sigma_min
    if range != "table":
        options = {"offset": offset} if range == "leading" else {}
        spaced = SPACINGS[range](schedule, steps, last="repeat", **options)
        top, bottom = spaced[0], spaced[-1]
    ramp = np.linspace(top ** (1 / rho), bottom ** (1 / rho), _count(steps, "n"))
    return _ending(schedule, (float(root**rho) for root in ramp), last)


def _count(steps: int, points: Points) -> int:
    if steps < 1:
        raise RequestError(f"steps is {steps}; it must be at least 1")
    return steps + (points == "n+1")


def _ending(schedule: Schedule, sigmas: Iterable[float], last: Last) -> list[float]:
    """The levels, checked to fall, and the one after the last step."""
    levels = list(sigmas)
    if any(upper <= lower for upper, lower in pairwise(levels)):
        raise RequestError(
            f"steps is {len(levels)}, more than this spacing finds different noise levels for in the "
            f"{schedule.num_train_timesteps} that the model was trained on; take fewer steps, or the spacing karras"
        )
    return [*levels, {"zero": 0.0, "sigma_min": schedule.sigma_min, "repeat": levels[-1]}[last]]


SPACINGS: dict[str, Callable[..., list[float]]] = {
    "leading": leading,
    "linspace": linspace,
    "trailing": trailing,
    "karras": karras,
}
