"""Read the table of contents of a zip archive whose records are stored, not compressed, as torch.save writes it.

Where a record's bytes lie is taken from its own local header: the table at the end does not say how long that header
is, and a program that packs an archive again pads it in another way.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from io import FileIO

MAX_RECORDS = 100_000  # torch.save writes one a tensor
MAX_DIRECTORY_BYTES = 16_000_000  # bytes of the table of contents

END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR64 = struct.Struct("<4sLQL")
CENTRAL = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")


@dataclass(frozen=True)
class Record:
    """One record of an archive: its first byte in the file, and its size in bytes."""

    start: int
    size: int


def read_directory(file: FileIO, size: int) -> dict[str, Record]:
    """Return the records of an archive of `size` bytes by name, without its folders.

    Raises:
        ValueError: If it is damaged, compressed, encrypted, too large, or names a record twice.
    """
    count, begin, length = _find_directory(file, size)
    if count > MAX_RECORDS or length > MAX_DIRECTORY_BYTES:
        raise ValueError(f"it has {count} records; at most {MAX_RECORDS} are read")
    directory = read_at(file, begin, length)
    records: dict[str, Record] = {}
    at = 0
    for _ in range(count):
        if at + CENTRAL.size > length:
            raise ValueError("its table of contents is cut short")
        row = CENTRAL.unpack_from(directory, at)
        flags, method, packed, plain, letters, extra, comment, offset = *row[3:5], *row[8:13], row[16]
        if row[0] != b"PK\1\2":
            raise ValueError("its table of contents is damaged")
        at += CENTRAL.size
        name = directory[at : at + letters].decode()
        fields = directory[at + letters : at + letters + extra]
        at += letters + extra + comment
        plain, packed, offset = _zip64_sizes(fields, plain, packed, offset)
        if name.endswith("/") and not plain:
            continue
        if flags & 1:
            raise ValueError("it is an encrypted archive; unpack it, and pack what is in it without a password")
        if method and "/code/" in name:
            raise ValueError("it is a TorchScript program, not weights; ask for a safetensors file")
        if method or plain != packed:
            raise ValueError("it is compressed; unpack it and pack it again without compression, as by `zip -0 -r`")
        if name in records:
            raise ValueError(f"it has {name[:100]!r} twice")
        records[name] = Record(_data_start(file, offset, name), plain)
        if records[name].start + plain > begin:
            raise ValueError(f"{name[:100]!r} lies outside the file")
    if at != length:
        raise ValueError("its table of contents is damaged")
    return records


def _find_directory(file: FileIO, size: int) -> tuple[int, int, int]:
    """Return the number of records, and the first byte and the length of the table of contents."""
    tail_start = max(size - END.size - 0xFFFF, 0)
    tail = read_at(file, tail_start, size - tail_start)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < END.size:
        raise ValueError("its table of contents is missing")
    _, _, _, _, count, length, begin, comment = END.unpack_from(tail, at)
    end = tail_start + at
    if end + END.size + comment != size:
        raise ValueError("it has bytes after its end")
    if end >= LOCATOR64.size:
        signature, _, found, _ = LOCATOR64.unpack(read_at(file, end - LOCATOR64.size, LOCATOR64.size))
        if signature == b"PK\6\7":
            if found + END64.size > end:
                raise ValueError("its table of contents is damaged")
            row = END64.unpack(read_at(file, found, END64.size))
            if row[0] != b"PK\6\6":
                raise ValueError("its table of contents is damaged")
            count, length, begin, end = *row[7:], found
    if begin + length != end:
        raise ValueError("its table of contents is not where it should be")
    return count, begin, length


def _zip64_sizes(fields: bytes, plain: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Replace the sizes and the offset that do not fit into 32 bits by those of the zip64 field."""
    values = [plain, packed, offset]
    wide = [k for k, value in enumerate(values) if value == 0xFFFFFFFF]
    at = 0
    while wide and at + 4 <= len(fields):
        kind, length = struct.unpack_from("<2H", fields, at)
        if kind == 1 and length >= 8 * len(wide) and at + 4 + length <= len(fields):
            for k, value in zip(wide, struct.unpack_from(f"<{len(wide)}Q", fields, at + 4), strict=True):
                values[k] = value
            return values[0], values[1], values[2]
        at += 4 + length
    if wide:
        raise ValueError("a record has no size")
    return plain, packed, offset


def _data_start(file: FileIO, offset: int, name: str) -> int:
    """Return the first byte of a record's data, from its local header."""
    row = LOCAL.unpack(read_at(file, offset, LOCAL.size))
    letters, extra = row[9:11]
    if row[0] != b"PK\3\4" or row[3] or read_at(file, offset + LOCAL.size, letters) != name.encode():
        raise ValueError(f"the header of {name[:100]!r} does not agree with the table of contents")
    return offset + LOCAL.size + int(letters) + int(extra)


def read_at(file: FileIO, start: int, size: int) -> bytes:
    """Read exactly `size` bytes, which the caller has bounded."""
    file.seek(start)
    data = bytearray()
    while len(data) < size:
        part = file.read(size - len(data))
        if not part:
            raise ValueError("it is cut short")
        data += part
    return bytes(data)
