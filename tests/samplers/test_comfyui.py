"""ComfyUI's and Forge's solvers that are not the published method, against their arithmetic written out: float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mezzotint.diffusion.solvers import SOLVERS
from mezzotint.samplers.names import resolve

TOLERANCE = 1e-11  # float64, at most 20 steps: weights of up to 10 with alternating signs lose a digit or two in each
SHAPE = (2, 1, 3, 3)
START = torch.linspace(-12, 12, 18, dtype=torch.float64).reshape(SHAPE)
LISTS = [[9.0 * (1 - i / n) ** power + last for i in range(n + 1)] for n in (1, 2, 3, 4, 12) for power in (1, 3)
         for last in (0.0, 0.04)]  # fmt: skip
MODEL = {"_class_name": "EulerDiscreteScheduler"}


class Pair:
    """Two smooth estimates."""

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        return torch.tanh(x / (1 + sigma)) + 0.3 * math.sin(sigma), torch.cos(x / (2 + sigma)) - 0.1 * sigma

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return self.pair(x, sigma)[0]


def seeded() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(1)
    return lambda *_: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def run(name: str, sigmas: list[float]) -> Tensor:
    """Our solver under this name."""
    sampler = resolve(name, MODEL)
    return list(SOLVERS[sampler.solver](Pair(), START, sigmas, seeded(), **sampler.options))[-1].x


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def slopes(sigmas: list[float], mean: Callable[[int, list[Tensor]], Tensor], denoises_last: bool) -> Tensor:
    """Steps along a mean of the slopes so far, newest first; in ComfyUI, a step to 0 returns the estimate."""
    x, found = START, list[Tensor]()
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = Pair()(x, sigma)
        found = [(x - denoised) / sigma, *found]
        x = denoised if sigma_next == 0 and denoises_last else x + (sigma_next - sigma) * mean(i, found)
    return x


def ipndm(i: int, d: list[Tensor]) -> Tensor:
    if i == 0:
        return d[0]
    if i == 1:
        return (3 * d[0] - d[1]) / 2
    if i == 2:
        return (23 * d[0] - 16 * d[1] + 5 * d[2]) / 12
    return (55 * d[0] - 59 * d[1] + 37 * d[2] - 9 * d[3]) / 24


def ipndm_v(t: list[float]) -> Callable[[int, list[Tensor]], Tensor]:
    """The coefficients as these programs have them, for the list of levels t."""

    def mean(i: int, d: list[Tensor]) -> Tensor:
        if i == 0:
            return d[0]
        a, b = t[i + 1] - t[i], t[i] - t[i - 1]
        if i == 1:
            return (1 + a / b / 2) * d[0] - a / b / 2 * d[1]
        c = t[i - 1] - t[i - 2]
        u = (1 - a / (3 * (a + b)) * (a * (a + b)) / (b * (b + c))) / 2
        if i == 2:
            return (1 + a / b / 2 + u) * d[0] - (a / b / 2 + (1 + b / c) * u) * d[1] + u * b / c * d[2]
        e = t[i - 2] - t[i - 3]
        v = (1 - a / (3 * (a + b))) / 2 + (1 - a / (2 * (a + b))) * a / (6 * (a + b + c))
        v = v * (a * (a + b) * (a + b + c)) / (b * (b + c) * (b + c + e))
        w = b * (b + c) / (c * (c + e))
        return (
            (1 + a / b / 2 + u + v) * d[0]
            - (a / b / 2 + (1 + b / c) * u + (1 + b / c + w) * v) * d[1]
            + (u * b / c + (b / c + w * (1 + c / e)) * v) * d[2]
            - v * w * b / c * d[3]
        )

    return mean


@pytest.mark.parametrize("sigmas", LISTS, ids=lambda sigmas: f"{len(sigmas) - 1} steps to {sigmas[-1]:g}")
def test_ipndm_and_ipndm_v_of_both_programs(sigmas: list[float]) -> None:
    assert apart(run("ipndm_v normal", sigmas), slopes(sigmas, ipndm_v(sigmas), True)) < TOLERANCE
    assert apart(run("IPNDM_V", sigmas), slopes(sigmas, ipndm_v(sigmas), False)) < TOLERANCE
    assert apart(run("ipndm normal", sigmas), slopes(sigmas, ipndm, True)) < TOLERANCE
    assert apart(run("IPNDM", sigmas), slopes(sigmas, ipndm, False)) < TOLERANCE


def test_three_slips_are_theirs_alone() -> None:
    """Ours is variable-step Adams-Bashforth, which with equal steps has the weights of iPNDM; theirs has not."""
    even, uneven = [10.0 - i for i in range(8)], LISTS[-1]
    assert apart(run("ipndm_v", even), run("ipndm", even)) < TOLERANCE
    assert apart(run("ipndm_v normal", even), run("ipndm", even)) > 1e-4
    assert apart(run("ipndm_v normal", uneven), run("ipndm_v", uneven)) > 1e-4


def multistep_areas(levels: list[float], sigma_next: float) -> Iterator[float]:
    """k-diffusion's linear_multistep_coeff: the integral of each Lagrange polynomial, here by its coefficients."""
    for j, level in enumerate(levels):
        poly = torch.tensor([1.0], dtype=torch.float64)
        for other in (*levels[:j], *levels[j + 1 :]):
            shifted = torch.cat([torch.zeros(1, dtype=poly.dtype), poly])
            poly = (shifted - other * torch.cat([poly, torch.zeros(1, dtype=poly.dtype)])) / (level - other)
        powers = [k + 1 for k in range(len(poly))]
        yield sum(float(c) * (sigma_next**k - levels[0] ** k) / k for c, k in zip(poly, powers, strict=True))


@pytest.mark.parametrize("sigmas", LISTS[4:], ids=lambda sigmas: f"{len(sigmas) - 1} steps to {sigmas[-1]:g}")
def test_lms_of_comfyui_ends_in_the_estimate(sigmas: list[float]) -> None:
    def mean(i: int, found: list[Tensor]) -> Tensor:
        levels = sigmas[max(i - 3, 0) : i + 1][::-1]
        areas = list(multistep_areas(levels, sigmas[i + 1]))
        total = sum((area * d for area, d in zip(areas, found, strict=False)), torch.zeros(SHAPE))
        return total / (sigmas[i + 1] - sigmas[i])

    assert apart(run("lms normal", sigmas), slopes(sigmas, mean, True)) < 1e-9  # powers of 9 cancel
    assert apart(run("LMS", sigmas), slopes(sigmas, mean, False)) < 1e-9
    if sigmas[-1] == 0.0:
        assert apart(run("lms normal", sigmas), run("lms", sigmas)) > 1e-3


@pytest.mark.parametrize("sigmas", LISTS, ids=lambda sigmas: f"{len(sigmas) - 1} steps to {sigmas[-1]:g}")
def test_dpmpp_2s_ancestral_cfg_pp_of_comfyui(sigmas: list[float]) -> None:
    """Its variable for the unconditional estimate holds the second call's by the time that the step is taken."""
    noise, x = seeded(), START
    for sigma, sigma_next in pairwise(sigmas):
        denoised, uncond = Pair().pair(x, sigma)
        up = min(sigma_next, (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
        down = (sigma_next**2 - up**2) ** 0.5
        if down == 0:
            x = denoised + (x - uncond) / sigma * down
        else:
            h = math.log(sigma / down)
            middle = math.exp(-h / 2) * (x + (denoised - uncond)) - math.expm1(-h / 2) * denoised
            second, uncond = Pair().pair(middle, sigma * math.exp(-h / 2))
            x = math.exp(-h) * (x + (denoised - uncond)) - math.expm1(-h) * second
        if sigma_next > 0:
            x = x + noise() * up
    assert apart(run("dpmpp_2s_ancestral_cfg_pp", sigmas), x) < TOLERANCE
    if len(sigmas) > 2:
        assert apart(run("dpmpp_2s_a_cfg_pp", sigmas), x) > 1e-2
