"""Singlestep solvers, which start each step, or group of steps, afresh. solvers.py describes the interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mezzotint.diffusion.solving import (
    Denoise,
    History,
    Noise,
    Step,
    ancestral_step,
    check_order,
    convert_output,
    euler_step,
    exponential_step,
    pair_denoiser,
    sde_noise_std,
    weighted_sum,
)
from mezzotint.errors import RequestError


def euler(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 0.0, cfg_pp: bool = False
) -> Iterator[Step]:
    """DDIM (Song et al. 2021, eq. 12). First order.

    Options:
        eta: 0 is Euler's method on the ODE. 1 is DDPM (Ho et al. 2020, alg. 2) with the posterior's variance, and
            k-diffusion's "Euler ancestral".
        cfg_pp: CFG++ (Chung et al. 2024, alg. 2): to the guided estimate, along the unconditional noise.
    """
    pair = pair_denoiser(denoise, cfg_pp)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised, uncond_denoised = pair(x, sigma)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        x = denoised + (sigma_down / sigma) * (x - uncond_denoised)
        if eta > 0.0:
            x = x + sigma_up * noise(sigma, sigma_next)  # the last step draws too, as in the references
        yield Step(i, sigma_next, x, denoised)


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Heun's method (Karras et al. 2022, alg. 1). Second order, 2n - 1 calls if the last level is 0 (an Euler step)."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next > 0.0:
            denoised = denoise(x_next, sigma_next)
            slope = (slope + (x_next - denoised) / sigma_next) / 2
            x_next = x + (sigma_next - sigma) * slope
        x = x_next
        yield Step(i, sigma_next, x, denoised)


def heunpp2(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Heun++ of ComfyUI and Forge (Carzit's sd-webui-samplers-scheduler; no paper).

    It averages the slopes at this level and the next two, found by Euler steps. The later ones are weighted by their
    levels over three times the first level, this one by the rest. First order, whatever the name says. Three calls a
    step, two in the last but one, and one in the last.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x_next, slopes = x, []
        levels = sigmas[i:-1][:3]
        for level, level_next in zip(levels, sigmas[i + 1 :], strict=False):
            denoised = denoise(x_next, level)
            slopes.append((x_next - denoised) / level)
            x_next = x_next + (level_next - level) * slopes[-1]
        shares = [level / (len(levels) * sigmas[0]) for level in levels[1:]]
        x = x + (sigma_next - sigma) * weighted_sum([1.0 - sum(shares), *shares], slopes)
        yield Step(i, sigma_next, x, denoised)


Segment = tuple[int, int, float, float]


def restart(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    segments: Sequence[Segment] | None = None,
    karras: bool = False,
) -> Iterator[Step]:
    """Restart sampling (Xu et al. 2023, alg. 1): Heun's method that at times adds noise and goes back up.

    Options:
        segments: Tuples (steps, times, low, high): on reaching `low`, add noise up to `high` and come down again in
            `steps` steps, `times` times. The total number of steps stays the same: the rest of the list is made
            coarser. None is A1111's choice, from 0.1 to 2: nothing below 20 steps, 9 steps once below 36, and from
            there a quarter of the steps twice.
        karras: Use a Karras spacing for the coarser list, down to the lowest level but one and then to 0, as A1111
            does.
    """
    steps = len(sigmas) - 1
    if segments is None:
        segments = [(steps // 4, 2, 0.1, 2.0)] if steps >= 36 else [(9, 1, 0.1, 2.0)] if steps >= 20 else []
    level = sigmas[0]
    for i, (sigma, sigma_next) in enumerate(_restart_intervals(sigmas, segments, karras)):
        if sigma > level:
            x = x + math.sqrt(sigma**2 - level**2) * noise(level, sigma)
        (step,) = heun(denoise, x, (sigma, sigma_next), noise)
        x, level = step.x, sigma_next
        yield Step(i, sigma_next, x, step.denoised)


def _restart_intervals(sigmas: Sequence[float], segments: Sequence[Segment], karras: bool) -> list[tuple[float, float]]:
    """Return the (sigma, sigma_next) of every step, as many as the list has."""
    for steps, times, low, high in segments:
        if steps < 1 or times < 1 or not 0.0 <= low < high:
            raise RequestError(
                f"segments has ({steps}, {times}, {low}, {high}); it must have steps and times of at least 1, and "
                "0 <= low < high"
            )
    taken = sum(steps * times for steps, times, _, _ in segments)
    if taken > len(sigmas) - 2:
        raise RequestError(f"segments take {taken} of {len(sigmas) - 1} steps; they must leave at least one")
    levels = sigmas
    if segments:
        source = (sigmas[0], sigmas[-2], 0.0) if karras else sigmas
        levels = _resample(source, len(sigmas) - 1 - taken)
    intervals = []
    for k, interval in enumerate(pairwise(levels), 1):
        intervals.append(interval)
        for steps, times, low, high in segments:
            if k == 1 + _nearest_index(levels[1:], low):
                top = levels[_nearest_index(levels[:k], high)]
                intervals += times * list(pairwise(_interpolate_karras((top, levels[k]), steps)))
    return intervals


def _nearest_index(levels: Sequence[float], level: float) -> int:
    return min(range(len(levels)), key=lambda k: abs(levels[k] - level))


def _resample(sigmas: Sequence[float], steps: int) -> list[float]:
    """Return the same spacing in `steps` steps; if it ends in 0, the 0 and the level above it are kept."""
    return (
        [*_interpolate_karras(sigmas[:-1], steps - 1), 0.0] if sigmas[-1] == 0.0 else _interpolate_karras(sigmas, steps)
    )


def _interpolate_karras(levels: Sequence[float], steps: int) -> list[float]:
    """Return steps + 1 levels, linearly interpolated in sigma^(1/7), so that a Karras list stays one."""
    roots = np.power(levels, 1 / 7)
    inner = np.interp(np.linspace(0, len(levels) - 1, steps + 1), np.arange(len(levels)), roots) ** 7
    return [levels[0], *inner[1:-1].tolist(), levels[-1]][: steps + 1]


def dpm2(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 0.0) -> Iterator[Step]:
    """DPM-Solver-2, k-diffusion's `sample_dpm_2(_ancestral)` (Karras et al. 2022, alg. 2, by the midpoint rule).

    The midpoint is in log sigma (Lu et al. 2022a). Second order, two calls a step, one for a step to 0.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        if sigma_down == 0.0:
            x = denoised
        else:
            sigma_mid = math.sqrt(sigma * sigma_down)
            x_mid = euler_step(x, denoised, sigma_mid / sigma)
            denoised = denoise(x_mid, sigma_mid)
            x = x + (sigma_down - sigma) * ((x_mid - denoised) / sigma_mid)
            if eta > 0.0:
                x = x + sigma_up * noise(sigma, sigma_next)
        yield Step(i, sigma_next, x, denoised)


def dpmpp_2s(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 0.0,
    order: int = 2,
    algorithm: Literal["dpmsolver++", "dpmsolver"] = "dpmsolver++",
    solver_type: Literal["midpoint", "heun"] = "midpoint",
    lower_order_final: bool = True,
    total_steps: int = 0,
) -> Iterator[Step]:
    """DPM-Solver++ singlestep (Lu et al. 2022b, alg. 1), on the levels of the list, as in diffusers.

    Steps come in groups of `order`, each from the first x of the group by all estimates since. One call a step.

    Options:
        eta: 1 is diffusers' "sde-dpmsolver++", 0 the ODE.
        order: From 1 to 3.
        algorithm: "dpmsolver" (Lu et al. 2022a) interpolates the noise instead of x0.
        solver_type: How the differences are weighted; see `exponential_moments`.
        lower_order_final: Take a first-order last step where it would complete a group; a last step to 0 always is.
        total_steps: Number of steps of the whole run, where this one is only its end: the groups are those of the
            whole run, and the first one lacks the estimates of the steps that were skipped.
    """
    check_order(order, 1, 3)
    skipped = max(total_steps - (len(sigmas) - 1), 0)
    predict_x0 = algorithm == "dpmsolver++"
    history: History = []  # since the group began
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        level = (skipped + i) % order
        if i == len(sigmas) - 2 and (sigma_next == 0.0 or (lower_order_final and level == order - 1)):
            level = 0
        level = min(level, len(history)) if i < order else level
        if level == 0:
            first, start, history = x, sigma, []
        denoised = denoise(x, sigma)
        history = [(sigma, convert_output(predict_x0, x, denoised, sigma)), *history]
        if solver_type == "midpoint" and level == 1:
            x = exponential_step(first, start, sigma_next, history, predict_x0, "midpoint", eta)
        else:  # the third order of "midpoint" omits the estimate in between
            used = [history[0], history[-1]] if solver_type == "midpoint" and level == 2 else history
            x = exponential_step(first, start, sigma_next, used, predict_x0, "logrho", eta)
        if eta > 0.0:
            x = x + sde_noise_std(start, sigma_next, predict_x0, eta) * noise(sigma, sigma_next)
        yield Step(i, sigma_next, x, denoised)


def dpmpp_2s_a(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    cfg_pp: bool = False,
    guided_midpoint: bool = False,
) -> Iterator[Step]:
    """Ancestral DPM-Solver++(2S) (Lu et al. 2022b, alg. 1), with k-diffusion's ancestral step.

    The midpoint is in log sigma. Second order at eta = 0, two calls a step, one for a step to 0. With `cfg_pp` (CFG++,
    Chung et al. 2024) the steps are unconditional and then shifted by the guidance at their start.

    Options:
        guided_midpoint: CFG++ as in ComfyUI: the midpoint is shifted too, and the step goes to the second guided
            estimate, shifted by the first guided one less the second unconditional one.
    """
    pair = pair_denoiser(denoise, cfg_pp)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised, uncond_denoised = pair(x, sigma)
        first, guidance = denoised, denoised - uncond_denoised
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        if sigma_down > 0.0:
            sigma_mid = math.sqrt(sigma * sigma_down)
            x_mid = euler_step(x, uncond_denoised, sigma_mid / sigma)
            denoised, uncond_denoised = pair(x_mid + guidance if guided_midpoint else x_mid, sigma_mid)
        if guided_midpoint:
            x = euler_step(x + first - uncond_denoised, denoised, sigma_down / sigma)
        else:
            x = euler_step(x, uncond_denoised, sigma_down / sigma) + guidance
        if eta > 0.0 and sigma_next > 0.0:
            x = x + sigma_up * noise(sigma, sigma_next)
        yield Step(i, sigma_next, x, denoised)


def dpmpp_sde(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, r: float = 1 / 2
) -> Iterator[Step]:
    """DPM-Solver++ (SDE) (Lu et al. 2022b, alg. 1), as in k-diffusion and diffusers.

    Both halves of a step are ancestral. `r` is the position of the inner estimate in log sigma. Two calls a step, one
    for a step to 0.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = target = denoise(x, sigma)
        if sigma_next > 0.0:
            sigma_mid = sigma * (sigma_next / sigma) ** r
            sigma_down, sigma_up = ancestral_step(sigma, sigma_mid, eta)
            x_mid = euler_step(x, denoised, sigma_down / sigma)
            if eta > 0.0:
                x_mid = x_mid + sigma_up * noise(sigma, sigma_mid)
            denoised = denoise(x_mid, sigma_mid)
            target = target + (denoised - target) / (2 * r)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        x = euler_step(x, target, sigma_down / sigma)
        if eta > 0.0 and sigma_next > 0.0:
            x = x + sigma_up * noise(sigma, sigma_next)
        yield Step(i, sigma_next, x, denoised)


def seeds_solver(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    nodes: Sequence[float] = (1 / 2,),
    solver_type: Literal["midpoint", "logrho"] = "midpoint",
) -> Iterator[Step]:
    """SEEDS-2 and SEEDS-3 (Gonzalez et al. 2023), interpolating x0: exponential integration of the diffusion SDE.

    Each step takes one more estimate at each of the nodes, from the first and the newest estimate, on one path of
    noise: one call more than nodes, one call for a step to 0.

    Options:
        eta: Variance of the noise, as a multiple of the diffusion SDE's; 0 is the ODE.
        nodes: Positions in log sigma, from 0 to 1. (1,) with eta 0 is the exponential form of Heun's method.
        solver_type: SEEDS-3 is nodes (1/3, 2/3) with "logrho".
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        ratio = sigma_next / sigma
        inner = [max(sigma_next, sigma * ratio**node) for node in nodes] if 0.0 < ratio < 1.0 else []
        history: History = []
        x_next, step_noise = x, 0.0 * x  # step_noise: the noise since the start of the step
        for level, after in pairwise([sigma, *inner, sigma_next]):
            denoised = denoise(x_next, level)
            history = [(level, denoised), *history[-1:]]
            if eta > 0.0 and after > 0.0:
                fresh = sde_noise_std(level, after, True, eta) * noise(level, after)
                step_noise = (after / level) ** (1.0 + eta) * step_noise + fresh
            x_next = exponential_step(x, sigma, after, history, True, solver_type, eta) + step_noise
        x = x_next
        yield Step(i, sigma_next, x, denoised)


def _dpm_solver(
    denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, order: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Take a step of DPM-Solver-1, -2 or -3 (Lu et al. 2022a, alg. 1 and 2).

    `order` calls, equally spaced in log sigma; one for a step to 0.

    Returns:
        x, the same by one order lower (which costs no call), and the newest denoised estimate.
    """
    denoised = denoise(x, sigma)
    begin = sigma, convert_output(False, x, denoised, sigma)
    history = [begin]
    low = high = exponential_step(x, sigma, sigma_next, history, False, "logrho")
    for k in range(1, order if sigma_next > 0.0 else 1):
        level = sigma * (sigma_next / sigma) ** (k / order)
        inner = exponential_step(x, sigma, level, history, False, "logrho")
        denoised = denoise(inner, level)
        history = [(level, convert_output(False, inner, denoised, level)), begin]
        low, high = high, exponential_step(x, sigma, sigma_next, history, False, "midpoint" if k == 1 else "logrho")
    return high, low, denoised


def dpm_fast(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, calls: int | None = None, eta: float = 0.0
) -> Iterator[Step]:
    """DPM-Solver-fast (Lu et al. 2022a, section 3.4): each interval is a third-order step, except for the last.

    Options:
        calls: Number of calls in total; the list must have calls // 3 + 1 intervals, evenly spaced in log sigma in
            k-diffusion. None is the largest number that fits.
        eta: Amount of ancestral noise; 0 is the ODE.
    """
    groups = len(sigmas) - 1
    calls = 3 * groups - 1 if calls is None else calls
    if calls < 1 or calls // 3 + 1 != groups:
        raise RequestError(
            f"calls is {calls}; for {groups} intervals it must be {max(3 * groups - 3, 1)} to {3 * groups - 1}"
        )
    orders = [3] * (groups - 2) + [2, 1] if calls % 3 == 0 else [3] * (groups - 1) + [calls % 3]
    for i, (order, sigma, sigma_next) in enumerate(zip(orders, sigmas, sigmas[1:], strict=False)):
        sigma_down, sigma_up = _bounded_ancestral_step(sigma, sigma_next, eta, sigmas[-1])
        x, _, denoised = _dpm_solver(denoise, x, sigma, sigma_down, order)
        if eta > 0.0:
            x = x + sigma_up * noise(sigma, sigma_next)
        yield Step(i, sigma_next, x, denoised)


def dpm_adaptive(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
) -> Iterator[Step]:
    """DPM-Solver-12 and -23 (Lu et al. 2022a, appendix C.4), with k-diffusion's PI step size control.

    Only the first level, the lowest above 0, and a final 0 of the list are used. It yields one Step for each accepted
    step, as many as the tolerances require. The error is that of the whole batch, so all pictures of a batch share
    their steps.

    Options:
        order: 2 or 3.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        h_init: First step size in log sigma.
        pcoeff: Proportional coefficient of the controller.
        icoeff: Integral coefficient of the controller.
        accept_safety: A step is rejected if its size would change by a smaller factor.
        eta: Amount of ancestral noise; 0 is the ODE.
    """
    check_order(order, 2, 3)
    last = min(sigma for sigma in sigmas if sigma > 0.0)
    sigma, h, i, x_low = sigmas[0], h_init, 0, x
    exponent = 1 / (1.5 if eta > 0.0 else order)
    previous: float | None = None  # inverse error of the previous step
    while math.log(sigma / last) > 1e-5:
        sigma_next = max(last, sigma * math.exp(-h))
        sigma_down, sigma_up = _bounded_ancestral_step(sigma, sigma_next, eta, last)
        high, low, denoised = _dpm_solver(denoise, x, sigma, sigma_down, order)
        allowed = (rtol * torch.maximum(low.abs(), x_low.abs())).clamp(min=atol)
        error = float(((low - high) / allowed).square().mean().sqrt())  # the only device synchronization
        inverse = 1 / (error + 1e-8)
        previous = previous or inverse
        factor = 1 + math.atan((inverse ** (pcoeff + icoeff) / previous**pcoeff) ** exponent - 1)
        h *= factor
        if factor < accept_safety:
            continue
        x = high if eta == 0.0 else high + sigma_up * noise(sigma, sigma_next)
        x_low, sigma, previous = low, sigma_next, inverse
        yield Step(i, sigma, x, denoised)
        i += 1
    if sigmas[-1] == 0.0:
        x = denoise(x, sigma)
        yield Step(i, 0.0, x, x)


def _bounded_ancestral_step(sigma: float, sigma_next: float, eta: float, last: float) -> tuple[float, float]:
    """Return `ancestral_step`, but never with sigma_down below the last level."""
    sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
    return (sigma_down, sigma_up) if sigma_down >= last else (last, math.sqrt(sigma_next**2 - last**2))


def lcm(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Latent consistency models (Luo et al. 2023, alg. 3): to x0 in one step, then fresh noise of the next level."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x = denoised = denoise(x, sigma)
        if sigma_next > 0.0:
            x = x + sigma_next * noise(sigma, sigma_next)
        yield Step(i, sigma_next, x, denoised)


def tcd(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 0.0,
    sigma_down_fn: Callable[[float, float], float] = lambda sigma_next, eta: (1.0 - eta) * sigma_next,
) -> Iterator[Step]:
    """Trajectory consistency distillation (Zheng et al. 2024, alg. 2, strategic stochastic sampling).

    Options:
        eta: The paper's gamma: 0 is the deterministic trajectory, 1 is LCM.
        sigma_down_fn: `sigma_down_fn(sigma_next, eta)`, the level to step to before noise brings x up to sigma_next.
            The paper takes (1 - eta) of the timestep, which depends on the model's schedule.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        sigma_down = sigma_down_fn(sigma_next, eta)
        x = euler_step(x, denoised, sigma_down / sigma)
        if sigma_down < sigma_next:
            x = x + math.sqrt(sigma_next**2 - sigma_down**2) * noise(sigma, sigma_next)
        yield Step(i, sigma_next, x, denoised)
