"""Find LoRA files: in a folder or repository, and by the name that their training program wrote into them."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from mezzotint.errors import CheckpointError
from mezzotint.files import open_regular
from mezzotint.weights.files import MAX_HEADER_BYTES
from mezzotint.weights.model_files import join_names

NAMES = (  # the usual names in a folder or repository, by precedence
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
SUFFIXES = (".safetensors", ".bin", ".pt")  # of other names; the safest first
CONFIG = "adapter_config.json"  # in the folder of peft's own files
OUTPUT_NAME = "ss_output_name"  # kohya's metadata: the name that the user gave the LoRA
METADATA_FIRST = '{"__metadata__":'  # as safetensors writes a header; then the table of tensors need not be parsed


def find_file(path: str | Path) -> Path:
    """Return the file, or the one LoRA in a folder. Raises CheckpointError."""
    path = Path(path)
    if not path.is_dir():
        return path
    there = _candidates(file.name for file in path.iterdir() if file.is_file())
    if len(there) != 1:
        raise CheckpointError(f"{path} is a folder with {len(there)} LoRA files; it must have one, such as {NAMES[0]}")
    return path / there[0]


def choose_files(name: str, listing: Iterable[str]) -> list[str]:
    """Choose the LoRA among a repository's files, and peft's configuration if there is one. Raises CheckpointError."""
    listing = list(listing)
    there = _candidates(file for file in listing if "/" not in file)
    if len(there) != 1:
        found = (
            f"{len(there)} files that could be the LoRA ({join_names(there)})"
            if there
            else "no .safetensors, .bin or .pt file"
        )
        raise CheckpointError(f"The hub's {name} has {found} at its top; name the LoRA's file, {name}/FILE")
    return [*there, *(file for file in listing if file == CONFIG)]


def _candidates(names: Iterable[str]) -> list[str]:
    """Return the file with a usual name, or all files of the safest format."""
    there = sorted(names)
    usual = [name for name in NAMES if name in there]
    kinds = ([name for name in there if name.endswith(suffix)] for suffix in SUFFIXES)
    return usual[:1] or next(filter(None, kinds), [])


def named_outputs(name: str, paths: Iterable[str]) -> list[str]:
    """Return the files whose metadata call them `name`, in any case; those that cannot be read are passed over."""
    found = []
    for path in paths:
        try:
            state = os.stat(path)
        except OSError:
            continue
        if stat.S_ISREG(state.st_mode) and _output_name(path, state.st_mtime_ns, state.st_size) == name.lower():
            found.append(path)
    return found


@lru_cache(maxsize=2**16)
def _output_name(path: str, _changed: int, size: int) -> str | None:
    """Return the name in a file's metadata in lower case."""
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if not path.endswith(".safetensors") or length > min(size - 8, MAX_HEADER_BYTES):
                return None
            header = file.read(length).decode("utf-8", errors="replace")
        if not header.startswith(METADATA_FIRST) or OUTPUT_NAME not in header:
            return None
        value = json.JSONDecoder().raw_decode(header, len(METADATA_FIRST))[0][OUTPUT_NAME]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None
    return value.lower() if isinstance(value, str) else None
