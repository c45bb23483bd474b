"""Reading what others have made: regular files, bounded."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from mezzotint.errors import CheckpointError
from mezzotint.files import hash_file, open_regular, read_bytes, read_text


def test_a_file_of_the_limit_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert read_bytes(tmp_path / "a", 3_000_000) == b"x" * 3_000_000
    with pytest.raises(OSError) as error:
        read_bytes(tmp_path / "a", 2_999_999)
    assert error.value.strerror == "it has more than 2,999,999 bytes"


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "pipe").symlink_to(tmp_path / "fifo")
    for name in ("fifo", "zero", "pipe", "/dev/zero"):
        with pytest.raises(OSError) as error:
            read_bytes(tmp_path / name)
        assert error.value.strerror == "it is not a regular file"
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)


def test_a_file_that_becomes_a_fifo_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x")
    os.mkfifo(tmp_path / "fifo")
    stat = os.stat

    def swap(path: Path) -> os.stat_result:
        found = stat(path)
        os.replace(tmp_path / "fifo", path)
        return found

    monkeypatch.setattr(os, "stat", swap)
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "a")


def test_a_sparse_terabyte_costs_no_more_than_the_limit(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="more than 1,000 bytes"):
        read_bytes(tmp_path / "a", 1000)


def test_text_and_its_newlines(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_text(tmp_path / "a", "utf-8-sig") == "a\nb\nc\n"
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "a")


def test_hashing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 9000)
    with pytest.raises(CheckpointError, match="b cannot be read: No such file"):
        hash_file(tmp_path / "b")
    assert hash_file(tmp_path / "a") == hashlib.sha256(bytes(range(256)) * 9000).hexdigest()
