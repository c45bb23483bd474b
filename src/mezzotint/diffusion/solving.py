"""What solvers share: the Step that they yield, the types of their arguments, and their arithmetic.

An exponential integrator works in lambda = -log sigma. It solves the linear part of the equation exactly and
interpolates the known estimates by a polynomial, over a step h of lambda:

    of x0 (`predict_x0`)   x' = exp(-h) x + integral of exp(s - h) x0(s) ds
    of the noise           x' = x - sigma' * integral of exp(h - s) noise(s) ds

A step to level 0 is infinite in lambda; it uses the newest estimate alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from mezzotint.errors import RequestError

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[float, float], Tensor]
Solver = Callable[..., Iterator["Step"]]
SolverType = Literal["midpoint", "heun", "logrho", "bh1", "bh2"]
History = list[tuple[float, Tensor]]  # (level, estimate), newest first


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Step:
    """One step of a solver.

    Attributes:
        index: Number of the step, from 0.
        sigma: The noise level just reached.
        x: The sample at that level, (B, C, h, w).
        denoised: The newest estimate of x0 that x was computed from.
    """

    index: int
    sigma: float
    x: Tensor
    denoised: Tensor

    def __repr__(self) -> str:
        dtype = str(self.x.dtype).removeprefix("torch.")
        return f"Step(index={self.index}, sigma={self.sigma:.4g}, x: {tuple(self.x.shape)} {dtype})"


def euler_step(x: Tensor, denoised: Tensor, ratio: float) -> Tensor:
    """Return x at `ratio` times its noise level, exact as long as `denoised` is constant.

    Euler's step, DDIM's, and the first-order steps of DPM-Solver and DPM-Solver++ are all this one.
    """
    return denoised + ratio * (x - denoised)


def ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Return (sigma_down, sigma_up), where sigma_down^2 + sigma_up^2 = sigma_next^2.

    sigma_down is the level to step to, and sigma_up the standard deviation of the noise to add there.
    """
    sigma_up = min(sigma_next, eta * sigma_next * math.sqrt(max(sigma**2 - sigma_next**2, 0.0)) / sigma)
    return math.sqrt(sigma_next**2 - sigma_up**2), sigma_up


def weighted_sum(weights: Sequence[float | Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of weight * tensor."""
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total


def check_order(order: int, low: int, high: int) -> None:
    """Raise RequestError unless low <= order <= high."""
    if not low <= order <= high:
        raise RequestError(f"order is {order}; it must be from {low} to {high} for this solver")


def pair_denoiser(denoise: Denoise, cfg_pp: bool = True) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
    """Return a function (x, sigma) -> (denoised, unconditional denoised).

    Args:
        denoise: The denoiser; for CFG++, one that has `pair`.
        cfg_pp: False returns the same estimate twice.

    Raises:
        RequestError: If `cfg_pp` is set and the denoiser has no `pair`.
    """
    if not cfg_pp:
        return lambda x, sigma: (denoise(x, sigma),) * 2
    pair: Callable[[Tensor, float], tuple[Tensor, Tensor]] | None = getattr(denoise, "pair", None)
    if pair is None:
        raise RequestError(
            "a CFG++ sampler needs the unconditional estimate, and this denoiser has no `pair`; use a guided denoiser"
        )
    return pair


def convert_output(predict_x0: bool, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """Return the quantity to interpolate: x0, or the noise."""
    return denoised if predict_x0 else (x - denoised) / sigma


def exponential_step(
    x: Tensor,
    sigma: float,
    sigma_next: float,
    history: History,
    predict_x0: bool,
    solver_type: SolverType,
    eta: float = 0.0,
) -> Tensor:
    """Return x at sigma_next, without the noise of the step: the exponential integral of the interpolating polynomial.

    Args:
        x: Sample at sigma, (B, C, h, w).
        sigma: Current noise level.
        sigma_next: Next noise level.
        history: (level, estimate) pairs, newest first; as many as the order of the step.
        predict_x0: Whether the estimates are of x0, or of the noise.
        solver_type: See `exponential_moments`.
        eta: Variance of the SDE's noise, as a multiple of the diffusion SDE's; 0 is the ODE.
    """
    estimates = [value for _, value in history]
    if sigma_next == 0.0:
        return estimates[0] if predict_x0 else x - sigma * estimates[0]
    h = math.log(sigma / sigma_next)
    rate = 1.0 + eta if predict_x0 else -1.0
    nodes = [math.log(sigma / level) for level, _ in history]
    change = weighted_sum(quadrature_weights(nodes, exponential_moments(len(history), h, rate, solver_type)), estimates)
    return math.exp(-rate * h) * x + change if predict_x0 else x + (1.0 + eta) * sigma_next * change


def sde_noise_std(sigma: float, sigma_next: float, predict_x0: bool, eta: float) -> float:
    """Return the standard deviation of the noise that a step of the SDE adds."""
    if sigma_next == 0.0:
        return 0.0
    if predict_x0:
        return sigma_next * math.sqrt(-math.expm1(-2.0 * eta * math.log(sigma / sigma_next)))
    return math.sqrt(eta * (sigma**2 - sigma_next**2))


def exponential_moments(count: int, h: float, rate: float, solver_type: SolverType) -> list[float]:
    """Return the integrals of rate * exp(rate * (s - h)) * s^k over a step h of lambda, for k below `count`.

    "logrho" is exact. The others change the highest moment as their references do, which keeps the order at 2: with two
    estimates, "midpoint" and "bh2" evaluate the second at the midpoint and "bh1" keeps its leading term; with three,
    "midpoint" and "heun" halve the third.
    """
    moments = [rate * math.factorial(k) * h ** (k + 1) * phi(k + 1, -rate * h) for k in range(count)]
    if count == 2 and solver_type in ("midpoint", "bh2"):
        moments[1] = moments[0] * h / 2
    elif count == 2 and solver_type == "bh1":
        moments[1] = rate * h * h / 2
    elif count == 3 and solver_type in ("midpoint", "heun"):
        moments[2] /= 2
    return moments


def quadrature_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Return the weights at `nodes` that integrate polynomials exactly, where moments[k] is the integral of s^k."""
    weights: list[float] = np.linalg.solve(np.vander(nodes, increasing=True).T, moments).tolist()
    return weights


def phi(k: int, z: float) -> float:
    """Return phi_k(z), the sum over j of z^j / (j + k)!, the basis function of exponential integrators."""
    if abs(z) < 1.0:  # the recursion would lose digits to cancellation
        return sum(z**j / math.factorial(j + k) for j in range(20))
    return math.expm1(z) / z if k == 1 else (phi(k - 1, z) - 1.0 / math.factorial(k - 1)) / z
