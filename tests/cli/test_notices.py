"""What the user should know of a request reaches standard error, --json and the picture's record at every door."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mezzotint import devices
from mezzotint.images.io import read_metadata
from mezzotint.records.record import read

Run = Callable[..., Any]
HIDDEN = "prompt: `#` hides the rest of its line (`#1`); prompt_syntax comfy and plain have no comments of this kind"
TAG = "<lora:style:0.8> is ignored: give lora_folder (--lora-folder) to load it"
PROMPT = "a lemon <lora:style:0.8> #1"


def recorded(path: str | Path) -> tuple[str, ...]:
    record = read(read_metadata(path))
    assert record is not None
    return record.notices


def test_generate_says_them_before_it_draws(run: Run, sd1_folder: Path) -> None:
    ran = run("generate", PROMPT, "--model", str(sd1_folder), "--steps", "4", "--out", "lemon.png", "--json")
    assert (ran.code, ran.err) == (0, f"{TAG}\n{HIDDEN}\n")
    assert json.loads(ran.out)["notices"] == [TAG, HIDDEN]
    assert recorded("lemon.png") == (TAG, HIDDEN)
    assert f"notice: {TAG}\nnotice: {HIDDEN}\n" in run("info", "lemon.png").out
    assert run("generate", "a lemon", "--model", str(sd1_folder), "--steps", "4", "--out", "plain.png").err == ""
    assert "notices" not in json.loads(read_metadata("plain.png")["mezzotint"])


def test_the_shell_says_them(run: Run, sd1_folder: Path) -> None:
    lines = f"\\set steps 4\n{PROMPT}\na lemon\n".encode()
    ran = run("shell", "--model", str(sd1_folder), "--out", "{seed}-{prompt}.png", stdin=lines)
    assert (ran.code, ran.err) == (0, f"{TAG}\n{HIDDEN}\n"), ran.err


def test_bulk_says_each_with_its_first_row(run: Run, sd1_folder: Path) -> None:
    """Each picture's record has those on its own prompt, though the rows share a batch."""
    rows = [{"prompt": text, "steps": 4, "batch": 3} for text in ("a lemon", PROMPT, "a lemon #1")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = run("bulk", "rows.jsonl", "--out", "out", "--model", str(sd1_folder), "--json")
    assert (ran.code, ran.err) == (0, f"row 2: {TAG}\nrow 2: {HIDDEN}\n")
    assert json.loads(ran.out)["notices"] == [{"row": 2, "notice": TAG}, {"row": 2, "notice": HIDDEN}]
    assert [recorded(f"out/00000{row}-0.png") for row in (1, 2, 3)] == [(), (TAG, HIDDEN), (HIDDEN,)]


def test_bulk_prints_only_the_first_ones(run: Run, sd1_folder: Path) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": f"a <lora:{k}:1>"}) + "\n" for k in range(25)))
    options = ("--set", "steps=1", "--set", "sampler=euler", "--set", "spacing=trailing", "--set", "batch=25")
    ran = run("bulk", "rows.jsonl", "--out", "out", "--model", str(sd1_folder), *options)
    lines = ran.err.splitlines()
    assert len(lines) == 21 and lines[19].startswith("row 20: <lora:19:1> is ignored")
    assert lines[20] == "further notices are in the records of the pictures"


def test_grid_says_each_once(run: Run, sd1_folder: Path) -> None:
    ran = run("grid", PROMPT, "--x", "steps=4,5", "--model", str(sd1_folder), "--json")
    assert (ran.code, ran.err) == (0, f"{TAG}\n{HIDDEN}\n")
    assert json.loads(ran.out)["notices"] == [TAG, HIDDEN]
    assert all(recorded(cell) == (TAG, HIDDEN) for cell in Path("grid-cells").iterdir())


def test_tokens_shows_remarks_and_the_weight_of_the_whole_prompt(run: Run, sd1_folder: Path) -> None:
    lines = run("tokens", "a lemon, ratio 16:9", "--model", str(sd1_folder)).out.splitlines()
    assert lines[1] == "the whole prompt, weight 9"
    assert lines[-1].startswith("note: the number at the end weights the whole prompt (9)")
    [remark] = json.loads(run("tokens", "a lemon #1", "--model", str(sd1_folder), "--json").out)["remarks"]
    assert (remark["start"], remark["end"]) == (8, 10) and "hides the rest" in remark["remark"]


def test_what_bfloat16_would_save(run: Run, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_native_bfloat16", lambda: True)
    monkeypatch.setattr(devices, "LARGE_UNET", 1)
    model = ("--model", str(sd1_folder), "--device", "cpu")
    draw = ("generate", "a lemon", *model, "--steps", "4", "--out", "lemon.png")
    hint = "this processor multiplies bfloat16 natively: --dtype auto would be faster"
    for command in (draw, ("plan", *model)):
        assert hint in run(*command).err
        assert hint not in run(*command, "--dtype", "float32").err
    assert run(*draw, "--dtype", "auto").code == 0
    record = read(read_metadata("lemon.png"))
    assert record is not None and record.model.dtype == "bfloat16"
