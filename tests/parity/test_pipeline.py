"""Whole pictures against diffusers' pipelines, live: one folder, loaded by both, the same request, the same picture.

pictures.py makes the models and draws. Limits (DESIGN.md section 5): final latents 1e-4 relative, pictures 1/255 at
most and 0.01/255 on average. What was measured is in docs/fidelity.md, and so are the differences that are meant; their
tests are in test_samplers.py.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mezzotint
from mezzotint.models.tokenizer import Tokenizer
from pictures import FAMILIES, NEGATIVE, PROMPT, Pair, apart, different, fields, load, ours, pixels, same, save, theirs
from table import NAMES
from test_single_file import Model

pytestmark = [  # diffusers with numpy 2, and its Brownian path asked a digit beyond its end
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),
]

LONG = "lemon " * 75  # fills the window to its last token
PNDM_V = ("pndm", "sd2")  # a known difference: test_samplers.py, test_pndm_with_v_prediction_differs


# ---- every sampler ---------------------------------------------------------------------------------------------------


# every class on one family, the first eight on all; the short form has the former
EIGHT = ("ddpm", "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpmpp_2m")
ON_ONE = [case for case in zip(NAMES, itertools.cycle(FAMILIES), strict=False) if case != PNDM_V]
ON_OTHERS = [case for case in itertools.product(EIGHT, FAMILIES) if case not in (PNDM_V, *ON_ONE)]
DRAWN = [*ON_ONE, *(pytest.param(*case, marks=pytest.mark.slow) for case in ON_OTHERS)]
UNGUIDED = ("euler", "euler_a", "dpmpp_2m")  # of each kind one: no sampler knows whether there is guidance
DRAWN_UNGUIDED = [
    pytest.param(*case, marks=() if case in ON_ONE and case[0] in UNGUIDED else pytest.mark.slow)
    for case in (*ON_ONE, *ON_OTHERS)
]


@pytest.mark.parametrize(("sampler", "family"), DRAWN)
def test_every_sampler_draws_their_picture(pairs: dict[str, Pair], sampler: str, family: str) -> None:
    """Two pictures of 40x56 with guidance and a negative prompt."""
    request = fields(sampler=sampler, count=2)
    same(ours(pairs[family], request), theirs(pairs[family], request))


@pytest.mark.parametrize(("sampler", "family"), DRAWN_UNGUIDED)
def test_a_picture_without_guidance(pairs: dict[str, Pair], sampler: str, family: str) -> None:
    """64x64."""
    request = fields(sampler=sampler, width=64, height=64, guidance_scale=1.0, steps=7)
    same(ours(pairs[family], request), theirs(pairs[family], request))


@pytest.mark.parametrize("family", ["sd1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd2", "sdxl"))])
def test_any_two_samplers_draw_different_pictures(pairs: dict[str, Pair], family: str) -> None:
    """Or the test above would show nothing. So do two seeds, two prompts, and no guidance.

    With one spacing, as in SDXL, DDPM and Euler a are the same, and DDIM and Euler differ by their last level alone.
    """
    drawn = {name: ours(pairs[family], fields(sampler=name)) for name in (NAMES if family == "sd1" else EIGHT)}
    for name, other in itertools.combinations(drawn, 2):
        alike = family == "sdxl" and (name, other) in (("ddpm", "euler_a"), ("ddim", "euler"))
        latents, greatest, _ = apart(drawn[name], drawn[other])
        least = 4 if {name, other} <= {*EIGHT} else 1  # 8 of them are further apart than any two of all
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
    latents = torch.randn(1, 4, 7, 5, generator=torch.Generator().manual_seed(99))
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


def test_an_index_that_does_not_name_zeros_has_diffusers_default(pairs: dict[str, Pair], tmp_path: Path) -> None:
    """A missing negative prompt is zeros in SDXL."""
    folder = Path(pairs["sdxl"].theirs.config._name_or_path)
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    index = json.loads((folder / "model_index.json").read_text())
    assert index.pop("force_zeros_for_empty_prompt") is True
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pair, request = load(tmp_path, "sdxl"), fields(negative_prompt=None)
    same(ours(pair, request), theirs(pair, request))


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


def test_a_file_with_its_yaml_and_a_given_vae_draws_what_its_folder_draws(tmp_path: Path) -> None:
    """The prediction stands beside the file, and the VAE is none of its own."""
    model = Model("sd1")
    save_file(
        {key: tensor for key, tensor in model.single().items() if not key.startswith("first_stage_model.")},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "model.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    save(tmp_path / "folder", "sd1", Tokenizer.clip(), model.encoders, model.unet, model.vae)
    config = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "v_prediction"}))
    folder = mezzotint.load(tmp_path / "folder", device="cpu")
    single = mezzotint.load(
        tmp_path / "model.safetensors", device="cpu", config=model.config, vae=tmp_path / "folder" / "vae"
    )
    request = mezzotint.Request(**fields(negative_prompt=None, steps=3))
    a, b = folder.generate(request), single.generate(request)
    assert torch.equal(a.latents, b.latents)
    assert np.array_equal(pixels(a.images), pixels(b.images))
    epsilon = mezzotint.load(tmp_path / "folder", device="cpu", prediction="epsilon")
    assert (epsilon.generate(request).latents - a.latents).abs().max() > 0.1
