"""Read files that somebody else has made: regular files only, and never more bytes than the caller expects.

A FIFO or a device, or a link to one, would block or never end, and a sparse file costs its author nothing.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from io import FileIO
from pathlib import Path

from mezzotint.errors import CheckpointError

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
