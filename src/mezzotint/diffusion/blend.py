"""Inpainting wraps: it takes a denoiser and returns one that leaves part of the picture as it is.

Before each call the kept part of x is put on the path of the original, x0 + sigma * noise with the run's first noise,
and after it the estimate there is x0. That is at once what diffusers' inpainting and what k-diffusion's masked denoiser
(A1111) do, for stochastic solvers too: their own noise never reaches the kept part of what the network sees.
Source: Lugmayr et al. 2022 (RePaint), eq. 8, without its jumps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Denoiser(Protocol):
    """What a solver is given; `pair` is for the CFG++ ones."""

    def __call__(self, x: Tensor, sigma: float) -> Tensor: ...
    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Blend:
    """keep (B or 1, 1, h, w): 1 where the original stays, 0 where the picture is drawn, or between. x0, noise (B, C, h,
    w): the original and the run's first noise. untouched: x is not changed at this level and above, where a run that
    starts from noise alone has nothing of the original in it yet.
    """

    denoise: Denoiser
    keep: Tensor
    x0: Tensor
    noise: Tensor
    untouched: float = float("inf")

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """denoised, like x (B, C, h, w)."""
        return self.put(self.denoise(self._noisy(x, sigma), sigma))

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """(guided, unconditional) denoised."""
        guided, unconditional = self.denoise.pair(self._noisy(x, sigma), sigma)
        return self.put(guided), self.put(unconditional)

    def put(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """x with the original at noise level sigma in the kept part."""
        original = self.x0 + sigma * self.noise if sigma else self.x0
        return self.keep * original + (1.0 - self.keep) * x

    def _noisy(self, x: Tensor, sigma: float) -> Tensor:
        return x if sigma >= self.untouched else self.put(x, sigma)
