"""The linear layer of linear.c, which is also a 1x1 convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from mezzotint.kernels import can_take, library, products

INPUTS, OUTPUTS = 8, 16  # of which the numbers of features must be multiples
LEAST_ROWS = 64  # with fewer, copying the weight takes too long
LEAST_WORK = 2**22  # rows times features: with less, starting the threads takes as long


def is_supported(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool = False, transposed: bool = False) -> bool:
    """Tell whether `multiply`, or `geglu` if gated, can be used: on the CPU, without gradients, with enough to do."""
    inputs = weight.shape[0 if transposed else 1]
    if not takes(weight, gated, transposed) or x.ndim < 2 or x.shape[-1] != inputs:
        return False
    rows = x.shape[:-1].numel()
    enough = rows >= LEAST_ROWS and rows * weight.numel() >= LEAST_WORK
    return enough and weight.is_contiguous() and can_take(x, weight, bias)


def takes(weight: Tensor, gated: bool = False, transposed: bool = False) -> bool:
    """Tell whether there is a kernel for a weight of this dtype and shape."""
    outputs, inputs = weight.shape[::-1] if transposed else weight.shape
    fits = outputs > 0 == outputs % (2 * OUTPUTS if gated else OUTPUTS) and inputs > 0 == inputs % INPUTS
    return fits and weight.dtype == torch.float32 and products() is not None


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """Apply a linear layer, where `is_supported` says so.

    The result differs from `torch.nn.functional.linear` by the rounding of float32. It depends neither on the number
    of threads nor on the other rows of x.

    Args:
        x: (..., inputs).
        weight: (outputs, inputs).
        bias: (outputs,).
        transposed: Whether weight is (inputs, outputs), as for the gradient with respect to the input.

    Returns:
        (..., outputs), contiguous.
    """
    return _multiply(x, weight, bias, transposed=transposed)


def geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer and multiply the first half of its outputs by the GELU of the second (Shazeer 2020).

    The layer's outputs are not written to memory, except for a few at a time.

    Args:
        x: (..., inputs).
        weight: (2 outputs, inputs).
        bias: (2 outputs,).

    Returns:
        (..., outputs), contiguous.
    """
    return _multiply(x, weight, bias, gated=True)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool = False, transposed: bool = False) -> Tensor:
    kernels = library()
    assert kernels is not None
    outputs, inputs = weight.shape[::-1] if transposed else (len(weight) // (1 + gated), weight.shape[1])
    rows = x.reshape(-1, inputs)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    bias = bias if bias is None else bias.contiguous()
    y = torch.empty(*x.shape[:-1], outputs)
    scratch = torch.empty(scratch_bytes(gated) // 4)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (rows, weight, bias, y, scratch))
    threads = torch.get_num_threads()
    kernels.linear(*pointers, len(rows), rows.stride(0), inputs, outputs, gated, transposed, threads)
    return y


def scratch_bytes(gated: bool = False) -> int:
    """Return the bytes that `multiply`, or `geglu` if gated, needs beside x and y, with the threads there are now."""
    kernels = library()
    assert kernels is not None
    floats: int = kernels.linear_scratch(gated, torch.get_num_threads())
    return 4 * floats
