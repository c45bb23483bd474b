"""Kernels in C for the CPU, in float32. Optional: without them torch does the same, slower.

The sources beside this file are compiled into one library, `float32.so`, when the package is built, if there is a C
compiler and the processor is an x86-64. The library is used on processors with AVX2 and FMA. It knows nothing of Python
or torch: its functions take pointers and sizes, and are called through ctypes.

The environment variable MEZZOTINT_KERNELS=off turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("float32.so")
VARIABLE = "MEZZOTINT_KERNELS"


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the library, or return None where it is missing, switched off or not for this processor."""
    if _reason():
        return None
    found = ctypes.CDLL(str(LIBRARY))
    pointer, size = ctypes.c_void_p, ctypes.c_ssize_t
    found.convolve3x3.argtypes, found.convolve3x3.restype = [pointer] * 5 + [size] * 7 + [ctypes.c_int], None
    found.convolve3x3_scratch.argtypes, found.convolve3x3_scratch.restype = [size, ctypes.c_int], size
    return found


def describe() -> str:
    """Say in a few words whether the kernels are used, for `mezzotint env`."""
    reason = _reason()
    return f"not used: {reason}" if reason else "3x3 convolutions in float32 (AVX2)"


def _reason() -> str | None:
    """Say why the library is not used."""
    if os.environ.get(VARIABLE, "").lower() in ("off", "0"):
        return f"{VARIABLE} is {os.environ[VARIABLE]}"
    if not LIBRARY.exists():
        return "not compiled; this needs a C compiler when mezzotint is installed, and an x86-64 processor"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "the processor has no AVX2"
    return None
