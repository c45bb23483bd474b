"""Read the table of contents of a PyTorch file (.ckpt, .pt, .bin) without torch's reader and without running code.

A file of torch.save is a zip archive with a pickle and one record of bytes for each storage; before PyTorch 1.6 it was
five pickles and then the storages. Either way the pickle is read as data (see pickles.py). It may name what makes a
tensor, a dictionary, a number or an array, and what training programs leave behind, which is ignored; any other name
means that the file is a program, and it is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO, FileIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mezzotint.weights.archive import Record, read_at, read_directory
from mezzotint.weights.entries import DTYPES, MAX_COUNT, Entry
from mezzotint.weights.pickles import MAX_PICKLE_BYTES, ForbiddenError, Global, Object, read_pickle

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of a file before PyTorch 1.6
MAX_ORDER_BYTES = 16  # bytes of the record "byteorder"

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
# tables whose values count as the file's own, those of a later one first: the first is of T2I-Adapters, the last three
# are of upscalers
NESTED = ("adapter", "model", "module", "state_dict", "params", "params-ema", "params_ema")
SKIPPED = {"ComplexDoubleStorage": 16, "QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4, "QUInt4x2Storage": 1}
DTYPES_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
ARRAYS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"}  # numpy's dtypes

# What a file may name. `IGNORED` are left behind by training; they are never imported, so nothing of them can run.
ORDERED_DICT = "collections.OrderedDict"
ENCODE = "_codecs.encode"
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
SUBCLASS = "torch._tensor._rebuild_from_type_v2"
ARRAY = re.compile(r"numpy\._?core\.multiarray\._reconstruct")
SCALAR = re.compile(r"numpy\._?core\.multiarray\.scalar")
UNREAD = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of another class",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a foreign device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a foreign device",
}
PLAIN = {
    *(ORDERED_DICT, ENCODE, *TENSORS, *PARAMETERS, SUBCLASS, *UNREAD),
    *("torch._tensor.Tensor", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"),
    *("torch.storage.UntypedStorage", "torch.nn.modules.container.ParameterDict"),
    *("torch.serialization._get_layout", "numpy.ndarray", "numpy.dtype"),
    *("collections.defaultdict", "argparse.Namespace", "builtins.set", "builtins.frozenset", "__builtin__.set"),
}
TORCH_NAMES = re.compile(r"\w+Storage|Size|device|bool|q?u?int\d+\w*|bits\w+|b?float\w+|complex\d+|per_\w+")
IGNORED = re.compile(r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities|omegaconf)\.[\w.]+")


@dataclass
class Contents:
    """What a PyTorch file holds: tensors by where their bytes lie, numbers, and arrays inside its pickle."""

    entries: dict[str, Entry] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)


class CodeError(ValueError):
    """The file names code, which was not run."""


@dataclass(frozen=True)
class _Storage:
    kind: str  # such as "FloatStorage"
    key: str
    count: int
    place: str  # the device that it was on


@dataclass(frozen=True)
class _View:
    """A tensor as its pickle describes it: a view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str | None = None  # of an UntypedStorage


@dataclass(frozen=True)
class _Unread:
    why: str


def read_zip(file: FileIO, size: int) -> Contents:
    """Read the table of contents of a file of torch.save.

    Raises:
        CodeError: If it names code.
        ValueError: If it is damaged, or holds a tensor that cannot be read.
    """
    records = read_directory(file, size)
    pickles = [name for name in records if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
    if len(pickles) != 1:
        raise ValueError(f"it has {len(pickles)} records data.pkl; a file of torch.save has one")
    root = pickles[0].removesuffix("data.pkl")
    if order := records.get(f"{root}byteorder"):
        byte_order = read_at(file, order.start, min(order.size, MAX_ORDER_BYTES))
        if byte_order != b"little":
            raise ValueError(f"its byte order is {byte_order.decode('ascii', 'replace')!r}; only 'little' is read")
    record = records[pickles[0]]
    if record.size > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle has {record.size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read")
    tree = _read(BytesIO(read_at(file, record.start, record.size)), {})

    def find(storage: _Storage) -> Record:
        if (found := records.get(f"{root}data/{storage.key}")) is None:
            raise ValueError(f"its record data/{storage.key[:40]} is missing")
        return found

    return _collect(tree, find)


def read_legacy(file: FileIO, size: int) -> Contents:
    """Read the table of contents of a file from before PyTorch 1.6. Raises as `read_zip` does."""
    data = BytesIO(read_at(file, 0, min(size, MAX_PICKLE_BYTES)))
    if _read(data) != MAGIC or _read(data) != PROTOCOL:
        raise ValueError("it is a pickle that torch.save did not write")
    system = _read(data)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its byte order is not little-endian")
    storages: dict[str, _Storage] = {}
    tree = _read(data, storages)
    keys = _read(data)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("its list of storages is damaged")
    records: dict[str, Record] = {}
    at = data.tell()
    for key in keys:
        if key not in storages or key in records:
            raise ValueError("its list of storages does not agree with its tensors")
        count = int.from_bytes(read_at(file, at, 8), "little", signed=True)
        bytes_each = _itemsize(storages[key].kind)
        if count != storages[key].count or bytes_each is None or at + 8 + count * bytes_each > size:
            raise ValueError(f"the storage {key[:40]!r} lies outside the file; download it again")
        records[key] = Record(at + 8, count * bytes_each)
        at += 8 + count * bytes_each
    if at != size:
        raise ValueError("it has bytes after its end")

    def find(storage: _Storage) -> Record:
        if (found := records.get(storage.key)) is None:
            raise ValueError(f"the storage {storage.key[:40]!r} is missing")
        return found

    return _collect(tree, find)


def _read(data: BytesIO, storages: dict[str, _Storage] | None = None) -> Any:
    """Read one pickle; the storages that it refers to are added to `storages`."""

    def refer(value: Any) -> _Storage:
        match value:
            case ("storage", Global() as kind, str(key), str(place), int(count)):
                pass
            case ("storage", Global() as kind, str(key), str(place), int(count), None):
                pass
            case _:
                raise ValueError("it refers to an object that is not a storage")
        found = _Storage(kind.name, key, count, place)
        if count < 0 or (storages or {}).get(key, found) != found:
            raise ValueError(f"it describes the storage {key[:40]!r} in two ways")
        if storages is not None:
            storages[key] = found
        return found

    try:
        return read_pickle(data, _is_allowed, _call, None if storages is None else refer)
    except ForbiddenError as error:
        raise CodeError(str(error)[:100]) from None


def _is_allowed(found: Global) -> bool:
    name = str(found)
    return bool(
        name in PLAIN
        or (found.module == "torch" and TORCH_NAMES.fullmatch(found.name))
        or IGNORED.fullmatch(name)
        or ARRAY.fullmatch(name)
        or SCALAR.fullmatch(name)
    )


def _call(function: Global, arguments: tuple[Any, ...]) -> Any:
    """Return what stands for a call in the pickle: data, a tensor's description, or an inert object."""
    name = str(function)
    if name in UNREAD:
        return _Unread(UNREAD[name])
    if name in TENSORS:
        return _view(name, arguments)
    if name in PARAMETERS:
        return arguments[0]
    if name == SUBCLASS:
        inner, _, inner_arguments, _ = arguments
        if not isinstance(inner, Global) or not isinstance(inner_arguments, tuple) or str(inner) == SUBCLASS:
            raise ValueError("it makes a tensor in an unknown way")
        return _call(inner, inner_arguments)
    if name == ORDERED_DICT:
        pairs = arguments[0] if arguments else []
        return {key: value for key, value in pairs if isinstance(key, str)}
    if name == ENCODE:
        return arguments[0].encode("latin-1")
    return Object(function, arguments)


def _view(function: str, arguments: tuple[Any, ...]) -> _View | _Unread:
    storage, offset, shape, stride, *rest = arguments
    dtype = None
    if function.endswith("_v3"):
        dtype = rest[2].name if isinstance(rest[2], Global) else ""
        del rest[2]
    if not isinstance(storage, _Storage) or not all(isinstance(part, tuple) for part in (shape, stride)):
        raise ValueError("it has a tensor without a storage, shape or stride")
    if any(type(number) is not int or number < 0 for number in (offset, *shape, *stride)) or len(shape) != len(stride):
        raise ValueError("it has a tensor whose shape or stride is not numbers")
    if len(rest) > 2 and rest[2]:
        return _Unread("a conjugated or negated view")
    return _View(storage, offset, shape, stride, dtype)


def _itemsize(kind: str) -> int | None:
    return STORAGES[kind].itemsize if kind in STORAGES else SKIPPED.get(kind)


def _collect(tree: Any, find: Any) -> Contents:
    """Return the tensors and numbers of the tables that count as the file's own."""
    contents = Contents()
    for name, value in _rows(tree):
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError("a name in it is not Unicode")
        if isinstance(value, _View):
            value = _entry(value, find(value.storage))
        elif isinstance(value, Object):
            value = _numbers(value)
        if isinstance(value, _Unread):
            raise ValueError(f"{name!r} is {value.why}; only dense tensors with values are read")
        if isinstance(value, Entry):
            contents.entries[name] = value
        elif isinstance(value, Tensor):
            contents.arrays[name] = value
            contents.entries[name] = Entry(value.dtype, tuple(value.shape), 0)
        elif isinstance(value, int | float):
            contents.scalars[name] = value
    return contents


def _rows(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield the named values of a file, those of NESTED tables, and with a prefix those of `string_to_param`."""
    table = _mapping(tree)
    if table is None:
        kind = "tensor" if isinstance(tree, _View | _Unread) else type(tree).__name__
        raise ValueError(f"it holds a {kind}, not a table of tensors")
    for name in NESTED * len(NESTED):  # in any order
        if (inner := _mapping(table.get(name))) is not None:
            table = {**table, **inner}
    if (inner := _mapping(table.get("string_to_param"))) is not None:
        table = {**table, **{f"string_to_param.{name}": value for name, value in inner.items()}}
    yield from ((name, value) for name, value in table.items() if isinstance(name, str))


def _mapping(value: Any) -> Mapping[Any, Any] | None:
    """Return a dictionary, one of a subclass, or the parameters of a ParameterDict; None for anything else."""
    if isinstance(value, Object):
        if isinstance(value.state, dict) and isinstance(held := value.state.get("_parameters"), dict):
            return held
        return value.items
    return value if isinstance(value, dict) else None


def _entry(view: _View, record: Record) -> Entry | _Unread:
    storage = view.storage
    dtype = STORAGES.get(storage.kind) if view.dtype is None else DTYPES_BY_NAME.get(view.dtype)
    if dtype is None:
        return _Unread(f"of the type {(view.dtype or storage.kind)[:40]}")
    if storage.place == "meta":
        return _Unread(UNREAD["torch._utils._rebuild_meta_tensor_no_storage"])
    each = _itemsize(storage.kind)
    count, last = 1, view.offset
    for size, step in zip(view.shape, view.stride, strict=True):
        count *= size
        last += (size - 1) * step
        if count >= MAX_COUNT or last >= MAX_COUNT:
            raise ValueError(f"a tensor of shape {view.shape[:8]} is too large")
    if each is None or storage.count * each > record.size:
        raise ValueError(f"the storage {storage.key[:40]!r} lies outside the file; download it again")
    if count and (last + 1) * dtype.itemsize > storage.count * each:
        raise ValueError(f"a tensor of shape {view.shape[:8]} lies outside its storage; download it again")
    if count * dtype.itemsize > storage.count * each:
        return _Unread(f"expanded: its shape is {view.shape[:8]}, its storage has {storage.count * each} bytes")
    return Entry(
        dtype,
        view.shape,
        record.start + (view.offset * dtype.itemsize if count else 0),
        None if not count or _is_contiguous(view) else view.stride,
    )


def _is_contiguous(view: _View) -> bool:
    step = 1
    for size, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _numbers(value: Object) -> Tensor | float | _Unread | None:
    """Return a numpy array as a tensor, a numpy scalar as a number, and None for any other object."""
    name = str(value.function)
    try:
        if SCALAR.fullmatch(name):
            dtype, data = value.arguments
            number = _array((), dtype, data).item()
            return number if isinstance(number, int | float) else None
        if ARRAY.fullmatch(name):
            _, shape, dtype, fortran, data = value.state
            array = _array(shape[::-1] if fortran else shape, dtype, data)
            return torch.from_numpy(np.ascontiguousarray(array.T if fortran else array))
    except (ValueError, TypeError, AttributeError):
        return _Unread("a numpy array of objects, or a damaged one") if ARRAY.fullmatch(name) else None
    return None


def _array(shape: tuple[int, ...], dtype: Any, data: Any) -> Any:
    """Return a copy of the bytes as an array of this shape, in this machine's byte order."""
    kind, order = dtype.arguments[0], dtype.state[1] if dtype.state else "|"
    if str(dtype.function) != "numpy.dtype" or kind not in ARRAYS or order not in ("<", ">", "|", "="):
        raise ValueError(f"{kind} is not a plain dtype")
    if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) >= MAX_COUNT:
        raise ValueError(f"{shape} is not a shape")
    raw = data.encode("latin-1") if isinstance(data, str) else data
    array = np.frombuffer(raw, dtype=f"{order}{kind}").reshape(shape)
    return array.astype(array.dtype.newbyteorder("="))
