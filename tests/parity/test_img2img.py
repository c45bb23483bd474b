"""Pictures from pictures against diffusers' pipelines, live: image to image, and inpainting with any model and its own.

The limits are those of test_pipeline.py (DESIGN.md section 5). diffusers puts the original's pixels back only where it
draws the masked part alone (padding_mask_crop); elsewhere pictures are compared inside the mask, latents everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image
from short_form import short_form
from transformers import CLIPTokenizer

import mezzotint
import tiny
from mezzotint.models.tokenizer import Tokenizer
from pictures import NEGATIVE, PROMPT, Drawn, Pair, apart, different, draw, ours, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),
]

SAMPLERS = ("euler", "euler_a", "heun", "ddim", "dpmpp_2m", "dpmpp_2m_sde")
SIZE = (40, 56)  # latents of 5x7


@pytest.fixture(scope="session")
def nine(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model made for inpainting: its UNet takes nine channels."""
    folder = tmp_path_factory.mktemp("inpainting")
    tokenizer = Tokenizer.subset([PROMPT, NEGATIVE])
    tokenizer.save(folder / "cut")
    config = tiny.SCHEDULER_CONFIGS["sd1"]
    ids = {"vocab_size": len(tokenizer.vocab), "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    theirs = StableDiffusionInpaintPipeline(
        unet=tiny.unet("inpainting"),
        vae=tiny.vae(),
        scheduler=diffusers.PNDMScheduler.from_config(config),
        text_encoder=tiny.clip("inpainting", **ids),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "cut"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.save_pretrained(folder / "model")
    (folder / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    theirs = StableDiffusionInpaintPipeline.from_pretrained(folder / "model", low_cpu_mem_usage=False)
    return Pair(theirs, mezzotint.load(folder / "model", device="cpu"), theirs.scheduler)


def photograph(width: int = SIZE[0], height: int = SIZE[1], seed: int = 0) -> Image.Image:
    """Soft noise in colours."""
    small = np.random.default_rng(seed).integers(0, 256, (13, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def blot(width: int = SIZE[0], height: int = SIZE[1]) -> Image.Image:
    """A mask: white in a part whose edges lie on no latent cell's."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 5, height // 4, width * 4 // 5, height * 2 // 3))
    return mask


def fields(**changes: Any) -> dict[str, Any]:
    usual = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "image": photograph(),
        "strength": 0.6,
        "steps": 8,
        "guidance_scale": 7.5,
        "seed": 7,
        "count": 1,
    }
    return usual | changes


def theirs(pair: Pair, kind: Callable[..., Any], request: dict[str, Any], **config: Any) -> Drawn:
    """What their pipeline of this kind draws, one picture after another: each from its own generator."""
    pipe = kind(**{**pair.theirs.components, "scheduler": pair.scheduler}, **NO_CHECKER.get(kind, {}), **config)
    return draw(pipe, pair.scheduler, request)


NO_CHECKER = {
    kind: {"requires_safety_checker": False}
    for kind in (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline)
}
IMG2IMG = {
    "sd1": StableDiffusionImg2ImgPipeline,
    "sd2": StableDiffusionImg2ImgPipeline,
    "sdxl": StableDiffusionXLImg2ImgPipeline,
}


# ---- image to image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "sampler"), short_form(["sd1", "sd2", "sdxl"], SAMPLERS))
def test_image_to_image(pairs: dict[str, Pair], family: str, sampler: str) -> None:
    """Two pictures of 40x56, each with its own generator; at full strength one of 64x64 without guidance."""
    request = fields(sampler=sampler, count=2)
    drawn = ours(pairs[family], request)
    same(drawn, theirs(pairs[family], IMG2IMG[family], request))
    different(drawn, ours(pairs[family], request | {"strength": 0.8}))
    full = fields(sampler=sampler, image=photograph(64, 64), strength=1.0, guidance_scale=1.0, steps=5)
    same(ours(pairs[family], full), theirs(pairs[family], IMG2IMG[family], full))


@pytest.mark.parametrize(("steps", "strength"), [(8, 0.13), (10, 0.58), (7, 0.99), (50, 0.3)])
def test_the_steps_are_cut_as_theirs(pairs: dict[str, Pair], steps: int, strength: float) -> None:
    request = fields(sampler="euler", steps=steps, strength=strength)
    same(ours(pairs["sd1"], request), theirs(pairs["sd1"], IMG2IMG["sd1"], request))
    resolved = pairs["sd1"].ours.resolve(mezzotint.Request(**request))
    assert len(list(pairs["sd1"].ours.stream(resolved))) == int(steps * strength)


@pytest.mark.parametrize("sampler", ["dpmpp_sde", "dpm2", "dpm2_a", "unipc", "deis", "lcm", "ddpm", "dpmpp_3m"])
def test_other_samplers_from_the_middle(pairs: dict[str, Pair], sampler: str) -> None:
    request = fields(sampler=sampler, steps=12, strength=0.5, guidance_scale=2.0)
    same(ours(pairs["sd1"], request), theirs(pairs["sd1"], IMG2IMG["sd1"], request))


@pytest.mark.parametrize("strength", [0.75, 0.25])
@pytest.mark.parametrize("order", [2, 3])
def test_dpmpp_2s_from_the_middle_keeps_the_groups_of_the_whole_list(
    pairs: dict[str, Pair], strength: float, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 and 15 of 20 steps are skipped; neither is a multiple of 2, and only the last of 3."""
    pair, request = pairs["sd1"], fields(sampler="dpmpp_2s", steps=20, strength=strength, guidance_scale=2.0)
    monkeypatch.setattr(pair.ours, "scheduler_config", pair.ours.scheduler_config | {"solver_order": order})
    config = {**pair.scheduler.config, "solver_order": order}
    monkeypatch.setattr(pair, "scheduler", diffusers.DPMSolverSinglestepScheduler.from_config(config))
    same(ours(pair, request), theirs(pair, IMG2IMG["sd1"], request))


def test_a_picture_of_another_size(pairs: dict[str, Pair]) -> None:
    """Stretched by Lanczos to the size that is asked for; of none, its own in whole cells, as diffusers does both."""
    request = fields(sampler="euler", image=photograph(100, 61))
    drawn = ours(pairs["sd1"], request)
    assert drawn.pixels.shape == (1, 56, 96, 3)
    same(drawn, theirs(pairs["sd1"], IMG2IMG["sd1"], request))
    resized = photograph(100, 61).resize((64, 48), Image.Resampling.LANCZOS)
    same(
        ours(pairs["sd1"], request | {"width": 64, "height": 48}),
        theirs(pairs["sd1"], IMG2IMG["sd1"], request | {"image": resized}),
    )


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_groups_draw_the_same_pictures(pairs: dict[str, Pair], batch: int) -> None:
    request = fields(sampler="euler_a", count=3)
    same(ours(pairs["sd1"], request, batch=batch), theirs(pairs["sd1"], IMG2IMG["sd1"], request))


def test_a_path_bytes_and_a_picture_are_the_same(pairs: dict[str, Pair], tmp_path: Path) -> None:
    photograph().save(tmp_path / "lemon.png")
    first = ours(pairs["sd1"], fields(sampler="euler"))
    for image in (tmp_path / "lemon.png", (tmp_path / "lemon.png").read_bytes()):
        assert torch.equal(ours(pairs["sd1"], fields(sampler="euler", image=image)).latents, first.latents)


# ---- inpainting ------------------------------------------------------------------------------------------------------


def masked(a: Drawn, mask: Image.Image) -> Drawn:
    """The pixels inside the mask alone."""
    inside = np.asarray(mask) >= 128
    return Drawn(a.latents, a.pixels[:, inside][:, None])


def one_by_one(pair: Pair, kind: Callable[..., Any], request: dict[str, Any]) -> Drawn:
    """Their pictures drawn alone: together, all of them get the first one's posterior sample."""
    count, seed = request["count"], request["seed"]
    drawn = [theirs(pair, kind, request | {"seed": seed + k, "count": 1}) for k in range(count)]
    return Drawn(torch.cat([d.latents for d in drawn]), np.concatenate([d.pixels for d in drawn]))


# Each model and each sampler with both strengths, though not every pair of them. The short form has each sampler once
# where the original is blended in, on either family, and the model that is told of the mask at both strengths.
STRENGTHS = [
    pytest.param(
        model,
        sampler,
        (0.6, 1.0)[(row + column) % 2],
        marks=() if (row == (column // 2) % 2 if row < 2 else column in (0, 3)) else pytest.mark.slow,
    )
    for row, model in enumerate(("sd1", "sdxl", "nine"))
    for column, sampler in enumerate(SAMPLERS)
]


@pytest.mark.parametrize(("model", "sampler", "strength"), STRENGTHS)
def test_inpainting(pairs: dict[str, Pair], nine: Pair, model: str, sampler: str, strength: float) -> None:
    pair = nine if model == "nine" else pairs[model]
    kind = StableDiffusionXLInpaintPipeline if model == "sdxl" else StableDiffusionInpaintPipeline
    request = fields(sampler=sampler, strength=strength, mask=blot(), count=2)
    drawn = ours(pair, request)
    sized = request | {"width": SIZE[0], "height": SIZE[1]}
    same(masked(drawn, blot()), masked(one_by_one(pair, kind, sized), blot()))
    outside = np.asarray(blot()) == 0
    assert (drawn.pixels[:, outside] == np.asarray(photograph())[outside]).all()
    assert (drawn.pixels[:, ~outside] != np.asarray(photograph())[~outside]).mean() > 0.5


@pytest.mark.parametrize("model", ["sd1", "nine"])
def test_a_mask_is_cut_at_the_same_grey(pairs: dict[str, Pair], nine: Pair, model: str) -> None:
    """127 is kept and 128 is drawn. (Pixels are not compared: here a grey mask also mixes them with the original's.)"""
    mask = Image.new("L", SIZE, 127)
    mask.paste(128, (8, 16, 32, 40))
    pair = nine if model == "nine" else pairs[model]
    request = fields(sampler="euler", strength=1.0, mask=mask, width=SIZE[0], height=SIZE[1])
    latents, _, _ = apart(ours(pair, request), theirs(pair, StableDiffusionInpaintPipeline, request))
    assert latents < 1e-4
    white = ours(pair, request | {"mask": mask.point([0] * 128 + [255] * 128)})
    assert torch.equal(ours(pair, request).latents, white.latents)


def test_a_mask_changes_the_picture(pairs: dict[str, Pair], nine: Pair) -> None:
    """Or the test above would show nothing: another mask gives other latents inside of both."""
    for pair in (pairs["sd1"], nine):
        request = fields(sampler="euler", mask=blot(), strength=1.0)
        a, b = ours(pair, request), ours(pair, request | {"mask": Image.new("L", SIZE, 255)})
        assert float((a.latents - b.latents)[..., 2:4, 1:4].abs().max()) > 1e-2


@pytest.mark.parametrize("padding", [0, 16])
def test_only_masked(pairs: dict[str, Pair], padding: int) -> None:
    """The masked part alone, enlarged, and put back: their padding_mask_crop, pixels everywhere."""
    mask = Image.new("L", (160, 120))
    mask.paste(255, (90, 40, 133, 71))
    request = fields(sampler="euler", image=photograph(160, 120), mask=mask, only_masked=padding, width=64, height=64)
    drawn, expected = (
        ours(pairs["sd1"], request),
        theirs(pairs["sd1"], StableDiffusionInpaintPipeline, request),
    )
    assert drawn.pixels.shape == (1, 120, 160, 3)
    same(drawn, expected)
    outside = np.asarray(mask) == 0
    assert (drawn.pixels[0, outside] == np.asarray(photograph(160, 120))[outside]).all()


def test_a_model_made_for_inpainting_draws_without_a_mask(nine: Pair) -> None:
    """As if all of a grey picture were masked: their inpainting of it."""
    request = fields(sampler="euler", strength=1.0)
    words = {name: value for name, value in request.items() if name not in ("image", "strength")}
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    white = request | {"image": grey, "mask": Image.new("L", (64, 64), 255), "width": 64, "height": 64}
    same(ours(nine, words | {"width": 64, "height": 64}), theirs(nine, StableDiffusionInpaintPipeline, white))


# ---- the known differences -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["pndm", "lms"])
def test_pndm_and_lms_in_the_middle_differ(pairs: dict[str, Pair], sampler: str) -> None:
    """There diffusers takes the order from the step's index, so a run that starts in the middle begins with estimates
    that it does not have; here it begins with the first order, as the methods do.
    """
    request = fields(sampler=sampler)
    latents, _, _ = apart(ours(pairs["sd1"], request), theirs(pairs["sd1"], IMG2IMG["sd1"], request))
    assert 1e-3 < latents < 0.5


def test_several_pictures_inpainted_at_once_and_what_is_outside_differ(pairs: dict[str, Pair]) -> None:
    """Theirs all get the first one's posterior sample, and outside of the mask what the VAE makes of the original."""
    request = fields(sampler="euler", mask=blot(), count=2)
    drawn = ours(pairs["sd1"], request)
    expected = theirs(pairs["sd1"], StableDiffusionInpaintPipeline, request | {"width": SIZE[0], "height": SIZE[1]})
    first, second = (
        apart(*(Drawn(d.latents[k : k + 1], d.pixels[k : k + 1]) for d in (drawn, expected)))[0] for k in (0, 1)
    )
    assert first < 1e-4 and 1e-2 < second < 2.0
    outside = np.asarray(blot()) == 0
    assert np.abs(drawn.pixels[:, outside].astype(int) - expected.pixels[:, outside]).mean() > 5
