"""The linear layer of every network."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.kernels import linear as kernel
from mezzotint.kernels import only_input_is_trained


class Linear(nn.Linear):
    """A linear layer, (..., inputs) -> (..., outputs), by our own kernel where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return linear(x, self.weight, self.bias)


PLAIN_TYPES = (Linear, nn.Linear)  # layers whose output depends on their weight, bias and input alone


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer as `torch.nn.functional.linear` does, by our own kernel where there is one."""
    if kernel.is_supported(x, weight, bias):
        return kernel.multiply(x, weight, bias)
    if only_input_is_trained(x, weight, bias) and kernel.is_supported(x.detach(), weight, bias):
        y: Tensor = _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return F.linear(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """A linear layer with frozen weights, with our own kernel in both passes."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return kernel.multiply(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        if kernel.is_supported(gradient, weight, None, transposed=True):
            return kernel.multiply(gradient, weight, None, transposed=True), None, None
        return gradient @ weight, None, None
