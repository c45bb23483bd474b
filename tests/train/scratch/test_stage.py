"""A stage of training from scratch: exact across a kill, and what Muon does. A toy network throughout."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import Tensor, nn

from mezzotint.errors import CheckpointError, TrainingError
from mezzotint.files import PATTERN
from mezzotint.train import checkpoints
from mezzotint.train.loop import TrainingLoop
from mezzotint.train.scratch.optim import Muon, MuonAdamW, orthogonalise
from mezzotint.train.scratch.stage import Losses, Stage, train

STAGE = Stage(steps=12, batch=8, lr=1e-2, warmup=3, decay=4, ema=0.9, save_every=4, log_every=3)


class Toy(nn.Module):
    """Every kind of parameter: embedding, convolution in channels_last, norm, matrix, bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = self.norm(self.conv(x + self.embedding(ids)[:, :, None, None]))
        y: Tensor = self.linear(h.relu().mean((2, 3)))
        return y


def toy() -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class Died(BaseException):
    """Stands for a kill: no `except Exception` catches it."""


def run(folder: Path, stage: Stage = STAGE, die_at: int | None = None, module: Toy | None = None) -> Toy:
    module = module or toy()

    def losses(step: int, generator: torch.Generator) -> Losses:
        if step == die_at:
            raise Died
        x = torch.randn(stage.batch, 4, 6, 6, generator=generator)
        ids = torch.randint(0, 5, (stage.batch,), generator=generator)
        error = (module(x, ids) - x.mean((2, 3)) - ids[:, None] / 5).square().mean()
        return {"loss": error, "twice": 2 * error.detach()}

    train(module, losses, stage, folder, adamw_only=("linear",), log=lambda line: None)
    return module


def state(folder: Path) -> Any:
    found = checkpoints.load_newest(folder)
    assert found
    return found[1]


def assert_equal(a: Any, b: Any) -> None:
    """The same structure with the same bits."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, Any]:
    folder = tmp_path_factory.mktemp("unbroken")
    return run(folder), state(folder)


def test_the_state_holds_all_that_a_step_needs(unbroken: tuple[Toy, Any]) -> None:
    module, saved = unbroken
    assert saved["step"] == 12
    assert saved["trained"].keys() == saved["averages"].keys() == module.state_dict().keys()
    kept = [len(part["state"]) for part in saved["optimiser"]["parts"]]
    assert sum(kept) == len(saved["averages"]) and len(kept) == 2, "each parameter has its momentum, in AdamW or Muon"


@pytest.mark.parametrize("deaths", [[0], [1], [4], [5], [11], [3, 7], [2, 6, 6, 10]], ids=str)
def test_a_run_that_died_resumes_bit_for_bit(tmp_path: Path, unbroken: tuple[Toy, Any], deaths: list[int]) -> None:
    for step in deaths:
        with pytest.raises(Died):
            run(tmp_path, die_at=step)
    module = run(tmp_path)
    assert_equal(dict(module.state_dict()), dict(unbroken[0].state_dict()))
    assert_equal(state(tmp_path), unbroken[1])


def test_it_does_not_repeat_what_is_saved(tmp_path: Path) -> None:
    with pytest.raises(Died):
        run(tmp_path, die_at=9)
    assert state(tmp_path)["step"] == 8
    with pytest.raises(Died):
        run(tmp_path, die_at=8)  # the first step after the checkpoint


def test_a_finished_run_is_only_read(tmp_path: Path, unbroken: tuple[Toy, Any]) -> None:
    run(tmp_path)
    (newest, _) = before = checkpoints.list_all(tmp_path)
    written = (newest / checkpoints.STATE).stat().st_mtime_ns
    assert_equal(dict(run(tmp_path, die_at=12).state_dict()), dict(unbroken[0].state_dict()))
    assert checkpoints.list_all(tmp_path) == before
    assert (newest / checkpoints.STATE).stat().st_mtime_ns == written


def dies_writing(folder: Path) -> None:
    """Train the toy; at the second checkpoint write half of it, then SIGKILL."""
    torch.set_num_threads(1)  # a fork has none of its parent's
    save, saves = torch.save, 0

    def half(saved: object, file: BinaryIO) -> None:
        nonlocal saves
        saves += 1
        save(saved, file)
        if saves == 2:
            file.truncate(file.tell() // 2)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.torch.save = half  # type: ignore[attr-defined]
    run(folder)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the forked process starts no threads of its own
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the run is forked")
def test_a_kill_while_a_checkpoint_is_written(tmp_path: Path, unbroken: tuple[Toy, Any]) -> None:
    """SIGKILL in a process of its own, half of the second checkpoint on the disk."""
    process = multiprocessing.get_context("fork").Process(target=dies_writing, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    first = tmp_path / "checkpoint-00000004" / checkpoints.STATE
    (half,) = (folder / checkpoints.STATE for folder in tmp_path.glob(PATTERN.format("*")))
    assert half.stat().st_size < first.stat().st_size
    assert state(tmp_path)["step"] == 4, "the first is whole"
    module = run(tmp_path)
    assert_equal(state(tmp_path), unbroken[1])
    assert_equal(dict(module.state_dict()), dict(unbroken[0].state_dict()))
    assert not half.exists()


def test_only_a_partial_checkpoint_is_none(tmp_path: Path, unbroken: tuple[Toy, Any]) -> None:
    partial = tmp_path / PATTERN.format("0")
    partial.mkdir()
    (partial / checkpoints.STATE).write_bytes(b"half")
    run(tmp_path)
    assert_equal(state(tmp_path), unbroken[1])


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign"])
def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, unbroken: tuple[Toy, Any], damage: str) -> None:
    """The run resumes from the one before; if all are damaged, a sentence says so."""
    run(tmp_path)
    for number, folder in enumerate(checkpoints.list_all(tmp_path)):
        path = folder / checkpoints.STATE
        path.write_bytes({"empty": b"", "cut": path.read_bytes()[:3000], "foreign": b"GIF89a" * 100}[damage])
        if number == 0:
            assert state(tmp_path)["step"] == 8
            assert_equal(dict(run(tmp_path).state_dict()), dict(unbroken[0].state_dict()))
    for folder in checkpoints.list_all(tmp_path):
        (folder / checkpoints.STATE).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged; delete them"):
        run(tmp_path)


@pytest.mark.parametrize("foreign", ["another model", "a key gone"])
def test_a_checkpoint_of_another_model_is_a_sentence(tmp_path: Path, foreign: str) -> None:
    run(tmp_path)
    saved = state(tmp_path) | {"trained": nn.Linear(2, 2).state_dict()} if foreign == "another model" else {"step": 3}
    checkpoints.save(tmp_path, 13, saved)
    with pytest.raises(CheckpointError, match=r"checkpoint-00000013 is of another model \(.*\); use another folder"):
        run(tmp_path)


def test_a_longer_run_goes_on_from_where_a_shorter_one_was(tmp_path: Path) -> None:
    """Before the decay starts, a run with more steps is the same run."""
    short, long = Stage(steps=8, batch=8, decay=2, save_every=4), Stage(steps=16, batch=8, decay=2, save_every=4)
    with pytest.raises(Died):
        run(tmp_path / "a", short, die_at=5)
    run(tmp_path / "a", long)
    run(tmp_path / "b", long)
    assert_equal(state(tmp_path / "a"), state(tmp_path / "b"))


def test_a_gradient_that_is_not_finite_stops_the_run_and_spoils_nothing(tmp_path: Path) -> None:
    with pytest.raises(Died):
        run(tmp_path, die_at=5)
    saved = state(tmp_path)
    module = toy()
    weight = module.linear.weight

    def losses(step: int, generator: torch.Generator) -> Losses:
        return {"loss": weight.sum() * float("nan")}

    with pytest.raises(
        TrainingError, match=r"step 5: the loss is not finite; the last good checkpoint is .*checkpoint-00000004"
    ):
        train(module, losses, STAGE, tmp_path, adamw_only=("linear",))
    assert_equal(state(tmp_path), saved)


def test_it_learns_and_writes_down_how(tmp_path: Path) -> None:
    lines: list[str] = []
    module, stage = toy(), Stage(steps=60, batch=16, lr=2e-2, warmup=5, decay=20, ema=0.9, log_every=20)
    x = torch.randn(16, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(16) % 5
    aim = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))[ids]

    def loss(step: int, generator: torch.Generator) -> Losses:
        return {"loss": (module(x, ids) - aim).square().mean()}

    train(module, loss, stage, tmp_path, log=lines.append)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged == [json.loads(line) for line in lines]
    assert [line["step"] for line in logged] == [20, 40, 60]
    assert logged[-1]["loss"] < 0.5 * logged[0]["loss"]
    assert loss(0, torch.Generator())["loss"] < logged[1]["loss"], "the averaged weights are a good model too"


def test_the_rate_rises_stays_and_falls() -> None:
    stage = Stage(steps=100, batch=1, warmup=10, decay=40)
    scales = [stage.lr_scale(step) for step in range(100)]
    assert scales[0] == 0.1 and scales[9] == 1.0
    assert set(scales[9:61]) == {1.0}
    assert scales[61] < 1.0 and scales[99] == 1 / 40
    assert scales[61:] == sorted(scales[61:], reverse=True)


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    module = run(tmp_path)
    averages, last = state(tmp_path)["averages"], state(tmp_path)["trained"]
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, averages[name]), "what comes back are the averages"
        assert not torch.equal(averages[name], last[name])


# ---- Muon ------------------------------------------------------------------------------------------------------------


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Singular values spread over one and a half decades."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    return u * torch.logspace(0, -1.5, min(rows, columns)) @ v  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [(48, 12), (12, 48), (24, 24), (1, 30), (30, 1)], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonalise(shape: tuple[int, int], scale: float) -> None:
    g = matrix(*shape) * scale
    result = orthogonalise(g)
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    assert ((u.T @ result @ v.T).diagonal() > 0.6).all(), "the same directions"


def test_orthogonalise_of_nothing_is_nothing() -> None:
    assert torch.equal(orthogonalise(torch.zeros(4, 6)), torch.zeros(4, 6))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_its_flattened_matrix(memory_format: torch.memory_format) -> None:
    start = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    conv = nn.Parameter(start.clone(memory_format=memory_format))
    flat = nn.Parameter(start.flatten(1).clone())
    optimisers = [Muon([p], lr=0.5) for p in (conv, flat)]
    for step in range(4):
        g = torch.randn(start.shape, generator=torch.Generator().manual_seed(step))
        conv.grad, flat.grad = g.clone(memory_format=memory_format), g.flatten(1)
        for optimiser in optimisers:
            optimiser.step()
    assert conv.is_contiguous(memory_format=memory_format)
    assert torch.equal(conv.flatten(1), flat)
    assert not torch.allclose(flat, start.flatten(1), atol=0.1)


def test_a_step_of_muon_by_hand() -> None:
    """Nesterov momentum, made orthogonal, at 0.2 sqrt(longer side) of the rate; weights decay first."""
    p = nn.Parameter(matrix(6, 10))
    start, g = p.detach().clone(), matrix(6, 10, seed=1)
    optimiser = Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5)
    p.grad = g
    optimiser.step()
    update = orthogonalise(0.1 * g + 0.9 * (0.1 * g))
    torch.testing.assert_close(p.detach(), start * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 10**0.5 * update)


def test_who_gets_which_optimiser() -> None:
    module = toy()
    adam, muon = MuonAdamW(module, 1e-3, adamw_only=("linear",)).parts
    names = {id(p): name for name, p in module.named_parameters()}
    assert [names[id(p)] for p in muon.param_groups[0]["params"]] == ["conv.weight"]
    assert len(adam.param_groups[0]["params"]) == len(names) - 1
    assert len(MuonAdamW(module, 1e-3, adamw_only=("",)).parts) == 1, "an empty word is in every name: AdamW alone"


def test_a_step_takes_the_scale_and_the_gradients_go(tmp_path: Path) -> None:
    module = toy()
    optimiser = MuonAdamW(module, 1e-3)
    before = [p.detach().clone() for p in module.parameters()]

    def backward(step: int) -> Losses:
        assert all(p.grad is None for p in module.parameters()), "each step begins without gradients"
        loss = module(torch.randn(2, 4, 3, 3), torch.tensor([0, 1])).sum()
        loss.backward()
        return {"loss": loss}

    loop = TrainingLoop(dict(module.named_parameters()), optimiser, tmp_path, STAGE, lambda step: float(step > 1))
    for done in loop.run(backward):
        still = [torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True)]
        assert all(still) if done.step <= 2 else not any(still), "at scale 0 nothing moves"
    assert all(p.grad is None for p in module.parameters())
