"""Noise that depends on an image's own seed and on nothing else: not on its neighbours in the batch, nor the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # of Philox4x32
WEYL = 0x9E3779B9, 0xBB67AE85  # what its key grows by each round: the golden ratio, and the root of 3 less 1
DIGITS = 6  # to which a Brownian tree of torchsde rounds every level; it warns of one a digit beyond its ends


class Philox:
    """The numbers of `torch.randn(shape, device="cuda", generator=...)` of this seed, drawn on the CPU.

    PyTorch's CUDA generator is cuRAND's Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
    3"). Its key is the seed; thread k of a launch has the counter (draws before, k) and uses the first of its four
    normals while the tensor has no more than a launch's threads, SM count x 2048 (aten/src/ATen/native/cuda/
    DistributionTemplates.h). What is larger follows another order there, which hangs on the GPU; here it goes on in
    this one. The normals are within 1e-5 of the GPU's, whose sine is an approximation.
    """

    def __init__(self, seed: int) -> None:
        """seed: 0 to 2**64 - 1."""
        self.key = seed & 0xFFFFFFFF, seed >> 32
        self.draws = 0

    def randn(self, shape: Sequence[int]) -> Tensor:
        """The next draw, float32."""
        count = math.prod(shape)
        counter = np.zeros((4, count), dtype=np.uint32)
        counter[0], counter[2] = self.draws, np.arange(count, dtype=np.uint32)
        self.draws += 1
        first, second, *_ = philox4x32(counter, self.key)
        return torch.from_numpy(box_muller(first, second)).reshape(tuple(shape))


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int], rounds: int = 10) -> NDArray[np.uint32]:
    """Philox4x32 of Salmon et al. 2011, section 3.3: counters (4, n) and a key of two 32-bit numbers -> (4, n)."""
    c0, c1, c2, c3 = counter.astype(np.uint64)
    low = np.uint64(0xFFFFFFFF)
    for turn in range(rounds):
        k0, k1 = (np.uint64((k + turn * weyl) % 2**32) for k, weyl in zip(key, WEYL, strict=True))
        left, right = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & low, (left >> 32) ^ c3 ^ k1, left & low
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def box_muller(x: NDArray[np.uint32], y: NDArray[np.uint32]) -> NDArray[np.float32]:
    """cuRAND's first normal of two 32-bit numbers: sqrt(-2 ln u) sin v, u in (0, 1] and v in (0, 2 pi] in float32 as
    there (the rounding of u decides the smallest normals), the functions in float64.
    """
    unit = np.float64(2.0**-32)
    turn = np.float64(np.float32(2.0**-32) * np.float32(2 * math.pi))
    u = (x.astype(np.float32) * unit + unit / 2).astype(np.float32).astype(np.float64)
    v = (y.astype(np.float32) * turn + turn / 2).astype(np.float32).astype(np.float64)
    return (np.sqrt(-2.0 * np.log(u)) * np.sin(v)).astype(np.float32)


class SeededNoise:
    """Standard normal noise for a batch, each image from its own generator.

    seeds: one an image. shape: (C, h, w) of one image's latents. kind: "seeded" draws from CPU generators, so the
    stream is that of diffusers given the same list of them; "philox" is what CUDA generators would give. Every draw is
    float32 of shape (1, ...) for each image; the values are then moved to `device`.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        device: torch.device | str | None = None,
        kind: str = "seeded",
    ) -> None:
        self.generators: list[torch.Generator] | list[Philox] = (
            [Philox(seed) for seed in seeds]
            if kind == "philox"
            else [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        )
        self.shape = shape
        self.device = device

    def sample(self, shape: Sequence[int]) -> Tensor:
        """The next noise, (B, *shape) float32."""
        draws = [
            g.randn((1, *shape)) if isinstance(g, Philox) else torch.randn((1, *shape), generator=g)
            for g in self.generators
        ]
        return torch.cat(draws).to(self.device)

    def draw(self) -> Tensor:
        """The next noise of the latents' shape, (B, C, h, w) float32."""
        return self.sample(self.shape)

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """The noise of one step, as solvers ask for it; independent of where the step lies."""
        return self.draw()


class BrownianNoise:
    """The increments of a Brownian path in sigma, one path an image, as k-diffusion's BrownianTreeNoiseSampler draws
    them: more steps see the same path in finer pieces, so the picture changes little with their number.

    seeds, shape, device: as of SeededNoise. sigmas: the run's levels; the path lies between the highest and the lowest
    above 0. Levels are rounded to float32 as there, for a path is not smooth: the last digit moves it by a thousandth.
    midpoints: DPM++ SDE goes through lambda = -log sigma, and asks at its midpoints too; rounded there.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        sigmas: Sequence[float],
        device: torch.device | str | None = None,
        *,
        midpoints: bool = False,
    ) -> None:
        from torchsde import BrownianTree  # type: ignore[import-untyped]  # it brings scipy, so half a second

        levels = torch.tensor([sigma for sigma in sigmas if sigma > 0.0], dtype=torch.float32)
        self.low, self.high = round(float(levels.min()), DIGITS), round(float(levels.max()), DIGITS)
        if midpoints:
            lambdas = -levels.log()
            levels = torch.cat([lambdas, lambdas[:-1] + lambdas.diff() * 0.5]).neg().exp()
        self.levels = levels.tolist()
        start = torch.zeros(shape, dtype=torch.float32)
        self.trees = [BrownianTree(t0=self.low, w0=start, t1=self.high, entropy=seed) for seed in seeds]
        self.device = device

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """The path's increment from sigma down to sigma_next over its standard deviation, (B, C, h, w) float32."""
        top, bottom = self._rounded(sigma), self._rounded(sigma_next)
        increments = torch.stack([tree(bottom, top) for tree in self.trees])
        return (increments / -math.sqrt(top - bottom) if top > bottom else increments).to(self.device)

    def _rounded(self, level: float) -> float:
        nearest = min(self.levels, key=lambda known: abs(known - level))
        level = nearest if math.isclose(nearest, level, rel_tol=1e-5) else level
        return min(max(round(level, DIGITS), self.low), self.high)
