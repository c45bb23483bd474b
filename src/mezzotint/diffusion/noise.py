"""Noise that depends on an image's own seed and on nothing else: not on its neighbours in the batch, nor the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
