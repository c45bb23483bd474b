"""Checkpoints of a training run: folders named checkpoint-00000250, each complete or absent.

A checkpoint is written to a temporary folder, synced to the disk and then renamed; only afterwards are older ones
deleted, so a kill at any moment leaves at least one complete checkpoint. `checkpoint.json` holds the state's SHA-256: a
checkpoint damaged by a failing disk or an incomplete copy is skipped in favour of the newest intact one.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mezzotint.errors import CheckpointError, WriteError
from mezzotint.files import atomic_path, remove_leftovers

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
    target = folder / f"checkpoint-{step:08}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        with atomic_path(target) as new:  # an existing one of this step is damaged: it was not resumed from
            new.mkdir()
            with (new / STATE).open("w+b") as file:
                torch.save(dict(state), file)
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            (new / RECORD).write_text(json.dumps({"step": step, "sha256": digest}), encoding="utf-8")
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
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
            # not TensorFile, which reads one table of tensors: the optimizer's state is nested, by parameter number
            state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
            return state
    except (OSError, ValueError, KeyError, TypeError):
        return None
