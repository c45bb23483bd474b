"""Solvers: from noise to picture along falling noise levels. `SOLVERS[name](denoise, x, sigmas, noise, **options)`.

x (B, C, h, w) = x0 + sigmas[0] * noise; `denoise(x, sigma) -> denoised`, the network's estimate of x0, same shape;
`sigmas` n + 1 falling Python floats, ending in 0.0 or above it; `noise(sigma, sigma_next)` fresh standard noise like x.
A solver is a generator: it yields a Step each time it has advanced, n in all, whatever the calls, and knows of nothing
else. Progress, previews and stopping belong to whoever iterates. x keeps its dtype.

The ODE that they solve is dx/dsigma = (x - denoised) / sigma (Karras et al. 2022, eq. 3). For a variance-preserving
model that slope is the predicted noise, so the update rules of DDIM, DDPM and PNDM, written in alphas, are these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[float, float], Tensor]
Solver = Callable[..., Iterator["Step"]]


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """One advance: x is at noise level `sigma`, just reached; `denoised` the newest estimate that it was made from."""

    index: int
    sigma: float
    x: Tensor
    denoised: Tensor


def euler(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 0.0) -> Iterator[Step]:
    """DDIM(eta), Song et al. 2021 eq. 12. eta = 0 is Euler's method on the ODE; eta = 1 is DDPM, Ho et al. 2020 alg. 2,
    with the posterior's variance, and k-diffusion's "Euler ancestral". First order.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        down, up = _ancestral(sigma, sigma_next, eta)
        x = denoised + (down / sigma) * (x - denoised)
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


def lms(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: int = 4) -> Iterator[Step]:
    """Linear multistep, k-diffusion's `sample_lms`: the slope is the polynomial through the last `order` (1 to 4)."""
    slopes: list[Tensor] = []  # newest first
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[: order - 1]]
        weights = _lagrange_integrals([sigmas[i - j] for j in range(len(slopes))], sigma_next)
        x = x + _weighted(weights, slopes)
        yield Step(i, sigma_next, x, denoised)


# Adams and Bashforth's weights for equal steps, by how many slopes there are; newest first.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Pseudo linear multistep (PLMS), Liu et al. 2022 eq. 12: Adams-Bashforth on the noise estimate as if the steps
    were equal, which in the timestep they are. The first step is Heun's, so n steps cost n + 1 calls.
    """
    slopes: list[Tensor] = []  # newest first
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[:3]]
        slope = _weighted(ADAMS_BASHFORTH[len(slopes) - 1], slopes)
        if i == 0 and len(sigmas) > 2:
            x_next = x + (sigma_next - sigma) * slope
            denoised = denoise(x_next, sigma_next)
            slope = (slope + (x_next - denoised) / sigma_next) / 2
        x = x + (sigma_next - sigma) * slope
        yield Step(i, sigma_next, x, denoised)


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Iterator[Step]:
    """DPM-Solver++(2M), Lu et al. 2022b alg. 2: second order in lambda = -log sigma, from two estimates of x0.

    The last step is first order if it goes to 0, with `euler_at_final`, or with `lower_order_final` below 15 steps.
    """
    steps = len(sigmas) - 1
    always_lower = euler_at_final or (lower_order_final and steps < 15)
    previous: tuple[Tensor, float] | None = None  # denoised, and the step in lambda that was taken from it
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = target = denoise(x, sigma)
        h = math.log(sigma / sigma_next) if sigma_next > 0.0 else math.inf
        lower = h == math.inf or (always_lower and i == steps - 1)
        if previous is not None and not lower:
            last, h_last = previous
            target = denoised + (h / (2 * h_last)) * (denoised - last)
        x = target + (sigma_next / sigma) * (x - target)
        previous = denoised, h
        yield Step(i, sigma_next, x, denoised)


def _ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(down, up), down^2 + up^2 = sigma_next^2: the level to step to, and the fresh noise to add there."""
    up = eta * sigma_next * math.sqrt(max(sigma**2 - sigma_next**2, 0.0)) / sigma
    return math.sqrt(sigma_next**2 - up**2), up


def _weighted(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total


def _lagrange_integrals(nodes: Sequence[float], end: float) -> list[float]:
    """For each node the integral, from nodes[0] to `end`, of the polynomial that is 1 there and 0 at the others.

    Two points of Gauss are exact up to the third degree: four nodes.
    """
    middle, half = (nodes[0] + end) / 2, (end - nodes[0]) / 2
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))

    def basis(j: int, point: float) -> float:
        return math.prod((point - node) / (nodes[j] - node) for k, node in enumerate(nodes) if k != j)

    return [half * sum(basis(j, point) for point in points) for j in range(len(nodes))]


SOLVERS: dict[str, Solver] = {
    "ddpm": partial(euler, eta=1.0),
    "ddim": euler,
    "pndm": pndm,
    "lms": lms,
    "euler": euler,
    "euler_a": partial(euler, eta=1.0),
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
}
