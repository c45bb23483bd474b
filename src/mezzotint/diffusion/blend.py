"""Inpainting as a wrapper: it takes a denoiser and returns one that keeps part of the original picture.

Before each call, the kept part of x is replaced by `x0 + sigma * noise`, with the first noise of the run; after the
call, the kept part of the estimate is replaced by x0. This is what diffusers' inpainting and k-diffusion's masked
denoiser (A1111) do, and it also holds for stochastic solvers: their own noise never reaches the kept part of the
network's input. See Lugmayr et al. 2022 (RePaint), eq. 8, without resampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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
