"""The linear layer of every network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.kernels import linear as kernel


class Linear(nn.Linear):
    """A linear layer, (..., inputs) -> (..., outputs), by our own kernel where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return linear(x, self.weight, self.bias)


PLAIN_TYPES = (Linear, nn.Linear)  # layers whose output depends on their weight, bias and input alone


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer as `torch.nn.functional.linear` does, by our own kernel where there is one."""
    if kernel.is_supported(x, weight):
        return kernel.multiply(x, weight, bias)
    return F.linear(x, weight, bias)
