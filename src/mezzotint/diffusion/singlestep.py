"""Solvers that begin each step, or group of steps, afresh. The contract is in solvers.py."""

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
    Known,
    Noise,
    Step,
    ancestral,
    check_order,
    estimate,
    integrated,
    pair_of,
    spread,
    towards,
    weighted,
)
from mezzotint.errors import RequestError


def euler(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 0.0, cfg_pp: bool = False
) -> Iterator[Step]:
    """DDIM(eta), Song et al. 2021 eq. 12. eta = 0 is Euler's method on the ODE; eta = 1 is DDPM, Ho et al. 2020 alg. 2,
    with the posterior's variance, and k-diffusion's "Euler ancestral". First order.

    cfg_pp: CFG++, Chung et al. 2024 alg. 2: to the guided estimate, but along the unconditional noise.
    """
    pair = pair_of(denoise, cfg_pp)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised, renoised = pair(x, sigma)
        down, up = ancestral(sigma, sigma_next, eta)
        x = denoised + (down / sigma) * (x - renoised)
        if eta > 0.0:
            x = x + up * noise(sigma, sigma_next)  # drawn on the last step too, where up is 0: the references do
        yield Step(i, sigma_next, x, denoised)


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Karras et al. 2022 alg. 1: Heun's method, second order; 2n - 1 calls when the last level is 0, Euler's step."""
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
    """Heun++, of ComfyUI and Forge (Carzit's sd-webui-samplers-scheduler; no paper): the slopes at this level and the
    next two, found by Euler's steps, weighted by their levels over three times the first one, this one by the rest.

    First order, whatever the name says. Three calls a step, but for two in the last but one and one in the last.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        ahead, slopes = x, []
        levels = sigmas[i:-1][:3]
        for level, following in zip(levels, sigmas[i + 1 :], strict=False):
            denoised = denoise(ahead, level)
            slopes.append((ahead - denoised) / level)
            ahead = ahead + (following - level) * slopes[-1]
        shares = [level / (len(levels) * sigmas[0]) for level in levels[1:]]
        x = x + (sigma_next - sigma) * weighted([1.0 - sum(shares), *shares], slopes)
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
    """Restart sampling, Xu et al. 2023 alg. 1: Heun's steps that from time to time go back up by fresh noise.

    segments: (steps, times, low, high): on reaching `low`, noise up to `high` and come down again in `steps`, so many
    times. The run keeps its number of steps: what the segments take is taken from the list, which is made coarser.
    None is A1111's choice: from 0.1 to 2, nothing below 20 steps, 9 of them once, from 36 on a quarter of them twice.
    karras: as there, the coarser list is Karras's, down to the lowest level but one and then to 0, whatever it was.
    """
    steps = len(sigmas) - 1
    if segments is None:
        segments = [(steps // 4, 2, 0.1, 2.0)] if steps >= 36 else [(9, 1, 0.1, 2.0)] if steps >= 20 else []
    level = sigmas[0]
    for i, (sigma, sigma_next) in enumerate(_restarts(sigmas, segments, karras)):
        if sigma > level:
            x = x + math.sqrt(sigma**2 - level**2) * noise(level, sigma)
        (step,) = heun(denoise, x, (sigma, sigma_next), noise)
        x, level = step.x, sigma_next
        yield Step(i, sigma_next, x, step.denoised)


def _restarts(sigmas: Sequence[float], segments: Sequence[Segment], karras: bool) -> list[tuple[float, float]]:
    """The (sigma, sigma_next) of every step, as many as the list has."""
    for steps, times, low, high in segments:
        if steps < 1 or times < 1 or not 0.0 <= low < high:
            raise RequestError(
                f"segments has ({steps}, {times}, {low}, {high}); it must be steps and times from 1, 0 <= low < high"
            )
    taken = sum(steps * times for steps, times, _, _ in segments)
    if taken > len(sigmas) - 2:
        raise RequestError(f"segments take {taken} of {len(sigmas) - 1} steps; at least one must be left")
    levels = sigmas
    if segments:
        source = (sigmas[0], sigmas[-2], 0.0) if karras else sigmas
        levels = _resampled(source, len(sigmas) - 1 - taken)
    plan = []
    for k, interval in enumerate(pairwise(levels), 1):
        plan.append(interval)
        for steps, times, low, high in segments:
            if k == 1 + _nearest(levels[1:], low):
                top = levels[_nearest(levels[:k], high)]
                plan += times * list(pairwise(_rooted((top, levels[k]), steps)))
    return plan


def _nearest(levels: Sequence[float], level: float) -> int:
    return min(range(len(levels)), key=lambda k: abs(levels[k] - level))


def _resampled(sigmas: Sequence[float], steps: int) -> list[float]:
    """The same spacing in `steps` steps; where it ends in 0, the 0 and what lies above it stay."""
    return [*_rooted(sigmas[:-1], steps - 1), 0.0] if sigmas[-1] == 0.0 else _rooted(sigmas, steps)


def _rooted(levels: Sequence[float], steps: int) -> list[float]:
    """steps + 1 levels along these, evenly between them in sigma^(1/7): from a Karras list always a Karras list."""
    roots = np.power(levels, 1 / 7)
    inner = np.interp(np.linspace(0, len(levels) - 1, steps + 1), np.arange(len(levels)), roots) ** 7
    return [levels[0], *inner[1:-1].tolist(), levels[-1]][: steps + 1]


def dpm2(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 0.0) -> Iterator[Step]:
    """DPM-Solver-2 as k-diffusion's `sample_dpm_2(_ancestral)`: Karras et al. 2022 alg. 2 by the midpoint rule, with
    the midpoint in log sigma (Lu et al. 2022a). Second order, two calls a step but for one down to 0.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        down, up = ancestral(sigma, sigma_next, eta)
        if down == 0.0:
            x = denoised
        else:
            middle = math.sqrt(sigma * down)
            x_middle = towards(x, denoised, middle / sigma)
            denoised = denoise(x_middle, middle)
            x = x + (down - sigma) * ((x_middle - denoised) / middle)
            if eta > 0.0:
                x = x + up * noise(sigma, sigma_next)
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
) -> Iterator[Step]:
    """DPM-Solver++ singlestep, Lu et al. 2022b alg. 1, on the list's own levels as in diffusers: groups of `order`
    (1 to 3) steps, each from the group's first x by all estimates since. One call a step.

    eta: 1 is diffusers' "sde-dpmsolver++". algorithm: interpolate x0 or, "dpmsolver", the noise (Lu et al. 2022a).
    solver_type: which exponential weights the differences have. The last step is first order where it goes to 0, and
    with `lower_order_final` where it would complete a group.
    """
    check_order(order, 1, 3)
    data = algorithm == "dpmsolver++"
    known: Known = []  # since the group began
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        level = i % order
        if i == len(sigmas) - 2 and (sigma_next == 0.0 or (lower_order_final and level == order - 1)):
            level = 0
        if level == 0:
            first, start, known = x, sigma, []
        denoised = denoise(x, sigma)
        known = [(sigma, estimate(data, x, denoised, sigma)), *known]
        if solver_type == "midpoint" and level == 1:
            x = integrated(first, start, sigma_next, known, data, "midpoint", eta)
        else:  # midpoint's third order leaves out the estimate between
            used = [known[0], known[-1]] if solver_type == "midpoint" and level == 2 else known
            x = integrated(first, start, sigma_next, used, data, "logrho", eta)
        if eta > 0.0:
            x = x + spread(start, sigma_next, data, eta) * noise(sigma, sigma_next)
        yield Step(i, sigma_next, x, denoised)


def dpmpp_2s_a(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, cfg_pp: bool = False
) -> Iterator[Step]:
    """Ancestral DPM-Solver++(2S), Lu et al. 2022b alg. 1 down to k-diffusion's ancestral level, midpoint in log sigma.

    Second order at eta = 0, two calls a step but for one down to 0. cfg_pp: CFG++ as ComfyUI has it, the steps
    unconditional and then shifted by the guidance at their beginning.
    """
    pair = pair_of(denoise, cfg_pp)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised, stepped = pair(x, sigma)
        guidance = denoised - stepped
        down, up = ancestral(sigma, sigma_next, eta)
        if down > 0.0:
            middle = math.sqrt(sigma * down)
            denoised, stepped = pair(towards(x, stepped, middle / sigma), middle)
        x = towards(x, stepped, down / sigma) + guidance
        if eta > 0.0 and sigma_next > 0.0:
            x = x + up * noise(sigma, sigma_next)
        yield Step(i, sigma_next, x, denoised)


def dpmpp_sde(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, r: float = 1 / 2
) -> Iterator[Step]:
    """DPM-Solver++ (SDE), Lu et al. 2022b alg. 1 with an ancestral part in both halves: k-diffusion's, and diffusers'
    DPMSolverSDE. r: where in log sigma the inner estimate lies. Two calls a step but for one down to 0.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = target = denoise(x, sigma)
        if sigma_next > 0.0:
            middle = sigma * (sigma_next / sigma) ** r
            down, up = ancestral(sigma, middle, eta)
            x_middle = towards(x, denoised, down / sigma)
            if eta > 0.0:
                x_middle = x_middle + up * noise(sigma, middle)
            denoised = denoise(x_middle, middle)
            target = target + (denoised - target) / (2 * r)
        down, up = ancestral(sigma, sigma_next, eta)
        x = towards(x, target, down / sigma)
        if eta > 0.0 and sigma_next > 0.0:
            x = x + up * noise(sigma, sigma_next)
        yield Step(i, sigma_next, x, denoised)


def seeds(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    nodes: Sequence[float] = (1 / 2,),
    solver_type: Literal["midpoint", "logrho"] = "midpoint",
) -> Iterator[Step]:
    """SEEDS-2 and -3, Gonzalez et al. 2023, interpolating x0: exponential integration of the diffusion SDE, with one
    more estimate at each of `nodes` (in log sigma, 0 to 1) from the first and the newest, on one path of noise.

    SEEDS-3 is (1/3, 2/3) and "logrho". eta: how much of the SDE's noise in variance, 0 is the ODE; node 1 then is the
    exponential form of Heun's method. One call a step more than nodes, but for one down to 0.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        ratio = sigma_next / sigma
        inner = [max(sigma_next, sigma * ratio**node) for node in nodes] if 0.0 < ratio < 1.0 else []
        known: Known = []
        x_next, added = x, 0.0 * x  # added: the noise of the path so far
        for level, after in pairwise([sigma, *inner, sigma_next]):
            denoised = denoise(x_next, level)
            known = [(level, denoised), *known[-1:]]
            if eta > 0.0 and after > 0.0:
                fresh = spread(level, after, True, eta) * noise(level, after)
                added = (after / level) ** (1.0 + eta) * added + fresh
            x_next = integrated(x, sigma, after, known, True, solver_type, eta) + added
        x = x_next
        yield Step(i, sigma_next, x, denoised)


def _dpm_solver(
    denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, order: int
) -> tuple[Tensor, Tensor, Tensor]:
    """DPM-Solver-1, -2 or -3, Lu et al. 2022a alg. 1 and 2: (x, the same by one order less, newest denoised).

    `order` calls, equally far apart in log sigma; one if it goes down to 0. The lower order costs no call of its own.
    """
    denoised = denoise(x, sigma)
    begin = sigma, estimate(False, x, denoised, sigma)
    known = [begin]
    low = high = integrated(x, sigma, sigma_next, known, False, "logrho")
    for k in range(1, order if sigma_next > 0.0 else 1):
        level = sigma * (sigma_next / sigma) ** (k / order)
        inner = integrated(x, sigma, level, known, False, "logrho")
        denoised = denoise(inner, level)
        known = [(level, estimate(False, inner, denoised, level)), begin]
        low, high = high, integrated(x, sigma, sigma_next, known, False, "midpoint" if k == 1 else "logrho")
    return high, low, denoised


def dpm_fast(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, calls: int | None = None, eta: float = 0.0
) -> Iterator[Step]:
    """DPM-Solver-fast, Lu et al. 2022a section 3.4: each interval of the list is a step of third order, the last lower.

    calls: of the network in all; the list must have calls // 3 + 1 intervals, and in k-diffusion is even in log sigma.
    None is the most that these intervals take.
    """
    groups = len(sigmas) - 1
    calls = 3 * groups - 1 if calls is None else calls
    if calls < 1 or calls // 3 + 1 != groups:
        raise RequestError(f"calls is {calls}; {groups} intervals take {max(3 * groups - 3, 1)} to {3 * groups - 1}")
    orders = [3] * (groups - 2) + [2, 1] if calls % 3 == 0 else [3] * (groups - 1) + [calls % 3]
    for i, (order, sigma, sigma_next) in enumerate(zip(orders, sigmas, sigmas[1:], strict=False)):
        down, up = _floored(sigma, sigma_next, eta, sigmas[-1])
        x, _, denoised = _dpm_solver(denoise, x, sigma, down, order)
        if eta > 0.0:
            x = x + up * noise(sigma, sigma_next)
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
    """DPM-Solver-12 and -23 (`order` 2 and 3), Lu et al. 2022a appendix C.4, with k-diffusion's PI step size control.

    Of the list only the first, the lowest level above 0, and a last 0 count: one Step each accepted step, as many as
    the tolerances ask for. The error is over the whole batch, so pictures drawn together share their steps. h_init: the
    first step in log sigma. accept_safety: below this change of step size the step is taken back.
    """
    check_order(order, 2, 3)
    last = min(sigma for sigma in sigmas if sigma > 0.0)
    sigma, h, i, x_low = sigmas[0], h_init, 0, x
    exponent = 1 / (1.5 if eta > 0.0 else order)
    previous: float | None = None  # inverse error of the step before
    while math.log(sigma / last) > 1e-5:
        sigma_next = max(last, sigma * math.exp(-h))
        down, up = _floored(sigma, sigma_next, eta, last)
        high, low, denoised = _dpm_solver(denoise, x, sigma, down, order)
        allowed = (rtol * torch.maximum(low.abs(), x_low.abs())).clamp(min=atol)
        error = float(((low - high) / allowed).square().mean().sqrt())  # the one synchronisation
        inverse = 1 / (error + 1e-8)
        previous = previous or inverse
        factor = 1 + math.atan((inverse ** (pcoeff + icoeff) / previous**pcoeff) ** exponent - 1)
        h *= factor
        if factor < accept_safety:
            continue
        x = high if eta == 0.0 else high + up * noise(sigma, sigma_next)
        x_low, sigma, previous = low, sigma_next, inverse
        yield Step(i, sigma, x, denoised)
        i += 1
    if sigmas[-1] == 0.0:
        x = denoise(x, sigma)
        yield Step(i, 0.0, x, x)


def _floored(sigma: float, sigma_next: float, eta: float, last: float) -> tuple[float, float]:
    """`ancestral`, but never down below the last level."""
    down, up = ancestral(sigma, sigma_next, eta)
    return (down, up) if down >= last else (last, math.sqrt(sigma_next**2 - last**2))


def lcm(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Latent consistency models, Luo et al. 2023 alg. 3: to the end in one step, then fresh noise of the next level."""
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
    down_to: Callable[[float, float], float] = lambda sigma_next, eta: (1.0 - eta) * sigma_next,
) -> Iterator[Step]:
    """Trajectory consistency distillation, Zheng et al. 2024 alg. 2 (strategic stochastic sampling, eta is its gamma).

    eta: 0 is the deterministic trajectory, 1 is LCM. down_to(sigma_next, eta): the level stepped to before noise brings
    x up to sigma_next; the paper takes (1 - eta) of the timestep, which only the model's schedule knows.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        down = down_to(sigma_next, eta)
        x = towards(x, denoised, down / sigma)
        if down < sigma_next:
            x = x + math.sqrt(sigma_next**2 - down**2) * noise(sigma, sigma_next)
        yield Step(i, sigma_next, x, denoised)
