"""The first noise of a run, led astray a little: towards another seed's, or made of that of another size.

Both are what A1111 calls variation seeds and "resize seed from height/width", so its pictures can be made again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From a (share 0) to b (share 1) along the great circle between them, (B, C, h, w).

    sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b, with w the angle between the two (Shoemake 1985); of each column of
    a channel alone, as A1111 does it. Where they point the same way or the opposite one, a straight line.
    """
    cosine = (F.normalize(a, dim=-2) * F.normalize(b, dim=-2)).sum(-2, keepdim=True).clamp(-1.0, 1.0)  # (B, C, 1, w)
    angle = cosine.acos()
    sine = angle.sin()
    curved = (((1.0 - share) * angle).sin() * a + (share * angle).sin() * b) / sine.clamp(min=1e-6)
    return torch.where(sine < 1e-4, (1.0 - share) * a + share * b, curved)


def centred(noise: Tensor, other: Tensor) -> Tensor:
    """`noise` (B, C, h, w) with `other` (B, C, h', w') in its middle, cut off where it is larger."""
    placed = noise.clone()
    to, source = [], []
    for size, inner in zip(noise.shape[2:], other.shape[2:], strict=True):
        offset = (size - inner) // 2
        length = inner + 2 * min(offset, 0)
        to.append(slice(max(offset, 0), max(offset, 0) + length))
        source.append(slice(max(-offset, 0), max(-offset, 0) + length))
    placed[:, :, to[0], to[1]] = other[:, :, source[0], source[1]]
    return placed
