"""Read an upscaler's file: by our own reader, which runs no code, then by spandrel, which finds its architecture.

spandrel is the extra `[upscale]`. It imports torchvision for two of its architectures. A torchvision that was built for
another torch (as the one of PyPI is for a CPU build) fails while it is imported, because its operators are missing;
none of them is used here, so the two that it looks up are declared, and it is imported again.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mezzotint.errors import CheckpointError, MissingExtraError
from mezzotint.files import hash_file
from mezzotint.models.upscaler import Upscaler
from mezzotint.weights.files import TensorFile
from mezzotint.weights.kinds import describe_kind

INSTALL = "pip install 'mezzotint[upscale]'"
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []  # torch.library.Library objects; an operator lives as long as its own


def load_upscaler(path: Path, device: torch.device, dtype: torch.dtype) -> Upscaler:
    """Load an upscaler, or return the one that was loaded from this file before.

    Args:
        path: A .safetensors or .pth file of any architecture that spandrel detects.
        device: Where it computes.
        dtype: The dtype of its weights; float32 if it does not support this one.

    Raises:
        CheckpointError: If the file is missing, damaged, unsafe, or no upscaler that spandrel knows.
        MissingExtraError: If spandrel is not installed, or cannot be imported.
    """
    try:
        state = path.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return _load(path, state.st_mtime_ns, state.st_size, device, dtype)


@lru_cache(maxsize=2)
def _load(path: Path, _modified: int, _size: int, device: torch.device, dtype: torch.dtype) -> Upscaler:
    file = TensorFile(path)
    spandrel = import_spandrel()
    weights = spandrel.canonicalize_state_dict({name: file.read(name) for name in file.entries})
    try:
        found = spandrel.ModelLoader(device="cpu").load_from_state_dict(weights)
    except spandrel.UnsupportedModelError:
        raise CheckpointError(
            f"{path} holds {describe_kind(file.shapes)}, in which spandrel {spandrel.__version__} finds no upscaler; "
            "give a file of an architecture that it knows, such as ESRGAN, SwinIR, HAT or DAT"
        ) from None
    except Exception as error:  # its loaders read keys and shapes of an untrusted file
        what = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path} is not a whole upscaler: {what}") from None
    architecture = found.architecture.name
    if not isinstance(found, spandrel.ImageModelDescriptor):
        raise CheckpointError(f"{path} is a {architecture} that needs a mask, not an upscaler")
    if (found.input_channels, found.output_channels) != (3, 3):
        raise CheckpointError(
            f"{path} is a {architecture} of {found.input_channels} to {found.output_channels} channels; an upscaler of "
            "colour pictures has 3 and 3"
        )
    fits = {torch.float16: found.supports_half, torch.bfloat16: found.supports_bfloat16}.get(dtype, True)
    found.to(device).to(dtype if fits else torch.float32).eval()
    tiled = found.tiling is not spandrel.ModelTiling.INTERNAL
    name = path.name, hash_file(path)
    return Upscaler(architecture, found.model.requires_grad_(False), found, found.scale, tiled, name)


def import_spandrel() -> ModuleType:
    """Import spandrel, whatever torchvision it finds.

    Raises:
        MissingExtraError: If it, or torchvision, is missing or cannot be imported; it says what to install.
    """
    try:
        return _import()
    except ModuleNotFoundError as error:
        missing = error.name or "spandrel"
        raise MissingExtraError(f"an upscaler's file needs {missing.partition('.')[0]}: {INSTALL}") from None
    except Exception as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise MissingExtraError(
            f"spandrel cannot be imported ({what}): install the torchvision that belongs to torch {torch.__version__}, "
            "from the same index as torch, then spandrel"
        ) from None


def _import() -> ModuleType:
    try:
        import spandrel
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [*sys.modules]:
            if name.partition(".")[0] in ("torchvision", "spandrel"):
                del sys.modules[name]
        declared = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            declared.define(operator + SCHEMA)  # type: ignore[no-untyped-call]
        _declared.append(declared)
        import spandrel
    module: ModuleType = spandrel
    return module
