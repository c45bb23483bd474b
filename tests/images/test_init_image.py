"""Pictures of any kind are opened as a person sees them; what is no picture gets a sentence."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mezzotint.errors import RequestError
from mezzotint.images import init_image
from mezzotint.images.init_image import crop_region, fit, open_mask, open_picture, prepare

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners() -> Image.Image:
    """6x4: red and green above, blue and white below."""
    image = Image.new("RGB", (6, 4), RED)
    image.paste(GREEN, (3, 0, 6, 2))
    image.paste(BLUE, (0, 2, 3, 4))
    image.paste(WHITE, (3, 2, 6, 4))
    return image


def file(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, form, **options)
    return held.getvalue()


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and np.array_equal(np.asarray(a), np.asarray(b))


# ---- as a person sees it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG"])
def test_every_orientation_is_upright(orientation: int, form: str) -> None:
    """The file holds what the camera saw; the tag says how to hold it (EXIF 2.3, table of tag 0x0112)."""
    held = {
        1: lambda levels: levels,
        2: lambda levels: levels[:, ::-1],
        3: lambda levels: levels[::-1, ::-1],
        4: lambda levels: levels[::-1],
        5: lambda levels: levels.transpose(1, 0, 2),
        6: lambda levels: levels.transpose(1, 0, 2)[::-1],
        7: lambda levels: levels[::-1, ::-1].transpose(1, 0, 2),
        8: lambda levels: levels.transpose(1, 0, 2)[:, ::-1],
    }
    # 6: the row that is stored first is the right side, the column that is stored first the top
    upright = corners().resize((48, 32), Image.Resampling.NEAREST)
    stored = Image.fromarray(np.ascontiguousarray(held[orientation](np.asarray(upright))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file(stored, form, exif=exif, **({"quality": 100, "subsampling": 0} if form == "JPEG" else {}))
    opened = open_picture(data)
    assert opened.size == upright.size == init_image.picture_size(data)
    assert np.abs(np.asarray(opened, int) - np.asarray(upright, int)).max() <= (4 if form == "JPEG" else 0)
    assert open_mask(data).size == upright.size
    image = Image.open(io.BytesIO(data))
    assert open_picture(init_image.to_bytes(image)).size == upright.size, "a PIL image that carries the tag"


def test_broken_exif_orders_nothing() -> None:
    data = file(corners(), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert same(open_picture(data), corners())


def test_transparency_lies_on_white() -> None:
    image = corners().convert("RGBA")
    image.putalpha(Image.fromarray(np.array([[255, 255, 255, 0, 0, 51]] * 4, np.uint8)))
    shown = np.asarray(open_picture(file(image)))
    assert shown[0].tolist() == [list(RED)] * 3 + [list(WHITE)] * 2 + [[204, 255, 204]]
    assert open_mask(file(image)).getpixel((5, 0)) == 51, "as a mask: how opaque it is"
    assert same(open_picture(file(corners().convert("RGBA"))), corners())
    assert open_mask(file(corners().convert("RGBA"))).getpixel((0, 0)) == 76, "nowhere transparent: how light"


def test_a_transparent_palette_and_a_transparent_colour() -> None:
    gif = corners().quantize(4)
    index = gif.getpixel((0, 0))
    shown = open_picture(file(gif, "GIF", transparency=index))
    assert shown.getpixel((0, 0)) == WHITE and shown.getpixel((5, 0)) == GREEN
    assert same(open_picture(file(corners().quantize(4))), corners())
    keyed = open_picture(file(corners(), transparency=GREEN))
    assert keyed.getpixel((5, 0)) == WHITE and keyed.getpixel((0, 3)) == BLUE


@pytest.mark.parametrize("source", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_cut_off(source: str) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    data = file(Image.fromarray(ramp), source)
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(np.asarray(open_mask(data)), expected)
    assert np.array_equal(np.asarray(open_picture(data))[..., 1], expected)
    image = Image.fromarray(ramp)
    assert np.array_equal(np.asarray(open_mask(init_image.to_bytes(image))), expected)


def test_numbers_of_other_kinds() -> None:
    ramp = np.arange(256, dtype=np.float32).reshape(16, 16)
    for image in (Image.fromarray(ramp), Image.fromarray(ramp / 255), Image.fromarray(ramp.astype(np.int32) * 257)):
        assert np.array_equal(np.asarray(open_mask(file(image, "TIFF"))), ramp.astype(np.uint8)), image.mode
        assert np.array_equal(np.asarray(open_mask(init_image.to_bytes(image))), ramp.astype(np.uint8)), image.mode


def test_grey_black_and_white_and_cmyk() -> None:
    grey = corners().convert("L")
    assert same(open_picture(file(grey)), grey.convert("RGB"))
    bits = grey.convert("1", dither=Image.Dither.NONE)
    assert same(open_mask(file(bits)), bits.convert("L"))
    cmyk = corners().resize((48, 32), Image.Resampling.NEAREST).convert("CMYK")
    shown = open_picture(file(cmyk, "JPEG", quality=100, subsampling=0))
    assert np.abs(np.asarray(shown, int) - np.asarray(cmyk.convert("RGB"), int)).max() <= 4
    assert same(open_picture(init_image.to_bytes(cmyk)), cmyk.convert("RGB"))


def test_the_first_frame_of_a_film() -> None:
    film = file(corners(), "GIF", save_all=True, append_images=[Image.new("RGB", (6, 4))])
    assert open_picture(film).getpixel((0, 0)) == RED


def test_paths_bytes_and_pictures_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a lemon.png"
    corners().save(path)
    from mezzotint import Request

    given = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), Image.open(path), corners()]
    shown = [open_picture(Request(prompt="", image=image).sources["image"]) for image in given]
    assert all(same(image, corners()) for image in shown)
    assert init_image.digests({"image": str(path)}) == {
        "image": {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    }
    assert init_image.digests({"image": path.read_bytes()})["image"]["path"] is None


def test_a_request_keeps_the_picture_it_was_given() -> None:
    from mezzotint import Request

    image = corners()
    request = Request(prompt="", image=image)
    image.paste("black", (0, 0, 6, 4))
    assert same(open_picture(request.sources["image"]), corners())
    assert Request.model_validate_json(request.model_dump_json()) == request


# ---- what is no picture ----------------------------------------------------------------------------------------------


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it has side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A small PNG whose text inflates to 64 MiB."""
    text = b"parameters\0\0" + zlib.compress(b"a" * 2**26)
    data = file(corners())
    return data[:33] + chunk(b"zTXt", text) + data[33:]


BROKEN = {
    "an SVG renamed": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>', "an SVG"),
    "a text": (b"a lemon", "not a picture"),
    "nothing": (b"\0", "not a picture"),
    "a cut off PNG": (file(Image.effect_noise((64, 64), 50))[:2000], "truncated or damaged"),
    "a cut off JPEG": (file(Image.effect_noise((64, 64), 50), "JPEG")[:600], "truncated or damaged"),
    "a header alone": (file(corners())[:30], "(cannot be read|not a picture|cut off)"),
    "a bomb": (bomb(60_000), "too many"),
    "a smaller bomb": (bomb(9_400), "too many"),
    "a bomb just below Pillow's own limit": (bomb(9_000), "too many"),
    "a bomb of text": (text_bomb(), "(truncated or damaged|cannot be read)"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not a picture"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_gets_a_sentence(name: str, tmp_path: Path) -> None:
    data, reason = BROKEN[name]
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    for source in (data, str(path)):
        with pytest.raises(RequestError, match=rf"(?s)^image is .*{reason}.*; it must be a picture \(PNG, ") as caught:
            open_picture(source)
        assert len(str(caught.value)) < 600
    with pytest.raises(RequestError, match=r"^mask is "):
        open_mask(data)


def test_what_is_not_there(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        ("no.png", "not there"),
        ("", "a folder"),
        ("pipe", "not a file"),
        ("a\0b", "(not there|cannot be read)"),
        ("x" * 5000, "(not there|cannot be read)"),
    ):
        with pytest.raises(RequestError, match=rf"^image is '.*{reason}"):
            open_picture(os.fspath(tmp_path / path) if path != "" else str(tmp_path))


def test_a_broken_picture_in_memory_is_no_traceback() -> None:
    from mezzotint import Request

    with pytest.raises(RequestError, match="cannot be read"):
        Request(prompt="", image=Image.open(io.BytesIO(BROKEN["a cut off PNG"][0])))


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init_image, "MAX_BYTES", 2**20)
    (tmp_path / "large.png").write_bytes(bytes(2**20 + 1))
    with pytest.raises(RequestError, match="larger than 1 MiB"):
        open_picture(str(tmp_path / "large.png"))


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_fit() -> None:
    wide = Image.fromarray(np.tile(np.arange(0, 240, 2, dtype=np.uint8), (40, 1)))  # 120x40
    assert fit(wide, (120, 40)) is wide
    assert fit(wide, (64, 64)).size == (64, 64)
    cropped = np.asarray(fit(wide, (40, 40), "crop"))
    assert np.array_equal(cropped, np.asarray(wide)[:, 40:80]), "the middle"
    filled = np.asarray(fit(wide, (120, 80), "fill"))
    assert np.array_equal(filled[20:60], np.asarray(wide))
    assert (filled[:20] == filled[20]).all() and (filled[60:] == filled[59]).all(), "edges continued"
    tall = np.asarray(fit(Image.fromarray(np.asarray(wide).T.copy()), (80, 120), "fill"))
    assert np.array_equal(tall, filled.T)


def test_region_by_hand() -> None:
    mask = Image.new("L", (100, 100))
    mask.paste(255, (40, 45, 60, 55))
    assert crop_region(mask, 0, (64, 64)) == (40, 40, 60, 60), "widened to the shape"
    assert crop_region(mask, 10, (64, 64)) == (30, 30, 70, 70)
    assert crop_region(mask, 0, (128, 64)) == (40, 45, 60, 55)
    mask = Image.new("L", (100, 100))
    mask.paste(255, (0, 0, 20, 10))
    assert crop_region(mask, 0, (64, 64)) == (0, 0, 20, 20), "moved at the edge"
    mask.paste(255, (0, 40, 100, 50))
    assert crop_region(mask, 200, (64, 128)) == (0, 0, 100, 100), "cut where there is no more"


# ---- masks -----------------------------------------------------------------------------------------------------------


def picture() -> bytes:
    generator = np.random.default_rng(0)
    return file(Image.fromarray(generator.integers(0, 256, (64, 48, 3), dtype=np.uint8)))


def half(size: tuple[int, int] = (48, 64)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 2, 0, *size))
    return mask


DRAWN = Image.new("RGB", (48, 64), (1, 2, 3))


@pytest.mark.parametrize("options", [{}, {"mask_blur": 3.0}, {"masked_content": "fill", "mask_blur": 1.5}])
def test_outside_the_mask_the_pixels_are_the_originals(options: dict[str, Any]) -> None:
    init = prepare({"image": picture(), "mask": file(half())}, (48, 64), **options)
    out, original = np.asarray(init.finish(DRAWN)), np.asarray(open_picture(picture()))
    assert init.alpha is not None
    alpha = np.asarray(init.alpha)
    assert (alpha == 0).any() and (alpha == 255).any() and (((alpha > 0) & (alpha < 255)).any() == bool(options))
    assert np.array_equal(out[alpha == 0], original[alpha == 0])
    assert (out[alpha == 255] == (1, 2, 3)).all()
    share = alpha[..., None] / 255
    assert np.abs(out - (original * (1 - share) + np.array([1, 2, 3]) * share)).max() <= 1
    assert same(init.image, open_picture(picture())) == (options.get("masked_content") != "fill")


def test_a_mask_inverted_and_of_another_size() -> None:
    init = prepare({"image": picture(), "mask": file(half((24, 32)))}, (48, 64), invert_mask=True)
    out = np.asarray(init.finish(DRAWN))
    assert (out[:, :22] == (1, 2, 3)).all()
    assert np.array_equal(out[:, 28:], np.asarray(open_picture(picture()))[:, 28:])
    assert init.notices == ("the mask is 24x32 and the image 48x64; the mask was resized",)
    assert prepare({"image": picture(), "mask": file(half())}, (48, 64)).notices == ()


@pytest.mark.parametrize("invert", [False, True])
def test_a_mask_that_marks_nothing(invert: bool) -> None:
    empty = Image.new("L", (48, 64), 255 if invert else 0)
    with pytest.raises(RequestError, match=f"mask is {'white' if invert else 'black'} everywhere"):
        prepare({"image": picture(), "mask": file(empty)}, (48, 64), invert_mask=invert)


def test_only_masked_draws_the_region_and_touches_nothing_else() -> None:
    mask = Image.new("L", (48, 64))
    mask.paste(255, (20, 30, 28, 38))
    init = prepare({"image": picture(), "mask": file(mask)}, (64, 64), only_masked=4)
    assert init.box == (16, 26, 32, 42)
    original = open_picture(picture())
    assert same(init.image, original.crop(init.box).resize((64, 64), Image.Resampling.LANCZOS))
    out = np.asarray(init.finish(Image.new("RGB", (64, 64), (1, 2, 3))))
    changed = (out != np.asarray(original)).any(-1)
    assert out.shape == (64, 48, 3) and (out[30:38, 20:28] == (1, 2, 3)).all()
    assert not changed[np.asarray(mask) == 0].any()


def test_outpainting_keeps_the_picture_and_draws_around_it() -> None:
    init = prepare({"image": picture()}, (48 + 16, 64 + 24), outpaint=(16, 0, 0, 24))
    assert init.mask is not None and init.mask.size == (64, 88)
    inside = np.zeros((88, 64), bool)
    inside[:64, 16:] = True
    assert np.array_equal(np.asarray(init.mask) == 0, inside)
    out = np.asarray(init.finish(Image.new("RGB", (64, 88), (1, 2, 3))))
    assert np.array_equal(out[:64, 16:], np.asarray(open_picture(picture())))
    assert (out[~inside] == (1, 2, 3)).all()
    softer = prepare({"image": picture()}, (64, 88), outpaint=(16, 0, 0, 24), mask_blur=2.0)
    assert softer.alpha is not None and (np.asarray(softer.alpha)[~inside] == 255).all()
    assert 0 < softer.alpha.getpixel((17, 3)) < 255 and softer.alpha.getpixel((40, 3)) == 0
    with pytest.raises(RequestError, match=r"outpaint is .*leaves"):
        prepare({"image": picture()}, (48, 64), outpaint=(24, 0, 24, 0))
    assert prepare({"image": picture()}, (48, 64), outpaint=(24, 0, 16, 0)).mask is not None  # 8 pixels are kept
    with pytest.raises(RequestError, match=r"leaves 7x64 of 48x64"):
        prepare({"image": picture()}, (48, 64), outpaint=(24, 0, 17, 0))


def test_outpainting_and_a_mask() -> None:
    init = prepare({"image": picture(), "mask": file(half())}, (64, 64), outpaint=(16, 0, 0, 0))
    assert init.mask is not None
    row = np.asarray(init.mask)[10]
    assert (row[:16] == 255).all() and (row[16:40] == 0).all() and (row[40:] == 255).all()


def test_fill_takes_the_colours_around() -> None:
    """Left of it red, right of it blue: filled, it is red, then blue, and nothing of what was there."""
    image = Image.new("RGB", (64, 32), RED)
    image.paste(BLUE, (32, 0, 64, 32))
    mask = Image.new("L", image.size)
    mask.paste(255, (16, 8, 48, 24))
    image.paste(GREEN, (16, 8, 48, 24))
    levels = np.asarray(init_image.fill_masked(image, mask)).astype(int)
    assert levels[..., 1].max() == 0
    assert levels[15, 17, 0] > 200 and levels[15, 46, 2] > 200
    assert init_image.fill_masked(image, Image.new("L", image.size, 255)).getpixel((3, 3)) == (128, 128, 128)
