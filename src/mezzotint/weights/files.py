"""Read tensor files one tensor at a time: safetensors, and PyTorch's own (.ckpt, .pt, .bin) without executing code.

`TensorFile(path)` reads the table of contents only. `read(name)` copies one tensor from the file into fresh memory and
keeps nothing: no memory map, whose pages would count as ours. `read_into` fills a tensor of another dtype or format in
small pieces, so that nothing else is held. Threads may share a file. The type of a file is determined by its first
bytes, not its name.

A safetensors header is held to the format's own rules (github.com/huggingface/safetensors, README "Format"), and to
smaller bounds of our own, before anything is allocated. PyTorch files are read by torch_files.py, which runs nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mezzotint.errors import CheckpointError
from mezzotint.files import open_regular
from mezzotint.weights.entries import DTYPES, MAX_COUNT, Entry
from mezzotint.weights.torch_files import CodeError, Contents, read_legacy, read_zip

MAX_HEADER_BYTES = 16_000_000  # bytes; the format allows 100 MB, SDXL has 0.3 MB
MAX_HEADER_VALUES = 1_000_000  # JSON values in a header; a tensor has about 10
MAX_TABLES = 20_000  # JSON objects in a header, one a tensor; SDXL has 2,515 tensors
MAX_FORMAT_BYTES = 100_000_000
CHUNK_BYTES = 2**22  # bytes that `read_into` reads at a time
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:(?:module|_orig_mod)\.)+")
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # how they begin, by protocol

T = TypeVar("T")


class TensorFile:
    """An open tensor file. Threads may share it.

    Attributes:
        path: The file.
        entries: The tensors by name.
        metadata: Strings in the header of a safetensors file.
        scalars: Numbers in a PyTorch file.
        size: Size of the file in bytes.

    Raises:
        CheckpointError: If the file is missing, damaged, of another format, or unsafe.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self.scalars: dict[str, float] = {}
        self._tensors: dict[str, Tensor] = {}  # numpy arrays inside a pickle
        self._file = _open(path)
        self._lock = threading.Lock()  # of the file's position
        weakref.finalize(self, self._file.close)
        self._state = self._stat()
        self.size = self._state[0]

        head = self._read(0, 64)
        length = int.from_bytes(head[:8], "little")
        if head[8:9] == b"{" and length <= max(self.size, MAX_FORMAT_BYTES):  # first: the length may spell anything
            self._read_safetensors(length)
        elif head.startswith(b"PK\x03\x04"):
            self._read_torch(read_zip)
        elif head[:2] in PICKLES:
            self._read_torch(read_legacy)
        elif head.startswith(b"GGUF"):
            raise CheckpointError(f"{path} is a GGUF file, which is not supported; give a safetensors file")
        elif head.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
        elif head.lstrip()[:1] == b"<":
            raise CheckpointError(f"{path} is a web page, not a model file: the download went wrong")
        elif path.suffix == ".safetensors":
            self._read_safetensors(length)  # raises
        else:
            raise CheckpointError(f"{path} is neither a safetensors nor a PyTorch file")
        self.entries, self._tensors = self._unwrap(self.entries), self._unwrap(self._tensors)

    def _unwrap(self, table: dict[str, T]) -> dict[str, T]:
        """Return the table with names without `module.` and `_orig_mod.`, of DistributedDataParallel and compile."""
        unwrapped = {WRAPPERS.sub("", name): value for name, value in table.items()}
        if len(unwrapped) != len(table):
            raise CheckpointError(f"{self.path} contains a tensor twice, with and without a prefix such as module.")
        return unwrapped

    def add_prefix(self, prefix: str) -> None:
        """Put a prefix before every name, so that two files may have the same ones."""
        self.entries = {prefix + name: entry for name, entry in self.entries.items()}
        self._tensors = {prefix + name: tensor for name, tensor in self._tensors.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes by name."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str, third: int | None = None) -> Tensor:
        """Read a tensor to the CPU; with `third` (0, 1, 2) only that third of its rows."""
        entry = self.entries[name]
        if name in self._tensors:
            whole = self._tensors[name]
            return whole if third is None else whole.chunk(3)[third]
        if entry.stride is not None:
            span = self._bytes(entry.start, entry.count, entry.dtype)
            whole = span.as_strided(entry.shape, entry.stride)
            return whole if third is None else whole.chunk(3)[third]
        shape, start = entry.shape, entry.start
        if third is not None:
            shape = (shape[0] // 3, *shape[1:])
            start += third * math.prod(shape) * entry.dtype.itemsize
        return self._bytes(start, math.prod(shape), entry.dtype).view(shape)

    def read_into(self, target: Tensor, name: str, third: int | None = None) -> None:
        """Read a tensor (or a third of its rows) into `target`, which may have another dtype, in small chunks."""
        entry, rows = self.entries[name], len(target) if target.ndim else 0
        row = math.prod(entry.shape[1:])  # elements
        if name in self._tensors or entry.stride is not None or not rows or not row:
            target.copy_(self.read(name, third))
            return
        first, some = (third or 0) * rows, max(CHUNK_BYTES // (row * entry.dtype.itemsize), 1)
        for begin in range(0, rows, some):
            part = target[begin : begin + some]
            start = entry.start + (first + begin) * row * entry.dtype.itemsize
            part.copy_(self._bytes(start, len(part) * row, entry.dtype).view(part.shape))

    def read_rows(self, name: str, numbers: Sequence[int]) -> Tensor:
        """Read some rows of a tensor to the CPU, of shape (len(numbers), ...)."""
        entry = self.entries[name]
        if name in self._tensors or entry.stride is not None:
            return self.read(name)[list(numbers)]
        if not all(0 <= number < entry.shape[0] for number in numbers):
            raise IndexError(f"{name} has {entry.shape[0]} rows")
        row = math.prod(entry.shape[1:])
        rows = [self._bytes(entry.start + n * row * entry.dtype.itemsize, row, entry.dtype) for n in numbers]
        return torch.stack(rows).view(len(rows), *entry.shape[1:])

    def prefetch(self, name: str) -> None:
        """Ask the system to read a tensor into its page cache."""
        if hasattr(os, "posix_fadvise") and name not in self._tensors:
            entry = self.entries[name]
            size = entry.count * entry.dtype.itemsize
            os.posix_fadvise(self._file.fileno(), entry.start, size, os.POSIX_FADV_WILLNEED)

    def _bytes(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """Read `count` elements from byte `start`, 1-D."""
        flat = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        left = memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy's stubs do not know the buffer protocol
        with self._lock, _sentences(self.path):
            self._file.seek(start)
            while left:
                got = self._file.readinto(left)
                if not got or self._stat() != self._state:  # otherwise the weights of two files would be mixed
                    raise CheckpointError(f"{self.path} was changed after it had been opened; load the model again")
                left = left[got:]
        return flat.view(dtype)

    def _read(self, start: int, size: int) -> bytes:
        """Read bytes that lie inside the file, while no other thread has it."""
        with _sentences(self.path):
            self._file.seek(start)
            return self._file.read(size)

    def _stat(self) -> tuple[int, int]:
        """Return the size and modification time of the open file."""
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def _read_safetensors(self, length: int) -> None:
        def refuse(why: str) -> CheckpointError:
            return CheckpointError(f"{self.path} is not a whole safetensors file: {why}")

        if self.size < 8 or length > self.size - 8:
            raise refuse(f"its header should have {length} bytes, the file has {self.size}; download it again")
        if length > MAX_HEADER_BYTES:
            raise refuse(f"its header has {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
        header = self._read(8, length)
        if sum(map(header.count, (b",", b":", b"[", b"{"))) > MAX_HEADER_VALUES:  # before each value stands one of them
            raise refuse(f"its header has more than {MAX_HEADER_VALUES:,} values")
        if header.count(b"{") > MAX_TABLES:
            raise refuse(f"its header has more than {MAX_TABLES:,} tensors")
        if header[:1] != b"{":
            raise refuse("its header does not begin with '{'")
        try:
            table = json.loads(
                header.decode(), object_pairs_hook=_unique_keys, parse_int=_parse_size, parse_constant=_reject_constant
            )
        except (ValueError, RecursionError) as error:
            raise refuse(f"its header is not valid JSON ({_short(error)})") from None

        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise refuse("its __metadata__ is not a table of strings")
        spans: list[tuple[int, int, str]] = []
        first = 8 + length
        for name, row in table.items():
            dtype, shape, begin, end = _parse_entry(name, row, refuse)
            spans.append((begin, end, name))
            self.entries[name] = Entry(dtype, shape, first + begin)
        reached = 0
        for begin, end, name in sorted(spans):
            if begin != reached:
                raise refuse(f"there is a hole or an overlap before {name!r}")
            reached = end
        if first + reached != self.size:
            what = "is cut short" if first + reached > self.size else "has bytes after its end"
            raise refuse(f"it {what}: {self.size} bytes of {first + reached}; download it again")
        self.metadata = metadata

    def _read_torch(self, read: Callable[[FileIO, int], Contents]) -> None:
        try:
            contents = read(self._file, self.size)
        except CodeError as error:
            raise CheckpointError(
                f"{self.path} holds Python code ({error}) and is refused; nothing in it was run. "
                "Ask for a safetensors file"
            ) from None
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self.path} is a PyTorch file that cannot be read: {_short(error)}") from None
        self.entries, self.scalars, self._tensors = contents.entries, contents.scalars, contents.arrays


def _open(path: Path) -> FileIO:
    try:
        with _sentences(path):
            return open_regular(path)
    except ValueError as error:  # a NUL byte in the name
        raise CheckpointError(f"{path} cannot be read: {error}") from None


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """Turn the system's errors into sentences."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def _short(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _parse_size(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 18:
        raise ValueError(f"{digits[:20]} is not a size")
    return int(digits)


def _reject_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _parse_entry(name: str, row: Any, refuse: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Validate an entry of a safetensors header and return its dtype, shape, begin and end."""
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise refuse("a name in its header is not Unicode")
    try:
        dtype, shape, (begin, end) = DTYPES[row["dtype"]], row["shape"], row["data_offsets"]
        sizes = (*shape, begin, end)
        if not isinstance(shape, list) or any(type(size) is not int for size in sizes):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise refuse(f"{name!r} needs a known dtype, a shape and two data_offsets") from None
    count = 1
    for size in shape:
        count *= size
        if count >= MAX_COUNT:
            raise refuse(f"{name!r} is too large")
    if count * dtype.itemsize != end - begin:
        raise refuse(
            f"{name!r} of shape {shape} needs {count * dtype.itemsize} bytes, its data_offsets give {end - begin}"
        )
    return dtype, tuple(shape), begin, end
