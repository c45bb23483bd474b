"""Kernels in C for the CPU. They are optional: without them torch computes the same, more slowly.

The sources beside this file are compiled into two libraries when the package is built on an x86-64 machine with a C
compiler. `float32.so` is used on processors with AVX2 and FMA. `bfloat16.so` has the attention in bfloat16 for
processors with AVX-512 BF16. It has been tested only with these instructions emulated, so it must be enabled
explicitly. The functions take pointers and sizes and know nothing of Python or torch; they are called through ctypes.

The environment variable MEZZOTINT_KERNELS=off disables both libraries; MEZZOTINT_KERNELS=bfloat16 enables the second.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

LIBRARY = Path(__file__).with_name("float32.so")
LIBRARY_BFLOAT16 = Path(__file__).with_name("bfloat16.so")
VARIABLE = "MEZZOTINT_KERNELS"
INSTRUCTIONS = "AVX2"
INSTRUCTIONS_BFLOAT16 = "AVX-512 BF16"


def library() -> ctypes.CDLL | None:
    """Return the library for float32, or None if it is missing, disabled, or not for this processor."""
    found = _load()
    return None if isinstance(found, str) else found


def library_bfloat16() -> ctypes.CDLL | None:
    """Return the library for bfloat16, or None if it is missing, not enabled, or not for this processor."""
    found = _load_bfloat16()
    return None if isinstance(found, str) else found


def products() -> ctypes.CDLL | None:
    """Return the library for linear layers and attention; None also with AVX-512, which only torch uses."""
    return None if torch.backends.cpu.get_cpu_capability() == "AVX512" else library()


def can_take(*tensors: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    """Tell whether these are plain tensors of a dtype on the CPU that need no derivatives, outside of autocast."""
    return (
        all(
            tensor is None
            or (
                type(tensor) in (Tensor, nn.Parameter)  # not of a class that keeps its numbers elsewhere
                and tensor.dtype == dtype
                and tensor.device.type == "cpu"
                and not (torch.is_grad_enabled() and tensor.requires_grad)
            )
            for tensor in tensors
        )
        and not torch.is_autocast_enabled("cpu")
        and is_eager(*tensors)
    )


def only_input_is_trained(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether a layer needs the gradient with respect to its input, and not to its weight or bias."""
    is_frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    return is_frozen and x.requires_grad and torch.is_grad_enabled() and is_eager(x, weight, bias)


def is_eager(*tensors: Tensor | None) -> bool:
    """Tell whether operators run eagerly: not under torch.compile, torch.func or forward-mode AD."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or any(tensor is not None and _has_tangent(tensor) for tensor in tensors)
    )


def _has_tangent(tensor: Tensor) -> bool:
    return unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def describe() -> str:
    """Describe which kernels are used, or why none are, for `mezzotint env`."""
    found = _load()
    if isinstance(found, str):
        return f"not used: {found}"
    uses = "3x3 convolutions" if products() is None else "3x3 convolutions, linear layers, attention"
    text = f"{uses} in float32 ({INSTRUCTIONS})"
    if os.environ.get(VARIABLE, "").lower() == "bfloat16":
        more = _load_bfloat16()
        text += f"; attention in bfloat16 ({more if isinstance(more, str) else INSTRUCTIONS_BFLOAT16})"
    return text


def instructions(dtype: torch.dtype) -> str:
    """Return the instruction sets of the kernels that a model of a dtype uses, for records; "" if it uses none."""
    if library() is None:
        return ""
    is_used = dtype == torch.bfloat16 and library_bfloat16() is not None
    return f"{INSTRUCTIONS}, {INSTRUCTIONS_BFLOAT16}" if is_used else INSTRUCTIONS


@functools.cache
def _load() -> ctypes.CDLL | str:
    """Load the library for float32 once, or return the reason why it cannot be used."""
    if os.environ.get(VARIABLE, "").lower() in ("off", "0"):
        return f"{VARIABLE} is {os.environ[VARIABLE]}"
    if not LIBRARY.exists():
        return "not compiled; this needs an x86-64 processor and a C compiler when mezzotint is installed"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return f"the processor has no {INSTRUCTIONS}"
    return _open(LIBRARY)


@functools.cache
def _load_bfloat16() -> ctypes.CDLL | str:
    """Load the library for bfloat16 once, or return the reason why it cannot be used."""
    if os.environ.get(VARIABLE, "").lower() != "bfloat16":
        return f"{VARIABLE} is not bfloat16"
    if not LIBRARY_BFLOAT16.exists():
        return "not compiled"
    capabilities = torch.cpu.get_capabilities()
    if not capabilities.get("avx512_bf16"):
        return f"the processor has no {INSTRUCTIONS_BFLOAT16}"
    if capabilities.get("amx_bf16"):
        return "the processor has AMX, which torch's attention uses"
    return _open(LIBRARY_BFLOAT16)


def _open(path: Path) -> ctypes.CDLL | str:
    """Open a library, or return the reason why it cannot be opened."""
    try:
        found = ctypes.CDLL(str(path))
        _declare(found)
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        found.use_openmp(ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p))
    except (OSError, AttributeError) as error:  # one for another C library, or torch without OpenMP
        return f"{path.name} cannot be loaded ({error})"
    if found.sources().decode() != _hash_sources():  # its functions may take other arguments
        return f"{path.name} was compiled from other sources; install mezzotint again"
    return found


def _hash_sources() -> str:
    """Return the SHA-256 of the sources, as setup.py compiles it into the library."""
    paths = sorted(LIBRARY.parent.glob("*.[ch]"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _declare(library: ctypes.CDLL) -> None:
    """Declare the types of the functions' arguments and results."""
    pointer, size = ctypes.c_void_p, ctypes.c_ssize_t
    library.use_openmp.argtypes, library.use_openmp.restype = [pointer], None
    library.sources.argtypes, library.sources.restype = [], ctypes.c_char_p
    library.attend.argtypes, library.attend.restype = [pointer] * 7 + [size] * 5 + [ctypes.c_int], None
    library.attend_scratch.argtypes, library.attend_scratch.restype = [size] * 4 + [ctypes.c_int], size
    if not hasattr(library, "linear"):  # that of bfloat16
        return
    library.linear.argtypes, library.linear.restype = [pointer] * 5 + [size] * 4 + [ctypes.c_int] * 3, None
    library.linear_scratch.argtypes, library.linear_scratch.restype = [ctypes.c_int] * 2, size
    library.convolve3x3.argtypes, library.convolve3x3.restype = [pointer] * 5 + [size] * 7 + [ctypes.c_int] * 2, None
    library.convolve3x3_scratch.argtypes, library.convolve3x3_scratch.restype = [size, ctypes.c_int], size
