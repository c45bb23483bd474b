"""Multistep solvers, which reuse earlier estimates. solvers.py describes the interface.

There are two families: Adams-Bashforth methods integrate the slope (x - denoised) / sigma over sigma; exponential
integrators, described in solving.py, work in lambda = -log sigma.
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
    History,
    Noise,
    SolverType,
    Step,
    ancestral_step,
    check_order,
    convert_output,
    exponential_step,
    pair_denoiser,
    quadrature_weights,
    sde_noise_std,
    weighted_sum,
)

# ---- Adams-Bashforth -------------------------------------------------------------------------------------------------

# Weights for equal steps, by the number of slopes; newest first.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def lms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    order: int = 4,
    weights: Sequence[Sequence[float]] | Literal["zju"] | None = None,
    time: Callable[[float], float] = float,
    euler_to_zero: bool = False,
    cfg_pp: bool = False,
) -> Iterator[Step]:
    """Linear multistep, k-diffusion's `sample_lms`: integrate the polynomial through the last `order` slopes.

    Options:
        order: From 1 to 4.
        weights: Fixed weights instead, by the number of slopes, newest first, whatever the steps. With `euler_to_zero`
            this is iPNDM (Zhang and Chen 2022). "zju" are the weights of iPNDM_v in ComfyUI and Forge; see
            `zju_weights`.
        time: The function of sigma in which the slope is a polynomial. With `euler_to_zero` this is tAB-DEIS; the
            identity is iPNDM_v.
        euler_to_zero: Take an Euler step to level 0, which returns the denoised estimate.
        cfg_pp: CFG++ (Chung et al. 2024): the slopes are the unconditional ones, and each step is shifted by the
            guidance.
    """
    check_order(order, 1, 4)
    pair = pair_denoiser(denoise, cfg_pp)
    slopes: History = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised, uncond_denoised = pair(x, sigma)
        slopes = [(sigma, (x - uncond_denoised) / sigma), *slopes[: order - 1]]
        used = slopes[:1] if euler_to_zero and sigma_next == 0.0 else slopes
        if weights == "zju":
            ends = [sigma_next, *(level for level, _ in used)]
            lengths = [(sigma_next - sigma) * weight for weight in zju_weights(ends)]
        elif weights is None:
            nodes = [time(level) - time(sigma) for level, _ in used]
            lengths = quadrature_weights(nodes, _time_moments(sigma, sigma_next, len(used), time))
        else:
            lengths = [(sigma_next - sigma) * weight for weight in weights[len(used) - 1]]
        x = x + weighted_sum(lengths, [slope for _, slope in used]) + (denoised - uncond_denoised)
        yield Step(i, sigma_next, x, denoised)


def zju_weights(levels: Sequence[float]) -> list[float]:
    """Return the weights of iPNDM_v as ComfyUI and Forge compute them (from zju-pi/diff-sampler), newest first.

    They differ from variable-step Adams-Bashforth by three errors in orders 3 and 4: a misplaced bracket in the factor
    of the second difference, a plus instead of a minus in that of the third, and h_1 / h_2 instead of h_2 / h_3 in the
    last weight.

    Args:
        levels: The level of the step's end, then those of the slopes, newest first; 2 to 5.
    """
    h, *back = (upper - lower for upper, lower in pairwise(levels))
    if not back:
        return [1.0]
    ratio = h / back[0]
    weights = [1.0 + ratio / 2, -ratio / 2]
    if len(back) == 1:
        return weights
    first = back[0] + back[1]
    second = (1.0 - h / (3 * (h + back[0])) * (h * (h + back[0])) / (back[0] * first)) / 2
    share = back[0] / back[1]
    weights = [weights[0] + second, weights[1] - (1.0 + share) * second, share * second]
    if len(back) == 2:
        return weights
    whole, last = h + first, back[1] + back[2]
    third = (1.0 - h / (3 * (h + back[0]))) / 2 + (1.0 - h / (2 * (h + back[0]))) * h / (6 * whole)
    third *= h * (h + back[0]) * whole / (back[0] * first * (first + back[2]))
    other = back[0] * first / (back[1] * last)
    thirds = 1.0, -(1.0 + share + other), share + other * (1.0 + back[1] / back[2]), -other * share
    return [weight + third * more for weight, more in zip([*weights, 0.0], thirds, strict=True)]


GAUSS_LEGENDRE = tuple(part.tolist() for part in np.polynomial.legendre.leggauss(16))  # points and weights


def _time_moments(sigma: float, sigma_next: float, count: int, time: Callable[[float], float]) -> list[float]:
    """Return the integrals over sigma of (time - time(sigma))^k, for k below `count`."""
    sigma_mid, half = (sigma + sigma_next) / 2, (sigma_next - sigma) / 2
    offsets = [time(sigma_mid + half * point) - time(sigma) for point in GAUSS_LEGENDRE[0]]
    return [half * sum(w * t**k for w, t in zip(GAUSS_LEGENDRE[1], offsets, strict=True)) for k in range(count)]


# The linear schedule with level 80 at time 1 and 0.002 at time 0.001.
_VP_BETA_D = 2 * (math.log1p(0.002**2) / 0.001 - math.log1p(80.0**2)) / (0.001 - 1)
_VP_BETA_MIN = math.log1p(80.0**2) - _VP_BETA_D / 2


def vp_time(sigma: float) -> float:
    """Return the time of a level in the variance-preserving schedule that ComfyUI and Forge use in DEIS.

    Level 80 is at time 1; ln(1 + sigma^2) = beta_d t^2 / 2 + beta_min t (Karras et al. 2022, table 1).
    """
    return (math.sqrt(_VP_BETA_MIN**2 + 2 * _VP_BETA_D * math.log1p(sigma**2)) - _VP_BETA_MIN) / _VP_BETA_D


def gradient_estimation(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, gamma: float = 2.0, cfg_pp: bool = False
) -> Iterator[Step]:
    """Gradient estimation (Permenter and Yuan 2023): weights gamma and 1 - gamma for the newest two slopes."""
    weights = ((1.0,), (gamma, 1.0 - gamma))
    return lms(denoise, x, sigmas, noise, order=2, weights=weights, euler_to_zero=True, cfg_pp=cfg_pp)


def pndm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    midpoint: Callable[[float, float], float] | None = None,
) -> Iterator[Step]:
    """Pseudo linear multistep, PLMS (Liu et al. 2022, eq. 12).

    Adams-Bashforth on the predicted noise with the weights for equal steps, which they are in the timestep. The first
    step is Heun's, so n steps take n + 1 calls.

    Options:
        midpoint: `midpoint(sigma, sigma_next)`, the level halfway between in timesteps, which depends on the model's
            schedule. If it is given and there are at least four steps, the first three are Runge-Kutta steps (their
            eq. 13, F-PNDM), and n steps take n + 9 calls.
    """
    slopes: list[Tensor] = []  # newest first
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[:3]]
        slope = weighted_sum(ADAMS_BASHFORTH[len(slopes) - 1], slopes)
        if midpoint is not None and i < 3 and len(sigmas) > 4:
            stages, half = slopes[:1], midpoint(sigma, sigma_next)
            for level in (half, half, sigma_next):
                x_next = x + (level - sigma) * stages[-1]
                denoised = denoise(x_next, level)
                stages.append((x_next - denoised) / level)
            slope = weighted_sum((1 / 6, 1 / 3, 1 / 3, 1 / 6), stages)
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
    total_steps: int = 0,
) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022b, alg. 2), of order 1 to 3.

    Options:
        order: From 1 to 3.
        algorithm: "dpmsolver" (Lu et al. 2022a) interpolates the noise instead of x0.
        solver_type: See `exponential_moments`; "logrho" with "dpmsolver" is DEIS (Zhang and Chen 2022).
        eta: 1 solves the diffusion SDE (SDE-DPM-Solver), 0 the ODE.
        curvature: Multiple of half the second derivative of the estimates times the step squared that is added. -1 is
            diffusers' third-order SDE solver, which has the wrong sign there.
        lower_order_final: Below 15 steps, use no higher order than the number of steps left.
        euler_at_final: Use first order in the last step.
        total_steps: Number of steps of the whole run, where this one is only its end.
    """
    check_order(order, 1, 3)
    predict_x0, steps = algorithm == "dpmsolver++", len(sigmas) - 1
    history: History = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        history = [(sigma, convert_output(predict_x0, x, denoised, sigma)), *history[: order - 1]]
        max_order = steps - i if lower_order_final and max(steps, total_steps) < 15 else order
        max_order = 1 if euler_at_final and i == steps - 1 else max_order
        used = history[:max_order]
        x = exponential_step(x, sigma, sigma_next, used, predict_x0, solver_type, eta)
        if curvature != 0.0 and len(used) == 3 and sigma_next > 0.0:
            area = curvature * math.log(sigma / sigma_next) ** 2
            nodes, estimates = [math.log(sigma / level) for level, _ in used], [value for _, value in used]
            x = x + weighted_sum(quadrature_weights(nodes, [0.0, 0.0, area]), estimates)
        if eta > 0.0:
            x = x + sde_noise_std(sigma, sigma_next, predict_x0, eta) * noise(sigma, sigma_next)
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
    """UniPC (Zhao et al. 2023, alg. 1 and 2): a predictor, and a corrector that costs no call.

    When the network has been called at the end of a step, the step is repeated with that estimate, one order higher.

    Options:
        order: Number of estimates of the predictor, from 1 to 4.
        corrector_order: Number of earlier estimates of the corrector, from 0 to 4; `order` by default.
        predict_x0: Whether to interpolate x0, or the noise.
        solver_type: For two estimates, "bh1" is B(h) = h, and "bh2" is B(h) = exp(h) - 1.
        tau: See `sa_solver`.
        lower_order_final: Use no more estimates than steps are left.
        disable_corrector: Indices of the steps that are not corrected.
    """
    check_order(order, 1, 4)
    corrector_order = order if corrector_order is None else corrector_order
    check_order(corrector_order, 0, 4)
    steps = len(sigmas) - 1
    x_previous, eta, step_noise = x, 0.0, 0.0 * x  # of the last step: its start and its noise
    history: History = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        newest = (sigma, convert_output(predict_x0, x, denoised, sigma))
        if i > 0 and i - 1 not in disable_corrector:
            max_order = min(corrector_order, steps - i + 1) if lower_order_final else corrector_order
            corrected = [newest, *history[:max_order]]
            x = exponential_step(x_previous, sigmas[i - 1], sigma, corrected, predict_x0, solver_type, eta) + step_noise
        history = [newest, *history[: max(order, corrector_order) - 1]]
        x_previous = x
        if tau is not None:
            eta = tau(sigma) ** 2
            step_noise = sde_noise_std(sigma, sigma_next, predict_x0, eta) * noise(sigma, sigma_next)
        max_order = min(order, steps - i) if lower_order_final else order
        x = exponential_step(x, sigma, sigma_next, history[:max_order], predict_x0, solver_type, eta) + step_noise
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
    """SA-Solver (Xue et al. 2023, alg. 1), stochastic Adams: UniPC on an SDE.

    The corrector uses the noise of the predictor.

    Options:
        predictor_order: From 1 to 4.
        corrector_order: From 1 to 4, counting the estimate at the end of the step.
        tau: `tau(sigma) >= 0`, the amount of noise: 0 is the ODE, 1 the diffusion SDE.
        predict_x0: Whether to interpolate x0, or the noise.
        lower_order_final: Use no more estimates than steps are left.
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
    """RES (Zhang et al. 2023), second-order multistep as in ComfyUI; eta above 0 is its ancestral form.

    With `cfg_pp` the steps are unconditional, as in ComfyUI: second-order steps add the guidance before the step, and
    first-order steps after it.
    """
    pair = pair_denoiser(denoise, cfg_pp)
    history: History = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised, uncond_denoised = pair(x, sigma)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        shift = (sigma_down / sigma if history and sigma_down > 0.0 else 1.0) * (denoised - uncond_denoised)
        x = exponential_step(x, sigma, sigma_down, [(sigma, uncond_denoised), *history], True, "logrho") + shift
        if eta > 0.0:
            x = x + sigma_up * noise(sigma, sigma_next)
        if sigma_down > 0.0:
            # seen from the next step, this estimate is as far away as the deterministic part of this step was long
            history = [(sigma * sigma_next / sigma_down, uncond_denoised)]
        yield Step(i, sigma_next, x, denoised)


def dpmpp_2m_cfg_pp(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """CFG++ (Chung et al. 2024) on DPM-Solver++(2M): to the guided estimate, along the unconditional noise."""
    pair = pair_denoiser(denoise)
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
    """Return the noise function that Cui et al. 2023 found best for pictures, ER SDE 5."""
    return sigma * (math.exp(sigma**0.3) + 10.0)


def er_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    order: int = 3,
    noise_scaler: Callable[[float], float] = _er_sde_noise,
) -> Iterator[Step]:
    """ER-SDE-Solver (Cui et al. 2023, alg. 1 to 3): extended reverse-time SDEs, in sigma, by a Taylor expansion.

    Options:
        order: From 1 to 3.
        noise_scaler: The paper's phi, a function of sigma: sigma itself is the ODE, sigma^2 the diffusion SDE.
    """
    check_order(order, 1, 3)
    last: list[Tensor] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        taylor = [denoised]  # and its derivatives in sigma, by finite differences
        for k in range(1, min(order, i + 1)):
            taylor.append(k * (taylor[-1] - last[k - 1]) / (sigma - sigmas[i - k]))
        last = taylor
        if sigma_next == 0.0:
            ratio, weights = 0.0, [1.0]
        else:
            ratio = noise_scaler(sigma_next) / noise_scaler(sigma)
            weights = [_er_sde_weight(k, sigma, sigma_next, noise_scaler) for k in range(len(taylor))]
        x = ratio * x + weighted_sum(weights, taylor[: len(weights)])
        x = x + math.sqrt(max(sigma_next**2 - (ratio * sigma) ** 2, 0.0)) * noise(sigma, sigma_next)
        yield Step(i, sigma_next, x, denoised)


def _er_sde_weight(k: int, sigma: float, sigma_next: float, noise_scaler: Callable[[float], float]) -> float:
    """Return the weight of the k-th derivative.

    It is the integral of noise_scaler(sigma_next) / noise_scaler(u) times the k-th term of the expansion.
    """
    if k == 0:
        return 1.0 - noise_scaler(sigma_next) / noise_scaler(sigma)
    sigma_mid, half = math.log(sigma * sigma_next) / 2, math.log(sigma / sigma_next) / 2
    levels = [math.exp(sigma_mid + half * point) for point in GAUSS_LEGENDRE[0]]
    values = (w * u * (u - sigma) ** (k - 1) / noise_scaler(u) for w, u in zip(GAUSS_LEGENDRE[1], levels, strict=True))
    return (sigma_next - sigma) ** k / math.factorial(k) + half * noise_scaler(sigma_next) * sum(values)
