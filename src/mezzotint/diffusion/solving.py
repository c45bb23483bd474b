"""What solvers share: the Step that they yield, the types of their arguments, and their arithmetic.

An exponential integrator goes along lambda = -log sigma, solves the linear part of the equation exactly, and puts a
polynomial through the estimates that it knows: of x0 (`data`), x' = exp(-h) x + the integral of exp(s - h) x0(s) ds
over a step h of lambda; or of the noise, x' = x - sigma' times the integral of exp(h - s) noise(s) ds. A step to level
0 is endless in lambda: there it takes the newest estimate alone.
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
Known = list[tuple[float, Tensor]]  # (level, estimate), newest first


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """One advance: x is at noise level `sigma`, just reached; `denoised` the newest estimate that it was made from."""

    index: int
    sigma: float
    x: Tensor
    denoised: Tensor


def towards(x: Tensor, denoised: Tensor, ratio: float) -> Tensor:
    """x at `ratio` times its noise level, exact while `denoised` stays what it is.

    Euler's step, DDIM's and the first orders of DPM-Solver and DPM-Solver++ are all this one.
    """
    return denoised + ratio * (x - denoised)


def ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(down, up), down^2 + up^2 = sigma_next^2: the level to step to, and the fresh noise to add there."""
    up = min(sigma_next, eta * sigma_next * math.sqrt(max(sigma**2 - sigma_next**2, 0.0)) / sigma)
    return math.sqrt(sigma_next**2 - up**2), up


def weighted(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """The sum of weight * tensor."""
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total


def check_order(order: int, low: int, high: int) -> None:
    """Raise RequestError for an order that the method does not have."""
    if not low <= order <= high:
        raise RequestError(f"order is {order}; this solver has the orders {low} to {high}")


def pair_of(denoise: Denoise, cfg_pp: bool = True) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
    """(x, sigma) -> (denoised, the estimate whose noise x keeps): for CFG++ `denoise.pair`, (guided, unconditional),
    else one estimate twice. Raises RequestError where there is no `pair`.
    """
    if not cfg_pp:
        return lambda x, sigma: (denoise(x, sigma),) * 2
    pair: Callable[[Tensor, float], tuple[Tensor, Tensor]] | None = getattr(denoise, "pair", None)
    if pair is None:
        raise RequestError(
            "sampler is a CFG++ one, which steps with the unconditional estimate; this denoiser has no `pair` to give "
            "it, a guided one has"
        )
    return pair


def estimate(data: bool, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """What is interpolated: x0, or the noise."""
    return denoised if data else (x - denoised) / sigma


def integrated(
    x: Tensor, sigma: float, sigma_next: float, known: Known, data: bool, solver_type: SolverType, eta: float = 0.0
) -> Tensor:
    """x at sigma_next, but for its noise: the exponential integral of the polynomial through the known estimates.

    eta: the SDE whose noise is eta times the diffusion's in variance.
    """
    estimates = [value for _, value in known]
    if sigma_next == 0.0:
        return estimates[0] if data else x - sigma * estimates[0]
    h = math.log(sigma / sigma_next)
    rate = 1.0 + eta if data else -1.0
    nodes = [math.log(sigma / level) for level, _ in known]
    change = weighted(quadrature(nodes, moments(len(known), h, rate, solver_type)), estimates)
    return math.exp(-rate * h) * x + change if data else x + (1.0 + eta) * sigma_next * change


def spread(sigma: float, sigma_next: float, data: bool, eta: float) -> float:
    """The standard deviation of the noise that a step of the SDE adds."""
    if sigma_next == 0.0:
        return 0.0
    if data:
        return sigma_next * math.sqrt(-math.expm1(-2.0 * eta * math.log(sigma / sigma_next)))
    return math.sqrt(eta * (sigma**2 - sigma_next**2))


def moments(count: int, h: float, rate: float, solver_type: SolverType) -> list[float]:
    """The integrals of rate * exp(rate * (s - h)) * s^k over a step h of lambda, for k below `count`; or nearly so.

    "logrho" takes them as they are. With two estimates "midpoint" and "bh2" take the second at the midpoint, "bh1" by
    its leading term; with three "midpoint" and "heun" halve the third, as the references do: the order stays 2.
    """
    moments = [rate * math.factorial(k) * h ** (k + 1) * phi(k + 1, -rate * h) for k in range(count)]
    if count == 2 and solver_type in ("midpoint", "bh2"):
        moments[1] = moments[0] * h / 2
    elif count == 2 and solver_type == "bh1":
        moments[1] = rate * h * h / 2
    elif count == 3 and solver_type in ("midpoint", "heun"):
        moments[2] /= 2
    return moments


def quadrature(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Weights of the values at `nodes` that integrate every polynomial exactly; moments[k] is the integral of s^k."""
    weights: list[float] = np.linalg.solve(np.vander(nodes, increasing=True).T, moments).tolist()
    return weights


def phi(k: int, z: float) -> float:
    """phi_k(z), the sum of z^j / (j + k)!: what exponential integrators are made of."""
    if abs(z) < 1.0:  # where the recursion would cancel
        return sum(z**j / math.factorial(j + k) for j in range(20))
    return math.expm1(z) / z if k == 1 else (phi(k - 1, z) - 1.0 / math.factorial(k - 1)) / z
