"""The convolution of every network, with optional circular padding, so that pictures tile seamlessly.

Inside `seamless("x")`, or "y" or "xy", convolutions pad with values from the opposite side in these directions. The
directions are a context variable, so they affect only the current thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.kernels import convolution as kernel
from mezzotint.kernels import linear as linear_kernel
from mezzotint.kernels import only_input_is_trained

joined: ContextVar[str] = ContextVar("joined", default="")


class Conv2d(nn.Conv2d):
    """A convolution with circular padding in the directions of `seamless`."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with a given weight; `forward` and the adapters call this."""
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            y: Tensor = super()._conv_forward(x, weight, bias)
            return y
        padding = self.padding
        if joined.get() and padding != (0, 0):
            rows, columns = padding
            x, padding = pad(x, (columns, columns, rows, rows)), (0, 0)
        return conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolve as `torch.nn.functional.conv2d` does, by our own kernel where there is one.

    If neither the weight nor the bias requires a gradient, the input is not saved for the backward pass.
    """
    options = tuple(stride), tuple(padding), tuple(dilation), groups
    if x.ndim == 4 and only_input_is_trained(x, weight, bias):
        dtype = _autocast_dtype(x)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
        y: Tensor = _FrozenConvolution.apply(x, weight, bias, *options)  # type: ignore[no-untyped-call]
        return y
    return _convolve(x, weight, bias, *options)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    stride, padding, _, groups = options
    if kernel.is_supported(x, weight, bias, *options):
        return kernel.convolve(x, weight, bias, padding)
    if weight.shape[2:] == (1, 1) == stride and padding == (0, 0) and groups == 1 and x.ndim == 4:
        pixels, matrix = x.permute(0, 2, 3, 1), weight.flatten(1)  # a linear layer of each pixel, in channels_last
        if pixels.is_contiguous() and linear_kernel.is_supported(pixels, matrix, bias):
            return linear_kernel.multiply(pixels, matrix, bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, *options)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that autocast would cast x to, or the dtype of x outside of autocast."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


class _FrozenConvolution(torch.autograd.Function):
    """A convolution with frozen weights. Unlike torch's, it does not save its input for the backward pass."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        return _convolve(x, weight, bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *ctx.options = inputs
        ctx.size, ctx.strides = x.shape, x.stride()
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        if kernel.takes(weight, transposed=True):
            gradient = gradient.contiguous(memory_format=torch.channels_last)
        if kernel.is_supported(gradient, weight, None, stride, padding, dilation, groups, transposed=True):
            return kernel.convolve(gradient, weight, None, padding, transposed=True), *[None] * 6
        x = gradient.new_empty_strided(ctx.size, ctx.strides)  # only its shape matters
        by_input = (stride, padding, dilation, False, (0, 0), groups, (True, False, False))
        return torch.ops.aten.convolution_backward(gradient, x, weight, None, *by_input)[0], *[None] * 6


def pad(x: Tensor, widths: tuple[int, int, int, int]) -> Tensor:
    """Pad x (B, C, h, w) by (left, right, top, bottom) cells: zeros, or the opposite side where sides are joined."""
    left, right, top, bottom = widths
    for axis, side in (("x", (left, right, 0, 0)), ("y", (0, 0, top, bottom))):
        if any(side):  # else F.pad makes a copy
            x = F.pad(x, side, "circular" if axis in joined.get() else "constant")
    return x


@contextmanager
def seamless(axes: str | None) -> Iterator[None]:
    """Join opposite sides of pictures inside the block: "x" left and right, "y" top and bottom, "xy" both."""
    before = joined.set(axes or "")
    try:
        yield
    finally:
        joined.reset(before)
