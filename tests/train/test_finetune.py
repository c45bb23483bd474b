"""Fine-tuning: the loss by hand, a killed run bit for bit, what is saved against diffusers. Tiny models, latents made
here (the pictures' side is test_data.py's). Kills from outside are test_killed.py's, several processes
test_processes.py's.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import mezzotint
from mezzotint.diffusion.schedule import Schedule, zero_terminal_snr
from mezzotint.errors import CheckpointError, MissingExtraError, RequestError, TrainingError, WriteError
from mezzotint.pipeline import Pipeline
from mezzotint.train import checkpoints, finetune, keyed_rng, loop
from mezzotint.train.finetune import Report, lr_scale, validation_loss
from mezzotint.train.recipe import DEFAULTS, Recipe, assignments
from mezzotint.train.saving import inference_parts, save_embedding, save_kohya, save_model, save_peft
from mezzotint.train.trainable import TrainableModel, swap_weights
from mezzotint.weights import Parts, open_model

WORDS = {"lora": "a lemon", "full": "a blue lemon", "textual-inversion": "a <new> lemon", "dreambooth": "a sks lemon"}


@dataclass(frozen=True)
class Batch:
    epoch: int
    ids: tuple[str, ...]
    captions: tuple[str, ...]
    latents: Tensor
    time_ids: Tensor
    hints: Tensor | None = None


class Made:
    """Three batches an epoch, of 2, 2 and 1 pictures; every picture a function of its name."""

    def __init__(self, caption: str = "a lemon", bad: int | None = None, stop: int | None = None) -> None:
        self.caption, self.bad, self.stop = caption, bad, stop

    def __len__(self) -> int:
        return 3

    def at(self, k: int) -> Batch:
        if k == self.stop:
            raise Died
        epoch, place = divmod(k, 3)
        ids = tuple(f"picture {place}.{j}" for j in range(2 if place < 2 else 1))
        latents = torch.stack([torch.randn(4, 4, 4, generator=keyed_rng.generator(name)) for name in ids])
        if k == self.bad:
            latents = latents * float("nan")
        sizes = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]]).repeat(len(ids), 1)
        return Batch(epoch, ids, (self.caption,) * len(ids), latents, sizes)


class Died(BaseException):
    """Stands for a kill: no `except Exception` catches it."""


def recipe_of(method: str = "lora", **fields: Any) -> Recipe:
    given = {
        "data": "x",
        "steps": 5,
        "save_every": 2,
        "lr": 1e-2,
        "accumulate": 2,
        "targets": ["attn2.to_q", "attn2.to_k"],
    }
    if method == "dreambooth":
        given["prompt"] = "a sks lemon"
    return Recipe.of(method, None, given | fields)


@cache
def opened(model: Path) -> Parts:
    return open_model(model, dtype=torch.float32)


def model_of(model: Path, recipe: Recipe) -> TrainableModel:
    """A copy of the model, made trainable; its tokenizers never change, and are not copied."""
    parts = opened(model)
    return TrainableModel(copy.deepcopy(parts, {id(tokenizer): tokenizer for tokenizer in parts.tokenizers}), recipe)


def run(model: Path, folder: Path, recipe: Recipe, stop: int | None = None, **more: Any) -> TrainableModel:
    trainable = model_of(model, recipe)
    caption = WORDS[recipe.method]
    prior = Made("a lemon") if recipe.method == "dreambooth" else None
    return finetune.finetune(trainable, Made(caption, stop=stop), folder, prior=prior, **more)


def assert_equal(a: Any, b: Any) -> None:
    """The same structure with the same bits."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def state(folder: Path) -> Any:
    found = checkpoints.load_newest(folder)
    assert found
    return found[1]


# ---- the recipe --------------------------------------------------------------------------------------------------


def test_a_recipe_is_printed_whole_and_read_again(tmp_path: Path) -> None:
    recipe = recipe_of("dreambooth", class_prompt='a "dog"', targets=["to_q"], min_snr=5, sample_prompts=["ä\n"])
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.toml(), encoding="utf-8")
    assert Recipe.of("dreambooth", path) == recipe
    assert Recipe.of("dreambooth", path, {"rank": 32}).rank == 32, "the command line goes before the file"
    assert {line.split(" ")[1 if line[0] == "#" else 0] for line in recipe.toml().splitlines()} == {
        *Recipe.model_fields
    }


def test_each_method_has_its_own_defaults() -> None:
    for method, own in DEFAULTS.items():
        fields = {"data": "x", "prompt": "a <new>"}
        assert own.items() <= Recipe.of(method, None, fields).model_dump().items()


@pytest.mark.parametrize(
    ("method", "fields", "sentence"),
    [
        ("lora", {"stepps": 3}, "no field 'stepps'; the nearest are steps"),
        ("lora", {"rank": 0}, "rank is '0'; it must be a whole number from 1"),
        ("lora", {"lr": float("nan")}, "lr is nan; it must be a number above 0"),
        ("dreambooth", {}, "prompt is missing; dreambooth needs one"),
        ("textual-inversion", {"prompt": "a hat"}, "it must contain the token <new>"),
        ("lora", {"zero_snr": True, "prediction": "epsilon"}, "prediction must be v_prediction"),
        ("lora", {"validate_every": 3}, "validation is not"),
        ("lora", {"sample_every": 3}, "sample_prompts is not"),
    ],
)
def test_a_wrong_recipe_is_a_sentence(method: str, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        Recipe.of(method, None, {"data": "x"} | fields)


def test_assignments() -> None:
    assert assignments(["steps=20", "token=<hat>", "targets=['a']", "flip=true", "lr = 1e-3"]) == {
        "steps": 20,
        "token": "<hat>",
        "targets": ["a"],
        "flip": True,
        "lr": 1e-3,
    }
    with pytest.raises(RequestError, match="NAME=VALUE"):
        assignments(["steps"])


def test_the_rate() -> None:
    cosine = recipe_of(schedule="cosine", steps=110, warmup=10)
    assert [lr_scale(cosine, step) for step in (0, 9, 10, 60)] == [0.1, 1.0, 1.0, pytest.approx(0.5)]
    assert lr_scale(cosine, 109) == pytest.approx(0.0, abs=3e-4)
    assert lr_scale(recipe_of(schedule="linear", steps=10), 5) == 0.5
    assert lr_scale(recipe_of(steps=10), 9) == 1.0


# ---- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("min_snr", [None, 5.0])
def test_the_loss_by_hand(sd1_folder: Path, kind: Any, min_snr: float | None) -> None:
    """In the variance-preserving coordinate of the papers: x_t = sqrt(a) x0 + sqrt(1 - a) eps."""
    model = model_of(sd1_folder, recipe_of(prediction=kind, min_snr=min_snr))
    batch = Made().at(4)
    timesteps, noise = model.draw_noise(batch)
    alpha = torch.tensor(model.schedule.alphas_cumprod)[timesteps].float().view(-1, 1, 1, 1)
    x = alpha.sqrt() * batch.latents + (1 - alpha).sqrt() * noise
    with torch.no_grad():
        output = model.unet(x, timesteps, model.encode_captions(batch.captions))
        losses = model.losses(batch.latents, batch.captions, batch.time_ids, timesteps, noise)
    target = noise if kind == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * batch.latents
    expected = (output - target).square().mean((1, 2, 3))
    if min_snr:
        snr = (alpha / (1 - alpha)).flatten()
        expected = expected * snr.clamp(max=min_snr) / (snr if kind == "epsilon" else snr + 1)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(batch), expected.mean(), rtol=1e-4, atol=1e-6)


def test_chance_is_of_the_seed_the_epoch_and_the_picture_alone(sd1_folder: Path) -> None:
    model = model_of(sd1_folder, recipe_of())
    batch = Made().at(0)
    timesteps, noise = model.draw_noise(batch)
    turned = replace(batch, ids=batch.ids[::-1])
    assert torch.equal(model.draw_noise(turned)[1], noise.flip(0)) and torch.equal(
        model.draw_noise(turned)[0], timesteps.flip(0)
    )
    later = model.draw_noise(replace(batch, epoch=1))[1]
    other = model_of(sd1_folder, recipe_of(seed=1)).draw_noise(batch)[1]
    assert not torch.equal(later, noise) and not torch.equal(other, noise)
    many = torch.stack([model.draw_noise(replace(batch, epoch=epoch))[0] for epoch in range(500)]).double()
    assert abs(many.mean() - 499.5) < 30 and many.min() < 20 and many.max() > 979, "uniform over all timesteps"


def test_noise_offset_is_one_number_a_channel(sd1_folder: Path) -> None:
    batch = Made().at(0)
    bare = model_of(sd1_folder, recipe_of()).draw_noise(batch)[1]
    offset = model_of(sd1_folder, recipe_of(noise_offset=0.5)).draw_noise(batch)[1] - bare
    assert torch.allclose(offset, offset[..., :1, :1].expand_as(offset), atol=1e-6)
    assert offset.std() > 0.2


def test_zero_snr(sd1_folder: Path) -> None:
    with pytest.raises(RequestError, match="this model's prediction is epsilon"):
        model_of(sd1_folder, recipe_of(zero_snr=True))
    model = model_of(sd1_folder, recipe_of(zero_snr=True, prediction="v_prediction"))
    plain = model_of(sd1_folder, recipe_of()).schedule
    assert model.schedule.alphas_cumprod == pytest.approx(zero_terminal_snr(plain.alphas_cumprod))
    assert inference_parts(model).scheduler_config["rescale_betas_zero_snr"] is True
    sampled = Pipeline(inference_parts(model)).schedule
    assert isinstance(sampled, Schedule) and sampled.sigma_max == model.schedule.sigma_max


def test_dreambooth_adds_the_weighted_loss_of_the_class(sd1_folder: Path) -> None:
    model = model_of(sd1_folder, recipe_of("dreambooth", prior_weight=0.25))
    own, prior = Made("a sks lemon").at(0), Made("a lemon").at(0)
    draws = model.draw_noise(prior, purpose="prior")
    lost = model.losses(prior.latents, prior.captions, prior.time_ids, *draws).mean()
    torch.testing.assert_close(model(own, prior), model(own) + 0.25 * lost)
    assert not torch.equal(draws[1], model.draw_noise(prior)[1])


# ---- what learns -------------------------------------------------------------------------------------------------


def test_a_lora_begins_as_the_model_and_learns_alone(sd1_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(text_encoder=True, convolutions=True, lr=2e-2, steps=8)
    model = model_of(sd1_folder, recipe)
    before = open_model(sd1_folder, dtype=torch.float32)
    for name, tensor in inference_parts(model).unet.state_dict().items():
        assert torch.equal(tensor, before.unet.state_dict()[name])
    assert all(".lora_" in name for name in model.trainable_parameters())
    assert any(name.startswith("text_encoder.") for name in model.trainable_parameters())
    assert any("conv1" in name for name in model.trainable_parameters())
    trained, total = model.count_parameters()
    networks = [before.unet, *before.text_encoders]
    assert total - trained == sum(p.numel() for network in networks for p in network.parameters())
    assert trained == sum(p.numel() for p in model.trainable_parameters().values())
    first = validation_loss(model, Made())
    finetune.finetune(model, Made(), tmp_path)
    assert validation_loss(model, Made()) < 0.95 * first
    after = inference_parts(model)
    changed = {
        name
        for name, tensor in after.unet.state_dict().items()
        if not torch.equal(tensor, before.unet.state_dict()[name])
    }
    assert changed and all(name.endswith(".weight") for name in changed)
    assert any(
        "q_proj" in name
        for name, tensor in after.text_encoders[0].state_dict().items()
        if not torch.equal(tensor, before.text_encoders[0].state_dict()[name])
    )


def test_the_learner_is_the_model_that_draws(sd1_folder: Path, tmp_path: Path) -> None:
    """The network with peft's layers in it and the one whose weights have the change added agree."""
    model = run(sd1_folder, tmp_path, recipe_of(text_encoder=True, convolutions=True, alpha=4))
    parts = inference_parts(model)
    batch = Made().at(0)
    timesteps, noise = model.draw_noise(batch)
    with torch.no_grad():
        condition = model.encode_captions(batch.captions)
        direct = Pipeline(parts).encode("a lemon").context
        torch.testing.assert_close(condition.context[:1], direct, rtol=1e-4, atol=1e-4)
        out, merged = model.unet(noise, timesteps, condition), parts.unet(noise, timesteps, condition)
    torch.testing.assert_close(out, merged, rtol=1e-3, atol=1e-3)


def test_a_start_of_more_tokens_than_vectors(sd1_folder: Path) -> None:
    """The rest of it would be dropped."""
    with pytest.raises(
        RequestError,
        match=r"^start is 'foo', which is 3 tokens of this model \('f', 'o', 'o'\), and vectors is 1; choose a word "
        "that is one token, or set vectors to 3",
    ):
        model_of(sd1_folder, recipe_of("textual-inversion", start="foo"))
    model = model_of(sd1_folder, recipe_of("textual-inversion", start="foo", vectors=3))
    table = model.text_encoders["text_encoder"].text_model.embeddings.token_embedding.weight
    assert torch.equal(model.vectors[0], table[model.tokenizers[0].encode("foo")])


def test_a_word_learns_alone(sd1_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of("textual-inversion", start="lemon", vectors=2, steps=6, lr=5e-2)
    model = model_of(sd1_folder, recipe)
    table = model.text_encoders["text_encoder"].text_model.embeddings.token_embedding.weight.clone()
    (lemon,) = model.tokenizers[0].encode("lemon")
    assert torch.equal(model.vectors[0], table[[lemon, lemon]]), "it begins as the word that was named"
    assert [*model.trainable_parameters()] == ["vectors.0"]
    first = validation_loss(model, Made("a <new> lemon"))
    finetune.finetune(model, Made("a <new> lemon"), tmp_path)
    assert validation_loss(model, Made("a <new> lemon")) < first
    assert torch.equal(model.text_encoders["text_encoder"].text_model.embeddings.token_embedding.weight, table)
    path = save_embedding(model, tmp_path / "new.safetensors")
    assert load_file(path).keys() == {"<new>"}
    pipe = mezzotint.load(sd1_folder, device="cpu")
    drawn = pipe.encode("a <new> lemon", mezzotint.Request(prompt="", embeddings=(str(path),), prompt_syntax="plain"))
    torch.testing.assert_close(drawn.context, model.encode_captions(["a <new> lemon"]).context.detach())


def test_sdxl(sdxl: mezzotint.Pipeline, tmp_path: Path) -> None:
    parts = copy.deepcopy(sdxl.parts)
    model = TrainableModel(parts, recipe_of(text_encoder=True, steps=2))
    finetune.finetune(model, Made(), tmp_path)
    keys = load_file(save_kohya(model, tmp_path / "k.safetensors", 2)).keys()
    assert {key.split("_")[1] for key in keys} == {"unet", "te1", "te2"}


def test_gradient_checkpointing_and_accumulation_change_nothing(sd1_folder: Path, tmp_path: Path) -> None:
    full = recipe_of("full", ema=0.0)
    expected = run(sd1_folder, tmp_path / "a", full)
    again = run(sd1_folder, tmp_path / "b", recipe_of("full", ema=0.0, checkpointing=True))
    assert_equal(dict(again.trainable_parameters()), dict(expected.trainable_parameters()))


@pytest.mark.parametrize("optimiser", ["adafactor", "adamw8bit"])
def test_other_optimisers(sd1_folder: Path, tmp_path: Path, optimiser: str) -> None:
    recipe = recipe_of(optimiser=optimiser, steps=4)
    try:
        model = run(sd1_folder, tmp_path, recipe)
    except MissingExtraError as error:
        assert optimiser == "adamw8bit" and "pip install bitsandbytes" in str(error)
    else:
        moved = [p for name, p in model.trainable_parameters().items() if "lora_B" in name]
        assert all(p.abs().max() > 0 for p in moved)


# ---- stopped and resumed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "fields", "stops"),
    [
        ("lora", {"text_encoder": True, "ema": 0.9, "lora_dropout": 0.2, "schedule": "cosine"}, [1, 5, 6, 9]),
        ("full", {"ema": 0.9, "checkpointing": True}, [7]),
        ("dreambooth", {}, [0, 4]),
        ("textual-inversion", {}, [5]),
        ("lora", {"optimiser": "adafactor"}, [5]),
    ],
)
def test_a_run_that_died_resumes_bit_for_bit(
    sd1_folder: Path, tmp_path: Path, method: str, fields: dict[str, Any], stops: list[int]
) -> None:
    """Between steps, and in the middle of an accumulation (odd numbers) and of an epoch."""
    recipe = recipe_of(method, log_every=1, **fields)
    expected = run(sd1_folder, tmp_path / "unbroken", recipe)
    for stop in stops:
        with pytest.raises(Died):
            run(sd1_folder, tmp_path / "broken", recipe, stop)
    again = run(sd1_folder, tmp_path / "broken", recipe)
    assert_equal(dict(again.trainable_parameters()), dict(expected.trainable_parameters()))
    assert_equal(state(tmp_path / "broken"), state(tmp_path / "unbroken"))
    logs = [
        [{**json.loads(line), "rate": 0} for line in (tmp_path / name / loop.LOG).read_text().splitlines()]
        for name in ("unbroken", "broken")
    ]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [1, 2, 3, 4, 5]


def test_ctrl_c_keeps_the_step_under_way(sd1_folder: Path, tmp_path: Path) -> None:
    def press(report: Report) -> None:
        if report.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(sd1_folder, tmp_path, recipe_of(), on_step=press)
    assert state(tmp_path)["step"] == 3


def test_another_recipe_does_not_go_on_from_it(sd1_folder: Path, tmp_path: Path) -> None:
    run(sd1_folder, tmp_path, recipe_of(steps=2))
    with pytest.raises(CheckpointError, match=r"another run \(lr: 0\.01 and 0\.001; rank: 8 and 4\)"):
        run(sd1_folder, tmp_path, recipe_of(rank=4, lr=1e-3))
    longer = run(sd1_folder, tmp_path, recipe_of(steps=4))
    assert_equal(
        dict(longer.trainable_parameters()),
        dict(run(sd1_folder, tmp_path / "b", recipe_of(steps=4)).trainable_parameters()),
    )


def test_a_loss_that_is_no_number_stops_and_spoils_nothing(sd1_folder: Path, tmp_path: Path) -> None:
    recipe, model = recipe_of(), model_of(sd1_folder, recipe_of())
    with pytest.raises(TrainingError, match=r"step 4: the loss is not finite.*picture 0\.0, .*checkpoint-00000002"):
        finetune.finetune(model, Made(bad=6), tmp_path)
    assert state(tmp_path)["step"] == 2
    assert all(p.isfinite().all() for p in run(sd1_folder, tmp_path, recipe).trainable_parameters().values())


def test_the_averages_come_back(sd1_folder: Path, tmp_path: Path) -> None:
    model = run(sd1_folder, tmp_path, recipe_of(ema=0.9))
    saved = state(tmp_path)
    assert_equal({name: p.detach() for name, p in model.trainable_parameters().items()}, saved["averages"])
    assert not torch.equal(
        *(
            saved[kind]["unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q.lora_B.default.weight"]
            for kind in ("averages", "trained")
        )
    )
    with swap_weights(model, saved["trained"]):
        assert_equal({name: p.detach() for name, p in model.trainable_parameters().items()}, saved["trained"])
    assert_equal({name: p.detach() for name, p in model.trainable_parameters().items()}, saved["averages"])


def test_validation_and_samples(sd1_folder: Path, tmp_path: Path) -> None:
    seen: list[Report] = []
    drawn: list[int] = []
    recipe = recipe_of(validate_every=2, validation="y", sample_every=4, sample_prompts=["a lemon"], ema=0.5)
    model = model_of(sd1_folder, recipe)
    finetune.finetune(
        model, Made(), tmp_path, validation=Made(), on_step=seen.append, on_sample=lambda _, step: drawn.append(step)
    )
    assert [report.validation is not None for report in seen] == [False, True, False, True, False]
    assert drawn == [4]
    bare = run(sd1_folder, tmp_path / "bare", recipe_of(ema=0.5))
    assert_equal(dict(bare.trainable_parameters()), dict(model.trainable_parameters())), "looking changes nothing"
    assert validation_loss(model, Made()) == validation_loss(model, Made()), "the same noise each time"


# ---- checkpoints -------------------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    assert checkpoints.load_newest(tmp_path) is None
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, step, {"step": step}, keep=2)
    assert [path.name for path in checkpoints.list_all(tmp_path)] == ["checkpoint-00000003", "checkpoint-00000002"]
    newest = tmp_path / "checkpoint-00000003" / checkpoints.STATE
    newest.write_bytes(newest.read_bytes()[:-1])
    assert state(tmp_path) == {"step": 2}
    (tmp_path / ".checkpoint-00000009.new").mkdir()
    assert state(tmp_path) == {"step": 2}
    checkpoints.save(tmp_path, 3, {"step": 3}, keep=2)
    assert state(tmp_path) == {"step": 3}, "the damaged one was made again"
    for path in checkpoints.list_all(tmp_path):
        (path / checkpoints.RECORD).write_text("{")
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged"):
        checkpoints.load_newest(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(tmp_path, 1, {"step": 1}, keep=1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"step 2 cannot be written .*No space left on device"):
        checkpoints.save(tmp_path, 2, {"step": 2}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]
    assert state(tmp_path) == {"step": 1}


# ---- what is saved -----------------------------------------------------------------------------------------------


def test_diffusers_draws_with_the_lora_as_the_learner_does(sd1_folder: Path, tmp_path: Path) -> None:
    """From a file in peft's names and from one in kohya's."""
    from diffusers import StableDiffusionPipeline

    fields = {"text_encoder": True, "alpha": 4, "lr": 5e-2, "convolutions": True}
    model = run(sd1_folder, tmp_path / "run", recipe_of(**fields))
    paths = [
        save_peft(model, tmp_path / "peft.safetensors", torch.float32),
        save_kohya(model, tmp_path / "kohya.safetensors", 5, torch.float32),
    ]
    reference = StableDiffusionPipeline.from_pretrained(sd1_folder, safety_checker=None, local_files_only=True)
    reference.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", "height": 32, "width": 32}

    def drawn() -> Tensor:
        return reference("a lemon", generator=[torch.Generator().manual_seed(3)], **options).images

    bare = drawn()
    ours = (
        Pipeline(inference_parts(model))
        .generate(mezzotint.Request(prompt="a lemon", seed=3, width=32, height=32))
        .latents
    )
    for path in paths:
        reference.load_lora_weights(path.parent, weight_name=path.name)
        theirs = drawn()
        reference.unload_lora_weights()
        scale = theirs.abs().max()
        assert (theirs - bare).abs().max() > 0.05 * scale, "the LoRA shows"
        assert (ours - theirs).abs().max() < 1e-3 * scale, path.name


def test_a_kohya_file_tells_of_its_training(sd1_folder: Path, tmp_path: Path) -> None:
    model = model_of(sd1_folder, recipe_of(rank=4, alpha=2, text_encoder=True))
    path = save_kohya(model, tmp_path / "hat.safetensors", 5)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        keys = set(file.keys())
        assert float(file.get_tensor("lora_te_text_model_encoder_layers_0_self_attn_out_proj.alpha")) == 2.0
    assert (facts["ss_network_dim"], facts["ss_network_alpha"], facts["ss_steps"]) == ("4", "2.0", "5")
    assert facts["ss_network_module"] == "networks.lora" and facts["ss_base_model_version"] == "sd_v1"
    layers = {key.rpartition(".lora_")[0] or key.rpartition(".alpha")[0] for key in keys}
    assert len(keys) == 3 * len(layers)


def test_a_whole_model_is_saved(sd1_folder: Path, tmp_path: Path) -> None:
    model = run(sd1_folder, tmp_path, recipe_of("full", text_encoder=True, steps=2))
    (folder,) = save_model(model, tmp_path / "model", torch.float32)
    loaded = open_model(folder)
    assert_equal(dict(loaded.unet.state_dict()), dict(inference_parts(model).unet.state_dict()))
    assert_equal(dict(loaded.text_encoders[0].state_dict()), dict(inference_parts(model).text_encoders[0].state_dict()))
