"""Devices and dtypes by name."""

from __future__ import annotations

import torch

from mezzotint.errors import RequestError


def best_device() -> str:
    """Return "cuda", "mps" or "cpu": the first that is available."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def all_devices() -> tuple[str, ...]:
    """Return every CUDA device where there are several, else the best device."""
    count = torch.cuda.device_count()
    return tuple(f"cuda:{k}" for k in range(count)) if count > 1 else (best_device(),)


def device_of(name: str | torch.device) -> torch.device:
    """Return the device of this name; raise RequestError if it is not available."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # torch raises any of them
        raise RequestError(
            f"device is {str(name)!r}, which is not available; the best available one is {best_device()!r}"
        ) from None
    return device


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # that a model can have


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """Return the dtype of this name; raise RequestError if a model cannot have it."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise RequestError(f"dtype is {dtype!r}; it can be {', '.join(DTYPES)}")
    return found
