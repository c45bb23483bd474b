"""Write files and folders so that they appear whole or not at all, even if the process is killed meanwhile."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mezzotint.errors import WriteError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # no other file name would help
PATTERN = ".mezzotint-{}.part"  # name of what is not yet whole


@contextmanager
def atomic_path(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path for the block to write a file or make a folder at; then rename it to `path`.

    What was written is synced to the disk before it is renamed. If the block raises, it is deleted and `path` stays as
    it was.

    Args:
        path: The file or folder to write. An existing one is replaced.
        overwrite: Whether an existing file may be replaced.

    Raises:
        FileExistsError: If the file exists and `overwrite` is False.
        OSError: If it cannot be written.
    """
    temporary, old = (path.with_name(PATTERN.format(secrets.token_hex(8))) for _ in range(2))
    try:
        yield temporary
        if temporary.is_dir():
            for entry in (*temporary.rglob("*"), temporary):
                _sync(entry)
            if path.exists():  # a folder cannot be renamed over another one
                path.rename(old)
            temporary.rename(path)
            _sync(path.parent)
            _remove(old)
        else:
            _sync(temporary)
            if not overwrite:
                path.open("xb").close()  # reserves the name until the rename
            temporary.replace(path)
    finally:
        _remove(temporary)


def write_atomically(path: Path, data: bytes, *, overwrite: bool = True) -> None:
    """Write the bytes of a file with `atomic_path`."""
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(data)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left in a folder. No other process may be writing to it."""
    for path in folder.glob(PATTERN.format("*")):
        _remove(path)


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a WriteError that names the file or folder."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Sync a file, or a folder's entries where the system supports it, to the disk."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
