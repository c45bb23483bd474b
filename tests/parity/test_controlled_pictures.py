"""Pictures with ControlNets against diffusers' pipelines, live.

    python tests/parity/test_controlled_pictures.py

prints how far apart they are, in every case with every family.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, MultiControlNetModel
from PIL import Image

import pictures
from pictures import SIZE, Drawn, Pair, different, draw, same
from test_controlnet import theirs as network

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),
]

PIPELINES = {
    (False, "text"): diffusers.StableDiffusionControlNetPipeline,
    (False, "picture"): diffusers.StableDiffusionControlNetImg2ImgPipeline,
    (False, "mask"): diffusers.StableDiffusionControlNetInpaintPipeline,
    (True, "text"): diffusers.StableDiffusionXLControlNetPipeline,
    (True, "picture"): diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
    (True, "mask"): diffusers.StableDiffusionXLControlNetInpaintPipeline,
}


def drawing(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (13, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def blot() -> Image.Image:
    mask = Image.new("L", SIZE)
    mask.paste(255, (8, 14, 32, 37))
    return mask


def masked_picture() -> torch.Tensor:
    """The input of an inpainting ControlNet, as in the documentation of diffusers."""
    picture, mask = (np.asarray(each, np.float32) / 255.0 for each in (drawing(5), blot()))
    picture[mask > 0.5] = -1.0
    return torch.from_numpy(picture).permute(2, 0, 1)[None]


ONE: dict[str, Any] = {"image": drawing(1), "scale": 0.8}
OTHER: dict[str, Any] = {"image": drawing(2, (60, 90)), "scale": 0.6}
FROM_PICTURE = {"image": drawing(5), "strength": 0.6}
MASKED = FROM_PICTURE | {"mask": blot(), "strength": 1.0}
# what is drawn: the entries, and other fields of the request
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one": ([ONE], {"sampler": "euler", "count": 2}),
    "two, a part of the steps": ([ONE | {"end": 0.6}, OTHER | {"start": 0.3}], {"sampler": "ddim", "steps": 8}),
    "guess": ([ONE | {"mode": "guess"}], {"sampler": "dpmpp_2m"}),
    "two, guess": ([ONE | {"mode": "guess"}, OTHER | {"mode": "guess"}], {"sampler": "euler_a"}),
    "image to image": ([ONE], FROM_PICTURE | {"sampler": "euler", "steps": 8}),
    "two, image to image": ([ONE, OTHER | {"end": 0.5}], FROM_PICTURE | {"sampler": "ddim", "steps": 8}),
    "inpainting": ([{"scale": 0.9}], MASKED | {"sampler": "euler"}),
    "two, inpainting": ([{"scale": 0.9}, OTHER], MASKED | {"sampler": "ddim", "strength": 0.7, "steps": 8}),
    "masked alone": ([ONE], MASKED | {"sampler": "euler", "strength": 0.7, "steps": 8, "only_masked": 8}),
    "without guidance": ([ONE | {"mode": "guess"}], {"sampler": "euler", "guidance_scale": 1.0}),
}


@cache
def saved(family: str, seed: int, folder: Path) -> ControlNetModel:
    """Write a network to a folder, and return it as diffusers reads it from there."""
    network(family, seed=seed).save_pretrained(folder)
    return ControlNetModel.from_pretrained(folder)


def both(pair: Pair, family: str, case: str, place: Path) -> tuple[Drawn, Drawn]:
    """The picture of a case, ours and theirs."""
    entries, changes = CASES[case]
    request = pictures.fields(guidance_scale=6.0) | changes
    xl, kind = family == "sdxl", pictures.kind_of(request)
    request = pictures.unsized(request) if kind == "picture" else request
    loaded = [saved(family, 10 + k, place / str(k)) for k in range(len(entries))]
    control = [{"file": place / str(k), **entry} for k, entry in enumerate(entries)]
    mine = pictures.ours(pair, request | {"control": control})

    many = len(loaded) > 1
    components = {**pair.theirs.components, "controlnet": MultiControlNetModel(loaded) if many else loaded[0]}
    pipe = PIPELINES[xl, kind](**components, **({} if xl else {"requires_safety_checker": False}))
    shown = [entry.get("image", masked_picture() if kind == "mask" else None) for entry in entries]
    if kind != "text" and many:  # their pipeline cannot mix tensors and pictures of other sizes
        shown = [
            each if isinstance(each, torch.Tensor) else each.resize(SIZE, Image.Resampling.LANCZOS) for each in shown
        ]

    def of(field: str, default: float) -> Any:
        values = [float(entry.get(field, default)) for entry in entries]
        return values if many else values[0]

    expected = draw(
        pipe,
        pair.scheduler,
        request,
        **{"image" if kind == "text" else "control_image": shown if many else shown[0]},
        controlnet_conditioning_scale=of("scale", 1.0),
        control_guidance_start=of("start", 0.0),
        control_guidance_end=of("end", 1.0),
        guess_mode=entries[0].get("mode") == "guess",
    )
    if kind == "mask" and "only_masked" not in changes:
        pictures.only_inside(blot(), mine, expected)
    return mine, expected


TESTED = [
    *(("sd1", case) for case in CASES),
    ("sd2", "two, a part of the steps"),
    *(("sdxl", case) for case in ("one", "two, guess", "two, image to image", "two, inpainting")),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


@pytest.mark.parametrize(("family", "case"), TESTED)
def test_pictures_are_those_of_diffusers(pairs: dict[str, Pair], family: str, case: str, files: Path) -> None:
    mine, expected = both(pairs[family], family, case, files / family)
    same(mine, expected)
    plain = pictures.ours(pairs[family], pictures.fields(guidance_scale=6.0) | CASES[case][1])
    different(mine, plain)


if __name__ == "__main__":
    families = ("sd1", "sd2", "sdxl")
    pictures.print_table("ControlNet", families, CASES, lambda pairs, *rest: both(pairs[rest[0]], *rest))
