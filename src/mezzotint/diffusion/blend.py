"""Inpainting as a wrapper: it takes a denoiser and returns one that keeps part of the original picture.

Before each call, the kept part of x is replaced by `x0 + sigma * noise`, with the first noise of the run; after the
call, the kept part of the estimate is replaced by x0. This is what diffusers' inpainting and k-diffusion's masked
denoiser (A1111) do, and it also holds for stochastic solvers: their own noise never reaches the kept part of the
network's input. See Lugmayr et al. 2022 (RePaint), eq. 8, without resampling.

Differential diffusion (Levin and Fried 2023) keeps each place for a share of the steps of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mezzotint.diffusion.guidance import step_index


class Denoiser(Protocol):
    """The denoiser that a solver calls. Only the CFG++ solvers call `pair`."""

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return the denoised estimate, of the shape of x (B, C, h, w)."""

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Return the (guided, unconditional) denoised estimates."""


@dataclass(frozen=True, eq=False)
class Blend:
    """A denoiser that keeps the original where `keep` is 1.

    Args:
        denoise: The denoiser to wrap.
        keep: Mask of shape (B or 1, 1, h, w): 1 keeps the original, 0 uses the solver's result, values between blend.
        x0: Latents of the original, (B, C, h, w).
        noise: The first noise of the run, (B, C, h, w).
        skip_above: At this noise level and above, x is passed on unchanged. A run that starts from pure noise holds
            nothing of the original before its first call.
    """

    denoise: Denoiser
    keep: Tensor
    x0: Tensor
    noise: Tensor
    skip_above: float = float("inf")

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return the blended denoised estimate, of the shape of x (B, C, h, w)."""
        return self.composite(self.denoise(self._noisy(x, sigma), sigma))

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Return the blended (guided, unconditional) denoised estimates."""
        guided, unconditional = self.denoise.pair(self._noisy(x, sigma), sigma)
        return self.composite(guided), self.composite(unconditional)

    def composite(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """Return x with the original, at noise level sigma, in the kept part."""
        original = self.x0 + sigma * self.noise if sigma else self.x0
        return self.keep * original + (1.0 - self.keep) * x

    def _noisy(self, x: Tensor, sigma: float) -> Tensor:
        return x if sigma >= self.skip_above else self.composite(x, sigma)


@dataclass(frozen=True, eq=False)
class DifferentialBlend:
    """A denoiser that keeps each place the original until its share of the steps is over.

    Of n steps, a place with `keep` k has the original's estimate x0 in step i (from 0) where k > (i + 1) / n, and so is
    the noisy original until its own first step begins. With Euler and DDIM this equals differential diffusion's
    replacement of x by x0 + sigma * noise before step i where k > i / n; with other solvers, x stays one that they
    could have reached.

    Args:
        denoise: The denoiser to wrap.
        keep: Share of the steps in which a place stays the original, (B or 1, 1, h, w).
        x0: Latents of the original, (B, C, h, w).
        noise: The first noise of the run, (B, C, h, w).
        sigmas: Noise levels of the run.
    """

    denoise: Denoiser
    keep: Tensor
    x0: Tensor
    noise: Tensor
    sigmas: Sequence[float]

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return the blended denoised estimate, of the shape of x (B, C, h, w)."""
        return self._at(sigma)(x, sigma)

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Return the blended (guided, unconditional) denoised estimates."""
        return self._at(sigma).pair(x, sigma)

    def _at(self, sigma: float) -> Blend:
        """Return the blend of the step that a call at this noise level belongs to."""
        begun = (step_index(sigma, self.sigmas) + 1) / max(len(self.sigmas) - 1, 1)
        return Blend(self.denoise, (self.keep > begun).to(self.x0.dtype), self.x0, self.noise)
