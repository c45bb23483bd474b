"""Pixels in and out, and a picture's record in its PNG file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.errors import MezzotintError, RequestError
from mezzotint.image import describe, from_pil, read_metadata, save_png, to_pil
from mezzotint.request import MAX_PROMPT, Request

REQUEST = Request(
    prompt="a lemon",
    negative_prompt="dark, blurry",
    width=104,
    height=72,
    steps=20,
    guidance_scale=7.5,
    sampler="euler_a",
    seed=7,
    count=4,
    batch=2,
)
MODEL = {"name": "emoji", "dtype": "float32", "threads": 2}


def picture(request: Request = REQUEST, seed: int = 9) -> Image.Image:
    image = Image.new("RGB", (16, 8), "yellow")
    image.info.update(describe(request, seed, MODEL, group=[9, 10]))
    return image


def test_rounding_is_that_of_diffusers() -> None:
    pixels = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    pixels[0, 0, 0] = torch.linspace(-1, 1, 24)
    # VaeImageProcessor: denormalize, pt_to_numpy, numpy_to_pil
    expected = (((pixels * 0.5 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    images = to_pil(pixels)
    assert [image.size for image in images] == [(24, 40)] * 2
    assert np.array_equal(np.stack([np.array(image) for image in images]), expected)


def test_every_level_survives_the_round_trip() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels[::-1], levels.T], axis=-1))
    pixels = from_pil(image)
    assert pixels.shape == (1, 3, 16, 16)
    assert (pixels.dtype, pixels.min().item(), pixels.max().item()) == (torch.float32, -1.0, 1.0)
    assert np.array_equal(np.array(to_pil(pixels)[0]), np.array(image))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_any_mode_comes_in(mode: str) -> None:
    assert from_pil(Image.new(mode, (16, 8))).shape == (1, 3, 8, 16)


def test_nan_is_no_picture() -> None:
    pixels = torch.zeros(1, 3, 8, 8)
    pixels[0, 1, 2, 3] = torch.nan
    with pytest.raises(MezzotintError, match="not numbers"):
        to_pil(pixels)


def test_the_record_makes_the_request_again(tmp_path: Path) -> None:
    save_png(picture(), tmp_path / "lemon.png")
    found = read_metadata(tmp_path / "lemon.png")
    record = json.loads(found["mezzotint"])
    assert Request.model_validate(record["request"]) == REQUEST
    assert (record["seed"], record["group"], record["model"]) == (9, [9, 10], MODEL)
    assert set(record["versions"]) == {"mezzotint", "torch"}
    assert found["parameters"] == (
        "a lemon\nNegative prompt: dark, blurry\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 9, Size: 104x72, Model: emoji, "
        f"Version: mezzotint {record['versions']['mezzotint']}"
    )


def test_the_record_is_the_same_every_time() -> None:
    assert picture().info == picture().info
    assert json.loads(describe(REQUEST, 9, MODEL)["mezzotint"])["group"] == [9]


def test_parameters_name_what_was_asked_for_and_quote_what_would_be_misread() -> None:
    request = Request(
        prompt="x", width=8, height=8, steps=1, clip_skip=1, eta=0.5, guidance_rescale=0.7, spacing="karras"
    )
    text = describe(request, 0, {"name": "a, b: c"})["parameters"]
    assert text.startswith('x\nSteps: 1, Schedule type: Karras, Seed: 0, Size: 8x8, Model: "a, b: c", Clip skip: 2, ')
    assert "Eta: 0.5, CFG rescale: 0.7, Version: mezzotint " in text


@pytest.mark.parametrize(
    ("sampler", "scale", "written"),
    [
        ("euler_cfg_pp", 0.6, "Sampler: DDIM CFG++, CFG scale: 7.5,"),
        ("euler_cfg_pp", (0.8, 0.4), 'Sampler: DDIM CFG++, CFG scale: "(10.0, 5.0)",'),
        ("DDIM CFG++", 7.5, "Sampler: DDIM CFG++, CFG scale: 7.5,"),
        ("euler", 7.5, "Sampler: Euler, CFG scale: 7.5,"),
    ],
)
def test_parameters_have_the_scale_that_a1111_would_need(sampler: str, scale: Any, written: str) -> None:
    assert written in describe(Request(prompt="x", sampler=sampler, guidance_scale=scale), 0, MODEL)["parameters"]


@pytest.mark.parametrize(
    "prompt", ["柠檬 🍋", "naïve", "two\nlines", "a\0b", "Steps: 3", "", "🍋" * MAX_PROMPT], ids=lambda text: text[:8]
)
def test_any_prompt_survives_the_file(tmp_path: Path, prompt: str) -> None:
    request = REQUEST.replace(prompt=prompt, negative_prompt=prompt)
    save_png(picture(request), tmp_path / "x.png")
    found = read_metadata(tmp_path / "x.png")
    assert Request.model_validate(json.loads(found["mezzotint"])["request"]) == request
    assert found["parameters"].startswith(prompt.replace("\0", "\ufffd"))


def test_only_the_record_is_written(tmp_path: Path) -> None:
    image = picture()
    image.info |= {"comment": "private", "icc_profile": b"profile", "exif": b"Exif\0\0", "dpi": (300, 300)}
    save_png(image, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as written:
        assert set(written.info) == {"mezzotint", "parameters"}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "bare.png")
    assert read_metadata(tmp_path / "bare.png") == {}


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"before")

    def interrupted(_: int) -> None:
        assert path.read_bytes() == b"before"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_png(picture(), path)
    assert os.listdir(tmp_path) == ["x.png"]
    assert path.read_bytes() == b"before"
    monkeypatch.undo()
    save_png(picture(), path)
    assert os.listdir(tmp_path) == ["x.png"]
    assert read_metadata(path)


def test_a_file_in_the_way_stays_when_told(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    save_png(picture(), path, overwrite=False)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        save_png(Image.new("RGB", (8, 8)), path, overwrite=False)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.png"]


def test_an_unwritable_path_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    places = ["file/x.png", "missing/x.png", ".", "x" * 300]
    for path in [*(str(tmp_path / place) for place in places), "", "a\0b"]:
        with pytest.raises(RequestError, match="cannot be written: "):
            save_png(picture(), path)
    assert os.listdir(tmp_path) == ["file"]


def test_reading_what_is_no_png_gets_a_sentence(tmp_path: Path) -> None:
    save_png(picture(), tmp_path / "whole.png")
    (tmp_path / "text.png").write_text("hello")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:40])
    for name in ["missing.png", "text.png", "x.jpg", "cut.png", "."]:
        with pytest.raises(RequestError, match="PNG file"):
            read_metadata(tmp_path / name)
