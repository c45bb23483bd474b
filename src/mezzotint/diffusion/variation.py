"""Variations of the first noise of a run: interpolation between seeds, and noise of another size.

These are A1111's "variation seed" and "resize seed from width/height", so that its pictures can be reproduced.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolate between a (weight 0) and b (weight 1) along the great circle, (B, C, h, w).

    sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b, where w is the angle between them (Shoemake 1985); for each column
    of each channel, as in A1111. Parallel and opposite columns are interpolated linearly.
    """
    cosine = (F.normalize(a, dim=-2) * F.normalize(b, dim=-2)).sum(-2, keepdim=True).clamp(-1.0, 1.0)  # (B, C, 1, w)
    angle = cosine.acos()
    sine = angle.sin()
    curved = (((1.0 - weight) * angle).sin() * a + (weight * angle).sin() * b) / sine.clamp(min=1e-6)
    return torch.where(sine < 1e-4, (1.0 - weight) * a + weight * b, curved)


def paste_center(noise: Tensor, other: Tensor) -> Tensor:
    """Return `noise` (B, C, h, w) with `other` (B, C, h', w') in its center, cropped where it is larger."""
    pasted = noise.clone()
    to, source = [], []
    for size, other_size in zip(noise.shape[2:], other.shape[2:], strict=True):
        offset = (size - other_size) // 2
        length = other_size + 2 * min(offset, 0)
        to.append(slice(max(offset, 0), max(offset, 0) + length))
        source.append(slice(max(-offset, 0), max(-offset, 0) + length))
    pasted[:, :, to[0], to[1]] = other[:, :, source[0], source[1]]
    return pasted
