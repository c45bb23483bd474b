"""Guidance wraps: it takes what gives the network's outputs and returns a denoiser. Solvers never hear of it.

Outputs come as (conditional, unconditional), from one batched call. Where guidance does nothing (scale at most 1, or
outside of its interval) only the conditional one is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mezzotint.diffusion.prediction import Prediction


class Outputs(Protocol):
    """The network's own outputs at x (B, C, h, w), one like x for each condition, or for the first `count` of them."""

    def __call__(self, x: Tensor, sigma: float, count: int | None = None) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance, Ho and Salimans 2022 eq. 6 in the form unconditional + scale * difference.

    scale: 1 and below is no guidance, as in diffusers. rescale: 0 to 1, how far the output is brought back to the
    standard deviation of the conditional one (Lin et al. 2023, eq. 15 and 16). interval: (low, high) noise levels,
    guidance only where low < sigma <= high (Kynkäänniemi et al. 2024).
    """

    outputs: Outputs
    prediction: Prediction
    scale: float
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """denoised, like x (B, C, h, w)."""
        if self._guides(sigma):
            return self.pair(x, sigma)[0]
        return self.prediction.denoised(self.outputs(x, sigma, 1)[0], x, sigma)

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """(guided, unconditional) denoised, for the CFG++ solvers."""
        conditional, unconditional = self.outputs(x, sigma)
        output = self._combined(conditional, unconditional) if self._guides(sigma) else conditional
        return self.prediction.denoised(output, x, sigma), self.prediction.denoised(unconditional, x, sigma)

    def _guides(self, sigma: float) -> bool:
        low, high = self.interval or (0.0, float("inf"))
        return self.scale > 1.0 and low < sigma <= high

    def _combined(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        output = unconditional + self.scale * (conditional - unconditional)
        if self.rescale > 0.0:
            each = tuple(range(1, output.ndim))  # over one image
            ratio = conditional.std(each, keepdim=True) / output.std(each, keepdim=True)
            output = output * (self.rescale * ratio + (1.0 - self.rescale))
        return output


def guided(
    outputs: Outputs,
    prediction: Prediction,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> Guided:
    """The guided denoiser of a network's outputs; see `Guided`."""
    return Guided(outputs, prediction, scale, rescale, interval)
