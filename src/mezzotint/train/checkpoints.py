"""Checkpoints of a run: folders checkpoint-00000250, each whole or not there.

One is written into a new folder, synced to the disk, and then named; only after that older ones go, so that a kill at
any moment leaves at least one that is whole. `checkpoint.json` holds the state's hash: what a disk or a half-done copy
has damaged is passed over, and the newest whole one is found.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mezzotint.errors import CheckpointError, WriteError

NAME = re.compile(r"checkpoint-(\d{8})")
STATE, RECORD = "state.pt", "checkpoint.json"


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write the state (tensors, numbers, texts, and lists and dicts of these) at this step; the last `keep` stay.

    Raises WriteError where the disk is full or refuses; then the older ones are all there.
    """
    new, target = folder / f".checkpoint-{step:08}.new", folder / f"checkpoint-{step:08}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        with (new / STATE).open("w+b") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with (new / RECORD).open("w", encoding="utf-8") as record:
            json.dump({"step": step, "sha256": digest}, record)
            record.flush()
            os.fsync(record.fileno())
        _sync(new)
        shutil.rmtree(target, ignore_errors=True)  # of this step, from before: damaged, or it would have been resumed
        new.rename(target)
        _sync(folder)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        shutil.rmtree(new, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0][:200]
        raise WriteError(f"the checkpoint of step {step} cannot be written in {folder}: {reason}") from error
    for old in found(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def found(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or damaged, the newest first."""
    return sorted((path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name)), reverse=True)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest that is whole, and its state on the CPU; None where a run is to begin.

    Raises CheckpointError where there are some and all are damaged: to begin anew would overwrite them.
    """
    paths = found(folder)
    for path in paths:
        state = _read(path)
        if state is not None:
            return path, state
    if paths:
        raise CheckpointError(f"{folder} has {len(paths)} checkpoints and none is whole; delete them to begin anew")
    return None


def _read(path: Path) -> dict[str, Any] | None:
    """The state, or None where the folder is not what `save` left."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        with (path / STATE).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
                return None
            file.seek(0)
            state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
            return state
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sync(folder: Path) -> None:
    """A folder's names, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
