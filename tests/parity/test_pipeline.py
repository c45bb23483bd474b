"""Whole pictures against diffusers' pipelines, live: one folder, loaded by both, the same request, the same picture.

One small random model of each family is saved by diffusers, with the scheduler_config.json that the hub has.
Limits (DESIGN.md section 5): final latents 1e-4 relative, pictures 1/255 at most and 0.01/255 on average. What was
measured is in docs/fidelity.md, and so are the differences that are meant; their tests are in test_samplers.py.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

import mezzotint
import tiny
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.samplers import CLASSES
from table import NAMES
from test_single_file import Model

pytestmark = [  # diffusers with numpy 2, and its Brownian path asked a digit beyond its end
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),
]

PROMPT = "a red lemon, left of a whale!"
NEGATIVE = "blurry"
LONG = "lemon " * 75  # fills the window to its last token

_HUB = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SCHEDULERS = {  # as the hub has them: SD1's has no timestep_spacing
    "sd1": _HUB | {"_class_name": "PNDMScheduler"},
    "sd2": _HUB | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "sdxl": _HUB | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "use_karras_sigmas": False},
}
FAMILIES = tuple(SCHEDULERS)
PNDM_V = ("pndm", "sd2")  # a known difference: test_samplers.py, test_pndm_with_v_prediction_differs

Theirs = StableDiffusionPipeline | StableDiffusionXLPipeline


@dataclass
class Pair:
    """One model, loaded twice."""

    theirs: Theirs
    ours: mezzotint.Pipeline
    scheduler: Any  # their own; runs replace it


@dataclass
class Drawn:
    """Final latents (count, C, h, w) and pictures (count, H, W, 3), 0 to 255."""

    latents: Tensor
    pixels: np.ndarray[Any, np.dtype[np.int16]]


def save(folder: Path, family: str, tokenizer: Tokenizer, encoders: list[Any], unet: Any, vae: Any) -> None:
    """Write the model as diffusers does, then the scheduler's file as the hub has it."""
    tokenizer.save(folder / "cut")
    config = SCHEDULERS[family]
    parts = {
        "unet": unet,
        "vae": vae,
        "scheduler": getattr(diffusers, str(config["_class_name"])).from_config(config),
        "text_encoder": encoders[0],
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "cut"),
    }
    if family == "sdxl":
        parts |= {
            "text_encoder_2": encoders[1],
            "tokenizer_2": CLIPTokenizer.from_pretrained(folder / "cut", pad_token="!"),
        }
        StableDiffusionXLPipeline(**parts).save_pretrained(folder)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        StableDiffusionPipeline(**parts).save_pretrained(folder)
    shutil.rmtree(folder / "cut")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


def load(folder: Path, family: str) -> Pair:
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    theirs = kind.from_pretrained(folder, low_cpu_mem_usage=False)
    theirs.set_progress_bar_config(disable=True)
    return Pair(theirs, mezzotint.load(folder, device="cpu"), theirs.scheduler)


@pytest.fixture(scope="session", autouse=True)
def quiet() -> Iterator[None]:
    """diffusers logs every key that a scheduler does not know, transformers draws bars."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    yield
    diffusers.utils.logging.set_verbosity(level)
    diffusers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return build(tmp_path_factory.mktemp("families"))


def build(place: Path) -> dict[str, Pair]:
    """One model of each family, in folders under `place`."""
    tokenizer = Tokenizer.cut([PROMPT, NEGATIVE])
    ids = {"vocab_size": len(tokenizer.vocab), "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    loaded = {}
    for family in FAMILIES:
        folder = place / family
        folder.mkdir()
        encoders = [tiny.clip(family, **ids)]
        if family == "sdxl":
            encoders.append(tiny.clip(family, seed=3, projection=True, **ids))
        factor = {"scaling_factor": 0.13025} if family == "sdxl" else {}
        save(folder, family, tokenizer, encoders, tiny.unet(family), tiny.vae(**factor))
        loaded[family] = load(folder, family)
    return loaded


def fields(**changes: Any) -> dict[str, Any]:
    """A request: one picture of 72x104, guided."""
    usual = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "width": 72,
        "height": 104,
        "steps": 5,
        "guidance_scale": 7.5,
        "seed": 7,
        "count": 1,
    }
    return usual | changes


def theirs(pair: Pair, request: dict[str, Any], latents: Tensor | None = None, **flags: Any) -> Drawn:
    """What their pipeline draws: the scheduler of `request["sampler"]`, with `flags`, made from the model's own."""
    pipe, names = pair.theirs, {"steps": "num_inference_steps", "count": "num_images_per_prompt"}
    names |= {"crop": "crops_coords_top_left"}
    options = {names.get(name, name): value for name, value in request.items()}
    seed, sampler = options.pop("seed"), options.pop("sampler", None)
    pipe.scheduler = pair.scheduler
    if sampler is not None:
        flags |= CLASSES[sampler].flags
        pipe.scheduler = getattr(diffusers, CLASSES[sampler].name).from_config(pair.scheduler.config, **flags)
        if hasattr(pipe.scheduler, "noise_sampler_seed"):  # it draws nothing from the generators
            pipe.scheduler.noise_sampler_seed = [seed + k for k in range(request["count"])]
    generators = [torch.Generator().manual_seed(seed + k) for k in range(request["count"])]
    final = []

    def keep(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        final[:] = [tensors["latents"]]
        return {}

    images = pipe(generator=generators, latents=latents, callback_on_step_end=keep, **options).images
    return Drawn(final[0], pixels(images))


def ours(pair: Pair, request: dict[str, Any], latents: Tensor | None = None, batch: int | None = 2) -> Drawn:
    result = pair.ours.generate(mezzotint.Request(**request, batch=batch), latents=latents)
    return Drawn(result.latents, pixels(result.images))


def pixels(images: list[Image.Image]) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def apart(a: Drawn, b: Drawn) -> tuple[float, int, float]:
    """Greatest difference of the latents, relative to the greatest value; of the pixels, greatest and mean."""
    assert a.latents.shape == b.latents.shape and a.pixels.shape == b.pixels.shape
    assert a.latents.isfinite().all() and b.latents.isfinite().all()
    levels = np.abs(a.pixels - b.pixels)
    return float((a.latents - b.latents).abs().max() / b.latents.abs().max()), int(levels.max()), float(levels.mean())


def same(a: Drawn, b: Drawn) -> None:
    latents, greatest, mean = apart(a, b)
    assert latents < 1e-4
    assert greatest <= 1
    assert mean < 0.01


def different(a: Drawn, b: Drawn) -> None:
    assert apart(a, b)[1] > 5


# ---- every sampler ---------------------------------------------------------------------------------------------------


# every class on one family, the first eight on all
EIGHT = ("ddpm", "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpmpp_2m")
DRAWN = dict.fromkeys([*zip(NAMES, itertools.cycle(FAMILIES), strict=False), *itertools.product(EIGHT, FAMILIES)])


@pytest.mark.parametrize(("sampler", "family"), [case for case in DRAWN if case != PNDM_V])
def test_every_sampler_draws_their_picture(pairs: dict[str, Pair], sampler: str, family: str) -> None:
    """Two pictures of 72x104 with guidance and a negative prompt; and one of 64x64 without guidance."""
    request = fields(sampler=sampler, count=2)
    same(ours(pairs[family], request), theirs(pairs[family], request))
    request = fields(sampler=sampler, width=64, height=64, guidance_scale=1.0, steps=7)
    same(ours(pairs[family], request), theirs(pairs[family], request))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_two_samplers_draw_different_pictures(pairs: dict[str, Pair], family: str) -> None:
    """Or the test above would show nothing. So do two seeds, two prompts, and no guidance.

    With one spacing, as in SDXL, DDPM and Euler a are the same, and DDIM and Euler differ by their last level alone.
    """
    drawn = {name: ours(pairs[family], fields(sampler=name)) for name in (NAMES if family == "sd1" else EIGHT)}
    for name, other in itertools.combinations(drawn, 2):
        alike = family == "sdxl" and (name, other) in (("ddpm", "euler_a"), ("ddim", "euler"))
        latents, greatest, _ = apart(drawn[name], drawn[other])
        least = 5 if {name, other} <= {*EIGHT} else 1  # 8 of them are further apart than any two of all
        assert alike or (latents > 5e-3 and greatest > least), (name, other)
    for changes in ({"seed": 8}, {"prompt": "a whale"}, {"negative_prompt": "a whale"}, {"guidance_scale": 1.0}):
        different(drawn["euler"], ours(pairs[family], fields(sampler="euler", **changes)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_sampler(pairs: dict[str, Pair], family: str) -> None:
    """No sampler and no negative prompt named: SD1's PNDM, SD2's DDIM, SDXL's Euler and its zeros."""
    request = fields(negative_prompt=None)
    same(ours(pairs[family], request), theirs(pairs[family], request))
    assert (
        pairs[family].ours.resolve(mezzotint.Request(prompt=PROMPT)).sampler
        == {
            "sd1": "pndm",
            "sd2": "ddim",
            "sdxl": "euler",
        }[family]
    )


def test_the_default_trap(pairs: dict[str, Pair]) -> None:
    """SD1's file has no timestep_spacing: PNDM of it runs leading, Euler of it linspace."""
    request = fields(sampler="euler")
    same(ours(pairs["sd1"], request), theirs(pairs["sd1"], request))
    leading = theirs(pairs["sd1"], request, timestep_spacing="leading")
    different(ours(pairs["sd1"], request), leading)
    same(ours(pairs["sd1"], fields(sampler="euler", spacing="leading")), leading)


@pytest.mark.parametrize(("family", "sampler"), [("sd1", "euler"), ("sd2", "dpmpp_2m"), ("sdxl", "heun")])
def test_karras_spacing(pairs: dict[str, Pair], family: str, sampler: str) -> None:
    request = fields(sampler=sampler)
    expected = theirs(pairs[family], request, use_karras_sigmas=True)
    same(ours(pairs[family], request | {"spacing": "karras"}), expected)
    different(ours(pairs[family], request), expected)


@pytest.mark.parametrize(
    ("sampler", "levels"),
    [
        ("euler", {"sigmas": (14.6, 6.5, 3.9, 1.4, 0.4, 0.0)}),
        ("euler", {"sigmas": (9.0, 2.0, 0.3)}),  # and so stops above 0
        ("heun", {"timesteps": (990, 700, 400, 20)}),
        ("dpmpp_2m", {"timesteps": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)}),
    ],
)
def test_a_list_of_ones_own(pairs: dict[str, Pair], sampler: str, levels: dict[str, tuple[float, ...]]) -> None:
    request = fields(sampler=sampler, **levels)
    del request["steps"]
    expected = theirs(pairs["sd1"], request | {name: list(values) for name, values in levels.items()})
    same(ours(pairs["sd1"], request), expected)
    different(ours(pairs["sd1"], fields(sampler=sampler)), expected)
    resolved = pairs["sd1"].ours.resolve(mezzotint.Request(**request))
    assert resolved.spacing is None and resolved == pairs["sd1"].ours.resolve(resolved)
    assert resolved.steps == len(next(iter(levels.values()))) - ("sigmas" in levels)


# ---- the other fields ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_groups_of_any_size_draw_the_same_pictures(pairs: dict[str, Pair], batch: int) -> None:
    request = fields(sampler="euler_a", count=3)
    same(ours(pairs["sd1"], request, batch=batch), theirs(pairs["sd1"], request))


@pytest.mark.parametrize("family", FAMILIES)
def test_given_latents(pairs: dict[str, Pair], family: str) -> None:
    latents = torch.randn(1, 4, 13, 9, generator=torch.Generator().manual_seed(99))
    request = fields(sampler="euler_a")  # whose steps draw what would have been the first noise
    same(ours(pairs[family], request, latents), theirs(pairs[family], request, latents))
    different(ours(pairs[family], request, latents), ours(pairs[family], request))


@pytest.mark.parametrize(("family", "eta"), [("sd1", 0.4), ("sd2", 1.0), ("sdxl", 0.7)])
def test_eta(pairs: dict[str, Pair], family: str, eta: float) -> None:
    request = fields(sampler="ddim", eta=eta)
    same(ours(pairs[family], request), theirs(pairs[family], request))
    different(ours(pairs[family], request), ours(pairs[family], fields(sampler="ddim")))


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_rescale(pairs: dict[str, Pair], family: str) -> None:
    request = fields(sampler="dpmpp_2m", guidance_rescale=0.7)
    same(ours(pairs[family], request), theirs(pairs[family], request))
    different(ours(pairs[family], request), ours(pairs[family], fields(sampler="dpmpp_2m")))


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize("family", FAMILIES)
def test_clip_skip(pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch, family: str, negative: str | None) -> None:
    """Of the prompt alone: diffusers encodes the negative prompt without it."""
    encoder = pairs[family].theirs.text_encoder
    monkeypatch.setitem(encoder.__dict__, "text_model", encoder)  # where diffusers looks for the norm, transformers 4's
    request = fields(sampler="ddim", clip_skip=1, negative_prompt=negative)
    drawn = ours(pairs[family], request)
    same(drawn, theirs(pairs[family], request))
    different(drawn, ours(pairs[family], request | {"clip_skip": 0}))


@pytest.mark.parametrize(
    "changes",
    [
        {"original_size": (512, 640)},
        {"crop": (16, 5)},
        {"target_size": (1024, 768)},
        {"original_size": (512, 640), "crop": (0, 90), "target_size": (300, 200), "guidance_scale": 1.0},
    ],
    ids=str,
)
def test_what_sdxl_is_told_of_sizes(pairs: dict[str, Pair], changes: dict[str, Any]) -> None:
    request = fields(**changes)
    drawn = ours(pairs["sdxl"], request)
    same(drawn, theirs(pairs["sdxl"], request))
    assert apart(drawn, ours(pairs["sdxl"], fields(guidance_scale=request["guidance_scale"])))[0] > 1e-3


def test_no_negative_prompt_is_zeros_in_sdxl_and_an_empty_one_is_not(pairs: dict[str, Pair]) -> None:
    request = fields(negative_prompt="")
    empty = ours(pairs["sdxl"], request)
    same(empty, theirs(pairs["sdxl"], request))
    different(empty, ours(pairs["sdxl"], fields(negative_prompt=None)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_fills_its_window(pairs: dict[str, Pair], family: str) -> None:
    request = fields(prompt=LONG, sampler="ddim")
    same(ours(pairs[family], request), theirs(pairs[family], request))


def test_a_longer_prompt_is_not_cut(pairs: dict[str, Pair]) -> None:
    """A known difference: diffusers drops what does not fit in one window, here it fills a second one."""
    pair = pairs["sd1"]
    longer = fields(prompt=LONG + "a red whale", sampler="ddim")
    same(theirs(pair, longer), theirs(pair, longer | {"prompt": LONG}))
    assert pair.ours.encode(longer["prompt"]).context.shape[1] == 2 * 77
    different(ours(pair, longer), ours(pair, longer | {"prompt": LONG}))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_single_file_draws_what_its_folder_draws(family: str, tmp_path: Path) -> None:
    model = Model(family)
    save_file(model.single(), tmp_path / "model.safetensors")
    if family == "sdxl":
        model.vae.register_to_config(scaling_factor=0.13025)  # which a single file does not hold
    save(tmp_path / "folder", family, Tokenizer.clip(), model.encoders, model.unet, model.vae)
    folder = mezzotint.load(tmp_path / "folder", device="cpu")
    single = mezzotint.load(tmp_path / "model.safetensors", device="cpu", config=model.config)
    request = mezzotint.Request(**fields(negative_prompt=None, steps=3))
    a, b = folder.generate(request), single.generate(request)
    assert torch.equal(a.latents, b.latents)
    assert np.array_equal(pixels(a.images), pixels(b.images))
    assert a.request == b.request
