"""A refiner after another model: where it takes over, what goes on, its sentences, the record, memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import SCHEDULER, SDXL, WIDTH, tiny_clip, tiny_unet, tiny_vae

import mezzotint
from mezzotint import Request
from mezzotint.again import again, judge, read_source
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.explain.maps import explain
from mezzotint.images.io import read_metadata
from mezzotint.memory import headers
from mezzotint.memory.footprint import predict
from mezzotint.memory.headers import ModelHeaders
from mezzotint.models import offload
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.placement import Placement
from mezzotint.run.levels import refiner_switch
from mezzotint.weights import save_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: a refiner, and a base model."""
    place, projects = tmp_path_factory.mktemp("models"), "CLIPTextModelWithProjection"
    scheduler = SCHEDULER | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    with torch.random.fork_rng():
        tokenizer = Tokenizer.subset(["a lemon on a blue background"])
        save_folder(
            place / "refiner",
            unet=tiny_unet(30, **SDXL | {"projection_class_embeddings_input_dim": 5 * 4 + WIDTH}),
            vae=tiny_vae(31),
            text_encoder=None,
            tokenizer=None,
            second=(tiny_clip(32, tokenizer, projects), tokenizer),
            scheduler_config=scheduler,
            model_index={"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False},
            dtype=torch.float32,
        )
        save_folder(
            place / "base",
            unet=tiny_unet(3, cross_attention_dim=2 * WIDTH, **SDXL),
            vae=tiny_vae(4),
            text_encoder=tiny_clip(5, tokenizer),
            tokenizer=tokenizer,
            second=(tiny_clip(6, tokenizer, projects), tokenizer),
            scheduler_config=scheduler,
            model_index={"force_zeros_for_empty_prompt": True},
            dtype=torch.float32,
        )
    return place


@pytest.fixture(scope="module")
def base(place: Path) -> mezzotint.Pipeline:
    return mezzotint.load(place / "base", device="cpu")


def request(place: Path, refiner: str = "refiner", **fields: Any) -> Request:
    usual = {"prompt": "a lemon", "seed": 3, "steps": 6, "guidance_scale": 3.0, "width": 32, "height": 32}
    return Request(**usual | {"refiner": place / refiner, "refiner_at": 0.5} | fields)


def drawing() -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC)


def mask() -> Image.Image:
    found = Image.new("L", (32, 32))
    found.paste(255, (8, 8, 24, 32))
    return found


# ---- what goes on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"sampler": "euler", "count": 2, "batch": 2},
        {"sampler": "euler_a", "negative_prompt": "blue"},
        {"sampler": "ddim", "image": drawing(), "strength": 0.8},
        {"sampler": "euler", "image": drawing(), "mask": mask(), "strength": 0.9},
        {"sampler": "euler", "image": drawing(), "mask": mask(), "differential": True, "strength": 1.0},
        {"sampler": "euler", "hires": 1.5, "hires_strength": 1.0, "seamless": "x"},
        {"sampler": "heun", "prompt": "a lemon AND a lime :0.5", "guidance_method": "cfg_zero"},
        {"sampler": "DPM++ 2M Karras"},
        {"sampler": "DPM++ 3M SDE", "noise": "philox"},
        {"sampler": "restart", "steps": 8},
    ],
    ids=lambda fields: str(fields["sampler"]),
)
def test_the_same_model_after_itself_changes_nothing(
    base: mezzotint.Pipeline, place: Path, fields: dict[str, Any]
) -> None:
    """Noise, masks, guidance, prompts and, by A1111's names, the solver's memory: bit for bit."""
    asked = request(place, "base", **{"steps": 4} | fields)
    steps: list[tuple[int, int]] = []
    result = base.generate(asked, on_step=lambda *counts: steps.append(counts))
    plain = base.generate(asked.replace(refiner=None, refiner_at=None))
    assert result.latents.equal(plain.latents)
    assert [done for done, _ in steps] == [*range(1, steps[-1][1] + 1)]
    assert not base.generate(asked.replace(refiner=str(place / "refiner"))).latents.equal(plain.latents)


def test_a_multistep_solver_begins_anew_except_by_a1111s_names(base: mezzotint.Pipeline, place: Path) -> None:
    asked = request(place, "base", sampler="dpmpp_2m")
    assert not base.generate(asked).latents.equal(base.generate(asked.replace(refiner=None, refiner_at=None)).latents)
    plan = base.plan(asked)
    assert plan.switch and plan.switch.step == 3 and plan.switch.sigma == plan.sigmas[3]
    steps = list(base.stream(asked))
    assert [step.index for step in steps] == [*range(6)]
    assert [step.sigma for step in steps] == plan.sigmas[1:]


@pytest.mark.parametrize("at", [0.0, 0.3, 0.55, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("name", ["DPM++ 2M Karras", "Euler a", "DDIM", "Heun"])
def test_a1111_changes_the_model_by_the_nearest_timestep(base: mezzotint.Pipeline, name: str, at: float) -> None:
    """Its apply_refiner, written out: (999 - index of the nearest level) / 1000 is at least the share."""
    plan = base.plan(Request("a", sampler=name, steps=30))
    table = torch.from_numpy(plan.schedule.sigmas)
    switch = refiner_switch(at, plan.sampler, plan.schedule, plan.sigmas)
    assert switch.step is None
    for sigma in plan.sigmas[:-1]:
        timestep = torch.argmin((table - sigma).abs())
        assert (sigma <= switch.sigma) == bool((999 - timestep) / 1000 >= at), sigma


def test_only_the_first_model_has_loras_and_freeu(base: mezzotint.Pipeline, place: Path) -> None:
    asked = request(place, freeu=(1.3, 1.4, 0.9, 0.2), sampler="euler", refiner_at=0.0)
    assert base.generate(asked).latents.equal(base.generate(asked.replace(freeu=None)).latents)
    plan = base.plan(asked).refined
    assert plan and plan.request.negative_prompt == "" and plan.model.has_aesthetic_score and not plan.loras


def test_embeddings_of_the_second_encoder(base: mezzotint.Pipeline, place: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    pair = {name: torch.randn(2, WIDTH, generator=generator) for name in ("clip_l", "clip_g")}
    save_file(pair, tmp_path / "style.safetensors")
    asked = request(place, prompt="a style lemon", embeddings=tmp_path / "style.safetensors", refiner_at=0.0)
    plan = base.plan(asked).refined
    assert plan and [each.tolist() for each in plan.embeddings["style"]] == [pair["clip_g"].tolist()]
    latents = base.generate(asked).latents
    save_file(pair | {"clip_l": pair["clip_l"] + 1.0}, tmp_path / "style.safetensors")
    assert base.generate(asked).latents.equal(latents)
    save_file(pair | {"clip_g": pair["clip_g"] + 1.0}, tmp_path / "style.safetensors")
    assert not base.generate(asked).latents.equal(latents)


def test_word_maps_are_the_first_models(base: mezzotint.Pipeline, place: Path) -> None:
    explanation = explain(base, request(place))
    assert explanation.steps == ((0, 1),)  # of six
    with pytest.raises(RequestError, match="the refiner takes all steps"):
        explain(base, request(place, refiner_at=0.0))


# ---- sentences -------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_a_sentence(
    sd1: mezzotint.Pipeline, sd1_folder: Path, base: mezzotint.Pipeline, place: Path, tmp_path: Path
) -> None:
    def refused(pipe: mezzotint.Pipeline, **fields: Any) -> str:
        with pytest.raises((RequestError, CheckpointError)) as error:
            pipe.plan(Request("a lemon", **fields))
        return str(error.value)

    assert "but this model is of the family sd1; it follows a text-to-image model" in refused(sd1, refiner="x")
    assert "refiner: " in (sentence := refused(base, refiner=sd1_folder)) and "a model of the family sd1" in sentence
    assert refused(base, refiner="nowhere.safetensors").startswith("refiner: 'nowhere.safetensors' does not exist")
    assert "refiner_at is given, but there is no refiner" in refused(base, refiner_at=0.5)
    assert "tile and refiner are both given" in refused(base, refiner="x", image=drawing(), tile=64)
    assert "refiner_at is nan; it must be a number from 0 to 1" in _error(refiner="x", refiner_at=float("nan"))
    assert "aesthetic_score is 11; it must be a number from 0 to 10" in _error(aesthetic_score=11)
    alone = mezzotint.load(place / "refiner", device="cpu")
    assert "but this model is SDXL's refiner itself" in refused(alone, refiner=place / "refiner")
    layers = {"pag_scale": 2.0, "pag_layers": ["down_blocks.0"]}
    assert base.plan(request(place, **layers)).refined
    for at, words in ((0.0, "takes all of 6 steps"), (1.0, "takes none of 6 steps")):
        assert any(words in notice for notice in base.plan(request(place, refiner_at=at)).notices)
    assert not base.plan(request(place)).notices


def _error(**fields: Any) -> str:
    with pytest.raises(RequestError) as error:
        Request("a", **fields)
    return str(error.value)


# ---- the record ------------------------------------------------------------------------------------------------------


def test_the_record_and_the_picture_again(base: mezzotint.Pipeline, place: Path, tmp_path: Path) -> None:
    asked = request(place, count=2, batch=2, sampler="dpmpp_2m", aesthetic_score=7.0)
    pictures = base.generate(asked).images
    pictures[1].save(tmp_path / "a.png")
    texts = read_metadata(tmp_path / "a.png")
    record = json.loads(texts["mezzotint"])
    assert record["request"]["refiner"] == "refiner" and str(place) not in texts["mezzotint"]
    assert {"model_index.json", "unet/config.json"} < record["model"]["refiner"].keys()
    assert not any(name.startswith("vae") for name in record["model"]["refiner"])
    assert "Refiner: refiner, Refiner switch at: 0.5" in texts["parameters"]
    source = read_source(tmp_path / "a.png")
    with pytest.raises(RequestError, match=r"with the refiner 'refiner' \(SHA-256 \w{10}\.\.\.\); give it with --ref"):
        again(base, source)
    drawn = again(base, source, refiner=str(place / "refiner"))[0]
    assert judge(source, drawn).identical
    other = again(base, source, refiner=str(place / "base"))[0]
    sentences = judge(source, other).sentences
    assert sentences[0].startswith("differs") and any("the refiner's unet" in sentence for sentence in sentences)


def test_a1111s_text(base: mezzotint.Pipeline) -> None:
    from mezzotint.records.infotext import parse, to_request, write

    resolved = base.resolve(
        Request("a", refiner="C:\\models\\sd_xl_refiner_1.0.safetensors", seed=1, sampler="Euler a")
    )
    text = write(resolved, 1, "base", "1", "0123456789", "7440042bbd")
    assert "Refiner: sd_xl_refiner_1.0 [7440042bbd], Refiner switch at: 0.8" in text
    read, _ = to_request(parse(text))
    assert (read.refiner, read.refiner_at) == ("sd_xl_refiner_1.0", 0.8)
    read, notes = to_request(parse(re.sub(r"Refiner: [^,]*, ", "", text)))
    assert read.refiner is None and read.refiner_at is None and not notes


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_both_models_are_counted_one_after_the_other(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "MIN_OFFLOAD_NUMEL", 100)
    model, asked = ModelHeaders.of(place / "base", device="cpu"), request(place)
    resident, offloaded = (
        {refiner: predict(model, asked.replace(refiner=refiner, refiner_at=at), Placement(weights=weights), base=0)
         for refiner, at in ((None, None), (str(place / "refiner"), 0.5))}
        for weights in ("resident", "offload")
    )  # fmt: skip
    second = model.refiner(str(place / "refiner"))
    large = 4 * sum(w.large for w in second.weights.values())
    small = 4 * sum(w.small for w in second.weights.values())
    assert {*second.weights} == {"text", "unet"} and large > 0
    plain, both = resident.values()
    assert both.stages["step"] - plain.stages["step"] >= large + small
    assert "refine" in both.stages and "refine" not in plain.stages
    plain, both = offloaded.values()
    tokenizer = 650 * second.encoders[0].vocab_size
    assert both.stages["step"] - plain.stages["step"] == small + tokenizer


def test_the_first_unet_is_let_go_before_the_refiners_is_loaded(
    base: mezzotint.Pipeline, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(place)
    expected, switch = base.generate(asked).latents, base.plan(asked).switch
    monkeypatch.setattr(offload, "MIN_OFFLOAD_NUMEL", 100)
    pipe = mezzotint.load(place / "base", device="cpu", placement=Placement(weights="offload"))
    held: list[tuple[bool, bool]] = []
    loaded = pipe._model.refiners

    def onloaded(network: torch.nn.Module) -> bool:
        layers = [m for m in network.modules() if isinstance(m, offload.OffloadedLayer)]
        found = {layer.weight_source._onloaded is not None for layer in layers}  # type: ignore[attr-defined]
        assert len(found) == 1, "there are offloaded layers, and all have one state"
        return found.pop()

    for step in pipe.stream(asked):
        last = step
        kept = loaded.load(loaded.read(str(asked.refiner)))
        assert kept is not None
        held.append((onloaded(pipe.unet), onloaded(kept.unet)))
    assert switch and switch.step
    assert held == [(True, False)] * switch.step + [(False, True)] * (6 - switch.step)
    assert last.x.equal(expected)
    assert not onloaded(pipe.unet) and not onloaded(kept.unet)
