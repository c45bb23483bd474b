"""Write hostile and broken files: each is made by code, and each attack would leave a canary if it ran.

`write(folder)` yields a `Case` for each file. The doors that a case goes through are those of its kind; see child.py.
"""

from __future__ import annotations

import base64
import functools
import io
import itertools
import json
import os
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save as save_safetensors

Content = bytes | Callable[[Path], Any]
Piece = tuple[str, str, Content]  # name, door, content


@dataclass(frozen=True)
class Case:
    """One file of the corpus."""

    group: str
    name: str
    door: str  # "tensors", "image", "text", or the name of a file in a model's folder
    path: Path


# Pickles by hand ------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def attacks(canary: str) -> dict[str, bytes]:
    """Return the middle of a pickle for each opcode that can lead to a call of os.mkdir(canary), or of a relative."""
    path = text(canary)
    line = b"V" + canary.encode() + b"\n"
    return {
        "global": b"cos\nmkdir\n" + path + b"\x85R",
        "global_posix": b"cposix\nmkdir\n" + path + b"\x85R",
        "global_nt": b"cnt\nsystem\n" + path + b"\x85R",
        "stack_global": short("os") + short("mkdir") + b"\x93" + path + b"\x85R",
        "inst": b"(" + line + b"ios\nmkdir\n",
        "obj": b"(cos\nmkdir\n" + line + b"o",
        "newobj": b"cos\nmkdir\n" + path + b"\x85\x81",
        "newobj_ex": b"cos\nmkdir\n" + path + b"\x85}\x92",
        "build": b"ccollections\nOrderedDict\n)R}" + text("__setstate__") + b"cos\nmkdir\nsb" + path + b"b",
        "ext": b"\x82\x01" + path + b"\x85R",
        "persid": b"Pos.mkdir\n",
        "binpersid": b"(" + text("storage") + b"cos\nmkdir\n" + text("0") + text("cpu") + b"K\x01tQ",
        "eval": b"cbuiltins\neval\n" + text(f"__import__('os').mkdir({canary!r})") + b"\x85R",
        "exec_old": b"c__builtin__\nexec\n" + text(f"import os; os.mkdir({canary!r})") + b"\x85R",
        "getattr": b"cbuiltins\ngetattr\n(cos\nmkdir\n" + text("__call__") + b"tR" + path + b"\x85R",
    }


CONTAINERS = ("raw", "zip", "legacy")


def contain(pickled: bytes, container: str) -> bytes:
    if container == "zip":
        return zipped({"a/data.pkl": pickled, "a/byteorder": b"little", "a/data/0": bytes(64), "a/version": b"3\n"})
    if container == "legacy":
        head = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}X\x0d\0\0\0little_endian\x88s."
        return head + pickled + b"\x80\x02]."
    return pickled


def zipped(records: dict[str, bytes], **changes: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", changes.get("method", zipfile.ZIP_STORED)) as archive:
        for name, data in records.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = archive.compression
            for key, value in changes.items():
                if key != "method":
                    setattr(info, key, value)
            archive.writestr(info, data)
    return buffer.getvalue()


def executions(canaries: Path) -> Iterator[Piece]:
    for protocol, (kind, container) in itertools.product(range(6), itertools.product(attacks(""), CONTAINERS)):
        name = f"{kind}-{protocol}-{container}"
        start = b"\x80" + bytes([protocol]) if protocol > 1 else b""
        middle = attacks(str(canaries / name))[kind]
        yield f"{name}.pt", "tensors", contain(start + b"}" + text("w") + middle + b"s.", container)


def bypasses(canaries: Path) -> Iterator[Piece]:
    """Shapes that have misled scanners: what hides, comes late, comes twice, or lies in another container."""

    def attack(name: str) -> bytes:
        return attacks(str(canaries / name))["global"]

    def call(name: str, module: str, function: str, *arguments: str) -> bytes:
        names = b"".join(map(text, arguments))
        return f"c{module}\n{function}\n".encode() + b"(" + names + b"tR"

    head = b"\x80\x04"
    for suffix in ("pt", "bin", "ckpt", "safetensors"):
        yield f"suffix.{suffix}", "tensors", contain(head + attack("suffix") + b".", "zip")
        yield f"raw-suffix.{suffix}", "tensors", head + attack("raw-suffix") + b"."
    for container in ("zip", "legacy"):
        yield f"broken-end-{container}.pt", "tensors", contain(head + attack("broken") + b"\xff\xff", container)
        yield f"no-stop-{container}.pt", "tensors", contain(head + attack("nostop"), container)
        memo = (
            head + text("os") + b"\x94" + text("mkdir") + b"\x94h\0h\1\x93" + text(str(canaries / "memo")) + b"\x85R."
        )
        yield f"memo-{container}.pt", "tensors", contain(memo, container)
        twice = head + text("x") + b"\x94" + text("os") + b"q\0" + text("mkdir") + b"h\0h\0\x93."
        yield f"memo-overwritten-{container}.pt", "tensors", contain(twice, container)
        nested = head + b"cpickle\nloads\nB" + struct.pack("<I", 30) + (attack("n") + b"." + bytes(30))[:30] + b"\x85R."
        yield f"nested-{container}.pt", "tensors", contain(nested, container)
    hidden = {
        "resolve_name": ("pkgutil", "resolve_name", "os:mkdir"),
        "operator": ("_operator", "attrgetter", "system"),
        "importlib": ("importlib", "import_module", "antigravity"),
        "runpy": ("runpy", "run_path", "x.py"),
        "asyncio": ("asyncio.unix_events", "_UnixSubprocessTransport._start", "id"),
        "pip": ("pip", "main", "install"),
        "pdb": ("pdb", "run", "1"),
        "timeit": ("timeit", "timeit", "1"),
        "cprofile": ("cProfile", "run", "1"),
        "ctypes": ("ctypes", "CDLL", "libc.so.6"),
        "webbrowser": ("webbrowser", "open", "http://localhost:1"),
        "torch_load": ("torch", "load", "x.pt"),
        "torch_hub": ("torch.hub", "load", "x", "y"),
        "torch_collect": ("torch.utils.collect_env", "run", "id"),
        "torch_storage": ("torch.storage", "_load_from_bytes", "x"),
        "numpy_loader": ("numpy.f2py.crackfortran", "getlincoef", "1", "x"),
        "dict_of": ("collections", "OrderedDict.fromkeys", "x"),
        "lightning_code": ("pytorch_lightning", "..os", "x"),
        "dotted": ("torch", "serialization.os.mkdir", str(canaries / "dotted")),
        "types": ("types", "FunctionType", "x"),
        "idlelib": ("idlelib.pyshell", "ModifiedInterpreter.runcommand", "1"),
        "open": ("builtins", "open", str(canaries / "open"), "w"),
    }
    for name, (module, function, *arguments) in hidden.items():
        yield f"{name}.pt", "tensors", contain(head + call(name, module, function, *arguments) + b".", "zip")
    yield "seven.pt", "tensors", b"7z\xbc\xaf\x27\x1c" + bytes(100) + attack("seven")
    yield "prefix.pt", "tensors", b"\0" * 10 + contain(head + attack("prefix") + b".", "zip")
    crc = bytearray(contain(head + attack("crc") + b".", "zip"))
    for flag in (6, 14, 16):
        changed = bytearray(crc)
        changed[flag] ^= 1
        yield f"flag-{flag}.pt", "tensors", bytes(changed)
    yield (
        "torchscript.pt",
        "tensors",
        zipped({"a/data.pkl": head + attack("ts") + b".", "a/code/x.py": b"1", "a/constants.pkl": head + b")."}),
    )
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("pickle", "storages", "tensors", "sys_info"):
            data = head + attack("tar") + b"."
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    yield "tar.pt", "tensors", buffer.getvalue()


def storage(kind: str = "Float", key: str = "0", count: int = 4) -> bytes:
    number = b"J" + struct.pack("<i", count) if abs(count) < 2**31 else b"\x8a\x08" + struct.pack("<q", count)
    return b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + text("cpu") + number + b"tQ"


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"


def tensor(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, store: bytes | None = None) -> bytes:
    call = b"ctorch._utils\n_rebuild_tensor_v2\n("
    rest = numbers((offset,))[1:-1] + numbers(shape) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    return call + (store or storage()) + rest


def table(**values: bytes) -> bytes:
    return (
        b"\x80\x02}" + b"".join(text(name.replace("__", ".")) + value + b"s" for name, value in values.items()) + b"."
    )


def torch_shapes(canaries: Path) -> Iterator[Piece]:
    big = 2**40
    shapes = {
        "plain": tensor((4,), (1,)),
        "stride0": tensor((10**6, 4), (0, 1)),
        "stride0_huge": tensor((2**61,), (0,)),
        "overlap": tensor((3, 3), (1, 1)),
        "offset": tensor((4,), (1,), 1),
        "negative": tensor((-4,), (1,)),
        "negative_stride": tensor((4,), (-1,)),
        "negative_offset": tensor((4,), (1,), -4),
        "count": tensor((8,), (1,), store=storage(count=8)),
        "count_huge": tensor((big,), (1,), store=storage(count=big)),
        "count_wraps": tensor((2**62,), (1,), store=storage(count=2**62)),
        "product_wraps": tensor((2**33, 2**33), (0, 0)),
        "empty_huge": tensor((0, 2**62), (1, 1)),
        "many_axes": tensor((1,) * 5000, (1,) * 5000),
        "missing_record": tensor((4,), (1,), store=storage(key="1")),
        "slip": tensor((4,), (1,), store=storage(key="../../etc/passwd")),
        "complex128": tensor((1,), (1,), store=storage("ComplexDouble")),
        "qint8": tensor((1,), (1,), store=storage("QInt8")),
        "setitem": tensor((4,), (1,)) + text("x") + b"K\x01s",
        "append": tensor((4,), (1,)) + b"K\x01a",
        "build": tensor((4,), (1,)) + b"}" + text("__class__") + b"K\x01sb",
        "setitem_storage": storage() + text("x") + b"K\x01s",
        "bytearray": b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R",
        "bytes": b"cbuiltins\nbytes\n\x8a\x05\0\0\0\0\x01\x85R",
        "range": b"cbuiltins\nlist\ncbuiltins\nrange\n\x8a\x05\0\0\0\0\x01\x85R\x85R",
        "sparse": b"ctorch._utils\n_rebuild_sparse_tensor\n)R",
        "size": b"ctorch\nSize\n(\x8a\x05\0\0\0\0\x01t\x85R",
        "ordered": b"ccollections\nOrderedDict\nK\x05\x85R",
        "parameter": b"ctorch._utils\n_rebuild_parameter\n)R",
        "subclass": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nmkdir\ncos\nmkdir\n"
        + text(str(canaries / "sub"))
        + b"\x85}tR",
        "subclass_loop": b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\nNNNtR",
        "encode": b"c_codecs\nencode\n(" + text("x") + text("rot13") + b"tR",
        "scalar": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(" + text("O8") + b"K\0K\x01tR" + text("x") + b"tR",
        "array": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85" + text("b") + b"tR(K\x01"
        b"\x8a\x05\0\0\0\0\x01\x85cnumpy\ndtype\n(" + text("f8") + b"K\0K\x01tR\x89" + text("") + b"tb",
        "deep_key": b"}" + b")" + b"\x85" * 199_000 + b"K\x01s",
        "deep_list": b"]" * 99_000 + b"a" * 98_999,
        "laughs": b"]" + b"\x94h\0h\0\x86" * 30,
        "self": b"}\x94" + text("state_dict") + b"h\0s",
        "long_number": b"\x8b" + struct.pack("<i", 500_000) + b"\x7f" * 500_000,
        "digits": b"L" + b"9" * 100_000 + b"L\n",
        "float": b"F" + b"9" * 100_000 + b"\n",
        "memo_far": b"K\x01r\xff\xff\xff\xff",
        "string_length": b"\x8d" + struct.pack("<Q", 2**62),
        "bytes_length": b"\x8e" + struct.pack("<Q", 2**62),
        "bytearray8": b"\x96" + struct.pack("<Q", 2**32),
        "frame": b"\x95" + struct.pack("<Q", 2**62),
        "buffer": b"\x97",
    }
    for name, value in shapes.items():
        for container in ("zip", "legacy"):
            yield f"{name}-{container}.pt", "tensors", contain(table(w=value), container)
    for order in (b"big", b"", b"little\0", bytes(10**6)):
        records = {"a/data.pkl": table(w=tensor((4,), (1,))), "a/data/0": bytes(16), "a/byteorder": order}
        yield f"byteorder-{order[:3].hex()}-{len(order)}.pt", "tensors", zipped(records)
    yield "opcodes.pt", "tensors", contain(b"\x80\x02" + b"}" * 10**6 + b".", "zip")
    yield "marks.pt", "tensors", contain(b"\x80\x02" + b"(" * 499_000 + b"t.", "zip")
    yield (
        "pickle_17mb.pt",
        "tensors",
        contain(b"\x80\x02}" + b"B" + struct.pack("<I", 2**24) + bytes(2**24) + b".", "zip"),
    )
    keys = b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"K\x01" for k in range(1, 60_000))
    yield "same_hash.pt", "tensors", contain(b"\x80\x02}(" + keys + b"u.", "zip")


# safetensors ----------------------------------------------------------------------------------------------------------


def raw(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(content) if length is None else length).to_bytes(8, "little") + content + data


def row(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors(canaries: Path) -> Iterator[Piece]:
    one = {"a": row([1], 0, 4)}
    files: dict[str, bytes] = {f"length-{n}": raw(one, bytes(4), n) for n in (0, 1, 7, 2**31, 2**32, 2**63, 2**64 - 1)}
    files |= {
        f"header-{k}": raw(header, bytes(4))
        for k, header in enumerate(
            (
                b"[]",
                b"{",
                b"{}",
                b"null",
                b'{"a":}',
                b'{"\xff":1}',
                b'{"a":1,"a":1}',
                b'{"a":{"dtype":"F32"}}',
                b" {}",
                b'{"a":' * 50000,
                b'{"a":' + b"[" * 50000,
                b"\xef\xbb\xbf{}",
                b"{}\x00",
                b"{} x",
                b'{"a":NaN}',
                b"{'a':1}",
            )
        )
    }
    rows: dict[str, Any] = {
        "hole": {"a": row([1], 0, 4), "b": row([1], 8, 12)},
        "overlap": {"a": row([2], 0, 8), "b": row([1], 4, 8)},
        "late": {"a": row([1], 4, 8)},
        "swapped": {"a": row([1], 4, 0)},
        "negative": {"a": row([1], -4, 0)},
        "short": {"a": row([2], 0, 4)},
        "long": {"a": row([1], 0, 8)},
        "overflow": {"a": row([2**40, 2**40], 0, 4)},
        "overflow0": {"a": row([2**40, 2**40, 0], 0, 0)},
        "wraps": {"a": row([2**62, 4], 0, 0)},
        "minus": {"a": row([-1, -1], 0, 4)},
        "float": {"a": row([1.0], 0, 4)},
        "exponent": {"a": row([1e300], 0, 4)},
        "bool": {"a": row([True], 0, 4)},
        "string": {"a": row(["1"], 0, 4)},
        "none": {"a": row([None], 0, 4)},
        "shape_text": {"a": {**row([], 0, 4), "shape": "1"}},
        "shape_table": {"a": {**row([], 0, 4), "shape": {"1": 1}}},
        "one_offset": {"a": {**row([], 0, 4), "data_offsets": [0]}},
        "three_offsets": {"a": {**row([], 0, 4), "data_offsets": [0, 4, 4]}},
        "extra_field": {"a": {**row([1], 0, 4), "x": 1}},
        "row_list": {"a": []},
        "row_null": {"a": None},
        "metadata_number": {"__metadata__": {"a": 1}, **one},
        "metadata_list": {"__metadata__": ["a"], **one},
        "metadata_null": {"__metadata__": None, **one},
        "metadata_deep": {"__metadata__": {"a": "[" * 10**5}, **one},
        "many_axes": {"a": row([1] * 10_000, 0, 4)},
        "name_path": {"../../../etc/passwd": row([1], 0, 4)},
        "name_nul": {"a\0b": row([1], 0, 4)},
        "name_escape": {"\x1b]52;c;eA==\x07\n\u202e": row([1], 0, 4)},
        "name_html": {"<img onerror=alert(1)>": row([1], 0, 4)},
        "name_long": {"a" * 10**6: row([1], 0, 4)},
        "name_empty": {"": row([1], 0, 4)},
        "name_surrogate": {"\ud800": row([1], 0, 4)},
        "name_metadata": {"__metadata__": row([1], 0, 4)},
        "name_digits": {"model.diffusion_model.input_blocks." + "9" * 5000 + ".0.weight": row([1], 0, 4)},
        "name_dots": {"." * 10**5: row([1], 0, 4)},
    }
    files |= {name: raw(header, bytes(4)) for name, header in rows.items()}
    for dtype in ("F33", "", "f32", 4, None, "F4", "F8_E8M0", "F6_E2M3", "C64", "U64", "BOOL", "F8_E4M3", ["F32"]):
        files[f"dtype-{dtype}"] = raw({"a": row([8], 0, 8 * 4, dtype)}, bytes(32))
        files[f"dtype-{dtype}-8"] = raw({"a": row([8], 0, 8, dtype)}, bytes(8))
    files["trailing"] = raw(one, bytes(5))
    files["cut"] = raw(one, bytes(3))
    files["bool_2"] = raw({"a": row([4], 0, 4, "BOOL")}, b"\2\3\xff\0")
    for word in ("nan", "inf", "-inf"):
        files[f"value-{word}"] = raw(one, struct.pack("<f", float(word)))
    files["twice_escaped"] = raw(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"\\u0061":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}',
        bytes(4),
    )
    files["minus_zero"] = raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', bytes(4))
    files["leading_zero"] = raw(b'{"a":{"dtype":"F32","shape":[01],"data_offsets":[0,4]}}', bytes(4))
    files["key_twice"] = raw(b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', bytes(4))
    files["digits"] = raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**5 + b'],"data_offsets":[0,4]}}', bytes(4))
    files["padded"] = raw(json.dumps(one).encode() + b" " * 1000, bytes(4))
    files["newline_in_name"] = raw(b'{"a\n":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4))
    for name, content in files.items():
        yield f"{name}.safetensors", "tensors", content
    empty = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    huge: dict[str, Callable[[], bytes]] = {
        "million_tensors": lambda: b",".join(empty % k for k in range(10**6)),
        "too_many_tensors": lambda: b",".join(empty % k for k in range(80_000)),
        "many_tensors": lambda: b",".join(empty % k for k in range(19_999)),
        "lists": lambda: b'"a":[' + b",".join([b"[]"] * 5 * 10**6) + b"]",
        "dicts": lambda: b'"a":[' + b",".join([b"{}"] * 450_000) + b"]",
        "integers": lambda: b'"a":[' + b",".join([b"1"] * 990_000) + b"]",
        "sixty_megabytes": lambda: b'"__metadata__":{"a":"' + b"x" * 60_000_000 + b'"}',
        "metadata_15": lambda: b'"__metadata__":{"a":"' + b"\\u0041" * 2_500_000 + b'"}',
    }
    for name, middle in huge.items():
        yield f"{name}.safetensors", "tensors", written(raw, middle)


def written(pack: Callable[[bytes], bytes], middle: Callable[[], bytes]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(pack(b"{" + middle() + b"}"))


def zips(canaries: Path) -> Iterator[Piece]:
    pickled = table(w=tensor((4,), (1,)))
    good = {"a/data.pkl": pickled, "a/data/0": bytes(16), "a/byteorder": b"little"}
    whole = zipped(good)
    end = whole.rindex(b"PK\5\6")
    central = whole.index(b"PK\1\2")
    files = {
        "plain": whole,
        "slip": zipped({**good, "../../canary": b"x"}),
        "absolute": zipped({**good, "/tmp/canary": b"x"}),
        "deflated": zipped(good, method=zipfile.ZIP_DEFLATED),
        "bzip2": zipped(good, method=zipfile.ZIP_BZIP2),
        "lzma": zipped(good, method=zipfile.ZIP_LZMA),
        "bomb": zipped({**good, "a/data/0": bytes(10**8)}, method=zipfile.ZIP_DEFLATED),
        "symlink": zipped(good, external_attr=0o120777 << 16),
        "no_pickle": zipped({"a/data/0": bytes(16)}),
        "two_pickles": zipped({**good, "b/data.pkl": pickled}),
        "deep_pickle": zipped({"a/b/c/data.pkl": pickled}),
        "empty": zipped({}),
        "many": zipped({**good, **{f"a/data/x{k}": b"" for k in range(20_000)}}),
        "names": zipped({**good, "a/" + "x" * 60_000: b""}),
        "unicode": zipped({**good, "a/\u202e\x1b]0;x\x07": b""}),
        "backslash": zipped({"a\\data.pkl": pickled}),
        "trailing": whole + b"x",
        "comment": whole[:-2] + b"\5\0hello",
        "comment_end": whole[:-2] + b"\x16\0" + whole[end:],
        "prefix": b"PK\3\4" + whole,
        "no_end": whole[:end],
        "end_twice": whole + whole[end:],
    }
    for name, at, value in (
        ("count", end + 10, b"\xff\x7f"),
        ("count_small", end + 10, b"\1\0"),
        ("directory_size", end + 12, b"\xff\xff\xff\x7f"),
        ("directory_offset", end + 16, b"\0\0\0\0"),
        ("record_offset", central + 42, b"\xff\xff\xff\x7f"),
        ("record_size", central + 20, b"\xff\xff\xff\x7f\xff\xff\xff\x7f"),
        ("zip64_size", central + 20, b"\xff\xff\xff\xff\xff\xff\xff\xff"),
        ("encrypted", central + 8, b"\1\0"),
        ("method", central + 10, b"\x63\0"),
        ("name_length", central + 28, b"\xff\xff"),
        ("extra_length", central + 30, b"\xff\xff"),
        ("local_name", 30, b"b"),
        ("local_extra", 28, b"\xff\xff"),
        ("local_method", 8, b"\x08\0"),
        ("not_utf8", central + 46, b"\xff"),
    ):
        files[name] = whole[:at] + value + whole[at + len(value) :]
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 2**63, 1)
    files["zip64_far"] = whole[:end] + locator + whole[end:]
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2**60, 2**60, 2**60, 0)
    files["zip64_count"] = whole[:end] + record + struct.pack("<4sLQL", b"PK\6\7", 0, end, 1) + whole[end:]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        with __import__("warnings").catch_warnings():
            __import__("warnings").simplefilter("ignore")
            archive.writestr("a/data.pkl", table(w=b"cos\nmkdir\n" + text(str(canaries / "second")) + b"\x85R"))
    files["duplicate"] = buffer.getvalue()
    for name, content in files.items():
        yield f"{name}.ckpt", "tensors", content


def adapters(canaries: Path) -> Iterator[Piece]:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
    down, up = torch.ones(2, 32), torch.ones(32, 2)

    def lora(metadata: dict[str, str] | None = None, **parts: torch.Tensor) -> bytes:
        tensors = {f"{layer}.{name.replace('_weight', '.weight')}": value for name, value in parts.items()}
        return save_safetensors({key: value.contiguous() for key, value in tensors.items()}, metadata)

    pair = {"lora_down_weight": down, "lora_up_weight": up}
    files = {
        "plain": lora(**pair),
        "rank0": lora(lora_down_weight=torch.ones(0, 32), lora_up_weight=torch.ones(32, 0)),
        "rank_million": lora(lora_down_weight=torch.ones(100_000, 32), lora_up_weight=torch.ones(32, 100_000)),
        "mismatch": lora(lora_down_weight=down, lora_up_weight=torch.ones(32, 3)),
        "width": lora(lora_down_weight=torch.ones(2, 33), lora_up_weight=up),
        "conv": lora(lora_down_weight=torch.ones(2, 32, 3, 3), lora_up_weight=torch.ones(32, 2, 1, 1)),
        "axes": lora(lora_down_weight=torch.ones((2,) + (1,) * 60), lora_up_weight=up),
        "scalar": lora(lora_down_weight=torch.tensor(1.0), lora_up_weight=torch.tensor(1.0)),
        "vector": lora(lora_down_weight=torch.ones(2), lora_up_weight=torch.ones(32)),
        "only_down": lora(lora_down_weight=down),
        "only_alpha": lora(alpha=torch.tensor(1.0)),
        "both_kinds": lora(**pair, hada_w1_a=torch.ones(32, 2), lokr_w1=torch.ones(2, 2)),
        "factors": lora(lora_down_weight=torch.full((2, 32), 3e38), lora_up_weight=torch.full((32, 2), 3e38)),
        "kron": lora(lokr_w1=torch.ones(10**4, 10**4).half()[:2000, :2000], lokr_w2=torch.ones(2000, 2000).half()),
        "kron_small": lora(lokr_w1=torch.ones(7, 5), lokr_w2=torch.ones(3, 3)),
        "dora": lora(**pair, dora_scale=torch.zeros(32, 1)),
        "dora_axes": lora(**pair, dora_scale=torch.zeros(3, 5, 7)),
        "diff": lora(diff=torch.ones(5)),
        "diff_nan": lora(diff=torch.full((32, 32), torch.nan)),
    }
    for word in ("nan", "inf", "-inf", "0", "1e38", "-1"):
        files[f"alpha-{word}"] = lora(**pair, alpha=torch.tensor(float(word)))
        files[f"value-{word}"] = lora(lora_down_weight=torch.full((2, 32), float(word)), lora_up_weight=up)
    files["alpha_vector"] = lora(**pair, alpha=torch.ones(5))
    files["alpha_empty"] = lora(**pair, alpha=torch.ones(0))
    for dtype in (
        torch.complex64,
        torch.bool,
        torch.int64,
        torch.uint8,
        torch.float64,
        torch.float8_e5m2,
        torch.uint64,
    ):
        files[f"dtype-{str(dtype)[6:]}"] = lora(lora_down_weight=down.to(dtype), lora_up_weight=up.to(dtype))
        files[f"alpha-{str(dtype)[6:]}"] = lora(**pair, alpha=torch.ones(()).to(dtype))
    for k, config in enumerate(
        (
            "[]",
            "{",
            "1",
            '{"unet.lora_alpha": 1e999}',
            '{"unet.lora_alpha": ' + "9" * 400 + "}",
            "[" * 10**5,
            '{"": 1}',
            '{"unet.alpha_pattern": 3}',
            '{"unet.alpha_pattern": {"a": [1]}}',
            '{"unet.r": "x"}',
            '{"unet": {"a": 1}}',
            '{"unet.alpha_pattern": {"(a+)+$": 1}}',
            '{"unet.lora_alpha": NaN}',
            '{"unet.alpha_pattern": {"1": null}}',
            '{"unet.lora_alpha": "1"}',
            '{"unet.use_rslora": 7, "unet.lora_alpha": 4}',
        )
    ):
        parts = {
            f"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.lora_{n}.weight": v
            for n, v in (("A", down), ("B", up))
        }
        files[f"config-{k}"] = save_safetensors(parts, {"lora_adapter_metadata": config})
    vectors: dict[str, dict[str, torch.Tensor]] = {
        "vectors": {"emb_params": torch.ones(2, 16)},
        "vectors_none": {"emb_params": torch.ones(0, 16)},
        "vectors_many": {"emb_params": torch.ones(100_000, 16)},
        "vectors_width": {"emb_params": torch.ones(2, 17)},
        "vectors_width0": {"emb_params": torch.ones(2, 0)},
        "vectors_nan": {"emb_params": torch.full((2, 16), torch.nan)},
        "vectors_complex": {"emb_params": torch.ones(2, 16, dtype=torch.complex64)},
        "vectors_bool": {"emb_params": torch.ones(2, 16, dtype=torch.bool)},
        "vectors_axes": {"emb_params": torch.ones(1, 1, 1, 16)},
        "vectors_name": {"\x1b[2J<evil>": torch.ones(16)},
        "vectors_long_name": {"x" * 10**5: torch.ones(16)},
        "vectors_pair": {"clip_l": torch.ones(2, 16), "clip_g": torch.ones(3, 16)},
        "vectors_bundle": {"bundle_emb.a.string_to_param.*": torch.ones(2, 16), "bundle_emb.a.x": torch.ones(1)},
        "vectors_thousand_names": {f"<{k}>": torch.ones(16) for k in range(2000)},
    }
    files |= {name: save_safetensors(tensors) for name, tensors in vectors.items()}
    for name, content in files.items():
        yield f"{name}.safetensors", "tensors", content


def honest() -> dict[str, bytes]:
    tensors = {"ab": torch.arange(6.0).reshape(2, 3), "c": torch.zeros(4).half(), "emb_params": torch.ones(8, 16)}
    buffers = {"safetensors": save_safetensors(tensors, {"k": "v"})}
    for suffix, new in (("pt", True), ("bin", False)):
        buffer = io.BytesIO()
        torch.save(tensors, buffer, _use_new_zipfile_serialization=new)
        buffers[suffix] = buffer.getvalue()
    return buffers


def damaged(long: bool) -> Iterator[Piece]:
    """Cut files, at every byte of a header and at 200 places of the data, and flip bits, 1,000 in each."""
    for suffix, whole in honest().items():
        header = 8 + int.from_bytes(whole[:8], "little") if suffix == "safetensors" else 64
        cuts = sorted({*range(header), *(header + (len(whole) - header) * k // 200 for k in range(200))})
        random.seed(suffix)
        flips = [(random.randrange(len(whole)), 1 << random.randrange(8)) for _ in range(1000)]
        for cut in cuts if long else cuts[::20]:
            yield f"cut-{cut}.{suffix}", "tensors", whole[:cut]
        for at, bit in flips if long else flips[::50]:
            yield f"flip-{at}-{bit}.{suffix}", "tensors", whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]


def sparse(size: int, head: bytes = b"") -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.write(head)
            file.truncate(size)

    return make


TERABYTE = 2**40


def special() -> Iterator[Piece]:
    makers: dict[str, Callable[[Path], Any]] = {
        "fifo": os.mkfifo,
        "zero": lambda path: path.symlink_to("/dev/zero"),
        "random": lambda path: path.symlink_to("/dev/urandom"),
        "loop": lambda path: path.symlink_to(path.name),
        "dangling": lambda path: path.symlink_to("nowhere"),
        "folder": Path.mkdir,
        "to_folder": lambda path: path.symlink_to("/proc"),
        "proc": lambda path: path.symlink_to("/proc/self/mem"),
        "empty": lambda path: path.write_bytes(b""),
        "sparse": sparse(TERABYTE),
    }
    for suffix in ("safetensors", "pt"):
        for name, make in makers.items():
            yield f"{name}.{suffix}", "tensors", make
    length = TERABYTE - 8 - 100
    header = json.dumps({"a": row([length - 10], 0, length - 10, "U8")}).encode()
    whole = (TERABYTE - 8 - length).to_bytes(8, "little") + header.ljust(100)
    yield "sparse_tensor.safetensors", "tensors", sparse(TERABYTE - 10, whole)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q.diff"
    mixed = {name: row([32, 32], 0, 4096), "rest": row([TERABYTE], 4096, 4096 + TERABYTE, "U8")}
    lora = raw(mixed)
    yield "sparse_lora.safetensors", "tensors", sparse(TERABYTE + len(lora) + 4096, lora)
    yield "sparse_zip.ckpt", "tensors", sparse(TERABYTE, zipped({"a/data.pkl": table()}))
    for door in DOORS:
        for name, make in makers.items():
            yield f"{name}{Path(door).suffix}", door, make


# Pictures, and the files of a model's folder --------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    *chunks: bytes, size: tuple[int, int] = (8, 8), depth: int = 8, kind: int = 2, data: bytes | None = None
) -> bytes:
    header = chunk(b"IHDR", struct.pack(">2I5B", *size, depth, kind, 0, 0, 0))
    pixels = zlib.compress(bytes(size[1] * (1 + 3 * size[0])) if data is None else data)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def encoded(form: str, size: tuple[int, int] = (64, 64), mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, form, **options)
    return buffer.getvalue()


@functools.cache
def packed_zeros() -> bytes:
    return zlib.compress(bytes(200_000_000))


def images(canaries: Path) -> Iterator[Piece]:
    small = png()
    files = {
        "plain.png": small,
        "bomb_size.png": png(size=(60_000, 60_000), data=b""),
        "bomb_2_31.png": png(size=(2**31 - 1, 2**31 - 1), data=b""),
        "zero.png": png(size=(0, 0), data=b""),
        "wide.png": png(size=(10**6, 1)),
        "no_data.png": png(data=b""),
        "bomb_idat.png": png(data=bytes(50_000_000)),
        "ztxt_bomb.png": png(chunk(b"zTXt", b"parameters\0\0" + packed_zeros())),
        "itxt_bomb.png": png(chunk(b"iTXt", b"mezzotint\0\1\0\0\0" + packed_zeros())),
        "iccp_bomb.png": png(chunk(b"iCCP", b"x\0\0" + packed_zeros())),
        "exif_bomb.png": png(chunk(b"eXIf", b"MM\0*" + b"\xff" * 1000)),
        "exif_loop.png": png(chunk(b"eXIf", b"II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\0\0\0\0")),
        "many_texts.png": png(*(chunk(b"tEXt", b"k%d\0v" % k) for k in range(20_000))),
        "long_text.png": png(chunk(b"tEXt", b"parameters\0" + b"x" * 10**6)),
        "no_plte.png": png(kind=3, data=bytes(72)),
        "odd_depth.png": png(depth=3),
        "sixteen.png": png(depth=16, kind=0, data=bytes(8 * 17)),
        "apng.png": png(chunk(b"acTL", struct.pack(">2I", 10**6, 0))),
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        "html.png": b"<html><script>alert(1)</script>",
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (w) file",
        "pdf.png": b"%PDF-1.4\n",
        "pickle.png": b"\x80\x04" + attacks(str(canaries / "png"))["global"] + b".",
        "zip.png": zipped({"a": b"b"}),
        "gif_frames.png": encoded(
            "GIF",
            (8, 8),
            save_all=True,
            append_images=[Image.new("RGB", (8, 8), (k % 256, k // 256, 0)) for k in range(300)],
        ),
        "fits.png": b"SIMPLE  =                    T" + bytes(3000),
        "bmp.png": encoded("BMP"),
        "bmp_huge.png": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
        "tga.png": encoded("TGA"),
        "ico.png": encoded("ICO"),
        "psd.png": b"8BPS\0\1" + bytes(100),
        "empty.png": b"",
        "one.png": b"\x89",
    }
    for key in ("mezzotint", "parameters", "prompt", "workflow", "invokeai_metadata", "sd-metadata"):
        for k, value in enumerate(
            (
                "{",
                "[]",
                "null",
                "{}",
                "[" * 100000,
                '{"a":' * 50000,
                "NaN",
                '{"version": 1e999}',
                "9" * 5000,
                "\x1b]0;x\x07",
                '{"1": {"inputs": {"a": ["1", 0]}}}',
                '{"3": {"class_type": "KSampler", "inputs": {"model": ["3", 0]}}}',
                '{"1": 1}',
                "a\nNegative prompt: b\nSteps: " + "9" * 400 + ", Sampler: x, Size: 99999999x99999999",
                "Steps: 1, " * 20000,
            )
        ):
            files[f"{key}-{k}.png"] = png(chunk(b"tEXt", key.encode() + b"\0" + value.encode("latin-1")))
    last = "\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model: "
    for k, prompt in enumerate(
        ("a AND " * 1000, "a AND " * 15_000, "((((" * 10_000, "[a:b:" * 5000, "<lora:../x:1>" * 1000)
    ):
        files[f"words-{k}.png"] = png(chunk(b"tEXt", f"parameters\0{prompt}{last}\x1b[2J".encode()))
    node = {"class_type": "KSampler", "inputs": {"model": ["3", 0], "positive": ["6", 0], "negative": ["6", 0]}}
    graph = {"3": node, "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a" * 20_000, "clip": ["6", 0]}}}
    graph["5"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64}}
    node["inputs"]["latent_image"] = ["5", 0]
    files["graph_loop.png"] = png(chunk(b"tEXt", b"prompt\0" + json.dumps(graph).encode()))
    for k, vectors in enumerate(([[0.1] * 16, [0.1] * 15], [[[0.1]]], 5, [[1e400]], [[0.1] * 16] * 5000, [["x"]], [])):
        held = {"name": "\x1b[2J" * 1000, "string_to_param": {"*": {"TORCHTENSOR": vectors}}}
        text_chunk = b"sd-ti-embedding\0" + base64.b64encode(json.dumps(held).encode())
        files[f"embedding-{k}.png"] = png(chunk(b"tEXt", text_chunk))
    for form, suffix in (("JPEG", "jpg"), ("WEBP", "webp"), ("TIFF", "tif")):
        whole = encoded(form)
        files[f"plain.{suffix}"] = whole
        for cut in (4, len(whole) // 2, len(whole) - 3):
            files[f"cut-{cut}.{suffix}"] = whole[:cut]
        files[f"huge.{suffix}"] = whole.replace(b"\0\x40\0\x40", b"\xff\xff\xff\xff")
    files["cmyk.jpg"] = encoded("JPEG", mode="CMYK")
    files["tiff_bomb.tif"] = b"II*\0\x08\0\0\0\xff\xff" + b"\0\1\4\0\1\0\0\0\xff\xff\xff\x7f" * 1000
    for cut in range(8, len(small), 6):
        files[f"cut-{cut}.png"] = small[:cut]
    for name, content in files.items():
        yield name, "image", content


DOORS = (
    "model_index.json",
    "mezzotint.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/diffusion_pytorch_model.safetensors",
    "prompts.csv",
    "prompts.jsonl",
    "recipe.toml",
    "wildcard.txt",
)
VALUES = (-1, 0, 10**6, 10**18, 10**400, 1e308, -1.5, "x", None, True, [], {}, [[1]], ["x"] * 1000, {"a": {"b": 1}})


NOWHERE = "/dev/zero"
ODD: dict[str, list[dict[str, Any]]] = {  # fields that are plausible one by one, and names that lead out of the folder
    "model_index.json": [
        {f"part{k}": ["a", "\x1b[2J"] for k in range(3000)},
        {"safety_checker": ["x", "Evil"]},
        {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]},
        {"unet": ["evil_module", "UNet2DConditionModel"]},
        {"text_encoder": ["transformers", "T5EncoderModel"]},
        {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
    ],
    "mezzotint.json": [
        {"image": NOWHERE, "mask": NOWHERE},
        {"loras": [[NOWHERE, 1.0]], "lora_folder": "/"},
        {"embeddings": ["/"], "wildcards": "/", "prompt_syntax": "comfy"},
        {"loras": [["someone/lora", 1.0]]},
        {"count": 10_000, "batch": 10_000},
        {"hires": 8.0, "hires_steps": 1000},
        {"negative_prompt": "a AND " * 15_000},
        {"few_step": {"sampler": "lcm", "steps": 4, "guidance_scale": 1.0, "lora": "../x.safetensors"}},
    ],
    "unet/config.json": [
        *({"sample_size": size} for size in (2**20, 1024, [4, 4])),
        *({"attention_head_dim": heads} for heads in (0, 3, [3, 2], [2, 0])),
        {"num_attention_heads": 0},
        {"cross_attention_dim": [16, 16]},
        {"freq_shift": 8},
        {"layers_per_block": [1, 10**9]},
        {"transformer_layers_per_block": [[1] * 10_000, 1]},
        {"down_block_types": ["AttnDownBlock2D", "\x1b[2J"]},
    ],
    "vae/config.json": [
        {"scaling_factor": 1e-300},
        {"latents_mean": [0] * 4, "latents_std": [1e-300] * 4},
        {"block_out_channels": [8] * 16},
        {"latent_channels": 16},
    ],
    "text_encoder/config.json": [
        *({"num_attention_heads": heads} for heads in (0, 3, 16)),
        *({"max_position_embeddings": positions} for positions in (1, 2**20)),
        *({"num_hidden_layers": layers} for layers in (0, 2)),
        {"eos_token_id": 10**6},
        {"auto_map": {"AutoModel": "evil.Model"}, "torch_dtype": "os.system"},
    ],
    "scheduler/scheduler_config.json": [
        {"trained_betas": [float("nan")] * 1000},
        {"trained_betas": [0.1] * 10**6},
        {"prediction_type": "v-prediction"},
        {"beta_start": 0.9, "beta_end": 0.1},
        {"num_train_timesteps": 2},
        {"_class_name": "EDMEulerScheduler", "sigma_min": 80.0, "sigma_max": 0.002},
        {"_class_name": "LCMScheduler", "original_inference_steps": 10**9},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 10**9},
    ],
    "tokenizer/tokenizer_config.json": [
        *({"model_max_length": length} for length in (2, 3, 78, 10**6, 1e30, "77", [], -1)),
        *({"added_tokens_decoder": tokens} for tokens in ({"x": {"content": "a"}}, [], {"1": {"content": None}})),
        {"unk_token": ""},
        {"bos_token": 5},
        {"additional_special_tokens": ["a", {"content": "lemon"}]},
    ],
}


def tokenizers(whole: dict[str, Any]) -> tuple[bytes, ...]:
    """Return tokenizer.json files whose tables do not hold together."""

    def changed(**fields: Any) -> bytes:
        return json.dumps({**whole, "model": {**whole["model"], **fields}}).encode()

    def with_added(*contents: str) -> bytes:
        flags = {"lstrip": True, "rstrip": True, "single_word": False, "special": False}
        added = [{"id": 600 + k, "content": content, **flags} for k, content in enumerate(contents)]
        return json.dumps({**whole, "added_tokens": added}).encode()

    vocab = whole["model"]["vocab"]
    return (
        *(changed(vocab=table) for table in ({}, [], {**vocab, "x": -1}, {**vocab, "x": 10**9}, {**vocab, "x": 1.5})),
        *(changed(merges=merges) for merges in ([["a", "b", "c"]], ["a b"] * 10, [["zz", "yy"]], [5])),
        changed(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[]),
        changed(vocab={key: value for key, value in vocab.items() if key != "<|endoftext|>"}),
        changed(vocab={"a": 0}, merges=[]),
        *map(with_added, ("", " ", "a", "\x1b[2J", "x" * 10**6)),
        with_added(*(f"t{k}" for k in range(50_000))),
    )


def configs(folder: Path, long: bool) -> Iterator[Piece]:
    """Replace each file of a model's folder by nonsense, and each of its fields by each of VALUES."""
    nonsense = (
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"9" * 10_000,
        b"{}",
        b"\0" * 100,
    )
    for door in DOORS:
        for k, content in enumerate(nonsense):
            yield f"nonsense-{k}{Path(door).suffix}", door, content
        if not door.endswith(".json"):
            continue
        fields = json.loads((folder / door).read_text())
        every = itertools.product(itertools.islice(fields, 40), VALUES)
        for k, (name, value) in enumerate(every):
            if k % (3 if long else 20) == 0:
                yield f"{name[:30]}-{k}.json", door, json.dumps({**fields, name: value}).encode()
    for door, changes in ODD.items():
        fields = json.loads((folder / door).read_text())
        for k, change in enumerate(changes):
            yield f"odd-{k}.json", door, json.dumps({**fields, **change}).encode()
    for door in (door for door in DOORS if door.endswith("g.json")):
        whole = (folder / door).read_text()
        yield "bom.json", door, whole.encode("utf-8-sig")
        yield "utf16.json", door, whole.encode("utf-16")
    rows = {
        "tokenizer/tokenizer.json": tokenizers(json.loads((folder / "tokenizer/tokenizer.json").read_text())),
        "prompts.csv": (
            b"prompt\n" + b"x" * 10**6,
            b"prompt,prompt\na,b\n",
            b"a,b\n",
            b"prompt\n\xff\n",
            b'prompt\n"',
            b"prompt\n\x00\n",
            b"prompt,steps\na,1e9\n",
            b"prompt,width\na," + b"9" * 5000 + b"\n",
            b"prompt,seed\na,[[[[\n",
            b"," * 10**5,
        ),
        "prompts.jsonl": (
            b'{"prompt":' * 10**4,
            b'{"prompt":"a","steps":1e400}\n',
            b'{"prompt":"a","image":"/dev/zero"}\n',
            b"x" * 5 * 10**6,
            b'{"prompt":"\\ud800"}',
            b'{"prompt":null}',
            b'{"prompt":"a","seed":' + b"9" * 4000 + b"}",
        ),
        "recipe.toml": (
            b"a=" + b"[" * 10**4,
            b'data="x"\nsteps=1e999',
            b"data=1",
            b'data="\\u0000"',
            b"x=" + b"9" * 5000,
        ),
        "wildcard.txt": (
            b"__x__",
            b"{" * 10**4,
            b"{a|" * 3000,
            b"\x1b[2J",
            b"\xff",
            b"a\n" * 10**6,
            b"{9999999$$a}",
            b"{1e9::a|b}",
        ),
        "tokenizer/merges.txt": (b"a b c\n", b"a\n", b"x y\n" * 10**5, b"#version: 0.2\n", b" \n"),
    }
    for door, contents in rows.items():
        for k, content in enumerate(contents):
            yield f"row-{k}{Path(door).suffix}", door, content


def write(folder: Path, model: Path, *, long: bool, every: int = 1) -> Iterator[Case]:
    """Write the corpus below a folder; the short form has every hand-made file that is quick, and samples of the rest.

    Args:
        folder: Where to write.
        model: A whole model's folder, whose configs are changed.
        long: Whether to write all of it.
        every: Write only each of this many files of a group.
    """
    canaries = folder / "canaries"
    canaries.mkdir(parents=True)
    groups: dict[str, Iterator[Piece]] = {
        "pickle execution": executions(canaries),
        "scanner bypasses": bypasses(canaries),
        "torch shapes": torch_shapes(canaries),
        "safetensors": safetensors(canaries),
        "zip": zips(canaries),
        "LoRA and embeddings": adapters(canaries),
        "cut and flipped": damaged(long),
        "special files": special(),
        "pictures": images(canaries),
        "configs and texts": configs(model, long),
    }
    for group, pieces in groups.items():
        place = folder / group.replace(" ", "_")
        for k, (name, door, content) in enumerate(pieces):
            if k % every:
                continue
            path = place / f"{k}" / name.replace("/", "_")
            path.parent.mkdir(parents=True)
            content(path) if callable(content) else path.write_bytes(content)
            yield Case(group, f"{k} {name}", door, path)
