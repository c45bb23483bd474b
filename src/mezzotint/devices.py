"""Devices and dtypes by name."""

from __future__ import annotations

import torch

from mezzotint.errors import RequestError

LARGE_UNET = 2**29  # parameters from which a hint is worth a line; SD 1.5's UNet has 8.6e8


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


def has_native_bfloat16() -> bool:
    """Return whether the CPU has instructions that multiply bfloat16 (AVX-512 BF16 or AMX)."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # that a model can have


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """Return the dtype of this name; raise RequestError if a model cannot have it."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise RequestError(f"dtype is {dtype!r}; it can be {', '.join(DTYPES)}")
    return found


def dtype_on(
    device: torch.device, dtype: str | torch.dtype | None, default: torch.dtype = torch.bfloat16
) -> torch.dtype:
    """Return the dtype of a model on a device.

    Args:
        device: The device.
        dtype: A dtype or its name; None is float32 on the CPU and `default` elsewhere; "auto" is the same, except that
            it is bfloat16 on a CPU that multiplies bfloat16 natively.
        default: The dtype on other devices than the CPU.

    Raises:
        RequestError: If a model cannot have this dtype.
    """
    if dtype is not None and dtype != "auto":
        return dtype_of(dtype)
    if device.type != "cpu":
        return default
    return torch.bfloat16 if dtype == "auto" and has_native_bfloat16() else torch.float32


def bfloat16_hint(dtype: str | torch.dtype | None, device: torch.device, parameters: int) -> list[str]:
    """Return a line that says what `dtype="auto"` would save, or none where it would save little or nothing.

    Args:
        dtype: The dtype that was asked for.
        device: The device of the model.
        parameters: Number of parameters of the UNet.
    """
    if dtype is not None or device.type != "cpu" or parameters < LARGE_UNET or not has_native_bfloat16():
        return []
    return [
        "this processor multiplies bfloat16 natively: --dtype auto would be faster and take "
        f"{2 * parameters / 1e9:.1f} GB less memory; the picture would differ slightly"
    ]
