"""FreeU (Si et al. 2023): in the first two levels of the UNet's up path, more of the backbone and less of the skips.

    b1, b2    factors of the first half of the feature map's channels, in the first and the second level
    s1, s2    factors of the lowest frequencies of the skip connections, likewise

The lowest frequencies are the four around zero of a centred Fourier transform, (-1, 0) in each direction, as in
diffusers.
"""

from __future__ import annotations

import torch
from torch import Tensor

FreeU = tuple[float, float, float, float]  # b1, b2, s1, s2


def of_level(factors: FreeU | None, level: int) -> tuple[float, float] | None:
    """Return the factors (b, s) of a level of the up path, counted from the lowest; None if it has none."""
    return (factors[level], factors[level + 2]) if factors and level < 2 else None


def concatenate(x: Tensor, skip: Tensor, factors: tuple[float, float]) -> Tensor:
    """Return a feature map (B, C, h, w) and its skip connection, scaled, side by side in the channels."""
    half = x.shape[1] // 2
    return torch.cat([x[:, :half] * factors[0], x[:, half:], scale_low_frequencies(skip, factors[1])], dim=1)


def scale_low_frequencies(x: Tensor, factor: float) -> Tensor:
    """Multiply the lowest frequencies of a feature map (B, C, h, w) by a factor; computed in float32."""
    height, width = x.shape[-2:]
    factors = torch.ones(height, width, device=x.device)
    rows, columns = ([0, -1][: min(side, 2)] for side in (height, width))
    for row in rows:
        factors[row, columns] = factor
    frequencies = torch.fft.fftn(x.float(), dim=(-2, -1)) * factors
    scaled: Tensor = torch.fft.ifftn(frequencies, dim=(-2, -1)).real.to(x.dtype)
    return scaled
