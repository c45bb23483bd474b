"""Results of torch's operations on the meta device, for those that the networks use: tensors of the right shape.

torch's own are written in Python: correct for everything, but they take 0.1 to 1 ms each and seconds to import. An
operation that is not in RESULTS is left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _new(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor like x; feature maps, which have four dimensions, in channels_last."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or x.dtype, device="meta", memory_format=layout)


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return _new(x, x.shape)


def _in_place(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _pointwise(*args: Any, **_: Any) -> Tensor:
    tensors = [x for x in args if isinstance(x, Tensor)]
    sides = zip_longest(*(reversed(x.shape) for x in tensors), fillvalue=1)
    shape = [max(side) for side in sides][::-1]
    return _new(tensors[0], shape, reduce(torch.promote_types, (x.dtype for x in tensors)))


def _linear(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _conv2d(x: Tensor, weight: Tensor, _: Any = None, stride: Any = 1, padding: Any = 0, *__: Any) -> Tensor:
    strides, paddings = (2 * list(v) if len(v) == 1 else v for v in map(_pair, (stride, padding)))
    sides = zip(x.shape[2:], paddings, weight.shape[2:], strides, strict=True)
    size = [(length + 2 * pad - kernel) // step + 1 for length, pad, kernel, step in sides]
    return _new(x, (x.shape[0], weight.shape[0], *size))


def _pair(value: Any) -> list[int]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _pad(x: Tensor, widths: list[int], *_: Any) -> Tensor:
    left, right, top, bottom = [*widths, 0, 0][:4]
    return _new(x, (*x.shape[:2], x.shape[2] + top + bottom, x.shape[3] + left + right))


def _upsample(x: Tensor, size: Any, scales: Any = None) -> Tensor:
    return _new(x, (*x.shape[:2], *(size or [int(n * k) for n, k in zip(x.shape[2:], scales, strict=True)])))


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    return _new(tensors[0], shape)


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), *tensors[0].shape)


def _einsum(equation: str, tensors: list[Tensor], **_: Any) -> Tensor:
    inputs, output = equation.split("->")
    sizes = {
        letter: length
        for letters, x in zip(inputs.split(","), tensors, strict=True)
        for letter, length in zip(letters, x.shape, strict=True)
    }
    return tensors[0].new_empty([sizes[letter] for letter in output])


def _arange(end: int, *, dtype: torch.dtype, **_: Any) -> Tensor:
    return torch.empty(end, dtype=dtype, device="meta")


def _mean(x: Tensor, dim: list[int], *_: Any, **__: Any) -> Tensor:
    return x.new_empty([length for axis, length in enumerate(x.shape) if axis not in dim])


RESULTS: dict[Any, Callable[..., Tensor]] = {
    aten.linear: _linear,
    aten.conv2d: _conv2d,
    aten.cat: _cat,
    aten.pad: _pad,
    aten.upsample_nearest2d: _upsample,
    aten.mean: _mean,
    aten.arange: _arange,
    aten.stack: _stack,
    aten.einsum: _einsum,
    **dict.fromkeys(
        (
            aten.group_norm,
            aten.layer_norm,
            aten.silu,
            aten.gelu,
            aten.rsqrt,
            aten.square,
            aten.sigmoid,
            aten.clone,
            aten.flip,
        ),
        _same,
    ),
    **dict.fromkeys((aten.add_, aten.mul_, aten.silu_, aten.square_, aten.copy_, aten.zero_), _in_place),
    **dict.fromkeys((aten.add, aten.sub, aten.mul, aten.addcmul, aten.clamp, aten.div, aten.minimum), _pointwise),
}
