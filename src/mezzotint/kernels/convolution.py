"""The 3x3 convolution of convolution.c, by Winograd's minimal filtering: a quarter of the multiplications."""

from __future__ import annotations

import torch
from torch import Tensor

from mezzotint.kernels import can_take, library

CHANNELS_IN, CHANNELS_OUT = 8, 32  # of which the numbers of channels must be multiples
LEAST_TILES = 4  # of 4x4 pixels: with fewer, transforming the weights takes longer than the convolution
LEAST_WORK = 2**18  # tiles times numbers of channels: with less, starting the threads takes as long


def is_supported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    transposed: bool = False,
) -> bool:
    """Tell whether `convolve` can be used: on the CPU, in channels_last, without gradients, and large enough."""
    if not takes(weight, transposed) or x.ndim != 4 or max(padding) > 2:
        return False
    around = [2 - width if transposed else width for width in padding]
    rows, columns = (-(-(side + 2 * width - 2) // 4) for side, width in zip(x.shape[2:], around, strict=True))
    tiles = len(x) * rows * columns
    return (
        tuple(stride) == tuple(dilation) == (1, 1)
        and groups == 1
        and tiles >= LEAST_TILES
        and tiles * weight.shape[0] * weight.shape[1] >= LEAST_WORK
        and can_take(x, weight, bias)  # before vmap is asked for a memory format, which is an error
        and x.is_contiguous(memory_format=torch.channels_last)
        and weight.is_contiguous(memory_format=torch.channels_last)
    )


def takes(weight: Tensor, transposed: bool = False) -> bool:
    """Tell whether there is a kernel for a weight of this dtype and shape."""
    outputs, inputs, *size = weight.shape
    if transposed:
        outputs, inputs = inputs, outputs
    fits = size == [3, 3] and inputs % CHANNELS_IN == 0 and outputs % CHANNELS_OUT == 0
    return fits and weight.dtype == torch.float32 and library() is not None


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], transposed: bool = False
) -> Tensor:
    """Convolve with stride 1, or compute the gradient with respect to the input, where `is_supported` says so.

    The result differs from `torch.nn.functional.conv2d` by the rounding of float32. It depends neither on the number
    of threads nor on the other pictures of the batch.

    Args:
        x: (B, C, h, w).
        weight: (O, C, 3, 3).
        bias: (O,).
        padding: Rows of zeros above and below, and columns of zeros left and right, of the convolution.
        transposed: Whether x is the gradient of the output, (B, O, h, w), and the result is that of the input.

    Returns:
        (B, O, h + 2 padding[0] - 2, w + 2 padding[1] - 2), in channels_last. If transposed,
        (B, C, h + 2 - 2 padding[0], w + 2 - 2 padding[1]).
    """
    kernels = library()
    assert kernels is not None
    batch, channels, height, width = x.shape
    top, left = ((2 - width if transposed else width) for width in padding)
    outputs, threads = weight.shape[1 if transposed else 0], torch.get_num_threads()
    size = (batch, outputs, height + 2 * top - 2, width + 2 * left - 2)
    y = torch.empty(size, memory_format=torch.channels_last)
    scratch = torch.empty(scratch_bytes(channels) // 4)
    bias = bias if bias is None else bias.contiguous()
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (x, weight, bias, y, scratch))
    kernels.convolve3x3(*pointers, batch, height, width, channels, outputs, top, left, transposed, threads)
    return y


def scratch_bytes(channels: int) -> int:
    """Return the bytes that `convolve` needs beside x and y, with the present number of threads."""
    kernels = library()
    assert kernels is not None
    floats: int = kernels.convolve3x3_scratch(channels, torch.get_num_threads())
    return 4 * floats
