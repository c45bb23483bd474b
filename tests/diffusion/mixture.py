"""Data from three Gaussians, whose denoiser is known exactly. Of numbers: every element of x is one."""

from __future__ import annotations

import torch
from torch import Tensor

MEANS = torch.tensor([-1.0, 0.4, 1.5], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
SPREAD = 0.3  # the standard deviation of each


def mixture(x: Tensor, sigma: float, spread: float = SPREAD) -> Tensor:
    """E[x0 | x], like x."""
    variance = spread**2 + sigma**2
    share = torch.softmax(WEIGHTS.log() - (x[..., None] - MEANS) ** 2 / (2 * variance), dim=-1)
    return (share * (spread**2 * x[..., None] + sigma**2 * MEANS) / variance).sum(-1)
