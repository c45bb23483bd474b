"""Tables of requests: three formats, rows that are none, files that cannot be read."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mezzotint import rows
from mezzotint.errors import MissingExtraError, RequestError
from mezzotint.pipeline import Pipeline
from mezzotint.request import Request

TABLE: list[dict[str, Any]] = [
    {"prompt": "a lemon, yellow", "seed": 7, "steps": 3},
    {"prompt": '[lemon:whale:0.5] "quoted"\nand a second line', "seed": 2**64 - 1, "guidance_scale": 3.5},
    {"prompt": "ein grüner Wal 🐳", "negative_prompt": "dark", "guidance_interval": [0.3, 5.0]},
]


def write_csv(path: Path, table: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in table for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(names)
        for row in table:
            cells = [row.get(name, "") for name in names]
            out.writerow([json.dumps(cell) if isinstance(cell, list) else cell for cell in cells])


def write_parquet(path: Path, table: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, of the extra scale")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = list(dict.fromkeys(name for row in table for name in row))
    columns = {name: pyarrow.array([row.get(name) for row in table]) for name in names if name != "seed"}
    columns["seed"] = pyarrow.array([row.get("seed") for row in table], pyarrow.uint64())
    parquet.write_table(pyarrow.table(columns), path)


def write_jsonl(path: Path, table: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b'\xef\xbb\xbfa lemon, yellow\r\n\n  {"prompt": 1} \n# whale\n\xff\nein gr\xc3\xbcner Wal')
    found = dict(rows.read(path, {"steps": 3}))
    prompts = {1: "a lemon, yellow", 3: '{"prompt": 1}', 4: "# whale", 6: "ein grüner Wal"}
    assert found.pop(5) == "the row is not UTF-8; it must be a prompt on one line"
    assert found == {n: Request(prompt=text, seed=rows.row_seed(n), steps=3) for n, text in prompts.items()}
    assert rows.measure(path, {"count": 2}) == (5, 8)


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_the_formats_say_the_same(tmp_path: Path, write: Any) -> None:
    path = tmp_path / f"prompts.{write.__name__.removeprefix('write_')}"
    write(path, TABLE)
    wanted = [Request.model_validate({"seed": rows.row_seed(k), "steps": 20, **row}) for k, row in enumerate(TABLE, 1)]
    assert list(rows.read(path, {"steps": 20})) == list(enumerate(wanted, 1))
    assert rows.measure(path, {"count": "3"}) == (3, 9)


def test_the_seed_of_a_row_is_what_the_docs_say() -> None:
    assert rows.row_seed(12) == 0x6B51D431  # printf 12 | sha256sum
    assert len({rows.row_seed(k) for k in range(10_000)}) == 10_000


def test_nothing_of_a_row_is_left_to_chance(tmp_path: Path, sd1: Pipeline) -> None:
    """Else a picture could not be drawn again, or a broken unit be mended."""
    path = tmp_path / "p.jsonl"
    lemon = {"prompt": "a {lemon|whale|cat}"}
    write_jsonl(path, [lemon, {**lemon, "prompt_syntax": "comfy"}, {**lemon, "variation_strength": 0.1}])
    first, second = ([sd1.resolve(r) for _, r in rows.read(path, {}) if isinstance(r, Request)] for _ in range(2))
    assert len(first) == 3 and first == second
    assert first[2].variation_seed != first[2].seed


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"promt": "a lemon"}', "no field 'promt'; the nearest is prompt"),
        (b'{"steps": 3}', "prompt is missing"),
        (b'{"prompt": null}', "prompt is missing"),
        (b'{"prompt": "a lemon", "steps": 0}', "steps is 0; it must be a whole number from 1 to 1000"),
        (b'{"prompt": "a lemon"', "the row is not JSON"),
        (b"[" * 100_000, "the row is not JSON (nested too deeply)"),
        (b'["a lemon"]', "the row is not an object"),
        (b'{"prompt": "\xff"}', "the row is not UTF-8"),
        (b'{"prompt": "' + b"a" * 5_000_000 + b'"}', "longer than 4,194,304 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_invalid_row_gives_a_reason_and_the_next_is_read(tmp_path: Path, line: bytes, sentence: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "first"}\n\n' + line + b'\r\n{"prompt": "last", "seed": null}')
    first, wrong, last = rows.read(path, {})
    assert (first[0], wrong[0], last[0]) == (1, 3, 4), "numbers are those of the lines"
    assert isinstance(wrong[1], str) and sentence in wrong[1]
    assert len(wrong[1]) < 1000
    assert first[1] == Request(prompt="first", seed=rows.row_seed(1))
    assert last[1] == Request(prompt="last", seed=rows.row_seed(4))


def test_a_csv_row_that_is_no_request(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_bytes(
        b"\xef\xbb\xbfprompt,steps\na lemon,3\n\na,1,2\n\xff,1\n,4\na cat\n" + b"a" * 200_000 + b"\na whale,x\n"
    )
    read = dict(rows.read(path, {}))
    assert list(read) == [1, 2, 3, 4, 5, 6, 7]
    assert read[1] == Request(prompt="a lemon", steps=3, seed=rows.row_seed(1))
    assert read[2] == "the row has 3 cells; the header has 2"
    assert "valid Unicode" in str(read[3])
    assert str(read[4]).startswith("prompt is missing")
    assert read[5] == Request(prompt="a cat", seed=rows.row_seed(5))
    assert "the row is not CSV: field larger than field limit" in str(read[6])
    assert "steps is 'x'; it must be a whole number" in str(read[7])


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "prompts.doc": (b"a lemon", "must end in .jsonl, .ndjson, .csv, .parquet, .txt"),
        "empty.jsonl": (b"\n", "has no rows"),
        "header.csv": (b"prompt,seed\n", "has no rows"),
        "column.csv": (b"prompt,promt\na,b\n", "no field 'promt'; the nearest is prompt"),
        "twice.csv": (b"prompt,prompt\na,b\n", "the column 'prompt' occurs twice"),
    }
    for name, (content, sentence) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RequestError) as error:
            rows.measure(tmp_path / name, {})
        assert sentence in str(error.value) and name in str(error.value)
    with pytest.raises(RequestError, match=r"missing.csv' cannot be read \(No such file"):
        rows.measure(tmp_path / "missing.csv", {})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mezzotint\[scale\]'"):
        rows.measure(tmp_path / "a.parquet", {})


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, of the extra scale")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more, PAR1")
    with pytest.raises(RequestError, match=r"a.parquet' cannot be read as Parquet"):
        rows.measure(tmp_path / "a.parquet", {})
    write_parquet(tmp_path / "b.parquet", [{"prompt": "a", "seed": 1, "promt": "b"}])
    with pytest.raises(RequestError, match="the nearest is prompt"):
        rows.measure(tmp_path / "b.parquet", {})


def test_assignments() -> None:
    texts = ["steps=20", "guidance_scale=[9, 3]", "negative_prompt=[dark:light:0.5] a=b"]
    assert rows.assignments("set", texts) == {
        "steps": "20",
        "guidance_scale": [9, 3],
        "negative_prompt": "[dark:light:0.5] a=b",
    }
    for text, sentence in {
        "steps": "must be FIELD=VALUE",
        "stepz=2": "the nearest is steps",
        "steps=0": "1 to 1000",
    }.items():
        with pytest.raises(RequestError, match=sentence):
            rows.assignments("set", [text])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("a.csv", "larger than field limit"), ("a.jsonl", "row of more than 1,000"), ("a.parquet", "as Parquet")],
)
def test_a_sparse_terabyte(name: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_SKIPPED", 1000)
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(RequestError, match=sentence):
        list(rows.read(tmp_path / name, {}))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_rows_of_what_is_no_regular_file(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(RequestError, match="not a regular file"):
        rows.measure(tmp_path / name, {})
