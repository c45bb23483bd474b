"""What the table of contents of a tensor file says of one tensor, whatever the format."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

MAX_COUNT = 2**60  # elements of a tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its elements start at byte `start`; `stride` is None if they are contiguous."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stride: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """Number of elements from the first to the last."""
        if self.stride is None:
            return math.prod(self.shape)
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
