"""Write safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mezzotint.files import atomic_path, report_write_errors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a .safetensors file, whole or not at all, and return its path.

    Args:
        path: The file. Missing parent folders are made.
        tensors: Contiguous tensors on the CPU, by name.
        metadata: Strings for the header.

    Raises:
        WriteError: If the file cannot be written.
    """
    with report_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_safetensors(temporary, tensors, metadata)
    return path


def own_copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a contiguous tensor on the CPU with memory of its own: a weight may be a view of fused ones."""
    return tensor.detach().to("cpu", dtype or tensor.dtype).clone(memory_format=torch.contiguous_format)


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file directly. Raises OSError."""
    path.touch()
    mode = path.stat().st_mode  # as the umask has it; save_file makes files that only their owner can read
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)
