"""List the files below a folder quickly, without opening them or calling stat."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def list_files(folder: Path, suffixes: Sequence[str]) -> list[str]:
    """Return the paths, relative to `folder`, of the files with these suffixes in it and in the folders below it.

    They are sorted folder by folder. Links to folders are not followed, and unreadable folders are skipped.
    """
    root, endings = str(folder), tuple(suffixes)
    found: list[str] = []
    pending = [""]
    while pending:
        place = pending.pop()
        try:
            with os.scandir(f"{root}/{place}" if place else root) as entries:
                for entry in entries:
                    name = f"{place}/{entry.name}" if place else entry.name
                    if name.endswith(endings) and entry.is_file():
                        found.append(name)
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(name)
        except OSError:
            continue
    return sorted(found, key=lambda name: name.replace("/", "\0"))  # as lists of path components
