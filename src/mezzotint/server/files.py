"""The data folder: its lock, and the files of pictures, thumbnails, maps and uploads, all of them named by us.

    mezzotint.db   the database (store.py)
    pictures/      ID.png: a picture as it was drawn, with its record
    thumbnails/    ID.webp
    maps/          ID.json: the word maps of a picture
    uploads/       SHA-256 of the content, without an extension

A name is made of hexadecimal digits alone, so that no text of a client becomes part of a path.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mezzotint.errors import RequestError, WriteError
from mezzotint.files import remove_leftovers, write_atomically
from mezzotint.server.errors import InvalidError

if TYPE_CHECKING:
    from PIL import Image

FOLDERS = {"pictures": ".png", "thumbnails": ".webp", "maps": ".json", "uploads": ""}
ID = re.compile("[0-9a-f]{32}|[0-9a-f]{64}")
THUMBNAIL = 320  # pixels of the longer side
_DECODING = threading.Lock()  # one at a time: a small file may hold 80 million pixels
SPARE_DISK = 64 * 2**20  # bytes that must be free to draw on


class DataFolder:
    """The data folder of a server, which only its own user can read.

    Args:
        path: The folder; it is made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            for folder in (path, *(path / name for name in FOLDERS)):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
        except OSError as error:
            raise WriteError(f"the data folder {str(path)!r} cannot be used: {error.strerror or error}") from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder against a second server. The lock ends with the process.

        Raises:
            RequestError: If another server uses the folder.
        """
        try:
            import fcntl
        except ImportError:  # Windows, where an open database is locked by SQLite alone
            yield
            return
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RequestError(
                    f"another server uses the data folder {str(self.path)!r}; stop it, or choose another with --data"
                ) from None
            for name in FOLDERS:
                remove_leftovers(self.path / name)
            yield
        finally:
            os.close(descriptor)

    def file(self, folder: str, id: str) -> Path:
        """Return the path of a file by its id, which was made by us.

        Raises:
            ValueError: If it is not an id.
        """
        if not ID.fullmatch(id):
            raise ValueError(f"{id!r} is not an id")
        return self.path / folder / f"{id}{FOLDERS[folder]}"

    def write(self, folder: str, id: str, data: bytes, *, durable: bool = True) -> None:
        """Write a file whole: to a temporary one, synced, renamed, and the folder synced.

        Args:
            folder: One of FOLDERS.
            id: The id.
            data: The content.
            durable: Whether the new name must outlive a loss of power when this returns.
        """
        path = self.file(folder, id)
        write_atomically(path, data)
        if durable:
            _sync_folder(path.parent)

    def remove(self, folder: str, id: str) -> None:
        """Delete a file, if it exists."""
        with suppress(OSError):
            self.file(folder, id).unlink(missing_ok=True)

    def free(self) -> int:
        """Return the free bytes of the disk."""
        return shutil.disk_usage(self.path).free

    def store_upload(self, data: bytes, param: str) -> tuple[str, str, int, int]:
        """Check a picture by its content and keep it under its SHA-256.

        Args:
            data: The file.
            param: The field that it came in, for the error.

        Returns:
            Its id, its format, width and height.

        Raises:
            InvalidError: If it is not a PNG, JPEG or WebP file, or too large.
        """
        format, width, height = inspect_picture(data, param)
        id = hashlib.sha256(data).hexdigest()
        if not self.file("uploads", id).exists():
            self.write("uploads", id, data)
        return id, format, width, height


def inspect_picture(data: bytes, param: str = "image") -> tuple[str, int, int]:
    """Return the format, width and height of a PNG, JPEG or WebP file, decoded once so that it is known to be whole.

    Raises:
        InvalidError: If it is no such file, damaged or too large.
    """
    from mezzotint.images.init_image import open_picture

    if not data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")):
        raise InvalidError(f"{param} is not a PNG, JPEG or WebP file", param)
    try:
        with _DECODING:
            image = open_picture(data, param)
    except RequestError as error:
        raise InvalidError(str(error), param) from None
    format = "PNG" if data[0] == 0x89 else "JPEG" if data[0] == 0xFF else "WEBP"
    return format, image.width, image.height


def thumbnail(image: Image.Image) -> bytes:
    """Return a picture as a small WebP file, without its metadata."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return encode(small, "WEBP", quality=80)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    """Return a picture as the bytes of a file without metadata."""
    file = io.BytesIO()
    bare = image.copy()
    bare.info = {}
    bare.save(file, format, **options)
    return file.getvalue()


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
