"""Noise that depends on an image's own seed and on nothing else: not on its neighbours in the batch, nor the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DIGITS = 6  # to which a Brownian tree of torchsde rounds every level; it warns of one a digit beyond its ends


class SeededNoise:
    """Standard normal noise for a batch, each image from its own CPU generator.

    seeds: one an image. shape: (C, h, w) of one image's latents. Every draw takes float32 (1, C, h, w) from each of
    `generators`, so the stream is that of diffusers given the same list of CPU generators; the values are then moved to
    `device`. Other draws of the run (the VAE posterior's sample) take theirs from `generators`, in order.
    """

    def __init__(
        self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device | str | None = None
    ) -> None:
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.shape = shape
        self.device = device

    def draw(self) -> Tensor:
        """The next noise, (B, C, h, w) float32."""
        draws = [torch.randn((1, *self.shape), generator=generator) for generator in self.generators]
        return torch.cat(draws).to(self.device)

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
