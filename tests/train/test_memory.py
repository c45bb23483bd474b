"""A budget for training: what is foreseen, what is done, and that what is learnt stays the same. Tiny models."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from mezzotint.errors import BudgetError
from mezzotint.memory import planner as memory
from mezzotint.memory import system, walk
from mezzotint.memory.headers import ModelHeaders
from mezzotint.train import budget
from mezzotint.train.batches import Batch
from mezzotint.train.budget import TrainingPlan, offload_placements, plan_training
from mezzotint.train.finetune import split_batch
from mezzotint.train.recipe import Recipe
from mezzotint.train.run import run
from mezzotint.train.saving import KOHYA
from mezzotint.train.trainable import TrainableModel
from mezzotint.weights import open_model

BASE = 500 * 2**20


def recipe_of(model: Path, method: str = "lora", **fields: Any) -> Recipe:
    made = {"data": "x", "model": str(model), "resolution": 32, "bucket_step": 8, "tensorboard": False, "steps": 2}
    return Recipe.of(method, None, made | fields)


def plan_of(model: Path, memory: str | int, method: str = "lora", **fields: Any) -> TrainingPlan:
    recipe = recipe_of(model, method, memory=str(memory), **fields)
    return plan_training(recipe, ModelHeaders.of(model, device="cpu"), [(40, 40)], [(32, 32)])


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that takes 500 MiB before its model, and libraries of no size."""
    monkeypatch.setattr(system, "resident", lambda: BASE)
    monkeypatch.setattr(system, "mapped", lambda: 1)


def test_tensors_count_from_when_they_are_made_until_nothing_names_them() -> None:
    network = nn.Linear(8, 8, device="meta")
    with torch.device("meta"), walk.TensorCounter(network) as counting:
        x = torch.empty(10, 8)
        assert counting.now == 320
        y = x * 2
        assert counting.now == 640
        view = y.view(80)
        del y
        assert counting.now == 640, "a view keeps what it looks at"
        del view, x
        gc.collect()
        assert counting.now == 0 and counting.peak == 640
        out = network(
            torch.empty(10, 8)
        ).square()  # input, result, square: of which the backward pass needs the first two
        assert counting.now == 960
        torch.autograd.backward(out.sum())
        assert network.weight.grad is not None and counting.peak >= 960 + 4 * 72


def test_a_convolution_counts_the_weight_that_onednn_lays_out() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1, device="meta")
    with torch.device("meta"), torch.no_grad(), walk.TensorCounter(layer) as counting:
        layer(torch.empty(1, 4, 8, 8))
    assert counting.peak == 2 * 4 * 4 * 64 + 4 * layer.weight.numel()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_budget_is_kept_down_to_the_least(
    sd1_folder: Path, base: None, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With steps of a size that is easily made: 50 MiB a picture, half where blocks are checkpointed."""
    monkeypatch.setattr(
        budget._Run, "_walk", lambda self, again, micro_batch, held: micro_batch * 50 * 2**20 // (1 + again)
    )
    fast = plan_of(sd1_folder, "20GiB", method, batch=2)
    assert fast.measures.micro_batch == 2 and not fast.measures.checkpointing and not fast.returns_freed
    assert "nothing" not in fast.table() and "read from their files" in fast.table()
    less = plan_of(sd1_folder, int(fast.peak * memory.SAFETY) - 1, method, batch=2)
    assert less.peak * memory.SAFETY <= less.limit < fast.peak * memory.SAFETY and less.returns_freed
    assert less.measures != fast.measures
    with pytest.raises(BudgetError, match="at least") as error:
        plan_of(sd1_folder, "400MiB", method, batch=2)
    least = int(str(error.value).partition("at least ")[2].partition("MiB")[0])
    assert plan_of(sd1_folder, f"{least}MiB", method, batch=2).peak <= least * 2**20
    with pytest.raises(BudgetError, match=f"at least {least}MiB"):
        plan_of(sd1_folder, f"{least - 1}MiB", method, batch=2)


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("textual-inversion", {"start": "lemon"}),
        ("dreambooth", {"prompt": "a sks", "class_prompt": "a"}),
        ("controlnet", {"condition_widths": (4, 4, 8, 8), "random_crop": True, "shuffle_tags": True}),
        ("lora", {"text_encoder": True, "random_crop": True, "precision": "bfloat16", "convolutions": True}),
    ],
)
def test_other_ways_to_train_are_foreseen(sd1_folder: Path, base: None, method: str, fields: dict[str, Any]) -> None:
    plain = plan_of(sd1_folder, "20GiB", method, **fields)
    assert all(BASE < stage < 2 * BASE for stage in plain.stages.values()) and plain.step_bytes > 0
    assert ("class" in plain.stages) == (method == "dreambooth")
    assert ("captions" in plain.stages) == (method in ("dreambooth", "controlnet"))


def test_what_a_step_is_made_of(sd1_folder: Path, base: None) -> None:
    plain = plan_of(sd1_folder, "20GiB", "full", batch=4)
    model = TrainableModel(open_model(sd1_folder, dtype=torch.float32), recipe_of(sd1_folder, "full"))
    learns, _ = model.count_parameters()
    assert plain.parts["optimiser"] == 8 * learns and plain.parts["averages"] == 4 * learns
    assert plain.parts["gradients and activations"] > 4 * learns
    again = plan_of(sd1_folder, "20GiB", "full", batch=4, checkpointing=True)
    assert again.step_bytes < plain.step_bytes
    assert plan_of(sd1_folder, "20GiB", "full", optimiser="adafactor").parts["optimiser"] == 0


def test_networks_wait_in_their_files_where_no_step_needs_them(sd1_folder: Path) -> None:
    model = ModelHeaders.of(sd1_folder, device="cpu")
    assert set(offload_placements(recipe_of(sd1_folder), model)) == {"vae", "text_encoder", "text_encoder_2"}
    assert set(offload_placements(recipe_of(sd1_folder, text_encoder=True), model)) == {"vae"}
    assert not offload_placements(recipe_of(sd1_folder, random_crop=True), model)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_pieces_of_a_batch_have_its_gradient(sd1_folder: Path, micro_batch: int) -> None:
    recipe = recipe_of(sd1_folder, "dreambooth", change="lora", prompt="a sks", prior_weight=0.5)
    model = TrainableModel(open_model(sd1_folder, dtype=torch.float32), recipe)
    for name, parameter in model.trainable_parameters().items():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))

    def batch(name: str, count: int) -> Batch:
        latents = torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(count))
        return Batch(0, tuple(f"{name}{k}" for k in range(count)), ("a lemon",) * count, latents, torch.zeros(count, 6))

    whole, prior = batch("a", 4), batch("b", 2)
    expected = torch.autograd.grad(model(whole, prior), [*model.trainable_parameters().values()])
    cut = list(split_batch(whole, prior, micro_batch))
    assert max(len(piece.ids) for piece in (*[c[0] for c in cut], *[c[1] for c in cut]) if piece) <= micro_batch
    total = [torch.zeros_like(gradient) for gradient in expected]
    for piece in cut:
        for sum_, gradient in zip(
            total, torch.autograd.grad(model(*piece), [*model.trainable_parameters().values()]), strict=True
        ):
            sum_ += gradient
    for sum_, gradient in zip(total, expected, strict=True):
        torch.testing.assert_close(sum_, gradient, rtol=1e-4, atol=1e-6)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(2):
        Image.new("RGB", (40, 40), (80 * k, 200, 30)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text("a lemon")
    return folder


def test_what_is_learnt_is_the_same(
    sd1_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every exact measure at once: streamed, checkpointed, one picture at a time, the VAE in strips."""
    monkeypatch.setattr(system, "return_freed", lambda: None)
    monkeypatch.setattr("mezzotint.models.offload.MIN_OFFLOAD_NUMEL", 64)
    recipe = recipe_of(sd1_folder, data=str(pictures), batch=2, lr=1e-2)
    run(recipe, tmp_path / "plain", device="cpu")
    measures = budget.TrainingMeasures(True, "stream", None, "strips", True, 1)
    told: list[str] = []
    candidates: Callable[[Any], Any] = lambda self: iter([measures])  # noqa: E731
    monkeypatch.setattr(budget._Run, "_measures", candidates)
    run(recipe.model_copy(update={"memory": "8GiB"}), tmp_path / "less", device="cpu", say=told.append)
    assert "split into parts of 1" in told[0] and "gradient checkpointing" in told[0]
    plain, less = (load_file(tmp_path / name / KOHYA) for name in ("plain", "less"))
    assert any(tensor.abs().max() > 0 for key, tensor in plain.items() if "lora_up" in key)
    for key, tensor in plain.items():
        torch.testing.assert_close(less[key].float(), tensor.float(), rtol=1e-2, atol=1e-4)
