"""Pictures and captions in four layouts: the same in all of them, and a sentence for each way to be wrong."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mezzotint.errors import MissingExtraError, RequestError
from mezzotint.images import init_image
from mezzotint.train.data import Dataset, open_data

CAPTIONS = {"a/lemon": "a lemon, yellow", "whale": "ein Wal, größer"}


def picture(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels)


def file_of(image: Image.Image, format: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


FILES = {name: file_of(picture(k)) for k, name in enumerate(CAPTIONS)}


def put(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def pack(path: Path, files: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            data = data if isinstance(data, bytes) else data.encode()
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return path


def next_to(folder: Path) -> Path:
    texts = {f"{name}.txt": f"\ufeff{text}\n" for name, text in CAPTIONS.items()}
    return put(folder, {**{f"{name}.png": data for name, data in FILES.items()}, **texts, ".hidden/no.txt": "no"})


def metadata(folder: Path) -> Path:
    lines = [json.dumps({"file_name": f"{name}.png", "text": text}) for name, text in CAPTIONS.items()]
    return put(folder, {"metadata.jsonl": "\n".join(lines), **{f"{name}.png": data for name, data in FILES.items()}})


def with_caption_suffix(folder: Path) -> Path:
    """As kohya's sd-scripts name them by default."""
    pictures = {f"{name}.png": data for name, data in FILES.items()}
    return put(folder, {**pictures, **{f"{name}.caption": text for name, text in CAPTIONS.items()}})


def metadata_csv(folder: Path) -> Path:
    lines = ["file_name,text", *(f'{name}.png,"{text}"' for name, text in CAPTIONS.items())]
    return put(folder, {"metadata.csv": "\ufeff" + "\r\n".join(lines), **{f"{n}.png": d for n, d in FILES.items()}})


def metadata_below(folder: Path) -> Path:
    """In a subfolder, as the hub has the splits of a dataset; the other pictures have caption files."""
    (lemon, yellow), (whale, wal) = CAPTIONS.items()
    csv = f'text,file_name,size\n"{yellow}",{lemon.removeprefix("a/")}.png,24\n'
    files = {f"{name}.png": data for name, data in FILES.items()}
    return put(folder, {"a/metadata.csv": csv, **files, f"{whale}.txt": wal})


def shards(folder: Path) -> Path:
    (lemon, yellow), (whale, wal) = CAPTIONS.items()
    pack(folder / "0.tar", {f"./{lemon}.png": FILES[lemon], f"./{lemon}.txt": yellow, "a/._lemon.png": b"?"})
    pack(folder / "1.tar", {f"{whale}.json": json.dumps({"caption": wal}), f"{whale}.png": FILES[whale]})
    return put(folder, {"README.txt": "two shards"})


def table(path: Path, columns: dict[str, list[Any]], **settings: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, of the extra train")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, **settings)
    return path


def structs(folder: Path) -> Path:
    """As the hub has them, in row groups of one."""
    cells = [{"bytes": data, "path": f"{name}.png"} for name, data in FILES.items()]
    table(folder / "train.parquet", {"image": cells, "text": list(CAPTIONS.values())}, row_group_size=1)
    return folder


def plain_bytes(folder: Path) -> Path:
    return table(folder / "t.parquet", {"image": list(FILES.values()), "prompt": list(CAPTIONS.values())})


@pytest.mark.parametrize(
    "write",
    [next_to, with_caption_suffix, metadata, metadata_csv, metadata_below, shards, structs, plain_bytes],
)
def test_the_layouts_give_the_same_examples(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    dataset = open_data(write(tmp_path / "data"))
    assert [example.caption for example in dataset] == list(CAPTIONS.values())
    assert [example.size for example in dataset] == [(24, 16)] * 2
    assert [example.digest for example in dataset] == [init_image.digest(data) for data in FILES.values()]
    assert [example.open().tobytes() for example in dataset] == [picture(k).tobytes() for k in range(2)]
    assert len({example.id for example in dataset}) == 2 and not dataset.skipped and not dataset.notices
    assert {example.repeats for example in dataset} == {1}


def test_ids_do_not_name_where_the_dataset_lies(tmp_path: Path) -> None:
    for write in (next_to, metadata, shards):
        here, there = (open_data(write(tmp_path / place / write.__name__)) for place in ("here", "there"))
        assert [e.id for e in here] == [e.id for e in there]


def test_size_is_that_of_the_picture_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[init_image.ORIENTATION] = 6
    put(tmp_path, {"a.jpg": file_of(picture(0, (40, 24)), "JPEG", exif=exif), "a.txt": "a"})
    (example,) = open_data(tmp_path)
    assert example.size == example.open().size == (24, 40)


def test_captions_are_one_line_and_may_come_from_outside(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": FILES["whale"], "b.PNG": FILES["whale"], "b.txt": "  two\r\nlines\n"})
    assert [e.caption for e in open_data(tmp_path, caption="a photo of sks whale")] == [
        "a photo of sks whale",
        "two lines",
    ]


def test_folders_that_say_how_often_their_pictures_are_used(tmp_path: Path) -> None:
    """Kohya's `REPEATS_WORDS`: the words are the caption of a picture that has none, and dates are no repeats."""
    written = {"10_sks dog/a.png": None, "10_sks dog/b.png": "a dog", "2_cat/c.png": None, "20240101_x/d.png": "d"}
    put(tmp_path, dict.fromkeys(written, FILES["whale"]))
    put(tmp_path, {name.replace(".png", ".txt"): text for name, text in written.items() if text})
    dataset = open_data(tmp_path)
    assert [(example.repeats, example.caption) for example in dataset] == [
        (10, "sks dog"),
        (10, "a dog"),
        (1, "d"),
        (2, "cat"),
    ]
    assert dataset.notices == (
        "10_sks dog: its 2 pictures are used 10 times each in an epoch, by the folder's name",
        "2_cat: its 1 picture is used 2 times in an epoch, by the folder's name",
    )
    given = open_data(tmp_path, caption="a photo")
    assert [example.caption for example in given] == ["a photo", "a dog", "d", "a photo"]


def test_metadata_that_is_for_something_else_or_there_twice(tmp_path: Path) -> None:
    put(next_to(tmp_path), {"metadata.csv": "id,licence\n1,CC0\n"})
    assert [example.caption for example in open_data(tmp_path)] == list(CAPTIONS.values())
    with pytest.raises(RequestError, match="has the columns id, licence; it must have file_name and text"):
        open_data(tmp_path / "metadata.csv")
    put(tmp_path, {"metadata.csv": "file_name,text\nwhale.png,a\n", "metadata.jsonl": "{}"})
    with pytest.raises(RequestError, match=r"has metadata\.jsonl and metadata\.csv; keep one of them"):
        open_data(tmp_path)
    put(tmp_path, {"whale.caption": "a whale"})
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(RequestError, match=r"whale\.caption' and .*whale\.txt' are captions of the same picture"):
        open_data(tmp_path)


def test_an_empty_caption_is_a_notice(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": FILES["whale"], "a.txt": " \n", "b.png": FILES["a/lemon"]})
    [notice] = open_data(tmp_path, caption="").notices or ("",)
    assert not notice, "an empty prompt was asked for"
    dataset = open_data(tmp_path, caption="words")
    assert [example.caption for example in dataset] == ["", "words"]
    assert dataset.notices == (
        f"1 picture has an empty caption, the first is {str(tmp_path / 'a.png')!r}: it is trained without words",
    )


BROKEN: dict[str, tuple[dict[str, bytes | str], str]] = {
    "a picture that is none": ({"bad.png": b"not a picture", "bad.txt": "bad"}, r"bad\.png.*not a picture"),
    "a picture without a caption": ({"bad.png": FILES["whale"]}, r"bad\.png' has no caption; add one"),
    "a caption without a picture": (
        {"bad.txt": "bad"},
        r"caption .*bad\.txt' has no picture; there must be one such as .*bad\.jpg",
    ),
    "a caption that is not UTF-8": ({"bad.png": FILES["whale"], "bad.txt": b"\xff\xfe\xff"}, r"bad\.txt' is not UTF-8"),
    "a caption beyond all measure": ({"bad.png": FILES["whale"], "bad.txt": "a" * 200_000}, "200,000 characters"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_used_is_named_and_stops_or_is_skipped(tmp_path: Path, what: str) -> None:
    files, sentence = BROKEN[what]
    put(next_to(tmp_path), files)
    with pytest.raises(RequestError, match=sentence):
        open_data(tmp_path)
    dataset = open_data(tmp_path, broken="skip")
    assert len(dataset) == 2
    assert len(dataset.skipped) == 1 and "bad" in dataset.skipped[0]


LINES = {
    "not JSON": ("{", "line 3.*not JSON"),
    "no file_name": ('{"text": "a"}', "line 3.*names no picture"),
    "a file outside": ('{"file_name": "../b.png", "text": "a"}', "line 3.*must be below the folder"),
    "an absolute file": ('{"file_name": "/b.png", "text": "a"}', "line 3.*must be below the folder"),
    "a file that is not there": ('{"file_name": "b.png", "text": "a"}', r"b\.png', which is not there"),
    "no text": ('{"file_name": "whale.png"}', "has no caption"),
    "the same again": ('{"file_name": "whale.png", "text": "a"}', "has the same name as another picture"),
}


@pytest.mark.parametrize("what", LINES)
def test_a_line_of_metadata_that_is_wrong(tmp_path: Path, what: str) -> None:
    line, sentence = LINES[what]
    folder = metadata(tmp_path)
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(f"\n{line}")
    with pytest.raises(RequestError, match=sentence):
        open_data(folder)
    dataset = open_data(folder / "metadata.jsonl", broken="skip")
    assert (len(dataset), len(dataset.skipped)) == (2, 1)


SAMPLES: dict[str, tuple[dict[str, bytes | str], str]] = {
    "two pictures": ({"c.png": FILES["whale"], "c.mask.png": FILES["whale"], "c.txt": "c"}, "has 2 pictures"),
    "no picture": ({"c.txt": "c"}, r"c\.txt' has no picture"),
    "no caption": ({"c.png": FILES["whale"]}, "has no caption"),
    "a caption that is not JSON": ({"c.png": FILES["whale"], "c.json": "{"}, r"c\.json' is not JSON"),
    "a picture that is none": ({"c.png": b"?", "c.txt": "c"}, r"0\.tar/c\.png', which is not a picture"),
}


@pytest.mark.parametrize("what", SAMPLES)
def test_a_sample_of_a_shard_that_is_wrong(tmp_path: Path, what: str) -> None:
    files, sentence = SAMPLES[what]
    path = pack(tmp_path / "0.tar", {"w.png": FILES["whale"], "w.txt": "w", "w.cls": "3", **files})
    with pytest.raises(RequestError, match=sentence):
        open_data(path)
    dataset = open_data(path, broken="skip")
    assert (len(dataset), len(dataset.skipped)) == (1, 1)


def test_a_shard_that_is_cut_off_or_compressed(tmp_path: Path) -> None:
    path = pack(tmp_path / "0.tar", {"w.png": FILES["whale"], "w.txt": "w", "x.txt": "x", "x.png": FILES["a/lemon"]})
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"x.png") + 700])
    with pytest.raises(RequestError, match=r"0\.tar/x\.png is truncated|not an intact tar file"):
        open_data(path)
    dataset = open_data(path, broken="skip")
    assert [e.caption for e in dataset] == ["w"] and dataset.skipped
    with tarfile.open(path, "w:gz") as shard:
        shard.add(__file__, "w.png")
    with pytest.raises(RequestError, match="uncompressed"):
        open_data(path)


def test_links_in_a_shard_lead_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as shard:
        for name, kind in (("w.png", tarfile.SYMTYPE), ("w.txt", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, __file__
            shard.addfile(member)
    with pytest.raises(RequestError, match="no usable pictures"):
        open_data(path)


def test_a_sparse_file_in_a_shard_is_passed_over(tmp_path: Path) -> None:
    """Its bytes do not lie in the shard as they are."""
    path = pack(tmp_path / "0.tar", {"w.png": FILES["whale"], "w.txt": "w"})
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as shard:
        member = tarfile.TarInfo("holes.png")
        member.size, member.pax_headers = 4, {"GNU.sparse.size": "5000", "GNU.sparse.map": "0,4"}
        shard.addfile(member, io.BytesIO(b"\x89PNG"))
    assert [e.caption for e in open_data(path)] == ["w"]


def test_a_table_that_is_wrong(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", {"picture": list(FILES.values()), "text": ["a", "b"]})
    with pytest.raises(RequestError, match="columns picture, text; it must have image and text"):
        open_data(path)
    table(path, {"image": [FILES["whale"], b"?", None], "text": ["a", "b", "c"]})
    dataset = open_data(path, broken="skip")
    assert [e.caption for e in dataset] == ["a"]
    assert "row 2" in dataset.skipped[0] and "row 3" in dataset.skipped[1]
    table(path, {"image": [{"path": "somewhere.png"}], "text": ["a"]})
    with pytest.raises(RequestError, match="has no bytes"):
        open_data(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(RequestError, match="cannot be read as Parquet"):
        open_data(path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    put(tmp_path, {"t.parquet": b"PAR1"})
    with pytest.raises(MissingExtraError, match=r"pip install 'mezzotint\[train\]'"):
        open_data(tmp_path)


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has no usable pictures; it must have at least one$"):
        open_data(tmp_path)
    put(tmp_path, {"a.txt": "a"})
    with pytest.raises(RequestError, match="First of 1 skipped: the caption"):
        open_data(tmp_path, broken="skip")
    with pytest.raises(RequestError, match="does not exist; it must be a folder"):
        open_data(tmp_path / "none")
    with pytest.raises(RequestError, match=r"must be a folder of pictures, a \.parquet file"):
        open_data(tmp_path / "a.txt")


def test_two_layouts_at_once_are_not_guessed_between(tmp_path: Path) -> None:
    shards(next_to(tmp_path))
    with pytest.raises(RequestError, match="has tar shards and pictures; give a folder that has only one"):
        open_data(tmp_path)


def test_a_picture_that_changes_while_it_is_learnt_from(tmp_path: Path) -> None:
    dataset: Dataset = open_data(next_to(tmp_path))
    put(tmp_path, {"whale.png": FILES["a/lemon"]})
    with pytest.raises(RequestError, match=r"whale\.png' has changed"):
        dataset[1].open()
