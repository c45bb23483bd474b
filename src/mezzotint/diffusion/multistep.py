"""Solvers that remember earlier estimates. The contract is in solvers.py.

Two families. Adams-Bashforth methods integrate the slope (x - denoised) / sigma over sigma. Exponential integrators go
along lambda = -log sigma, solve the linear part of the equation exactly, and put a polynomial through the estimates
that they remember: of x0 (`data`), x' = exp(-h) x + the integral of exp(s - h) x0(s) ds over a step h of lambda; or of
the noise, x' = x - sigma' times the integral of exp(h - s) noise(s) ds. A step to level 0 is endless in lambda: there
they all take the newest estimate of x0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from torch import Tensor

from mezzotint.diffusion.solving import (
    Denoise,
    Known,
    Noise,
    SolverType,
    Step,
    ancestral,
    check_order,
    estimate,
    integrated,
    pair_of,
    quadrature,
    spread,
    weighted,
)

# ---- Adams-Bashforth -------------------------------------------------------------------------------------------------

# Their weights for equal steps, by how many slopes there are; newest first.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def lms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    order: int = 4,
    weights: Sequence[Sequence[float]] | None = None,
    time: Callable[[float], float] = float,
    euler_to_zero: bool = False,
    cfg_pp: bool = False,
) -> Iterator[Step]:
    """Linear multistep, k-diffusion's `sample_lms`: the slope is the polynomial through the last `order` (1 to 4).

    `weights`, by how many slopes there are and newest first, average them instead, whatever the steps. `euler_to_zero`:
    the step to level 0 is Euler's, which lands on denoised. With both it is iPNDM, of Zhang and Chen 2022 (DEIS); with
    the second alone iPNDM_v; and with `time`, a function of the level in which the polynomial is, their tAB-DEIS.

    cfg_pp: CFG++, Chung et al. 2024: the slopes are the unconditional ones, and each step shifts by the guidance.
    """
    check_order(order, 1, 4)
    pair = pair_of(denoise, cfg_pp)
    slopes: Known = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised, stepped = pair(x, sigma)
        slopes = [(sigma, (x - stepped) / sigma), *slopes[: order - 1]]
        used = slopes[:1] if euler_to_zero and sigma_next == 0.0 else slopes
        if weights is None:
            nodes = [time(level) - time(sigma) for level, _ in used]
            lengths = quadrature(nodes, _areas(sigma, sigma_next, len(used), time))
        else:
            lengths = [(sigma_next - sigma) * weight for weight in weights[len(used) - 1]]
        x = x + weighted(lengths, [slope for _, slope in used]) + (denoised - stepped)
        yield Step(i, sigma_next, x, denoised)


GAUSS = tuple(part.tolist() for part in np.polynomial.legendre.leggauss(16))  # points and weights


def _areas(sigma: float, sigma_next: float, count: int, time: Callable[[float], float]) -> list[float]:
    """The integrals over the level of (time - time(sigma))^k, for k below `count`."""
    middle, half = (sigma + sigma_next) / 2, (sigma_next - sigma) / 2
    ages = [time(middle + half * point) - time(sigma) for point in GAUSS[0]]
    return [half * sum(w * age**k for w, age in zip(GAUSS[1], ages, strict=True)) for k in range(count)]


# Of the linear schedule that has level 80 at time 1 and 0.002 at 0.001.
_RISE = 2 * (math.log1p(0.002**2) / 0.001 - math.log1p(80.0**2)) / (0.001 - 1)
_BETA = math.log1p(80.0**2) - _RISE / 2


def vp_time(sigma: float) -> float:
    """When the variance-preserving schedule by which ComfyUI and Forge interpolate in DEIS has this level: it is 1 at
    80, and ln(1 + sigma^2) = rise t^2 / 2 + beta t (Karras et al. 2022, table 1).
    """
    return (math.sqrt(_BETA**2 + 2 * _RISE * math.log1p(sigma**2)) - _BETA) / _RISE


def gradient_estimation(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, gamma: float = 2.0, cfg_pp: bool = False
) -> Iterator[Step]:
    """Gradient estimation, Permenter and Yuan 2023: slopes weighted gamma and, of the step before, 1 - gamma."""
    weights = ((1.0,), (gamma, 1.0 - gamma))
    return lms(denoise, x, sigmas, noise, order=2, weights=weights, euler_to_zero=True, cfg_pp=cfg_pp)


def pndm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    middle: Callable[[float, float], float] | None = None,
) -> Iterator[Step]:
    """Pseudo linear multistep (PLMS), Liu et al. 2022 eq. 12: Adams-Bashforth on the noise estimate as if the steps
    were equal, which in the timestep they are. The first step is Heun's, so n steps cost n + 1 calls.

    middle(sigma, sigma_next): the level halfway in the timestep, which only the model's schedule knows. Given, and from
    four steps on, the first three are by Runge and Kutta (their eq. 13, F-PNDM), and n steps cost n + 9 calls.
    """
    slopes: list[Tensor] = []  # newest first
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[:3]]
        slope = weighted(ADAMS_BASHFORTH[len(slopes) - 1], slopes)
        if middle is not None and i < 3 and len(sigmas) > 4:
            tried, half = slopes[:1], middle(sigma, sigma_next)
            for level in (half, half, sigma_next):
                x_next = x + (level - sigma) * tried[-1]
                denoised = denoise(x_next, level)
                tried.append((x_next - denoised) / level)
            slope = weighted((1 / 6, 1 / 3, 1 / 3, 1 / 6), tried)
        elif i == 0 and len(sigmas) > 2:
            x_next = x + (sigma_next - sigma) * slope
            denoised = denoise(x_next, sigma_next)
            slope = (slope + (x_next - denoised) / sigma_next) / 2
        x = x + (sigma_next - sigma) * slope
        yield Step(i, sigma_next, x, denoised)


# ---- exponential integrators -----------------------------------------------------------------------------------------


def dpm_multistep(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    order: int = 2,
    algorithm: Literal["dpmsolver++", "dpmsolver"] = "dpmsolver++",
    solver_type: SolverType = "midpoint",
    eta: float = 0.0,
    curvature: float = 0.0,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    whole: int = 0,
) -> Iterator[Step]:
    """DPM-Solver++(2M), Lu et al. 2022b alg. 2, of order 1 to 3; "dpmsolver", Lu et al. 2022a, interpolates the noise.

    eta = 1 solves the diffusion SDE (their SDE-DPM-Solver), 0 the ODE. `solver_type`: see `moments`; "logrho" of
    "dpmsolver" is DEIS, Zhang and Chen 2022. `lower_order_final`: below 15 steps, no higher order than steps are left
    (`whole`: the steps of the run that this one is the end of, if there were more); `euler_at_final`: first order in
    the last step. `curvature`, half the estimates' second derivative times the step squared, is added so many times: -1
    is diffusers' third order of the SDE, where a sign is wrong.
    """
    check_order(order, 1, 3)
    data, steps = algorithm == "dpmsolver++", len(sigmas) - 1
    known: Known = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        known = [(sigma, estimate(data, x, denoised, sigma)), *known[: order - 1]]
        most = steps - i if lower_order_final and max(steps, whole) < 15 else order
        most = 1 if euler_at_final and i == steps - 1 else most
        used = known[:most]
        x = integrated(x, sigma, sigma_next, used, data, solver_type, eta)
        if curvature != 0.0 and len(used) == 3 and sigma_next > 0.0:
            area = curvature * math.log(sigma / sigma_next) ** 2
            nodes, estimates = [math.log(sigma / level) for level, _ in used], [value for _, value in used]
            x = x + weighted(quadrature(nodes, [0.0, 0.0, area]), estimates)
        if eta > 0.0:
            x = x + spread(sigma, sigma_next, data, eta) * noise(sigma, sigma_next)
        yield Step(i, sigma_next, x, denoised)


def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    order: int = 2,
    corrector_order: int | None = None,
    predict_x0: bool = True,
    solver_type: SolverType = "bh2",
    tau: Callable[[float], float] | None = None,
    lower_order_final: bool = True,
    disable_corrector: Collection[int] = (),
) -> Iterator[Step]:
    """UniPC, Zhao et al. 2023 alg. 1 and 2: each step is taken by `order` (1 to 4) estimates, and when the network has
    seen its end taken again with that estimate too, which brings one order more and costs no call.

    Where two estimates are used the paper leaves a choice: `solver_type` "bh1", B(h) = h, or "bh2", B(h) = exp(h) - 1.
    `lower_order_final`: no more estimates than steps are left. `disable_corrector`: of the steps of these indices.
    `corrector_order`: the estimates that the corrector adds its own to, `order` unless given. `tau`: see `sa_solver`.
    """
    check_order(order, 1, 4)
    corrector_order = order if corrector_order is None else corrector_order
    check_order(corrector_order, 0, 4)
    steps = len(sigmas) - 1
    before, eta, added = x, 0.0, 0.0 * x  # of the last step: where it began, and its noise
    known: Known = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        newest = (sigma, estimate(predict_x0, x, denoised, sigma))
        if i > 0 and i - 1 not in disable_corrector:
            most = min(corrector_order, steps - i + 1) if lower_order_final else corrector_order
            corrected = [newest, *known[:most]]
            x = integrated(before, sigmas[i - 1], sigma, corrected, predict_x0, solver_type, eta) + added
        known = [newest, *known[: max(order, corrector_order) - 1]]
        before = x
        if tau is not None:
            eta = tau(sigma) ** 2
            added = spread(sigma, sigma_next, predict_x0, eta) * noise(sigma, sigma_next)
        most = min(order, steps - i) if lower_order_final else order
        x = integrated(x, sigma, sigma_next, known[:most], predict_x0, solver_type, eta) + added
        yield Step(i, sigma_next, x, denoised)


def sa_solver(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: Callable[[float], float] = lambda sigma: 1.0,
    predict_x0: bool = True,
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """SA-Solver, Xue et al. 2023 alg. 1: stochastic Adams, UniPC on an SDE, the corrector with the predictor's noise.

    tau(sigma) >= 0 is how much noise: 0 solves the ODE, 1 the diffusion SDE. Orders 1 to 4, of the corrector counted
    with the estimate that it corrects by.
    """
    check_order(corrector_order, 1, 4)
    return unipc(
        denoise,
        x,
        sigmas,
        noise,
        order=predictor_order,
        corrector_order=corrector_order - 1,
        predict_x0=predict_x0,
        solver_type="bh1" if predict_x0 else "logrho",
        tau=tau,
        lower_order_final=lower_order_final,
    )


def res_multistep(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 0.0, cfg_pp: bool = False
) -> Iterator[Step]:
    """RES, Zhang et al. 2023, second order multistep, as ComfyUI has it; with eta above 0 its ancestral form.

    cfg_pp: CFG++ as there: steps are unconditional; those of second order have the guidance added before, not after.
    """
    pair = pair_of(denoise, cfg_pp)
    known: Known = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised, stepped = pair(x, sigma)
        down, up = ancestral(sigma, sigma_next, eta)
        kept = down / sigma if known and down > 0.0 else 1.0  # what the step leaves of the guidance
        x = integrated(x, sigma, down, [(sigma, stepped), *known], True, "logrho") + kept * (denoised - stepped)
        if eta > 0.0:
            x = x + up * noise(sigma, sigma_next)
        if down > 0.0:
            known = [(sigma * sigma_next / down, stepped)]  # as old, next time, as the solver's own way down was long
        yield Step(i, sigma_next, x, denoised)


def dpmpp_2m_cfg_pp(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """CFG++, Chung et al. 2024, on DPM-Solver++(2M): towards the guided estimate, away from the unconditional one."""
    pair = pair_of(denoise)
    previous: tuple[float, Tensor] | None = None  # level, and the unconditional estimate there
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised, unconditional = pair(x, sigma)
        ratio = sigma_next / sigma
        x = denoised + ratio * (x - unconditional)
        if previous is not None and sigma_next > 0.0:
            level, last = previous
            x = x + (1.0 - ratio) / 2 * math.log(ratio) / math.log(sigma / level) * (denoised - last)
        previous = sigma, unconditional
        yield Step(i, sigma_next, x, denoised)


# ---- another SDE -----------------------------------------------------------------------------------------------------


def _er_sde_noise(sigma: float) -> float:
    """The noise that Cui et al. 2023 found best for pictures, their ER SDE 5."""
    return sigma * (math.exp(sigma**0.3) + 10.0)


def er_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    order: int = 3,
    scale: Callable[[float], float] = _er_sde_noise,
) -> Iterator[Step]:
    """ER-SDE-Solver, Cui et al. 2023 alg. 1 to 3: extended reverse-time SDEs, in sigma, by a Taylor expansion.

    scale(sigma) is the paper's phi, which says how much noise: sigma is the ODE, sigma^2 the diffusion SDE.
    """
    check_order(order, 1, 3)
    last: list[Tensor] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        taylor = [denoised]  # and its derivatives in sigma, from differences
        for k in range(1, min(order, i + 1)):
            taylor.append(k * (taylor[-1] - last[k - 1]) / (sigma - sigmas[i - k]))
        last = taylor
        if sigma_next == 0.0:
            ratio, weights = 0.0, [1.0]
        else:
            ratio = scale(sigma_next) / scale(sigma)
            weights = [_er_sde_weight(k, sigma, sigma_next, scale) for k in range(len(taylor))]
        x = ratio * x + weighted(weights, taylor[: len(weights)])
        x = x + math.sqrt(max(sigma_next**2 - (ratio * sigma) ** 2, 0.0)) * noise(sigma, sigma_next)
        yield Step(i, sigma_next, x, denoised)


def _er_sde_weight(k: int, sigma: float, sigma_next: float, scale: Callable[[float], float]) -> float:
    """Of the k-th derivative: the integral of scale(sigma_next) / scale(u) over the k-th term of the expansion."""
    if k == 0:
        return 1.0 - scale(sigma_next) / scale(sigma)
    middle, half = math.log(sigma * sigma_next) / 2, math.log(sigma / sigma_next) / 2
    levels = [math.exp(middle + half * point) for point in GAUSS[0]]
    values = (w * u * (u - sigma) ** (k - 1) / scale(u) for w, u in zip(GAUSS[1], levels, strict=True))
    return (sigma_next - sigma) ** k / math.factorial(k) + half * scale(sigma_next) * sum(values)
