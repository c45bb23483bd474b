"""Checkpoints of a training run: folders named checkpoint-00000250, each complete or absent.

A checkpoint is written to a temporary folder, synced to the disk and then renamed; only afterwards are older ones
deleted, so a kill at any moment leaves at least one complete checkpoint. `checkpoint.json` holds the state's SHA-256: a
checkpoint damaged by a failing disk or an incomplete copy is skipped in favour of the newest intact one.
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
    """Write a checkpoint and delete all but the newest `keep`.

    Args:
        folder: the run's folder.
        step: number of steps done.
        state: tensors, numbers and strings, in nested lists and dicts.
        keep: number of checkpoints to keep, this one included.

    Returns:
        The checkpoint's folder.

    Raises:
        WriteError: if the checkpoint cannot be written; the older ones are then all still there.
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
        shutil.rmtree(target, ignore_errors=True)  # an existing one of this step is damaged: it was not resumed from
        new.rename(target)
        _sync(folder)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        shutil.rmtree(new, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0][:200]
        raise WriteError(f"the checkpoint of step {step} cannot be written in {folder}: {reason}") from error
    for old in list_all(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def list_all(folder: Path) -> list[Path]:
    """Return a run's checkpoints, intact or damaged, newest first."""
    return sorted((path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name)), reverse=True)


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Load the newest intact checkpoint.

    Returns:
        Its folder and its state on the CPU; None if there are no checkpoints.

    Raises:
        CheckpointError: if there are checkpoints and all are damaged: a new run would overwrite them.
    """
    paths = list_all(folder)
    for path in paths:
        state = _read(path)
        if state is not None:
            return path, state
    if paths:
        raise CheckpointError(f"all {len(paths)} checkpoints in {folder} are damaged; delete them to start again")
    return None


def _read(path: Path) -> dict[str, Any] | None:
    """Return the state, or None if the folder is damaged."""
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
    """Sync a folder's entries to the disk, where the system supports it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
