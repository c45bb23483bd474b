"""PyTorch files read as data: equal to torch.load on honest files, a sentence on the others."""

from __future__ import annotations

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mezzotint.errors import CheckpointError
from mezzotint.weights import pickles
from mezzotint.weights.files import TensorFile

TENSORS = {
    "half": torch.arange(12).reshape(3, 4).half(),
    "brain": torch.randn(2, 3).bfloat16(),
    "eight": torch.randn(5).to(torch.float8_e4m3fn),
    "t": torch.arange(12.0).reshape(3, 4).T,
    "part": torch.arange(20)[4:10],
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "flag": torch.tensor([True, False]),
    "wide": torch.tensor([2**63], dtype=torch.uint64),
    "pair": torch.complex(torch.ones(2), torch.zeros(2)),
    "p": torch.nn.Parameter(torch.ones(2)),
}


def save(path: Path, thing: Any, *, old: bool = False) -> TensorFile:
    torch.save(thing, path, _use_new_zipfile_serialization=not old)
    return TensorFile(path)


def same(file: TensorFile, tensors: dict[str, torch.Tensor]) -> None:
    assert set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        assert file.entries[name].dtype == tensor.dtype and file.entries[name].shape == tensor.shape
        raw = file.read(name).contiguous().reshape(-1).view(torch.uint8)
        assert raw.equal(tensor.detach().contiguous().reshape(-1).view(torch.uint8)), name


def refusal(path: Path, thing: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        save(path, thing, **options)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("old", [False, True])
def test_every_dtype_and_view(old: bool, tmp_path: Path) -> None:
    same(save(tmp_path / "a.pt", OrderedDict(TENSORS), old=old), TENSORS)


def repack(path: Path, extra: bytes = b"", rename: dict[str, bytes] | None = None) -> TensorFile:
    """Write a file of torch.save again with zipfile, its records in another order and with another padding."""
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        new.writestr("archive/", b"")
        for row in sorted(old.infolist(), key=lambda row: row.filename[::-1]):
            info = zipfile.ZipInfo(row.filename)
            info.extra = extra
            data = old.read(row)
            new.writestr(info, (rename or {}).get(row.filename.partition("/")[2], data))
    return TensorFile(path)


def test_a_file_that_another_program_has_packed_again(tmp_path: Path) -> None:
    same(repack(tmp_path / "a.ckpt"), TENSORS)
    same(repack(tmp_path / "b.ckpt", extra=b"ab\5\0hello"), TENSORS)


def test_the_byte_order_must_be_little(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="byte order is 'big'"):
        repack(tmp_path / "a.pt", rename={"byteorder": b"big"})
    same(repack(tmp_path / "b.pt", rename={"byteorder": b"little"}), TENSORS)


def named(module: str, name: str, base: type = object) -> Any:
    """Make a class that pickles under this name."""
    made = type(name, (base,), {"__module__": module})
    parts = module.split(".")
    for k in range(len(parts)):
        sys.modules.setdefault(".".join(parts[: k + 1]), types.ModuleType(parts[k]))
    setattr(sys.modules[module], name, made)
    return made


@pytest.mark.parametrize("module", ["pytorch_lightning.x.y", "lightning.pytorch.z", "omegaconf.dictconfig"])
def test_what_lightning_leaves_behind_is_inert(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        for k in range(len(module.split("."))):
            patch.setitem(sys.modules, ".".join(module.split(".")[: k + 1]), types.ModuleType("x"))
        thing = named(module, "Thing")()
        thing.field = [1]
        table = named(module, "AttributeDict", dict)({"lr": 1.0})
        torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": {thing: 1}, "hyper": table}, tmp_path / "a.ckpt")
    same(TensorFile(tmp_path / "a.ckpt"), {"w": torch.ones(2)})


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_numpy_is_data(module: bytes, tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
    }
    buffer = io.BytesIO()
    torch.save({**arrays, "loss": np.float64(0.25), "w": torch.ones(2), "o": 7}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "a.ckpt", "w") as new:
        for row in old.infolist():
            new.writestr(row.filename, old.read(row).replace(b"numpy._core.multiarray", module))
    file = TensorFile(tmp_path / "a.ckpt")
    assert file.scalars == {"loss": 0.25, "o": 7}
    native = {name: torch.from_numpy(array.astype(array.dtype.newbyteorder("="))) for name, array in arrays.items()}
    for name, tensor in native.items():
        assert file.entries[name].dtype == tensor.dtype
        assert torch.equal(file.read(name), tensor)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.ones(1).expand(512, 10**6), "expanded"),
        (lambda: torch.arange(7.0).as_strided((4, 4), (1, 1)), "expanded"),
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
        (lambda: torch.zeros(4, dtype=torch.uint8).view(torch.bits8), "of the type bits8"),
        (lambda: torch.ones(2, device="meta"), "without values"),
        (lambda: torch.complex(torch.ones(2), torch.ones(2)).conj(), "conjugated"),
        (lambda: torch.ones(2, dtype=torch.complex128), "of the type ComplexDoubleStorage"),
    ],
)
def test_a_tensor_of_another_kind_is_named(make: Any, words: str, old: bool, tmp_path: Path) -> None:
    tensor = make()
    message = refusal(tmp_path / "a.pt", {"w": tensor}, old=old)
    assert "'w' is " in message and words in message
    same(
        save(tmp_path / "b.pt", {"state_dict": {"v": torch.ones(1)}, "x": {"w": tensor}}, old=old), {"v": torch.ones(1)}
    )


def test_a_compressed_archive_says_what_to_do(tmp_path: Path) -> None:
    """What it says is enough: the same records, stored, are read."""
    torch.save({"w": torch.ones(4)}, tmp_path / "a.pt")
    for method, name in ((zipfile.ZIP_DEFLATED, "b.pt"), (zipfile.ZIP_STORED, "c.pt")):
        with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / name, "w", method) as new:
            for row in old.infolist():
                new.writestr(row.filename, old.read(row))
    with pytest.raises(CheckpointError, match=r"b\.pt .* is compressed; unpack it and pack it again .* `zip -0 -r`$"):
        TensorFile(tmp_path / "b.pt")
    same(TensorFile(tmp_path / "c.pt"), {"w": torch.ones(4)})
    with zipfile.ZipFile(tmp_path / "d.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("d/code/__torch__.py", "1" * 100)
    with pytest.raises(CheckpointError, match="it is a TorchScript program, not weights"):
        TensorFile(tmp_path / "d.pt")


@pytest.mark.parametrize("names", ["state_dict state_dict", "state_dict model", "model module state_dict"])
def test_tables_in_tables(names: str, tmp_path: Path) -> None:
    nested: Any = {"w": torch.ones(4)}
    for name in names.split():
        nested = {name: nested}
    same(save(tmp_path / "a.pt", nested), {"w": torch.ones(4)})


def in_zip(path: Path, pickled: bytes) -> TensorFile:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/data/0", bytes(16))
    return TensorFile(path)


STORAGE = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI4\ntQ"


def rebuilt(
    storage: bytes = STORAGE, offset: int = 0, shape: str = "I4\n", stride: str = "I1\n", name: bytes = b"w"
) -> bytes:
    """Return the pickle of {"w": a tensor}."""
    view = b"(%bI%d\n(%bt(%btI00\nccollections\nOrderedDict\n)Rt" % (storage, offset, shape.encode(), stride.encode())
    return b"\x80\2}V%b\nctorch._utils\n_rebuild_tensor_v2\n%bRs." % (name, view)


def test_a_pickle_by_hand(tmp_path: Path) -> None:
    same(in_zip(tmp_path / "a.pt", rebuilt()), {"w": torch.zeros(4)})
    empty = in_zip(tmp_path / "b.pt", rebuilt(shape="I0\n", offset=72_057_594_021_150_720))
    assert empty.entries["w"].start < 1000, "an empty tensor has no offset"
    same(empty, {"w": torch.zeros(0)})


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (b"\x80\2}Vw\ncbuiltins\nbytearray\n\x8a\5\0\0\0\0\1\x85Rs.", r"Python code \(builtins.bytearray\)"),
        (rebuilt(STORAGE.replace(b"I4", b"I5")), "outside the file"),
        (rebuilt(offset=1), "outside its storage"),
        (rebuilt(shape="I4\nI1\n", stride="I1\n"), "shape or stride"),
        (rebuilt(shape="I4\nI1099511627776\n", stride="I0\nI0\n"), "expanded"),
        (rebuilt(shape="I4\nI1099511627776\nI1099511627776\n", stride="I0\nI0\nI0\n"), "too large"),
        (rebuilt(shape="I-4\n"), "shape or stride"),
        (rebuilt(stride="I-1\n"), "shape or stride"),
        (rebuilt(STORAGE.replace(b"V0", b"V../0")), "missing"),
        (rebuilt(STORAGE.replace(b"Float", b"QInt8")), "of the type QInt8Storage"),
        (b"\x80\2}" + b"(" * 10 + b"0" * 11 + b"s.", "do not fit together"),
        (b"\x80\2}" + b"}" * 199_999 + b".", "more than 200,000 opcodes"),
        (b"\x80\2}Vw\n\x82\1s.", "opcode EXT1"),
        (b"\x80\5\x96\xff\xff\xff\xff\0\0\0\0.", "expected|BYTEARRAY8"),
        (rebuilt(name=b"\\ud800"), "not Unicode"),
        (
            rebuilt(STORAGE.replace(b"Float", b"Untyped").replace(b"I4", b"I16"))
            .replace(b"tensor_v2", b"tensor_v3")
            .replace(b")RtRs.", b")Rctorch\nint4\nNtRs."),
            "of the type int4",
        ),
    ],
)
def test_a_hostile_pickle(pickled: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        in_zip(tmp_path / "a.pt", pickled)


def test_keys_that_python_is_slow_to_hash_are_left_out() -> None:
    slow = {k * (2**61 - 1): 1 for k in range(1, 50)} | {((),) * 3: 1, 7: 2, "a": 3}
    assert pickles.read_pickle(io.BytesIO(pickle.dumps(slow, 2)), lambda _: False) == {7: 2, "a": 3}
    deep = b"\x80\2}" + b")" + b"\x85" * 100_000 + b"I1\ns."  # Python's own hash of it overflows the C stack
    assert pickles.read_pickle(io.BytesIO(deep), lambda _: False) == {}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_values_are_python_s(protocol: int) -> None:
    value = {"a": [1, -2.5, 10**30, True, None, b"\xff", "é", (1,), (1, 2, 3, 4)], 3: {"x": {}}, "s": {1}}
    shared = [value["a"]] * 2
    found = pickles.read_pickle(io.BytesIO(pickle.dumps([value, shared], protocol)), lambda g: g.module != "os")
    value["s"] = [1] if protocol > 3 else found[0]["s"]  # sets are lists; older protocols call `set`
    if protocol == 2:
        value["a"][5] = found[0]["a"][5]  # a call of _codecs.encode
    assert found == [value, shared]
    assert found[1][0] is found[0]["a"]


def test_a_header_of_too_many_values(tmp_path: Path) -> None:
    row = b'"":{"a":[' + b",".join([b"[]"] * 600_000) + b"]}"
    (tmp_path / "a.safetensors").write_bytes((len(row) + 2).to_bytes(8, "little") + b"{" + row + b"}")
    with pytest.raises(CheckpointError, match="more than 1,000,000 values"):
        TensorFile(tmp_path / "a.safetensors")


def test_damaged_tables_of_contents(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(8)}, tmp_path / "a.pt")
    whole = bytearray((tmp_path / "a.pt").read_bytes())
    first = whole.index(b"PK\1\2")
    read = 0
    places = range(first, len(whole), 4)
    for at in places:
        whole[at] ^= 1 << at % 8
        (tmp_path / "b.pt").write_bytes(whole)
        whole[at] ^= 1 << at % 8
        try:
            assert TensorFile(tmp_path / "b.pt").read("w").shape == (8,)
            read += 1
        except CheckpointError:
            pass
    assert 0 < read < len(places), "times, versions and checksums are not read"
