"""The benchmark runner on trivial commands. How fast anything is, is never asserted."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

FILE = Path(__file__).parent.parent / "benchmarks" / "run.py"
SAVES = """
import json, pathlib, sys
pathlib.Path(sys.argv[1]).write_text("x")
print(json.dumps({"steps": 20, "name": "x"}))
"""


def script(name: str) -> ModuleType:
    if str(FILE.parent) not in sys.path:
        sys.path.append(str(FILE.parent))  # where the scripts find each other
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


def test_a_side_may_have_fewer_runs(bench: ModuleType, row: Any) -> None:
    row.at_most, row.also, row.not_run = {"peer": 1}, ("steps",), {"other": "not installed"}
    record = bench.run_row(row)
    assert [len(record["sides"][side]["steps"]["runs"]) for side in ("ours", "peer")] == [2, 1]
    assert "other: not installed" in bench.table(record)
    head, _, ours, peer, other = bench.markdown(record).splitlines()
    assert head == "| trivial | saved_s | steps | runs |" and other == "| other | not installed |  |  |"
    assert ours.startswith("| ours | ") and ours.endswith(" | 20 | 2 |")
    assert peer.startswith("| peer | ") and peer.endswith(" | 20 (1.00) | 1 |")


@pytest.mark.parametrize("name", ["step", "decode", "picture", "picture_xl"])
def test_rows_leave_out_what_is_not_installed(
    bench: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sys.modules["rows"]
    setup = bench.Setup(tmp_path, tmp_path, dtype="bfloat16", size=256, pythons={"openvino": "elsewhere"})
    for versions, peers in (({}, set()), ({"openvino": "1", "sdcpp": "2"}, {"openvino", "sdcpp"})):
        monkeypatch.setattr(rows, "peer_version", lambda peer, python, versions=versions: versions.get(peer, ""))
        row = bench.ROWS[name](setup)
        assert row.name == f"{name}_256_bfloat16" and next(iter(row.commands)) == "mezzotint"
        there = {"mezzotint", "diffusers", "diffusers_best"} | (peers if name == "step" else peers - {"sdcpp"})
        assert set(row.commands) == there and set(row.pictures) <= there
        assert set(row.not_run.values()) <= {"not installed"} and row.versions.keys() == there & versions.keys()
        assert all({"--dtype", "bfloat16"} <= set(command) for command in row.commands.values())
    assert row.commands["openvino"][0] == "elsewhere" and row.commands["mezzotint"][0] == sys.executable
    if name == "step":
        assert "256" in bench.ROWS[name](bench.Setup(tmp_path, tmp_path)).not_run["sdcpp"]


def test_a_peer_is_found_in_its_interpreter(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = sys.modules["rows"]
    monkeypatch.setitem(rows.PEERS, "openvino", "pytest")
    assert rows.peer_version("openvino", sys.executable) == pytest.__version__
    monkeypatch.setitem(rows.PEERS, "openvino", "no-such-distribution")
    assert rows.peer_version("openvino", sys.executable) == ""
    assert bench.peer_python("openvino=/a/python") == ("openvino", "/a/python")
    monkeypatch.setattr(sys, "argv", ["run.py", "--peer-python", "torch=/a/python"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "'torch=/a/python' is not PEER=PYTHON, with openvino or sdcpp as PEER" in capsys.readouterr().err


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_all_sides_draw_and_decode_the_same(sd1_folder: Path, tmp_path: Path) -> None:
    """The latents after a step and the decoded picture are of one model and one noise."""
    rows, step, decode = script("rows"), script("step"), script("decode")
    options = argparse.Namespace(folder=sd1_folder, size=64, steps=2, dtype="float32", controlnet=None)
    arrays, pictures = {}, {}
    for options.side in ("mezzotint", "diffusers", "diffusers_best"):
        reports: list[int] = []
        latents = step.SIDES[options.side](options, lambda reports=reports: reports.append(1))
        assert latents.shape == (1, 4, 8, 8) and len(reports) == 2
        arrays[options.side] = tmp_path / f"{options.side}.npy"
        np.save(arrays[options.side], latents.numpy())
        pictures[options.side] = tmp_path / f"{options.side}.png"
        decode.SIDES[options.side](options)().save(pictures[options.side])
    arrays["openvino"] = tmp_path / "none.npy"  # not run
    distances = rows.distances(arrays)
    assert set(distances) == {"distance_diffusers", "distance_diffusers_best"} and max(distances.values()) < 1e-4
    assert max(rows.levels_apart(pictures).values()) <= 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_loop_for_openvino_is_diffusers_euler() -> None:
    """With a network of numpy in place of the compiled one: sigmas, scales, timesteps and guidance."""
    from diffusers import EulerDiscreteScheduler

    random_model, engine = script("random_model"), script("openvino_engine")
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((1, 4, 8, 8), np.float32)
    weight = rng.standard_normal((2, 4, 4), np.float32) / 4

    def predict(x: Any, timestep: float) -> Any:
        return np.einsum("bij,jhw->bihw", weight, x[0]) * np.float32(timestep / 1000)

    for steps in (1, 3, 20):
        scheduler = EulerDiscreteScheduler.from_config(random_model.SCHEDULER)
        scheduler.set_timesteps(steps)
        x = torch.from_numpy(noise) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            plain, prompted = torch.from_numpy(
                predict(scheduler.scale_model_input(x, timestep).numpy(), float(timestep))
            )
            x = scheduler.step(plain + 7.5 * (prompted - plain), timestep, x).prev_sample
        *_, latents = engine.euler(predict, noise, random_model.SCHEDULER, steps, 7.5)
        assert latents.shape == noise.shape and latents.dtype == np.float32
        assert np.abs(latents - x.numpy()).max() < 1e-5 * np.abs(latents).max()


def test_tokens_for_openvino_are_those_of_transformers(sd1_folder: Path) -> None:
    from transformers import CLIPTokenizer

    prompts = ["", "a lemon on a blue background", "lemon " * 100]
    theirs = CLIPTokenizer.from_pretrained(sd1_folder / "tokenizer")(
        prompts, padding="max_length", max_length=77, truncation=True
    )
    assert script("openvino_engine").tokens(sd1_folder / "tokenizer", prompts).tolist() == theirs["input_ids"]
