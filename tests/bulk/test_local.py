"""Bulk: which files a file of requests gives, whatever happens during the run."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import mezzotint
from mezzotint import cli
from mezzotint.bulk import local as bulk
from mezzotint.bulk.folder import Failures
from mezzotint.errors import MezzotintError, RequestError, WriteError
from mezzotint.images.io import read_metadata
from mezzotint.memory import system
from mezzotint.pipeline import Pipeline
from mezzotint.placement import Placement
from mezzotint.request import Request

OWN = {"width": 16, "height": 8, "steps": 3, "guidance_scale": 7.5, "sampler": "euler", "batch": 3, "seed": 0}
Table = list[dict[str, Any]]


class FakePipeline:
    """A picture's colour depends on all of its group, as the last bits of a real one do."""

    device, dtype, placement = torch.device("cpu"), torch.float32, Placement()
    parts = SimpleNamespace(identity={"weights": "abc"})
    notices = ()
    remarks: tuple[str, ...] = ()  # on each picture

    def __init__(self) -> None:
        self.groups: list[list[Request]] = []

    def resolve(self, request: Request) -> Request:
        if request.prompt == "refused":
            raise RequestError("no model draws this")
        return request.replace(**{name: value for name, value in OWN.items() if getattr(request, name) is None})

    def generate(
        self,
        requests: list[Request],
        *,
        on_step: Callable[[int, int], None] = lambda done, total: None,
        on_image: Callable[[int, Image.Image], None],
    ) -> list[SimpleNamespace]:
        self.groups.append(requests)
        for step in range(3):
            on_step(step + 1, 3)
        for k, request in enumerate(requests):
            if request.prompt.startswith("fails"):
                raise (RuntimeError("not enough\nmemory") if "memory" in request.prompt else MezzotintError("NaN"))
            about = json.dumps([k, *(one.model_dump(mode="json") for one in requests)])
            image = Image.new("RGB", (16, 8), "#" + hashlib.sha256(about.encode()).hexdigest()[:6])
            image.info["parameters"] = f"{request.prompt} {request.seed}"
            on_image(k, image)
        return [
            SimpleNamespace(notices=tuple(remark.format(request) for remark in self.remarks)) for request in requests
        ]


def write(path: Path, table: Table) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    return path


def run(file: Path, folder: Path, pipe: Any = None, on_step: Any = lambda *_: None, **options: Any) -> list[Any]:
    """As the command does it."""
    with bulk.prepare(file, folder, options.pop("fields", {}), **options) as plan:
        worker, failures, outcomes = bulk.Worker(plan, pipe or FakePipeline()), Failures(folder), []
        for outcome in bulk.run(plan, worker, on_step):
            failures.add(outcome)
            outcomes.append(outcome)
        failures.write()
    return outcomes


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def mixed(rows: int, seed: int) -> Table:
    """Rows of four kinds that batch among themselves, with several pictures, and with failures of each sort."""
    draw = random.Random(seed)
    table: Table = []
    for k in range(rows):
        row: dict[str, Any] = {
            "prompt": f"lemon {k}",
            "steps": draw.choice([1, 2]),
            "sampler": draw.choice(["ddim", "euler"]),
        }
        row |= draw.choice([{}, {}, {"count": draw.randint(1, 5)}, {"seed": draw.randrange(2**64 - 9)}])
        row |= draw.choice(
            [{}] * 12 + [{"prompt": "refused"}, {"prompt": "fails"}, {"prompt": "fails, memory"}, {"stepz": 1}]
        )
        table.append(row)
    return table


# ---- which pictures --------------------------------------------------------------------------------------------------


def test_the_pictures_are_those_of_the_rows_requests(sd1: Pipeline, tmp_path: Path) -> None:
    """At batch 1 each to the last bit, and with its record, as `generate` gives it."""
    table = [
        {"prompt": "a lemon", "seed": 5, "count": 3},
        {"prompt": "{a|b|c|d|e}", "prompt_syntax": "comfy", "count": 2},
    ]
    run(write(tmp_path / "p.jsonl", table), tmp_path / "out", sd1, fields={"steps": "2"})
    for number, row in enumerate(table, 1):
        request = Request.model_validate({"seed": bulk.rows.row_seed(number), "steps": 2, **row})
        for k, image in enumerate(sd1.generate(request).images):
            path = tmp_path / "out" / f"00000{number}-{k}.png"
            with Image.open(path) as written:
                assert written.tobytes() == image.tobytes()
            text = read_metadata(path)["parameters"]
            assert f"Seed: {(request.seed or 0) + k}," in text and text == image.info["parameters"]
    assert len(files(tmp_path / "out")) == 5 + 1


def test_units_are_of_pictures_that_are_drawn_alike(tmp_path: Path) -> None:
    pipe = FakePipeline()
    table = [{"prompt": f"lemon {k}", "steps": 1 + k % 2} for k in range(10)] + [
        {"prompt": "whale", "count": 5, "batch": 2}
    ]
    run(write(tmp_path / "p.jsonl", table), tmp_path / "out", pipe)
    assert [[request.prompt[-1] for request in group] for group in pipe.groups] == [
        list("024"),
        list("135"),
        list("ee"),
        list("ee"),
        list("68"),
        list("79"),
        list("e"),
    ]
    first = bulk.rows.row_seed(11)
    assert sorted(r.seed - first for group in pipe.groups for r in group if r.prompt == "whale") == [0, 1, 2, 3, 4]  # type: ignore[operator]


def test_broken_off_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """After each step of the run in turn: no picture is drawn differently, lost, or written twice."""
    file = write(tmp_path / "p.jsonl", mixed(40, seed=3))
    run(file, tmp_path / "whole")
    whole = files(tmp_path / "whole")
    assert len(whole) > 30 and b"no model draws this" in whole["failures.jsonl"] and b"stepz" in whole["failures.jsonl"]
    draw = random.Random(1)
    folder, breaks = tmp_path / "broken", 0
    written: dict[str, int] = {}
    while True:
        left = draw.randint(1, 30) + 10 * breaks  # what failed is tried again each time

        def on_step(done: int, total: int) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt

        try:
            run(file, folder, on_step=on_step)
            break
        except KeyboardInterrupt:
            breaks += 1
        for path in folder.glob("*.png"):
            assert written.setdefault(path.name, path.stat().st_ino) == path.stat().st_ino, "written once"
    assert breaks > 3
    assert files(folder) == whole


def test_only_the_missing_files_of_a_unit_are_written(tmp_path: Path) -> None:
    file, folder, pipe = (
        write(tmp_path / "p.jsonl", [{"prompt": f"lemon {k}"} for k in range(6)]),
        tmp_path / "out",
        FakePipeline(),
    )
    run(file, folder)
    before = files(folder)
    kept = {path.name: path.stat().st_ino for path in folder.iterdir() if path.name != "000005-0.png"}
    (folder / "000005-0.png").unlink()
    outcomes = run(file, folder, pipe)
    assert files(folder) == before
    assert {path.name: path.stat().st_ino for path in folder.iterdir() if path.name in kept} == kept
    assert [[request.prompt for request in group] for group in pipe.groups] == [["lemon 3", "lemon 4", "lemon 5"]]
    assert (sum(one.drawn for one in outcomes), sum(one.existing for one in outcomes)) == (1, 5)


def test_parts_of_windows_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each actor of a cluster does: parts in any order, by two workers, give the same files and failures."""
    monkeypatch.setattr(bulk, "WINDOW", 30)
    file = write(tmp_path / "p.jsonl", mixed(2 * bulk.WINDOW + 30, seed=5))
    run(file, tmp_path / "whole")
    with bulk.prepare(file, tmp_path / "parts", {}) as plan:
        assert plan.windows == 3
        workers = [bulk.Worker(plan, FakePipeline()) for _ in range(2)]  # type: ignore[arg-type]
        parts = [(window, part) for window in range(3) for part in range(4)]
        random.Random(0).shuffle(parts)
        outcomes = [
            outcome for k, (window, part) in enumerate(parts) for outcome in workers[k % 2].work(window, part, parts=4)
        ]
        failures = Failures(plan.folder)
        for outcome in sorted(outcomes, key=lambda outcome: outcome.window):
            failures.add(bulk.from_json(bulk.to_json(outcome)))
        failures.write()
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    for worker in workers:
        assert worker.pipe.groups, "both had work"  # type: ignore[attr-defined]


def test_a_long_file_takes_no_more_memory_than_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "WINDOW", 32)

    class Quick(FakePipeline):
        def generate(self, requests: list[Request], **_: Any) -> None:
            pass

    def peak(rows: int) -> int:
        file = write(tmp_path / f"{rows}.jsonl", [{"prompt": f"lemon {k}"} for k in range(rows)])
        with bulk.prepare(file, tmp_path / f"out{rows}", {}) as plan:
            worker = bulk.Worker(plan, Quick())  # type: ignore[arg-type]
            tracemalloc.start()
            for _ in bulk.run(plan, worker, lambda done, total: None):
                pass
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return most

    assert peak(10 * bulk.WINDOW) < 1.2 * peak(2 * bulk.WINDOW)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_row_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    table: Table = [{"prompt": p} for p in ("a", "fails", "b", "refused", "fails for memory", "c")]
    table.insert(1, {"prompt": "d", "steps": 0})
    outcomes = run(write(tmp_path / "p.jsonl", table), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert lines == [
        {"row": 2, "error": "steps is 0; it must be a whole number from 1 to 1000"},
        {"row": 3, "image": 0, "error": "NaN"},
        {"row": 5, "error": "no model draws this"},
        {"row": 6, "image": 0, "error": "unexpected error (RuntimeError: not enough memory)"},
    ]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [f"00000{k}-0.png" for k in (1, 4, 7)]
    assert sum(one.drawn for one in outcomes) == 3


def test_a_failure_that_is_mended_is_gone(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "fails"}])
    run(file, tmp_path / "out")
    pipe = FakePipeline()
    pipe.generate = lambda requests, on_step, on_image: [  # type: ignore[assignment, method-assign]
        on_image(k, Image.new("RGB", (8, 8))) for k in range(len(requests))
    ]
    run(file, tmp_path / "out", pipe)
    assert sorted(files(tmp_path / "out")) == ["000001-0.png", "000002-0.png", "bulk.json"]


@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    file = write(tmp_path / "p.jsonl", [{"prompt": f"lemon {k}"} for k in range(12)])
    run(file, tmp_path / "whole")
    calls, sync = 0, os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match="No space left on device"):
            run(file, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.png"))) == max(at - 2, 0), "one of the writes was bulk.json's"
    run(file, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_folder_belongs_to_one_file_and_its_settings(tmp_path: Path) -> None:
    file, folder = write(tmp_path / "p.jsonl", [{"prompt": "a"}]), tmp_path / "out"
    run(file, folder, threads=2)
    run(file, folder)  # the threads are those of the beginning
    assert json.loads((folder / "bulk.json").read_text())["threads"] == 2
    other = write(tmp_path / "q.jsonl", [{"prompt": "b"}])
    model = FakePipeline()
    model.parts = SimpleNamespace(identity={"weights": "abd"})
    for arguments, options, sentence in [
        ((other, folder), {}, r"^file is \".*\", but .* was started with \".*\"; use the same file, or choose another"),
        (
            (file, folder),
            {"threads": 1},
            "threads is 1, but .* was started with 2; use the same threads",
        ),
        ((file, folder), {"fields": {"steps": 2}}, "fields steps is 2, but .* was started with null"),
        ((file, folder, model), {}, 'model weights is "abd", but .* was started with "abc"'),
    ]:
        with pytest.raises(RequestError, match=sentence):
            run(*arguments, **options)  # type: ignore[arg-type]
    (folder / "bulk.json").write_text("[]")
    with pytest.raises(RequestError, match="not the record of a bulk run"):
        run(file, folder)
    (folder / "bulk.json").unlink()
    with pytest.raises(RequestError, match=r"contains pictures but no bulk\.json"):
        run(file, folder)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", [{"prompt": "a"}])
    with bulk.prepare(file, tmp_path / "out", {}), pytest.raises(WriteError, match="in use by another run"):
        run(file, tmp_path / "out")
    run(file, tmp_path / "out")


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process, on the fake model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEZZOTINT_DEBUG", raising=False)
    monkeypatch.setattr(mezzotint, "load", lambda *_, **__: FakePipeline(), raising=False)

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mezzotint", "bulk", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return int(done.value.code or 0), *capsys.readouterr()

    return command


def test_output_of_the_command(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "p.jsonl", [{"prompt": f"lemon {k}"} for k in range(7)])
    code, out, err = command("p.jsonl", "--out", "out", "--threads", "1", "--json")
    record = json.loads(out)
    assert (code, err) == (0, "") and record.pop("seconds") > 0
    assert record == {"folder": "out", "drawn": 7, "found": 0, "failed_rows": 0, "rows": 7, "threads": 1, "notices": []}
    assert command("p.jsonl", "--out", "out")[:2] == (
        0,
        "Wrote 0 pictures into out; 7 were there already (0 pictures a minute, 1 thread)\n",
    )
    write(tmp_path / "q.jsonl", [{"prompt": "a"}, {"prompt": "refused"}])
    monkeypatch.setattr(sys.modules["mezzotint.cli.bulk"], "EVERY", 0.0)
    code, out, err = command("q.jsonl", "--out", "other", "--set", "count=2")
    assert code == 1 and out.startswith("Wrote 2 pictures into other (")
    assert "2 of 4 pictures, " in err and "pictures a minute, 0 min left, 1 thread" in err
    assert err.endswith("1 of 2 rows failed; the reasons are in other/failures.jsonl\n")


def test_threads_are_those_that_torch_would_take_within_the_quota(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "p.jsonl", [{"prompt": "a lemon"}])
    for torch_threads, cpus, threads in ((1, 64, 1), (3, 2, 2)):
        torch.set_num_threads(torch_threads)  # what OMP_NUM_THREADS does
        monkeypatch.setattr(system, "usable_cpus", lambda cpus=cpus: cpus)
        out = command("p.jsonl", "--out", f"out{threads}", "--json")[1]
        assert json.loads(out)["threads"] == torch.get_num_threads() == threads
    assert ", 2 threads)" in command("p.jsonl", "--out", "out2")[1]  # those of the beginning


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ("missing.jsonl --out out", 2, "'missing.jsonl' cannot be read (No such file or directory)"),
        ("p.jsonl --out p.jsonl/out", 1, "cannot be written to (Not a directory)"),
        ("p.jsonl --out out --set steps", 2, "set is 'steps'; it must be FIELD=VALUE"),
        ("p.jsonl --out out --set prompt=a", 2, "prompt and seed cannot be set for all rows"),
        ("p.jsonl --out out --threads 0", 2, "threads is 0; it must be a whole number from 1"),
        ("p.jsonl --out out --engine spark", 2, "engine is 'spark'; it must be local or ray"),
        ("p.jsonl --out out --engine ray", 2, "--engine ray needs Ray: pip install 'mezzotint[scale]'"),
    ],
)
def test_errors_are_raised_before_a_model_is_loaded(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, code: int, sentence: str
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(mezzotint, "load", load)
    monkeypatch.setitem(sys.modules, "ray", None)
    write(tmp_path / "p.jsonl", [{"prompt": "a"}])
    got, out, err = command(*arguments.split())
    assert (got, out) == (code, "") and sentence in err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_a_sentence_and_code_1(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "p.jsonl", [{"prompt": "a"}])

    def full(image: Any, path: Path) -> None:
        raise RequestError(f"{path.name!r} cannot be written: No space left on device")

    monkeypatch.setattr("mezzotint.images.io.save_png", full)
    code, out, err = command("p.jsonl", "--out", "out")
    assert (code, out) == (1, "")
    assert err == (
        "Error: '000001-0.png' cannot be written: No space left on device. Finished pictures are in out, and the same "
        "command continues from there\n"
    )


def test_ctrl_c_ends_within_a_step_and_loses_nothing(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "p.jsonl", [{"prompt": f"lemon {k}"} for k in range(9)])
    assert command("p.jsonl", "--out", "whole")[0] == 0
    pipe, steps = FakePipeline(), 0
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    def resolve(request: Request) -> Request:
        nonlocal steps
        steps += 1
        if steps == 5:  # while the second unit starts
            os.kill(os.getpid(), signal.SIGINT)
        return FakePipeline.resolve(pipe, request)

    pipe.resolve = resolve  # type: ignore[method-assign]
    monkeypatch.setattr(mezzotint, "load", lambda *_, **__: pipe)
    try:
        code, out, err = command("p.jsonl", "--out", "out")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (code, out) == (130, "")
    assert err == "Stopped; finished pictures are in out, and the same command continues from there\n"
    assert len(pictures(tmp_path / "out")) == 3 and len(pipe.groups) == 2
    assert command("p.jsonl", "--out", "out")[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# ---- killed ----------------------------------------------------------------------------------------------------------


def die(kind: str, number: int, folder: Path, line: list[str]) -> None:
    """Run the command, and end this process by SIGKILL just before something that is counted: the N-th call of any
    layer, or the N-th time that it opens, renames or removes a file in its folder. So a kill hits however fast the
    processor is.
    """
    left = number

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.link") and any(str(folder) in str(arg) for arg in args):
            count()

    if kind == "layer":
        torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: count())
    else:
        sys.addaudithook(watch)
    sys.argv = ["mezzotint", "bulk", *line]
    cli.main()


def command_line(file: Path, folder: Path, *options: str) -> list[str]:
    return [str(file), "--out", str(folder), "--threads", "1", *options]


def finished(file: Path, folder: Path, *options: str) -> None:
    line = [sys.executable, "-m", "mezzotint", "bulk", *command_line(file, folder, *options)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def pictures(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.png")}


def killed(file: Path, folder: Path, kind: str, number: int, *options: str) -> None:
    """Run the command in a fork of this process and have it killed; no picture may be torn."""
    before = pictures(folder)
    line = command_line(file, folder, *options)
    process = multiprocessing.get_context("fork").Process(target=die, args=(kind, number, folder, line))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for name in pictures(folder) - before:
        with Image.open(folder / name) as image:
            image.load()


def check_kills(
    tmp_path: Path, name: str, rows: int, kills: int, layers: int, finish: Callable[..., None], *options: str
) -> None:
    """Kill the command so many times; layers: how many calls of a layer a killed one makes at most."""
    table = [{"prompt": f"a {('lemon', 'whale', 'cat')[k % 3]}", "batch": 1 + k // 4 % 3} for k in range(rows)]
    file = write(tmp_path / "p.jsonl", table)
    folder, whole, draw = tmp_path / f"{name} killed", tmp_path / f"{name} whole", random.Random(rows)
    folder.mkdir()
    left, inodes = [], dict[str, int]()
    for k in range(kills):
        kind = ("file", "layer")[k % 2]
        killed(file, folder, kind, draw.randint(1 if k else 12, {"file": 30, "layer": layers}[kind]), *options)
        left.append(len(pictures(folder)))
        for path in folder.glob("*.png"):
            assert inodes.setdefault(path.name, path.stat().st_ino) == path.stat().st_ino, "drawn and written again"
    print(f"pictures after each kill: {left}")
    assert 0 < left[-1] < rows, "the kills fell in the middle"
    finish(file, folder, *options)
    finish(file, whole, *options)
    assert len(pictures(whole)) == rows
    assert files(folder) == files(whole)


FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the forked processes start no threads


@FORKS
def test_killed_twice(tmp_path: Path, sd1_folder: Path, sd1: Pipeline) -> None:
    """The rest is drawn by this process, which is quicker."""
    before = torch.get_num_threads()

    def finish(file: Path, folder: Path, *_: str) -> None:
        torch.set_num_threads(1)
        run(file, folder, sd1, fields={"steps": "5"}, threads=1)
        torch.set_num_threads(before)

    check_kills(tmp_path, "tiny", 20, 2, 1500, finish, "--model", str(sd1_folder), "--set", "steps=5")


@FORKS
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_twenty_times(tmp_path: Path) -> None:
    check_kills(tmp_path, "emoji", 300, 20, 2000, finished, "--set", "steps=1")


# ---- Ray -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_workers_of_ray_make_the_same_files(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is 150 MB to download, of the extra scale: pip install 'mezzotint[scale]'")
    table: Table = [{"prompt": f"a {('lemon', 'whale', 'cat')[k % 3]}", "batch": 1 + k // 4 % 3} for k in range(24)]
    table[5] = {"prompt": "a cat", "stepz": 3}
    table[9] = {"prompt": "a cat", "sampler": "heun", "eta": 0.5}
    file = write(tmp_path / "p.jsonl", table)
    code = (
        "import sys, ray, logging\n"
        "ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)\n"
        "from mezzotint import cli\n"
        "sys.argv = ['mezzotint', 'bulk', *sys.argv[1:]]\n"
        "cli.main()\n"
    )
    for engine, begin in {"local": ["-m", "mezzotint", "bulk"], "ray": ["-c", code]}.items():
        line = [
            sys.executable,
            *begin,
            str(file),
            "--out",
            str(tmp_path / engine),
            "--threads",
            "1",
            "--engine",
            engine,
        ]
        done = subprocess.run([*line, "--set", "steps=1"], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "2 of 24 rows failed" in done.stderr, done.stderr
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert len(pictures(tmp_path / "ray")) == 22


def test_notices_name_the_first_row_of_each_unit(tmp_path: Path) -> None:
    """Also through JSON, in which Ray's workers send them."""
    table = [{"prompt": "whale", "steps": 2}, {"prompt": "fails"}, *({"prompt": "lemon", "steps": n} for n in (2, 1))]
    pipe = FakePipeline()
    pipe.remarks = ("a notice", "{0.steps} steps")
    outcomes = run(write(tmp_path / "rows.jsonl", table), tmp_path / "out", pipe)
    told = [notice for outcome in outcomes for notice in bulk.from_json(bulk.to_json(outcome)).notices]
    assert sorted(told) == [(1, "2 steps"), (1, "a notice"), (4, "1 steps"), (4, "a notice")]
    assert [notice for outcome in outcomes for notice in outcome.notices] == told
