"""A Request takes what is right and answers what is wrong with a sentence."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from PIL import Image

from mezzotint.entries.control import Control, ControlPicture
from mezzotint.entries.ip_adapter import IPAdapter
from mezzotint.entries.regions import Region
from mezzotint.errors import RequestError
from mezzotint.images import io
from mezzotint.request import MAX_PROMPT, MAX_SEED, Request
from mezzotint.result import Result

FULL: dict[str, Any] = {
    "prompt": "a lemon, 柠檬 🍋",
    "negative_prompt": "",
    "prompt_syntax": "comfy",
    "emphasis": "no_norm",
    "embeddings": ("style.pt", "owner/name"),
    "loras": (("a.safetensors", 0.8), ("b.safetensors", 1.0, 0.5, (("unet.mid_block", 0.3),))),
    "lora_folder": "loras",
    "choices": "draw",
    "wildcards": "cards",
    "width": 104,
    "height": 72,
    "steps": 20,
    "guidance_scale": 7.5,
    "sampler": "euler_a",
    "spacing": "karras",
    "seed": MAX_SEED - 2,
    "count": 3,
    "batch": 2,
    "clip_skip": 1,
    "eta": 0.5,
    "guidance_rescale": 0.7,
    "guidance_interval": (0.3, 5.0),
    "guidance_steps": (0.0, 0.8),
    "guidance_method": "apg",
    "apg_eta": 0.1,
    "apg_momentum": -0.75,
    "apg_norm_threshold": 7.5,
    "cfg_zero_init_steps": 2,
    "perp_neg_scale": 1.5,
    "mimic_scale": 5.0,
    "pag_scale": 3.0,
    "regions": ({"prompt": "a", "box": (0.0, 0.0, 0.5, 1.0), "mask": None, "weight": 2.0},),
    "region_base": 0.3,
    "pag_layers": ("mid", "up_blocks.0"),
    "pag_adaptive_scale": 0.005,
    "freeu": (1.5, 1.6, 0.9, 0.2),
    "threshold_percentile": 0.95,
    "original_size": (1000, 801),
    "crop": (0, 3),
    "target_size": (1024, 1024),
    "refiner": "refiner.safetensors",
    "refiner_at": 0.75,
    "aesthetic_score": 6.5,
    "negative_aesthetic_score": 2.0,
    "discard_penultimate_sigma": True,
    "noise": "philox",
    "image": "lemon.png",
    "mask": b"\x89PNG",
    "strength": 0.6,
    "fix_steps": True,
    "resize_mode": "crop",
    "mask_blur": 4.0,
    "invert_mask": True,
    "differential": True,
    "masked_content": "fill",
    "only_masked": 32,
    "outpaint": (0, 8, 64, 0),
    "control": (
        {
            "file": "canny.pth",
            "image": "edge.png",
            "scale": 0.8,
            "start": 0.1,
            "end": 0.6,
            "mode": "prompt",
            "resize_mode": "crop",
            "type": "canny",
            "more": ({"image": "depth.png", "type": 1, "scale": 0.5},),
        },
    ),
    "tile": 512,
    "ip_adapter": (
        {
            "file": "plus.safetensors",
            "image": ("face.png", "other.png"),
            "embeds": "face.safetensors",
            "encoder": "image_encoder",
            "scale": (("mid", 0.5), ("up.block_0", (0.0, (1.0, 0.5), 0.0))),
            "start": 0.1,
            "end": 0.6,
            "mask": ("mask.png",),
        },
    ),
    "hires": 2.0,
    "hires_upscale": "pixels",
    "hires_steps": 12,
    "hires_strength": 0.5,
    "seamless": "x",
    "variation_seed": 9,
    "variation_strength": 0.1,
    "seed_size": (64, 72),
    "safety": "blur",
}


def test_a_path_that_is_not_unicode() -> None:
    """As Python reads a file name that is not UTF-8."""
    for field, value in (("loras", (("\udcff.pt", 1.0),)), ("image", "\udcff.png"), ("embeddings", ("\udcff",))):
        with pytest.raises(RequestError, match=rf"^{field} is .*udcff.*, which is not Unicode; it must be"):
            Request(prompt="a", **{field: value})  # type: ignore[arg-type]


def test_a_full_request_survives_json() -> None:
    request = Request(**FULL)
    assert {*FULL, "sigmas", "timesteps"} == set(Request.model_fields)  # which exclude a spacing
    assert request.model_dump(exclude={"sigmas", "timesteps"}) == FULL
    assert Request.model_validate_json(request.model_dump_json()) == request
    assert hash(request) == hash(Request(**FULL))


def test_the_prompt_may_be_the_one_positional_argument() -> None:
    assert Request("a lemon", seed=7) == Request(prompt="a lemon", seed=7)
    for wrong in (lambda: Request("a lemon", prompt="a whale"), lambda: Request("a lemon", "a whale")):
        with pytest.raises(TypeError, match="prompt"):
            wrong()
    with pytest.raises(RequestError, match="steps is 0"):
        Request("a lemon", steps=0)


def test_a_repr_shows_the_fields_that_are_set() -> None:
    assert repr(Request("a lemon", seed=7)) == str(Request("a lemon", seed=7)) == "Request(prompt='a lemon', seed=7)"
    assert repr(Request("", count=1)) == "Request(prompt='')"
    request = Request("", image=b"x" * 12_345, loras=["a.safetensors"])
    assert repr(request) == "Request(prompt='', loras=(('a.safetensors', 1.0),), image=<12,345 bytes>)"
    full = Request(**{**FULL, "mask": "mask.png"})
    names = {each.__name__: each for each in (Request, Control, ControlPicture, IPAdapter, Region)}
    assert eval(repr(full), names) == full
    region = Region(prompt="a", mask=b"x" * 12_345)
    assert repr(region) == "Region(prompt='a', mask=<12,345 bytes>)"


# ---- Result ----------------------------------------------------------------------------------------------------------


def result(*seeds: int) -> Result:
    request = Request("a <lemon>", seed=seeds[0], count=len(seeds), width=16, height=8)
    images = [io.Picture.from_image(Image.new("RGB", (16, 8), (seed, 0, 0))) for seed in seeds]
    for image, seed in zip(images, seeds, strict=True):
        image.info["parameters"] = f"seed {seed}"
    return Result([*images], torch.zeros(len(seeds), 4, 1, 2), [*seeds], request, {"total": 3.25}, ("a notice",))


def test_a_result_saves_one_picture_under_its_name(tmp_path: Path) -> None:
    for name in ("x.png", "x.jpg", "x.webp"):
        assert result(7).save(tmp_path / name) == [tmp_path / name]
        assert io.read_metadata(tmp_path / name) == {"parameters": "seed 7"}
    with pytest.raises(RequestError, match="must end in"):
        result(7).save(tmp_path / "x.gif")


def test_a_result_numbers_several_pictures(tmp_path: Path) -> None:
    paths = result(7, 8).save(str(tmp_path / "x.png"))
    assert paths == [tmp_path / "x-0001.png", tmp_path / "x-0002.png"]
    assert [io.read_metadata(path)["parameters"] for path in paths] == ["seed 7", "seed 8"]


def test_repr_of_a_result() -> None:
    assert repr(result(7)) == "<Result: 1 picture of 16x8, seed 7, 3.2 s, notices: a notice>"
    assert repr(result(7, 8)).startswith("<Result: 2 pictures of 16x8, seeds 7 to 8, ")


def test_a_result_shows_itself_in_a_notebook() -> None:
    png = result(7)._repr_png_()
    assert png is not None and Image.open(BytesIO(png)).size == (16, 8)
    assert result(7, 8)._repr_png_() is None
    page = result(7, 8)._repr_html_()
    assert page.count('src="data:image/png;base64,') == 2 and "seed 8" in page
    assert "&lt;lemon&gt;" in page and "<lemon>" not in page


def test_none_is_the_models_own() -> None:
    request = Request(prompt="")
    assert request.count == 1
    assert {value for name, value in request if name not in ("prompt", "count")} == {None}


def test_every_field_has_a_description() -> None:
    assert all(field.description for field in Request.model_fields.values())


def test_replace_validates_and_leaves_the_first_alone() -> None:
    request = Request(**FULL)
    assert request.replace(seed=1).seed == 1
    assert request.seed == FULL["seed"]
    with pytest.raises(RequestError, match="steps is 0"):
        request.replace(steps=0)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        request.steps = 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None),
        ("prompt", 3),
        ("prompt", "x" * (MAX_PROMPT + 1)),
        ("prompt", "\udcff"),
        ("negative_prompt", "x" * (MAX_PROMPT + 1)),
        ("width", 100),
        ("width", 0),
        ("height", -8),
        ("height", 8200),
        ("steps", 0),
        ("steps", 10_000),
        ("steps", 2.5),
        ("steps", True),
        ("steps", "many"),
        ("guidance_scale", float("nan")),
        ("guidance_scale", float("inf")),
        ("guidance_scale", -1),
        ("guidance_scale", 1e308),
        ("sampler", ""),
        ("sampler", 7),
        ("spacing", "k" * 101),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        pytest.param("seed", 10**5000, id="seed-too-long-to-print"),
        ("count", 0),
        ("count", None),
        ("batch", 0),
        ("clip_skip", -1),
        ("eta", float("nan")),
        ("eta", 1.5),
        ("guidance_rescale", 2),
        ("guidance_scale", [7.5, float("nan")]),
        ("guidance_scale", [7.5, float("inf")]),
        ("guidance_scale", [7.5, -1.0]),
        ("guidance_scale", []),
        ("guidance_scale", [1.0] * 1001),
        ("guidance_scale", "much"),
        ("guidance_method", "cfg++"),
        ("guidance_steps", (0.8, 0.2)),
        ("guidance_steps", (0.5, 0.5)),
        ("guidance_steps", (0, 20)),
        ("guidance_steps", (float("nan"), 1.0)),
        ("apg_eta", -0.1),
        ("apg_momentum", 1.0),
        ("apg_momentum", float("nan")),
        ("apg_norm_threshold", -1),
        ("apg_norm_threshold", float("inf")),
        ("cfg_zero_init_steps", 0.5),
        ("perp_neg_scale", float("inf")),
        ("mimic_scale", float("nan")),
        ("pag_scale", float("nan")),
        ("region_base", -1.0),
        ("pag_layers", ()),
        ("pag_adaptive_scale", -1.0),
        ("freeu", (1.5, 1.6, 0.9)),
        ("freeu", (1.5, 1.6, 0.0, 0.2)),
        ("differential", 1),
        ("threshold_percentile", 95),
        ("sigmas", [1.0, 2.0, 0.0]),
        ("sigmas", [2.0, 2.0, 0.0]),
        ("sigmas", [2.0]),
        ("sigmas", [2.0, -1.0]),
        ("sigmas", [float("inf"), 1.0]),
        ("sigmas", [2.0, float("nan")]),
        ("timesteps", []),
        ("timesteps", [1, 2]),
        ("guidance_interval", (5.0, 0.3)),
        ("guidance_interval", (1.0, 1.0)),
        ("guidance_interval", (0.1, float("inf"))),
        ("guidance_interval", (0.1,)),
        ("original_size", (0, 10)),
        ("crop", (-1, 0)),
        ("crop", "middle"),
        ("target_size", 512),
        ("image", 7),
        ("image", ""),
        ("image", b""),
        pytest.param("image", "x" * 4097, id="image-name-too-long"),
        ("image", "data:;base64,no!"),
        ("mask", "data:image/png,abc"),
        ("mask", [1, 2]),
        ("strength", 1.01),
        ("strength", -0.1),
        ("strength", float("nan")),
        ("strength", True),
        ("resize_mode", "squeeze"),
        ("mask_blur", -1),
        ("invert_mask", 1),
        ("invert_mask", "yes"),
        ("masked_content", "nothing"),
        ("only_masked", -1),
        ("only_masked", True),
        ("outpaint", (8, 8)),
        ("outpaint", (8, 8, 8, 7)),
        ("outpaint", (-8, 0, 0, 0)),
        ("tile", 60),
        ("tile", 32),
        ("hires", 1.0),
        ("hires", 9.0),
        ("hires_upscale", "esrgan"),
        ("hires_steps", 0),
        ("hires_strength", 0.0),
        ("seamless", "yx"),
        ("variation_seed", -1),
        ("variation_strength", 2),
        ("seed_size", (64, 63)),
    ],
)
def test_a_wrong_field_gets_a_sentence(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        Request.model_validate({"prompt": "a lemon", field: value})
    sentence = str(caught.value)
    assert sentence.startswith(f"{field} is ")
    assert sentence.endswith(f"it must be {Request.model_fields[field].description}")
    assert len(sentence) < 400
    assert "\n" not in sentence


def test_the_sentences_in_full() -> None:
    with pytest.raises(RequestError, match=r"^prompt is missing; it must be a text"):
        Request()  # type: ignore[call-arg]
    with pytest.raises(RequestError) as caught:
        Request(prompt="x" * 10_000_000, steps=0)
    assert str(caught.value) == (
        "prompt is 10,000,000 characters long; it must be a text (valid Unicode) of at most 100,000 characters. "
        "steps is 0; it must be a whole number from 1 to 1000"
    )
    with pytest.raises(RequestError, match=r"^steps is 'a dozen'; it must be"):
        Request(prompt="", steps="a dozen")  # type: ignore[arg-type]


def test_an_unknown_field_is_named_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="no field 'negative'; use negative_prompt"):
        Request(prompt="", negative="dark")  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="no field 'zzz'; it has prompt, negative_prompt"):
        Request(prompt="", zzz=1)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="no field 1; "):
        Request.model_validate({"prompt": "", 1: 2})


def test_the_last_seed_must_fit() -> None:
    assert Request(prompt="", seed=MAX_SEED).seed == MAX_SEED
    with pytest.raises(RequestError, match="count 2; picture k has seed"):
        Request(prompt="", seed=MAX_SEED, count=2)


@pytest.mark.parametrize("levels", [{"sigmas": [14.6, 3, 0.5]}, {"timesteps": [999, 1.5]}], ids=str)
def test_levels_of_ones_own(levels: dict[str, Any]) -> None:
    request = Request(prompt="", **levels)
    assert Request.model_validate_json(request.model_dump_json()) == request
    with pytest.raises(RequestError, match=r"steps is 3 and .* has 2 steps; leave steps out"):
        Request(prompt="", steps=3, **levels)
    with pytest.raises(RequestError, match="and spacing are given; each sets the noise levels, so give only one"):
        Request(prompt="", spacing="karras", **levels)


def test_guidance_may_have_several_scales() -> None:
    request = Request(prompt="", guidance_scale=[9, 3.5])  # type: ignore[arg-type]
    assert request.guidance_scale == (9.0, 3.5)
    assert Request.model_validate_json(request.model_dump_json()) == request
    assert hash(request) == hash(request.replace(guidance_scale=(9.0, 3.5)))


def test_a_percentile_needs_its_scale() -> None:
    with pytest.raises(RequestError, match=r"threshold_percentile is 0\.9 without mimic_scale; give both, or neither"):
        Request(prompt="", threshold_percentile=0.9)


def test_the_guidance_methods_are_those_that_there_are() -> None:
    from mezzotint.diffusion.guidance import METHODS

    assert all(Request(prompt="", guidance_method=name) for name in METHODS)
    description = Request.model_fields["guidance_method"].description
    assert description == f"{', '.join([*METHODS][:-1])} or {[*METHODS][-1]}"


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"prompt": "\\ud800"}', b'{"prompt": "\xff"}', '{"prompt": 1e999}'])
def test_wrong_json_gets_a_sentence(text: str | bytes) -> None:
    with pytest.raises(RequestError):
        Request.model_validate_json(text)


def test_no_torch_and_no_pillow_on_this_floor() -> None:
    code = "import sys, mezzotint.request; print({'torch', 'PIL', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
