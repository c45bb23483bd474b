"""The planner: what it chooses, what it refuses, and that a pipeline keeps to it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mezzotint
from mezzotint import cli
from mezzotint.explain.maps import explain
from mezzotint.images.io import CHUNKS, read_metadata
from mezzotint.memory import planner as memory
from mezzotint.memory import system
from mezzotint.memory.footprint import MemoryEstimate
from mezzotint.memory.headers import ModelHeaders
from mezzotint.memory.planner import Budget, MemoryPlan, plan
from mezzotint.placement import Placement, format_size
from mezzotint.records.record import read
from mezzotint.request import Request

BASE = 250 * 2**20
LARGE = Request(prompt="a lemon", width=1024, height=1024)


def test_sizes_are_written_in_binary_units() -> None:
    sizes = {
        1023: "1023 B",
        1024: "1.00 KiB",
        1536 * 2**10: "1.50 MiB",
        2**30 - 1: "1024.00 MiB",
        5 * 2**28: "1.25 GiB",
    }
    assert {count: format_size(count) for count in sizes} == sizes


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report a process of 250 MiB with libraries of a fixed size, whatever this machine has mapped."""
    monkeypatch.setattr(system, "resident", lambda: BASE)
    monkeypatch.setattr(system, "mapped", lambda: 100 * 2**20)


@pytest.fixture
def model(process: None) -> ModelHeaders:
    """Return the bundled model."""
    return ModelHeaders.of(device="cpu")


def test_with_room_nothing_is_done(model: ModelHeaders) -> None:
    made = plan(model, "20GiB", LARGE)
    assert made.placement == Placement() and not made.costs and not made.returns_freed
    assert made.slowdown == 0.0 and made.estimate == made.baseline
    assert "no measures are needed" in made.table()


def test_less_memory_is_never_faster_and_always_kept(model: ModelHeaders) -> None:
    """From what the fast way takes down to the least that can be met."""
    made = [plan(model, "20GiB", LARGE)]
    while True:
        try:
            made.append(plan(model, int(made[-1].estimate.peak * memory.SAFETY) - 1, LARGE))
        except mezzotint.BudgetError as error:
            least = int(str(error).rpartition(" ")[2].removesuffix("MiB"))
            break
    assert len(made) > 4
    assert all(one.estimate.peak * memory.SAFETY <= one.limit for one in made)
    costs = [one.slowdown for one in made if "tiles" not in one.table() and one.placement.vae != "tiles"]
    assert costs == sorted(costs)
    assert plan(model, f"{least}MiB", LARGE).estimate.peak <= least * 2**20
    with pytest.raises(mezzotint.BudgetError, match=f"at least {least}MiB"):
        plan(model, f"{least - 1}MiB", LARGE)


def test_exact_before_approximate(model: ModelHeaders) -> None:
    """A byte below the least that exact placements need, one is chosen that is not exact."""
    exact = min(memory.predict(model, LARGE, way, base=BASE).peak for way in memory._placements(model, 0))
    made = plan(model, int(exact * memory.SAFETY) + 1, LARGE)
    assert made.placement.vae != "tiles" and made.placement.storage in (None, "float16")
    assert model.file_dtypes == {"float16"}, "so float16 loses nothing"
    less = plan(model, int(exact * memory.SAFETY) - 1, LARGE)
    assert less.placement.vae == "tiles" or less.placement.storage == "int8"
    assert less.estimate.peak < exact


def test_the_cpu_streams_no_weights_that_are_stored_smaller(model: ModelHeaders) -> None:
    """Each use would read the file and round the weights again; offloaded ones are rounded once."""
    found = {(way.weights, way.storage) for rank in range(4) for way in memory._placements(model, rank)}
    assert {weights for weights, storage in found if storage} == {"resident", "offload"}
    assert ("stream", None) in found


def test_a_smaller_batch_comes_before_slower_measures(model: ModelHeaders) -> None:
    request = LARGE.replace(count=4, batch=4)
    whole = plan(model, "40GiB", request)
    made = plan(model, int(whole.estimate.peak * 0.6), request)
    assert made.request.batch in (1, 2) and made.placement == Placement()
    assert "batch" in made.costs and f"{made.request.batch} at a time" in made.table()
    several = plan(model, int(whole.estimate.peak * 0.6), [request, LARGE])
    assert [r.batch for r in several.requests] == [4, 1], "of several, whose batches they share, none is changed"


def test_the_table_lists_every_measure(model: ModelHeaders) -> None:
    limit = int(plan(model, "40GiB", LARGE).estimate.peak * 0.85)
    made = plan(model, limit, LARGE)
    assert made.placement.changes()
    text = made.table()
    for stage in ("load", "encode", "step", "decode", "png"):
        assert f"\n{stage}" in text
    assert f"of {memory.format_size(limit)}" in text and set(made.costs) == set(made.placement.changes())
    record = made.to_dict()
    assert json.loads(json.dumps(record)) == record
    assert record["peak"] == max(record["stages"].values()) and record["memory"] == limit
    assert record["placement"] == made.placement.changes()


def test_freed_memory_goes_back_only_where_it_must(model: ModelHeaders, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(system, "return_freed", lambda: called.append(1))
    made = plan(model, "20GiB", LARGE)
    made.prepare()
    assert not called
    tight = MemoryPlan(**{**vars(made), "limit": made.estimate.peak + 1})
    tight.prepare()
    assert called and tight.returns_freed and "returns to the system" in tight.table()


@pytest.mark.parametrize("size", ["0", "-1", "4 gigs", "10EiB", "lots", "", "99999999GiB", "9" * 400, 0, -5])
def test_what_is_no_budget(size: str | int) -> None:
    with pytest.raises(mezzotint.BudgetError, match="memory is"):
        plan(None, size)


def test_auto_is_what_is_free(model: ModelHeaders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "available", lambda: 2**30)
    assert plan(model, "auto").limit == int(BASE + memory.AUTO_SHARE * 2**30)
    monkeypatch.setattr(system, "available", lambda: None)
    with pytest.raises(mezzotint.BudgetError, match="not known"):
        plan(model, "auto")


def test_a_plan_is_itself(model: ModelHeaders) -> None:
    made = plan(model, "20GiB")
    assert plan(None, made) is made
    assert made.request.width == made.request.height == 128, "no request is the model's own picture"


@pytest.mark.usefixtures("process")
def test_a_pipeline_keeps_its_budget() -> None:
    pipe = mezzotint.load(device="cpu", memory=BASE + 400 * 2**20)
    assert isinstance(pipe._budget, Budget)
    with pytest.raises(mezzotint.BudgetError, match="this request needs"):
        pipe.generate(Request(prompt="a", width=2048, height=2048))
    larger = Request(prompt="a", width=640, height=640)
    pipe._budget.check(larger, pipe.placement)
    with mezzotint.attention.backend("math"), pytest.raises(mezzotint.BudgetError, match="this request needs"):
        pipe.generate(larger)
    assert pipe("a lemon", steps=1, seed=1).size == (128, 128)


def test_a_batch_is_made_smaller_where_that_makes_it_fit(model: ModelHeaders) -> None:
    """As the plan does, so that what was planned for is drawn: of one request, and of several that share a batch."""
    run = model.plan(LARGE.replace(count=4, batch=4))
    request = run.request
    made = plan(model, int(plan(model, "40GiB", request).estimate.peak * 0.6), request)
    budget, way, smaller = made.budget, made.placement, made.request.batch
    assert smaller in (1, 2)
    assert budget.fit_batch(run, way, 4).request.batch == smaller
    one = run.with_batch(4, 1)
    assert budget.fit_batch(one, way, 4).request.batch == smaller, "its neighbours fill the batch"
    assert budget.fit_batch(one, way, 1) is one, "nobody else is in it"
    with pytest.raises(mezzotint.BudgetError, match="this request needs"):
        budget.fit_batch(model.plan(request.replace(width=4096, height=4096)), way, 4)


def test_requests_that_share_a_batch_are_planned_together(model: ModelHeaders) -> None:
    together = LARGE.replace(count=8, batch=8)
    alone = plan(model, "90GiB", LARGE.replace(batch=8))
    assert plan(model, "90GiB", [LARGE.replace(batch=8, seed=k) for k in range(8)]).estimate == (
        plan(model, "90GiB", together).estimate
    )
    assert plan(model, "90GiB", together).estimate.peak > alone.estimate.peak


def test_placement_and_memory_are_one_or_the_other() -> None:
    with pytest.raises(mezzotint.RequestError, match="both"):
        mezzotint.load(device="cpu", memory="1GiB", placement=Placement(vae="strips"))


def test_the_peak_is_of_the_largest_stage() -> None:
    assert MemoryEstimate({"load": 3, "step": 5, "png": 1}).peak == 5


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):  # type: ignore[no-untyped-def]
    """The command line in this process: (code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mezzotint", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return (int(done.value.code or 0), *capsys.readouterr())

    return run


def test_the_command_prints_the_plan(run_command) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = run_command("plan", "--size", "512x512", "--count", "4", "--memory", "6GiB", "--device", "cpu")
    assert code == 0 and out.startswith("stage") and "of 6.00 GiB" in out
    code, out, _ = run_command("plan", "--memory", "6GiB", "--device", "cpu", "--json")
    assert code == 0 and json.loads(out)["memory"] == 6 * 2**30


@pytest.mark.parametrize("size", ["0", "4 gigs", "10EiB", "1MiB"])
@pytest.mark.parametrize("command", [("plan",), ("generate", "a lemon")])
def test_a_wrong_budget_is_an_error_of_the_user(run_command, command: tuple[str, ...], size: str) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run_command(*command, "--memory", size, "--device", "cpu")
    assert code == 2 and not out and err.startswith("Error: memory is")


def test_generate_and_bulk_print_the_plan_before_they_load(run_command, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run_command(
        "generate", "a lemon", "--steps", "1", "--seed", "1", "--memory", "16GiB", "--device", "cpu"
    )
    assert code == 0 and err.startswith("stage") and "Wrote" in out
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "steps": 1}\n{"prompt": "b", "width": 256, "steps": 1}\n')
    code, out, err = run_command("bulk", "rows.jsonl", "--out", "out", "--memory", "16GiB", "--device", "cpu")
    assert code == 0 and err.startswith("stage") and "Wrote 2" in out
    (tmp_path / "out" / "bulk.json").write_text(
        (tmp_path / "out" / "bulk.json").read_text().replace('"placement": {}', '"placement": {"guidance": "split"}')
    )
    first = next(path for path in sorted((tmp_path / "out").glob("*.png")))
    first.unlink()
    code, out, err = run_command("bulk", "rows.jsonl", "--out", "out", "--memory", "16GiB", "--device", "cpu")
    assert code == 2 and "leave out --memory" in err
    code, out, err = run_command("bulk", "rows.jsonl", "--out", "out", "--device", "cpu")
    record = read(read_metadata(first, CHUNKS))
    assert code == 0 and record is not None and record.model.placement.guidance == "split"
    code, out, err = run_command("bulk", "rows.jsonl", "--out", "other", "--memory", "1MiB", "--device", "cpu")
    assert code == 2 and "256x128" in err


def test_a_plan_is_of_one_model(model: ModelHeaders, sd1_folder: Path) -> None:
    made = plan(model, "20GiB")
    assert plan(model, made) is made
    with pytest.raises(mezzotint.RequestError, match="make a plan for this one") as error:
        mezzotint.load(sd1_folder, device="cpu", memory=made)
    assert str(sd1_folder) in str(error.value) and "float32 on cpu" in str(error.value)
    with pytest.raises(mezzotint.RequestError, match="bfloat16 on cpu"):
        mezzotint.load(device="cpu", dtype="bfloat16", memory=made)


def test_loras_count(model: ModelHeaders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are in the file, and in float32; what is no pair of factors is made whole as it is used."""
    monkeypatch.setattr(system, "mapped", lambda: 100 * 2**20)
    plain = LARGE.replace(loras=())
    peak = memory.predict(model, plain, base=BASE).peak
    tensors = {"lora_unet_x.lora_down.weight": torch.zeros(4, 1000, dtype=torch.float16)}
    save_file(tensors, tmp_path / "pair.safetensors")
    one = LARGE.replace(loras=((str(tmp_path / "pair.safetensors"), 1.0),))
    assert memory.predict(model, one, base=BASE).peak == peak + 4000 * (2 + 4)
    save_file({"lora_unet_x.hada_w1_a": torch.zeros(4, 1000)}, tmp_path / "pair.safetensors")
    largest = max(w.largest for w in model.weights.values())
    assert memory.predict(model, one, base=BASE).peak == peak + 4000 * 4 + 12 * largest


@pytest.mark.usefixtures("process")
def test_maps_of_an_explanation_count() -> None:
    pipe = mezzotint.load(device="cpu", memory=BASE + 400 * 2**20)
    request = Request(prompt="a lemon", steps=2, width=64, height=64)
    assert explain(pipe, request).steps == ((0, 1),)
    budget = pipe._budget
    assert budget
    pipe._budget = replace(budget, limit=budget.limit - budget.spare(pipe.plan(request), pipe.placement))
    with pytest.raises(mezzotint.BudgetError, match="load the model with more memory"):
        explain(pipe, request)
