"""Read files that somebody else has made, and write files so that they appear whole or not at all.

Reading takes regular files only, and never more bytes than the caller expects: a FIFO or a device, or a link to one,
would block or never end, and a sparse file costs its author nothing. A file that is written gets its name only once it
is whole on the disk, even if the process is killed meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from mezzotint.errors import CheckpointError, WriteError

# ---- reading --------------------------------------------------------------------------------------------------------

MAX_TEXT_BYTES = 50_000_000  # bytes of a config, index, tokenizer or list of prompts; CLIP's tokenizer.json has 2 MB


def open_regular(path: str | Path) -> FileIO:
    """Open a regular file for reading, without a buffer.

    Raises:
        OSError: If it cannot be opened, or is a folder, FIFO, socket or device.
    """
    _check_regular(os.stat(path))  # opening a device may already do something
    file = FileIO(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)))
    try:
        _check_regular(os.fstat(file.fileno()))  # it may have been replaced meanwhile
    except OSError:
        file.close()
        raise
    return file


def read_bytes(path: str | Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        OSError: If it cannot be read, is not a regular file, or is larger; its `strerror` says which.
    """
    with open_regular(path) as file:
        parts: list[bytes] = []
        left = limit + 1
        while left and (part := file.read(min(left, 2**20))):
            parts.append(part)
            left -= len(part)
    if not left:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    return b"".join(parts)


def read_text(path: str | Path, encoding: str = "utf-8", limit: int = MAX_TEXT_BYTES) -> str:
    """Read a regular text file of at most `limit` bytes, with universal newlines.

    Raises:
        OSError: As `read_bytes`.
        UnicodeDecodeError: If it is not in this encoding.
    """
    return read_bytes(path, limit).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a regular file in hexadecimal, of no more bytes than it has at first.

    Raises:
        CheckpointError: If it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            left = os.fstat(file.fileno()).st_size
            while left and (part := file.read(min(left, 2**20))):
                digest.update(part)
                left -= len(part)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
        raise OSError(kind, "it is a folder, not a file" if kind == errno.EISDIR else "it is not a regular file")


# ---- writing --------------------------------------------------------------------------------------------------------

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # no other file name would help
PATTERN = ".mezzotint-{}.part"  # name of a file that is not yet complete


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
