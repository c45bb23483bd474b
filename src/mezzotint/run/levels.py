"""The noise levels of a run: the sampler's whole list, and the part of it that img2img runs."""

from __future__ import annotations

import math
from typing import NamedTuple

from mezzotint.denoiser import timestep_at
from mezzotint.diffusion.schedule import Schedule
from mezzotint.diffusion.spacing import SPACINGS, from_timesteps
from mezzotint.errors import RequestError
from mezzotint.request import Request
from mezzotint.samplers import Sampler

# A1111 truncates strength * steps to t_enc and then runs this many more steps
STEP_OFFSET = {"a1111": 1, "a1111 timesteps": -1, "a1111 unipc": 0}

OWN_LEVELS = ("dpm_adaptive", "restart")  # solvers that take other steps than the list's


def all_sigmas(request: Request, sampler: Sampler, schedule: Schedule, prefix: str = "") -> list[float]:
    """Return the noise levels of a resolved request that starts from noise alone.

    Args:
        request: The request; that of a second pass has its steps and strength.
        sampler: The sampler.
        schedule: The training schedule.
        prefix: "hires_" for a second pass, for error messages.

    Raises:
        RequestError: If the schedule has fewer levels.
    """
    if request.sigmas:
        return list(request.sigmas)
    if request.timesteps:
        return from_timesteps(schedule, request.timesteps, last=sampler.spacing_options.get("last", "zero"))
    spacing, options = sampler.steps_from or (sampler.spacing, sampler.spacing_options)
    steps = _total_steps(request, sampler)
    if request.discard_penultimate_sigma and options.get("points") != "n+1" and "calls" not in options:
        if options.get("last") == "own":  # A1111's timesteps: one more is computed, and none is dropped
            steps += 1
        else:
            options = {**options, "points": "n+1"}
    try:
        levels = SPACINGS[spacing](schedule, steps, **options)
    except RequestError:
        if _total_steps(request, sampler) == request.steps:
            raise
        raise RequestError(
            f"{prefix}steps is {request.steps} and {prefix}strength {request.strength}: with fix_steps, the run is the "
            f"end of a list of {steps:,} steps, and this spacing has fewer distinct noise levels; use fewer steps, a "
            "larger strength, or no fix_steps (--no-fix-steps)"
        ) from None
    return _respace(sampler, schedule, levels) if sampler.steps_from and request.strength is None else levels


def run_sigmas(
    request: Request, sampler: Sampler, schedule: Schedule, levels: list[float], prefix: str = ""
) -> list[float]:
    """Return the levels that the run takes: all of them or, for img2img, the last ones.

    A sampler with `steps_from` replaces them by as many steps of its own spacing.

    Raises:
        RequestError: If `strength` leaves no step.
    """
    if request.strength is None:
        return levels
    respaced = sampler.steps_from is not None and not (request.sigmas or request.timesteps)
    steps = len(levels) - (not respaced)
    left = min(_steps_left(request, sampler, steps), steps)
    if left < 1:
        needed = f"at least 1/{steps}, or {prefix}steps must be larger"
        raise RequestError(
            f"{prefix}strength is {request.strength}, which leaves none of {steps} steps; it must be "
            f"{'above 0' if _is_fixed(request, sampler) else needed}"
        )
    taken = levels[steps - left :]
    return _respace(sampler, schedule, taken, schedule.timestep(taken[0])) if respaced else taken


class Switch(NamedTuple):
    """Where a refiner takes over.

    Attributes:
        sigma: The noise level at which, and below which, the refiner is called.
        step: Number of steps before it, after which the solver begins anew; None if it goes on and remembers them.
    """

    sigma: float
    step: int | None


def refiner_switch(at: float, sampler: Sampler, schedule: Schedule, sigmas: list[float]) -> Switch:
    """Return where a refiner takes over.

    In diffusers it takes the steps from timesteps below round(T - at * T), in a pipeline of its own, whose solver knows
    nothing of the steps before. In A1111 the model is changed at the first call whose timestep is T - 1 - at * T or
    less, and the solver does not notice. As ComfyUI's nodes begin anew too, its names and ours are as in diffusers.

    Args:
        at: The share of the timesteps.
        sampler: The sampler.
        schedule: The training schedule.
        sigmas: The noise levels of the run.
    """
    timesteps = schedule.num_train_timesteps
    if sampler.counts.startswith("a1111"):
        last = math.floor(timesteps - 1 - at * timesteps + 1e-6)  # the nearest timestep counts
        above = math.inf if last + 1 >= timesteps else (schedule.sigma(last) + schedule.sigma(last + 1)) / 2
        return Switch(above if last >= 0 else -1.0, None)
    cutoff = round(timesteps - at * timesteps)
    starts = [round(timestep_at(sigma, schedule, sampler.timestep, sigmas), 3) for sigma in sigmas[:-1]]
    step = sum(timestep >= cutoff for timestep in starts)
    return Switch(sigmas[step] if step < len(starts) else -1.0, None if sampler.solver in OWN_LEVELS else step)


def _respace(sampler: Sampler, schedule: Schedule, levels: list[float], top: float | None = None) -> list[float]:
    """Return as many steps of the sampler's spacing as there are levels, from the timestep `top` or the highest."""
    options = sampler.spacing_options if top is None else {**sampler.spacing_options, "top": top}
    return SPACINGS[sampler.spacing](schedule, len(levels), **options)


def schedule_steps(request: Request, sampler: Sampler, levels: list[float]) -> int:
    """Return the number of steps that prompt schedules count, including those that img2img skips."""
    return len(levels) - 1 if _has_own_list(request, sampler) else request.steps or 1


def _steps_left(request: Request, sampler: Sampler, steps: int) -> int:
    """Return how many of a list's `steps` an img2img run takes."""
    if request.strength == 0.0:
        return 0
    fixed = _is_fixed(request, sampler)
    wanted = steps if _has_own_list(request, sampler) else request.steps or 1
    left = wanted if fixed else int(wanted * _cap_strength(sampler, request.strength or 0.0))
    if sampler.counts == "a1111" and not _has_own_list(request, sampler):
        # A1111 counts the steps that it skips, so that a longer list leaves more
        left += max(steps - _total_steps(request, sampler), 0)
    return left + STEP_OFFSET[sampler.counts] - fixed if sampler.counts in STEP_OFFSET else left


def _total_steps(request: Request, sampler: Sampler) -> int:
    """Return the number of steps before img2img skips the first ones."""
    steps = request.steps or 1
    return int(steps / _cap_strength(sampler, request.strength)) if request.fix_steps and request.strength else steps


def _is_fixed(request: Request, sampler: Sampler) -> bool:
    """Return whether the run takes all of the request's steps, on a longer list."""
    return bool(request.fix_steps) and not _has_own_list(request, sampler)


def _has_own_list(request: Request, sampler: Sampler) -> bool:
    """Return whether the list of levels may have another length than the request's steps."""
    return bool(request.sigmas or request.timesteps or "calls" in sampler.spacing_options)


def _cap_strength(sampler: Sampler, strength: float) -> float:
    """Return the strength, limited to 0.999 for A1111 samplers, as A1111 does."""
    return min(strength, 0.999) if sampler.counts.startswith("a1111") else strength
