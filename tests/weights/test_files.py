"""The safetensors reader against the format's rules and the Rust reader; PyTorch files without their code."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import threading
import zipfile
from collections import OrderedDict
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from mezzotint.errors import CheckpointError
from mezzotint.weights import files
from mezzotint.weights.files import MAX_HEADER_BYTES, TensorFile

TENSORS = {
    "half": torch.arange(12).reshape(3, 4).half(),
    "brain": torch.randn(2, 3).bfloat16(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "index": torch.arange(77)[None],
    "flag": torch.tensor([True, False]),
}


def raw(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def row(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        TensorFile(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt"}
    for name, tensor in TENSORS.items():
        assert file.entries[name].dtype == tensor.dtype
        assert torch.equal(file.read(name), tensor)
    assert torch.equal(file.read("half", third=1), TENSORS["half"][1:2])


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".safetensors"])
def test_pytorch_files_round_trip_whatever_their_name(suffix: str, tmp_path: Path) -> None:
    views = {
        "t": torch.arange(12.0).reshape(3, 4).T,
        "part": torch.arange(20.0)[4:10],
        "p": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save({"state_dict": OrderedDict(TENSORS | views), "global_step": 7}, tmp_path / f"a{suffix}")
    file = TensorFile(tmp_path / f"a{suffix}")
    assert file.scalars["global_step"] == 7
    for name, tensor in (TENSORS | views).items():
        assert torch.equal(file.read(name), tensor)
    assert torch.equal(file.read("part", third=2), views["part"][4:])


def test_the_old_pytorch_format(tmp_path: Path) -> None:
    torch.save({"a": TENSORS["half"]}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    file = TensorFile(tmp_path / "a.bin")
    assert torch.equal(file.read("a"), TENSORS["half"])
    assert torch.equal(file.read("a", third=2), TENSORS["half"][2:])


DAMAGE = {
    "length 0": (raw(b"", length=0), "begin with"),
    "length 7": (b"\x07\0\0\0\0\0\0\0{", "header should have 7"),
    "length 2^63": (raw({}, length=2**63), "header should have"),
    "not an object": (raw(b"[1, 2]    "), "begin with"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "surrogate": (raw(b'{"\\ud800":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', b"1234"), "not Unicode"),
    "deep": (raw(b'{"a":' * 20_000), "not valid JSON"),
    "tables": (raw(b'{"a":' * 20_001), "more than 20,000 tensors"),
    "NaN": (raw(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'), "NaN is not JSON"),
    "twice": (raw(b'{"a":1,"a":2}'), "occurs twice"),
    "hole": (raw({"a": row([1], 0, 4), "b": row([1], 8, 12)}, bytes(12)), "hole"),
    "overlap": (raw({"a": row([2], 0, 8), "b": row([1], 4, 8)}, bytes(8)), "hole"),
    "late start": (raw({"a": row([1], 4, 8)}, bytes(8)), "hole"),
    "trailing": (raw({"a": row([1], 0, 4)}, bytes(5)), "after its end"),
    "cut": (raw({"a": row([4], 0, 16)}, bytes(5)), "cut short"),
    "span": (raw({"a": row([2], 0, 4)}, bytes(4)), "needs 8 bytes"),
    "overflow": (raw({"a": row([2**40, 2**40, 0], 0, 0)}), "too large"),
    "negative": (raw({"a": row([-1], 0, 4)}, bytes(4)), "not a size"),
    "float size": (raw({"a": row([1.0], 0, 4)}, bytes(4)), "needs a known dtype"),
    "bool size": (raw({"a": row([True], 0, 4)}, bytes(4)), "needs a known dtype"),
    "dtype": (raw({"a": row([1], 0, 4, "F33")}, bytes(4)), "needs a known dtype"),
    "no shape": (raw({"a": {"dtype": "F32"}}), "needs a known dtype"),
    "row is a list": (raw({"a": []}), "needs a known dtype"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "table of strings"),
    "huge digits": (raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'), "not a size"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_safetensors_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    content, words = DAMAGE[name]
    assert words in refusal(tmp_path / "a.safetensors", content)
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "a.safetensors", "pt").__enter__()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = save(TENSORS)
    for size in (*range(100), *range(100, len(whole), 5)):
        refusal(tmp_path / "a.safetensors", whole[:size])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_nothing_is_accepted_that_the_rust_reader_refuses(data: st.DataObject) -> None:
    whole = bytearray(save({"ab": torch.ones(2, 3), "c": torch.zeros(4).half()}, metadata={"k": "v"}))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = Path(f"/tmp/mezzotint-fuzz-{os.getpid()}.safetensors")
    try:
        path.write_bytes(whole)
        try:
            file = TensorFile(path)
        except CheckpointError:
            return
        with safe_open(path, "pt") as rust:
            assert set(rust.keys()) == set(file.entries)
            for name in file.entries:
                theirs = rust.get_tensor(name)
                assert file.read(name).view(torch.uint8).equal(theirs.view(torch.uint8))
    finally:
        path.unlink()


@pytest.mark.parametrize("length", [0x3C, 0x3C20, 0x0280, 0x0480, 0x4B50])  # as bytes: "<", " <", two pickles, "PK"
def test_a_header_length_is_not_taken_for_another_format(length: int, tmp_path: Path) -> None:
    header = json.dumps({"a": row([1], 0, 4)}).encode()
    (tmp_path / "a.ckpt").write_bytes(raw(header.ljust(length), bytes(4)))
    assert TensorFile(tmp_path / "a.ckpt").read("a").item() == 0.0


def test_a_header_beyond_the_bound_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{")
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(CheckpointError, match="at most 16,000,000 are read"):
        TensorFile(path)


def test_a_shape_beyond_all_memory_is_named(tmp_path: Path) -> None:
    header = json.dumps({"a": row([2**30, 2**30], 0, 4)}).encode()
    (tmp_path / "a.safetensors").write_bytes(raw(header, bytes(4)))
    with pytest.raises(CheckpointError, match="'a' is too large"):
        TensorFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a whole safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"GIF89a and more", "not a whole safetensors"),
    ],
)
def test_foreign_files(content: bytes, words: str, tmp_path: Path) -> None:
    assert words in refusal(tmp_path / "a.safetensors", content)


@pytest.mark.parametrize("content", [b"", b"hello", b"7z\xbc\xaf\x27\x1c", b"\x80"])
def test_foreign_files_named_ckpt(content: bytes, tmp_path: Path) -> None:
    assert "neither a safetensors nor a PyTorch file" in refusal(tmp_path / "a.ckpt", content)


class Evil:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def pickled(path: Path, thing: Any, container: str) -> None:
    if container == "zip":
        torch.save(thing, path)
    elif container == "legacy":
        torch.save(thing, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(thing, protocol=int(container)))


@pytest.mark.parametrize("container", ["zip", "legacy", "2", "4", "5"])
def test_code_in_a_pickle_is_not_run(container: str, tmp_path: Path) -> None:
    pickled(tmp_path / "a.ckpt", {"state_dict": {"w": torch.ones(2), "x": Evil(tmp_path / "canary")}}, container)
    with pytest.raises(CheckpointError) as error:
        TensorFile(tmp_path / "a.ckpt")
    assert not (tmp_path / "canary").exists()
    assert "nothing in it was run" in str(error.value)
    assert "mkdir" in str(error.value) or container in "245"  # where torch's own names come first


def test_training_leftovers_of_the_original_files_are_passed_over(tmp_path: Path) -> None:
    """sd-v1-4.ckpt holds the names of a Lightning callback and numpy scalars; they become inert objects."""
    buffer = io.BytesIO()
    torch.save({"state_dict": {"w": torch.ones(2)}, "best": Evil(tmp_path / "canary")}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "a.ckpt", "w") as new:
        for info in old.infolist():
            content = old.read(info).replace(
                f"c{os.mkdir.__module__}\nmkdir\n".encode(), b"cnumpy.core.multiarray\nscalar\n"
            )
            new.writestr(info.filename, content)
    file = TensorFile(tmp_path / "a.ckpt")
    assert torch.equal(file.read("w"), torch.ones(2))
    assert not (tmp_path / "canary").exists()


def test_packed_and_broken_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"0" * 1000)
    with pytest.raises(CheckpointError, match="it is compressed; unpack it and pack it again"):
        TensorFile(tmp_path / "packed.ckpt")
    torch.save({"w": torch.ones(1000)}, tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    for size in range(4, len(whole), 97):
        refusal(tmp_path / "cut.ckpt", whole[:size])


@pytest.mark.parametrize("thing", [[torch.ones(2)], torch.ones(2), 3])
def test_a_pytorch_file_of_something_else(thing: Any, tmp_path: Path) -> None:
    torch.save(thing, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not a table of tensors"):
        TensorFile(tmp_path / "a.pt")


def test_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path, words in (
        (tmp_path / "pipe.safetensors", "not a regular file"),
        (tmp_path, "a folder, not a file"),
        (tmp_path / "none.safetensors", "cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=words):
            TensorFile(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_reading_in_pieces_into_another_dtype_and_format(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    tensors = {
        "conv": torch.randn(7, 4, 3, 3).half(),
        "fused": torch.randn(9, 5),
        "wide": torch.randn(3, 200),
        "vector": torch.randn(130),
        "number": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
    }
    path = tmp_path / f"a{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors | {"t": torch.randn(6, 9).T}, path)
    file = TensorFile(path)
    for name in file.entries:
        whole = file.read(name)
        target = torch.full(whole.shape, torch.nan, dtype=torch.float64)
        target = target.contiguous(memory_format=torch.channels_last) if whole.ndim == 4 else target
        file.read_into(target, name)
        assert torch.equal(target, whole.double())
    for third in range(3):
        target = torch.empty(5, 3).T
        file.read_into(target, "fused", third)
        assert torch.equal(target, tensors["fused"].chunk(3)[third])


@pytest.mark.parametrize("old", [False, True])
def test_reading_single_rows(old: bool, tmp_path: Path) -> None:
    tensors = {"table": torch.randn(11, 5), "t": torch.randn(5, 11).T, "conv": torch.randn(4, 2, 3, 3)}
    torch.save(tensors, tmp_path / "a.bin", _use_new_zipfile_serialization=not old)
    file = TensorFile(tmp_path / "a.bin")
    for name, numbers in (("table", [10, 0, 0, 3]), ("t", [10, 2]), ("conv", [3])):
        assert torch.equal(file.read_rows(name, numbers), tensors[name][numbers])
        file.prefetch(name)
    for number in (11, -1) if not old else (11,):
        with pytest.raises(IndexError):
            file.read_rows("table", [number])


def test_threads_share_a_file(tmp_path: Path) -> None:
    tensors = {str(k): torch.full((5000,), float(k)) for k in range(8)}
    save_file(tensors, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    right: list[bool] = []

    def work(name: str) -> None:
        right.extend(torch.equal(file.read(name), tensors[name]) for _ in range(50))

    threads = [threading.Thread(target=work, args=(name,)) for name in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 400


def test_a_file_cut_while_it_is_read(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    os.truncate(tmp_path / "a.safetensors", 500)
    with pytest.raises(CheckpointError, match="was changed after it had been opened"):
        file.read("w")


class Damaged(FileIO):
    """A file on a damaged disk."""

    def read(self, size: int | None = -1, /) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def readinto(self, buffer: Any, /) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_an_error_of_the_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.ones(10)}, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    with monkeypatch.context() as patch, Damaged(tmp_path / "a.safetensors") as damaged:
        patch.setattr(file, "_file", damaged)
        with pytest.raises(CheckpointError, match=r"a.safetensors cannot be read: Input/output error"):
            file.read("w")
    monkeypatch.setattr(files, "open_regular", Damaged)
    with pytest.raises(CheckpointError, match=r"a.safetensors cannot be read: Input/output error"):
        TensorFile(tmp_path / "a.safetensors")


def test_a_file_written_over_while_it_is_open(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    save_file({"w": torch.zeros(1000)}, tmp_path / "b.safetensors")
    os.replace(tmp_path / "b.safetensors", tmp_path / "a.safetensors")
    assert torch.equal(file.read("w"), torch.ones(1000)), "the file that was opened is still there"
    file = TensorFile(tmp_path / "a.safetensors")
    os.utime(tmp_path / "a.safetensors", ns=(0, 10**18))  # as if written to at another time
    with pytest.raises(CheckpointError, match="was changed after it had been opened"):
        file.read("w")
