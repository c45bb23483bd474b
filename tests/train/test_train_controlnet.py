"""`mezzotint train controlnet`: its conditioning pictures, a run that is killed, what is saved. Tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import load_file

import mezzotint
from mezzotint.errors import RequestError
from mezzotint.images.io import from_pil
from mezzotint.train.batches import Batches, DataOptions
from mezzotint.train.conditions import pair_conditions
from mezzotint.train.data import PICTURES, Dataset, open_data
from mezzotint.train.finetune import Report
from mezzotint.train.latents import Latents, View
from mezzotint.train.recipe import Recipe
from mezzotint.train.run import run
from mezzotint.train.trainable import TrainableModel
from mezzotint.weights import open_model


def picture(seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures whose conditioning pictures, of half their size, are named by metadata."""
    made = tmp_path / "pictures"
    (made / "edges").mkdir(parents=True)
    lines = []
    for k in range(3):
        picture(k).save(made / f"{k}.png")
        picture(10 + k, (20, 24)).save(made / "edges" / f"{k}.png")
        lines.append({"file_name": f"{k}.png", "conditioning_image": f"edges/{k}.png", "text": "a lemon"})
    (made / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


def paired(data: Path, conditions: Path | None = None, broken: Any = "stop") -> Dataset:
    return pair_conditions(open_data(data), conditions and str(conditions), PICTURES, broken)


def recipe_of(model: Path, data: Path, **fields: Any) -> Recipe:
    made = {"data": str(data), "model": str(model), "resolution": 32, "bucket_step": 8, "tensorboard": False}
    made |= {"steps": 3, "batch": 2, "lr": 1e-2, "save_every": 1, "condition_widths": (4, 4, 8, 8)}
    return Recipe.of("controlnet", None, made | fields)


def test_conditioning_pictures_are_cropped_and_mirrored_as_their_pictures(
    folder: Path, sd1: mezzotint.Pipeline
) -> None:
    """With the picture itself as its conditioning picture, what the ControlNet reads is what the VAE reads."""
    data = paired(folder, folder)
    options = DataOptions(resolution=32, bucket_step=8, batch=3, random_crop=True, flip=True)
    seen: list[torch.Tensor] = []

    class Recording(Latents):
        def posterior(self, example: Any, view: View, keep: bool = True) -> Any:
            seen.append(from_pil(view(example.open())))
            return super().posterior(example, view, keep)

    batches = Batches(data, options, Recording(sd1.vae), seed=1)
    for k in range(4):
        seen.clear()
        hints = batches.at(k).hints
        assert hints is not None and hints.shape[:2] == (3, 3)
        torch.testing.assert_close(hints * 2 - 1, torch.cat(seen))


def test_three_ways_to_give_them(folder: Path, tmp_path: Path) -> None:
    by_metadata = [one.condition.open().tobytes() for one in paired(folder) if one.condition]
    by_folder = [one.condition.open().tobytes() for one in paired(folder, folder / "edges") if one.condition]
    assert by_metadata == by_folder == [picture(10 + k, (20, 24)).tobytes() for k in range(3)]
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    bytes_of = [{"bytes": (folder / "edges" / f"{k}.png").read_bytes()} for k in range(3)]
    pictures = [{"bytes": (folder / f"{k}.png").read_bytes()} for k in range(3)]
    table = pyarrow.table({"image": pictures, "conditioning_image": bytes_of, "text": ["a"] * 3})
    parquet.write_table(table, tmp_path / "data.parquet")
    assert [one.condition.open().tobytes() for one in paired(tmp_path / "data.parquet") if one.condition] == by_folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conditioning_image": "edges/wide.png"}, r"wide.png' is 30x20 and its picture 40x48; .* same aspect ratio"),
        ({"conditioning_image": "edges/none.png"}, r"none.png.*"),
        ({"conditioning_image": "../x.png"}, r"names '../x.png'; it must be below the folder"),
        ({"conditioning_image": "words.txt"}, r"words.txt"),
        ({}, r"0.png' has no conditioning picture; the data must name it as conditioning_image, or the recipe's"),
    ],
)
def test_data_that_cannot_be_used(folder: Path, change: dict[str, str], said: str) -> None:
    picture(0, (30, 20)).save(folder / "edges" / "wide.png")
    (folder / "words.txt").write_text("no picture")
    lines = [{"file_name": "0.png", "text": "a"} | change]
    lines += [{"file_name": "1.png", "conditioning_image": "edges/1.png", "text": "a"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RequestError, match=said):
        paired(folder)
    if "below" not in said:
        kept = paired(folder, broken="skip")
        assert [one.id for one in kept] == ["1.png"] and len(kept.skipped) == 1


def test_the_folder_of_conditions_must_exist(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"conditions is .*none'; it must be a folder"):
        paired(folder, folder / "none")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text_encoder": True}, "text_encoder is set, which a ControlNet cannot change"),
        ({"sample_every": 1, "sample_prompts": ["a"]}, "sample_conditions has 0 pictures and sample_prompts 1"),
        ({"method": "lora", "conditions": "edges"}, "conditions are for the method controlnet; the method is lora"),
        ({"timesteps": "late"}, "timesteps is 'late'; it must be uniform, or cubic"),
    ],
)
def test_recipes_that_cannot_be_used(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Recipe.of(str(fields.get("method", "controlnet")), None, {"data": "x", **fields})


def test_a_killed_run_ends_with_the_same_bits_and_diffusers_reads_them(
    sd1_folder: Path, folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(
        sd1_folder, folder, ema=0.9, timesteps="cubic", sample_every=3, sample_prompts=["a lemon"],
        sample_conditions=[str(folder / "edges" / "0.png")],
    )  # fmt: skip
    (made,) = run(recipe, tmp_path / "whole", device="cpu")

    def stop(report: Report) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "killed", device="cpu", on_step=stop)
    (again,) = run(recipe, tmp_path / "killed", device="cpu")
    whole, killed = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (made, again))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    assert whole["controlnet_mid_block.weight"].abs().max() > 0
    assert (tmp_path / "whole" / "samples" / "step-00000003-0.png").is_file()

    theirs = ControlNetModel.from_pretrained(made, torch_dtype=torch.float32)
    parts = open_model(sd1_folder, dtype=torch.float32)
    model = TrainableModel(parts, recipe.model_copy(update={"controlnet": str(made)}))  # a run that starts from it
    assert model.controlnet is not None
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in model.controlnet.state_dict().items())
    assert dict(theirs.config)["conditioning_embedding_out_channels"] == [4, 4, 8, 8]


def test_cubic_timesteps_prefer_noise(sd1_folder: Path) -> None:
    """Their mean is three quarters of the schedule."""

    class Batch:
        epoch, ids = 0, tuple(map(str, range(2000)))
        latents = torch.zeros(2000, 1, 1, 1)

    model = TrainableModel(open_model(sd1_folder, dtype=torch.float32), recipe_of(sd1_folder, Path("x")))
    batch: Any = Batch()
    uniform, noise = model.draw_noise(batch)
    model.recipe = model.recipe.model_copy(update={"timesteps": "cubic"})
    cubic, _ = model.draw_noise(batch)
    assert 470 < uniform.float().mean() < 530 and 735 < cubic.float().mean() < 765
    assert cubic.min() >= 0 and cubic.max() == 999 and noise.shape == batch.latents.shape
