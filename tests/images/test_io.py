"""Pixels in and out, and a picture's record in its file."""

from __future__ import annotations

import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mezzotint.errors import MezzotintError, RequestError
from mezzotint.images.io import FORMATS, Picture, from_pil, read_metadata, read_picture, save, save_png, to_pil
from mezzotint.records.record import describe
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
    image.info.update(describe(request, seed, MODEL, [(request, 9), (request, 10)], seed - 9, image=image))
    return image


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.PNG"])
def test_a_pictures_own_save_keeps_the_record(tmp_path: Path, name: str) -> None:
    drawn = Picture.from_image(picture())
    drawn.save(tmp_path / name)
    save(picture(), tmp_path / f"ours-{name}")
    assert read_metadata(tmp_path / name) == read_metadata(tmp_path / f"ours-{name}")
    with (tmp_path / "open").open("wb") as file:
        drawn.save(file, "PNG", optimize=True)
    assert read_metadata(tmp_path / "open") == read_metadata(tmp_path / f"ours-{name}")


def test_a_picture_is_saved_as_pillow_would_but_for_its_record(tmp_path: Path) -> None:
    drawn = Picture.from_image(picture())
    assert drawn == Picture.from_image(picture()) and drawn.tobytes() == picture().tobytes()
    drawn.save(tmp_path / "x.bmp")
    drawn.save(tmp_path / "own.png", pnginfo=PngInfo())
    drawn.copy().save(tmp_path / "copy.png")
    assert read_metadata(tmp_path / "own.png") == read_metadata(tmp_path / "copy.png") == {}
    assert pickle.loads(pickle.dumps(drawn)) == drawn
    long = Picture.from_image(picture(REQUEST.replace(prompt="x" * MAX_PROMPT)))
    with pytest.raises(RequestError, match=r"record is .* bytes long and a JPEG file holds at most 65,000"):
        long.save(tmp_path / "long.jpg")
    with pytest.raises(ValueError, match="unknown file extension"):
        drawn.save(tmp_path / "x.unknown")


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
    with pytest.raises(MezzotintError, match="not finite"):
        to_pil(pixels)


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


@pytest.mark.parametrize("suffix", [*FORMATS, ".PNG"])
def test_every_format_carries_the_record(tmp_path: Path, suffix: str) -> None:
    image = picture(REQUEST.replace(prompt="柠檬 🍋, naïve"))
    image.info |= {"comment": b"private", "icc_profile": b"profile", "exif": b"Exif\0\0", "dpi": (300, 300)}
    image.putpixel((3, 2), (1, 2, 3))
    save(image, tmp_path / f"x{suffix}")
    assert read_metadata(tmp_path / f"x{suffix}") == {name: image.info[name] for name in ("mezzotint", "parameters")}
    with Image.open(tmp_path / f"x{suffix}") as written:
        assert written.format == FORMATS[suffix.lower()] and not {"comment", "icc_profile"} & {*written.info}
        assert written.info.get("dpi") != (300, 300)
    if FORMATS[suffix.lower()] != "JPEG":
        assert np.array_equal(np.array(read_picture(tmp_path / f"x{suffix}")), np.array(image)), "no level is lost"


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a1111_finds_its_text_where_it_writes_it(tmp_path: Path, suffix: str) -> None:
    """In EXIF's UserComment: eight bytes that name the character code, then UTF-16 (EXIF 2.3, 4.6.5)."""
    image = picture(REQUEST.replace(prompt="柠檬"))
    save(image, tmp_path / f"x{suffix}")
    with Image.open(tmp_path / f"x{suffix}") as written:
        comment = written.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0" and comment[8:].decode("utf-16-be") == image.info["parameters"]


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "a 柠檬".encode("utf-16-be"),
        b"UNICODE\0" + "a 柠檬".encode("utf-16-le"),
        b"UNICODE\0" + "a 柠檬".encode("utf-16"),
        b"\0" * 8 + "a 柠檬".encode(),
        "a 柠檬".encode() + b"\0\0",
    ],
)
def test_other_programs_user_comments(tmp_path: Path, comment: bytes) -> None:
    exif = Image.Exif()
    exif[0x8769] = {0x9286: comment}
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", exif=exif.tobytes())
    assert read_metadata(tmp_path / "x.jpg") == {"parameters": "a 柠檬"}


def test_a_record_too_long_for_a_jpeg_gets_a_sentence(tmp_path: Path) -> None:
    image = picture(REQUEST.replace(prompt="🍋" * 40_000))
    with pytest.raises(RequestError, match=r"65,000; save it as .png or .webp"):
        save(image, tmp_path / "x.jpg")
    assert not os.listdir(tmp_path)
    save(image, tmp_path / "x.webp")
    assert read_metadata(tmp_path / "x.webp")["mezzotint"] == image.info["mezzotint"]


def test_another_suffix_gets_a_sentence(tmp_path: Path) -> None:
    for name in ("x.gif", "x", "x.png.exe"):
        with pytest.raises(RequestError, match=r"must end in \.png, \.jpg, \.jpeg, \.webp"):
            save(picture(), tmp_path / name)


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


@pytest.mark.parametrize("read", [read_metadata, read_picture])
def test_reading_what_is_no_picture_gets_a_sentence(tmp_path: Path, read: Callable[[Path], object]) -> None:
    save_png(picture(), tmp_path / "whole.png")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "svg.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.gif")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:40])
    os.mkfifo(tmp_path / "fifo.png")
    for name in ["missing.png", "text.png", "svg.png", "x.gif", "cut.png", "fifo.png", ".", "a\0b"]:
        with pytest.raises(RequestError, match="a PNG, JPEG or WebP file"):
            read(tmp_path / name)


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_bomb_is_not_opened(tmp_path: Path, side: int) -> None:
    """A header that promises 100 million pixels or more."""
    chunks = [b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]), b"IDAT"]
    written = [(len(c) - 4).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in chunks]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))
    with pytest.raises(RequestError, match="too large a picture"):
        read_metadata(tmp_path / "bomb.png")


def test_text_of_64_megabytes_is_not_read(tmp_path: Path) -> None:
    """Compressed to 64 kilobytes, and as it is."""
    for zip in (True, False):
        info = PngInfo()
        for k in range(1 if not zip else 70):
            info.add_text(f"parameters{k}", "x" * (2**20 - 1 if zip else 65 * 2**20), zip=zip)
        Image.new("RGB", (8, 8)).save(tmp_path / "long.png", pnginfo=info)
        with pytest.raises(RequestError, match="cannot be read"):
            read_metadata(tmp_path / "long.png")
