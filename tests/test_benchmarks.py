"""The benchmark runner on trivial commands. How fast anything is, is never asserted."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parent.parent / "benchmarks" / "run.py"
SAVES = """
import json, pathlib, sys
pathlib.Path(sys.argv[1]).write_text("x")
print(json.dumps({"steps": 20, "name": "x"}))
"""


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FILE.with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("run")


@pytest.fixture
def row(bench: ModuleType, tmp_path: Path) -> Any:
    """Two sides that save a file and print a measure."""
    pictures = {name: tmp_path / f"{name}.png" for name in ("ours", "peer")}
    commands = {name: [sys.executable, "-c", SAVES, str(path)] for name, path in pictures.items()}
    return bench.Row("trivial", "nothing", "saved_s", commands, pictures, runs=2, warmups=0)


def test_runs_are_interleaved(bench: ModuleType) -> None:
    assert "".join(bench.order(["A", "B", "C"], 3)) == "ABCCBAABC"


def test_statistics(bench: ModuleType) -> None:
    table = bench.summary([{"s": s, "rare": s} if s == 1.0 else {"s": s} for s in (4.0, 1.0, 2.0, 3.0, 10.0)])
    assert table == {
        "s": {"median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "max": 10.0, "runs": [4.0, 1.0, 2.0, 3.0, 10.0]}
    }
    one = bench.summary([{"s": 7.0}])["s"]
    assert one["q1"] == one["median"] == one["q3"] == 7.0
    sides = {"ours": {"s": {"median": 1.0}}, "peer": {"s": {"median": 4.0}}, "best": {"s": {"median": 2.0}}}
    assert bench.ratios(sides, "s") == {"ours/peer": 0.25, "ours/best": 0.5}


def test_a_row_becomes_a_dated_record(bench: ModuleType, row: Any, tmp_path: Path) -> None:
    row.check = lambda: {"alike": True}
    record = bench.run_row(row, threads=1)
    path = bench.save(record, tmp_path / "results")
    assert path.name == f"{record['date']}-trivial.json"
    assert json.loads(path.read_text()) == record
    assert set(record["sides"]) == {"ours", "peer"} and set(record["ratios"]) == {"ours/peer"}
    side = record["sides"]["ours"]
    assert set(side) == {"wall_s", "cpu_s", "peak_mb", "saved_s", "steps"}  # a text that a child prints is no measure
    assert side["steps"]["runs"] == [20, 20]
    assert all(len(numbers["runs"]) == 2 and numbers["min"] >= 0 for numbers in side.values())
    assert record["machine"]["threads"] == 1 and record["machine"]["torch"]
    assert record["commands"]["ours"].startswith("python -c ")
    text = bench.table(record)
    assert "ours/peer of saved_s: " in text and "alike: True" in text


def test_ratios_of_other_measures(bench: ModuleType, row: Any) -> None:
    row.also = ("steps",)
    record = bench.run_row(row)
    assert record["ratios_steps"] == {"ours/peer": 1.0}
    assert "ours/peer of steps: 1.000" in bench.table(record)


def test_a_limit_is_held_or_not(bench: ModuleType, row: Any) -> None:
    row.measure, row.runs, row.pictures = "steps", 1, {}
    for limit, within in ((21, True), (20, False)):
        row.limit = limit
        record = bench.run_row(row)
        assert record["within_limit"] is within and "ratios" not in record
        assert f"{'within' if within else 'OVER'} its limit" in bench.table(record)


def test_a_command_that_fails_is_named(bench: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"python -c .* failed with exit code 3: no luck"):
        bench.run_once([sys.executable, "-c", "import sys; print('no luck'); sys.exit(3)"], None, None)
    with pytest.raises(RuntimeError, match="failed"):  # it ends well, but saves nothing
        bench.run_once([sys.executable, "-c", ""], tmp_path / "none.png", None)


def test_a_missing_model_is_reported(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--rows", "first_picture", "--model", str(tmp_path)])
    bench.main()
    assert "first_picture: not run, its model is missing" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_all_sides_train_the_same_lora(sd1_folder: Path, tmp_path: Path) -> None:
    train = script("train")
    fields = {"model": sd1_folder, "size": 64, "batch": 1, "steps": 2, "dtype": "float32", "device": "cpu"}
    options = argparse.Namespace(**fields, checkpointing=True, memory=None)
    learn = set()
    for side, run in train.SIDES.items():
        (tmp_path / side).mkdir()
        clock = train.Clock()
        learn.add(run(train.write_pictures(tmp_path / side / "pictures", 64, 1), options, clock))
        assert len(clock.times) == 3 and min(clock.measures().values()) > 0
    assert len(learn) == 1 and learn.pop() > 0
