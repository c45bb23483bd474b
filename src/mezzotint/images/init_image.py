"""Pictures that a run starts from, opened as a person expects them, and laid out for the run. No torch here.

A source is a path or the bytes of a file. EXIF orientation is obeyed, transparency lies on white, 16 bits become 8,
palettes and CMYK become RGB. `place` makes of the sources of a Request what is drawn on: a canvas (enlarged by
outpainting), the part of it that the run sees at its own size, and the mask; `Placed.finish` puts what was drawn back,
so that outside the mask every pixel is the canvas's. Whatever is wrong with a picture is a RequestError.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from mezzotint.errors import RequestError

Source = str | bytes  # a path, or what the file holds
ResizeMode = Literal["resize", "crop", "fill"]
Box = tuple[int, int, int, int]  # left, top, right, bottom

MAX_PIXELS = 80_000_000  # a little below where Pillow itself begins to warn of decompression bombs
MAX_BYTES = 256 * 2**20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # none that starts another program
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
RIGHT = f"it must be a picture ({', '.join(FORMATS)}) of at most {MAX_PIXELS // 10**6} million pixels"
ORIENTATION, SIDEWAYS = 0x0112, range(5, 9)  # the EXIF tag, and its values that swap the sides
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_bytes(image: Image.Image) -> bytes:
    """A picture in memory as a PNG file, every pixel kept; so a Request that holds it does not change with it."""
    file = io.BytesIO()
    try:
        image.load()
        plain = _oriented(image)
        if plain.mode not in PNG_MODES:
            plain = _eight_bits(plain)
        if plain.mode not in PNG_MODES:
            plain = plain.convert("RGBA" if plain.has_transparency_data else "RGB")
        plain.save(file, "PNG", compress_level=1)
    except Exception as error:  # it may be a broken file, not yet read
        raise RequestError(f"the picture given cannot be read ({error}); {RIGHT}") from None
    return file.getvalue()


def read(source: Source, name: str = "image") -> bytes:
    """What the file holds. Raises RequestError where it is missing, is no plain file, or is larger than MAX_BYTES."""
    if isinstance(source, bytes):
        return source
    try:
        path = Path(source)
        if not path.is_file():
            what = "a folder" if path.is_dir() else "not a file" if path.exists() else "not there"
            raise RequestError(f"{name} is {source!r}, which is {what}; {RIGHT}")
        if path.stat().st_size > MAX_BYTES:
            raise RequestError(f"{name} is {source!r}, larger than {MAX_BYTES // 2**20} MiB; {RIGHT}")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{name} is {source[:200]!r}, which cannot be read ({reason}); {RIGHT}") from None


def digest(data: bytes) -> str:
    """SHA-256 of a file, as sha256sum prints it."""
    return hashlib.sha256(data).hexdigest()


def digests(sources: Mapping[str, Source]) -> dict[str, dict[str, str | None]]:
    """Of each picture its path (None where bytes were given) and SHA-256."""
    return {name: _digested(source, read(source, name)) for name, source in sources.items()}


def size_of(source: Source, name: str = "image", data: bytes | None = None) -> tuple[int, int]:
    """(width, height) as a person sees it, from the file's header. data: what the file holds, if it was read."""
    data = read(source, name) if data is None else data
    image = _opened(data, source, name)
    if image.format == "TIFF":  # Pillow turns these itself, some of its versions only while it loads them
        return _loaded(data, source, name).size
    return (image.height, image.width) if _orientation(image) in SIDEWAYS else image.size


def open_picture(source: Source, name: str = "image", data: bytes | None = None) -> Image.Image:
    """RGB, upright; transparency on white. data: what the file holds, if it was read already."""
    image = _loaded(read(source, name) if data is None else data, source, name)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def open_mask(source: Source, name: str = "mask", data: bytes | None = None) -> Image.Image:
    """Greyscale ("L"), upright: how light it is; or, where parts are transparent, how opaque it is."""
    image = _loaded(read(source, name) if data is None else data, source, name)
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            return alpha
        image = image.convert("RGBA").convert("RGB")
    return image.convert("L")


def fit(
    image: Image.Image,
    size: tuple[int, int],
    mode: ResizeMode = "resize",
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """The picture at `size` (width, height), by Lanczos or, where nothing may swing over the edge, another way.

    "resize" stretches it; "crop" keeps its shape, fills the size and cuts off what is over; "fill" keeps its shape,
    lies within and has its edge pixels continued.
    """
    width, height = size
    if mode == "resize" or image.width * height == image.height * width:
        return image if image.size == size else image.resize(size, resample)
    wider = image.width * height > image.height * width
    if (mode == "crop") == wider:
        inner = image.width * height // image.height, height
    else:
        inner = width, image.height * width // image.width
    left, top = width // 2 - inner[0] // 2, height // 2 - inner[1] // 2
    resized = image.resize(inner, resample)
    if mode == "crop":
        return resized.crop((-left, -top, width - left, height - top))
    levels = np.asarray(resized)
    around = [(top, height - inner[1] - top), (left, width - inner[0] - left)]
    return Image.fromarray(np.pad(levels, around + [(0, 0)] * (levels.ndim - 2), mode="edge"))


def region(mask: Image.Image, padding: int, size: tuple[int, int]) -> Box:
    """The part of the picture around what the mask has marked, `padding` pixels wider, in the shape of `size`.

    Widened to that shape where there is room, as A1111 and diffusers do; moved, and at last cut, at the edges.
    """
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    spans = [
        [max(left - padding, 0), min(right + padding, mask.width)],
        [max(top - padding, 0), min(bottom + padding, mask.height)],
    ]
    wide, high = (end - begin for begin, end in spans)
    ratio = size[0] / size[1]
    axis = 1 if wide / high > ratio else 0  # the side that is too short
    extra = int(wide / ratio - high) if axis else int(high * ratio - wide)
    limit = mask.size[axis]
    begin, end = spans[axis][0] - extra // 2, spans[axis][1] + extra - extra // 2
    over = max(end - limit, 0)
    begin, end = begin - over, end - over
    spans[axis] = [max(begin, 0), min(end - min(begin, 0), limit)]
    return spans[0][0], spans[1][0], spans[0][1], spans[1][1]


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture, where the mask is not black painted with the nearest colours outside of it, blurred. (RGB, L)"""
    from scipy.ndimage import distance_transform_edt, gaussian_filter  # type: ignore[import-untyped]

    hidden = np.asarray(mask) > 0
    levels = np.asarray(image)
    if hidden.all():
        return Image.new("RGB", image.size, (128, 128, 128))
    distance, nearest = distance_transform_edt(hidden, return_indices=True)
    spread = levels[nearest[0], nearest[1]].astype(np.float32)  # (H, W, 3)
    blurred = gaussian_filter(spread, (distance.max() / 8, distance.max() / 8, 0))
    return Image.fromarray(np.where(hidden[..., None], blurred.round(), levels).astype(np.uint8))


@dataclass(frozen=True, eq=False)
class Placed:
    """A picture ready to be drawn on.

    image: RGB, what the run sees, at its size. mask: L at the same size, white where it draws; None where it draws
    everywhere. canvas: RGB, what the result is put into, and `alpha`, L of its size, how much of the result shows
    there; box: the part of the canvas that the run sees, the whole when None. digests: by field, the source's path
    (None where bytes were given) and SHA-256. notices: what a person should know.
    """

    image: Image.Image
    mask: Image.Image | None = None
    canvas: Image.Image | None = None
    alpha: Image.Image | None = None
    box: Box | None = None
    digests: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def finish(self, drawn: Image.Image) -> Image.Image:
        """What was drawn, put into the canvas: where the mask is black, the canvas's own pixels."""
        if self.canvas is None or self.alpha is None:
            return drawn
        if self.box is None:
            return Image.composite(drawn, self.canvas, self.alpha)
        left, top, right, bottom = self.box
        over = self.canvas.copy()
        over.paste(fit(drawn, (right - left, bottom - top), "crop"), (left, top))
        return Image.composite(over, self.canvas, self.alpha)


def place(
    sources: Mapping[str, Source],
    size: tuple[int, int],
    *,
    resize_mode: ResizeMode = "resize",
    mask_blur: float = 0.0,
    invert_mask: bool = False,
    masked_content: str = "original",
    only_masked: int | None = None,
    outpaint: Box | None = None,
) -> Placed:
    """The `image` and perhaps the `mask` of `sources`, laid out for a run that draws `size` (width, height).

    The options are the fields of a Request. Raises RequestError where a source cannot be opened, and where the mask
    leaves nothing to draw.
    """
    held = {name: read(source, name) for name, source in sources.items()}
    digests = {name: _digested(source, held[name]) for name, source in sources.items()}
    notices = []
    image = open_picture(sources["image"], data=held["image"])
    mask = None
    if "mask" in sources:
        mask = open_mask(sources["mask"], data=held["mask"])
        if mask.size != image.size:
            notices.append(f"the mask is {_by(mask.size)} and the image {_by(image.size)}; the mask was resized")
            mask = fit(mask, image.size, resample=Image.Resampling.BILINEAR)
        mask = ImageOps.invert(mask) if invert_mask else mask
        if outpaint is None and mask.getbbox() is None:
            side, other = ("white", "black") if invert_mask else ("black", "white")
            raise RequestError(f"mask is {side} everywhere; it must have {other} areas, which are inpainted")
    if mask is None and outpaint is None:
        return Placed(fit(image, size, resize_mode), digests=digests)

    if outpaint is not None:
        left, top, right, bottom = outpaint
        inner = size[0] - left - right, size[1] - top - bottom
        if min(inner) < 8:
            raise RequestError(
                f"outpaint is {outpaint}, which leaves {_by(inner)} of {_by(size)} to the picture; it must leave some, "
                "width and height are those of the whole"
            )
        kept = Image.new("L", image.size) if mask is None else mask
        within = fit(kept, inner, resize_mode, Image.Resampling.BILINEAR)
        image, inside = Image.new("RGB", size), fit(image, inner, resize_mode)
        mask = Image.new("L", size, 255)
        image.paste(inside, (left, top))
        mask.paste(within, (left, top))
        outside = Image.new("L", size, 255)
        outside.paste(0, (left, top, left + inner[0], top + inner[1]))
        image = filled(image, outside)
    assert mask is not None
    alpha = mask.filter(ImageFilter.GaussianBlur(mask_blur)) if mask_blur else mask
    if outpaint is not None:
        alpha = Image.composite(outside, alpha, outside)  # nothing of the canvas out there is anyone's
    content = filled(image, alpha) if masked_content == "fill" else image
    if only_masked is None:
        canvas, marked, content = (fit(part, size, resize_mode) for part in (image, alpha, content))
        alpha = fit(alpha, size, resize_mode, Image.Resampling.BILINEAR)
        return Placed(content, marked, canvas, alpha, None, digests, tuple(notices))
    box = region(alpha, only_masked, size)
    seen, marked = (fit(part.crop(box), size, "fill") for part in (content, alpha))
    return Placed(seen, marked, image, alpha, box, digests, tuple(notices))


def _digested(source: Source, data: bytes) -> dict[str, str | None]:
    return {"path": source if isinstance(source, str) else None, "sha256": digest(data)}


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _said(source: Source) -> str:
    return repr(source) if isinstance(source, str) else f"{len(source):,} bytes"


def _opened(data: bytes, source: Source, name: str) -> Image.Image:
    """The picture, its pixels not yet decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        head = data[:1024].lstrip().lower()
        if head.startswith((b"<svg", b"<?xml", b"<!doctype svg")) and b"<svg" in data[:65536].lower():
            raise RequestError(f"{name} is {_said(source)}, an SVG, which is drawn from text; {RIGHT}") from None
        raise RequestError(f"{name} is {_said(source)}, which is not a picture; {RIGHT}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(f"{name} is {_said(source)}, which has too many pixels; {RIGHT}") from None
    except Exception as error:  # what a broken file makes a decoder raise has no end
        raise RequestError(f"{name} is {_said(source)}, which cannot be read ({error}); {RIGHT}") from None
    if image.width * image.height > MAX_PIXELS:
        raise RequestError(f"{name} is {_said(source)} of {_by(image.size)} pixels, too many; {RIGHT}")
    return image


def _loaded(data: bytes, source: Source, name: str) -> Image.Image:
    """The picture upright, of at most 8 bits a channel."""
    image = _opened(data, source, name)
    try:
        image.load()
    except Exception as error:  # as above
        raise RequestError(f"{name} is {_said(source)}, which is cut off or broken ({error}); {RIGHT}") from None
    return _eight_bits(_oriented(image))


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # EXIF data that cannot be read orders nothing
        return None


def _oriented(image: Image.Image) -> Image.Image:
    """Upright, whatever EXIF says beside."""
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey (I;16, and I of older files) and floats to L; Pillow would cut them off at 255."""
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        top = 65535 if image.mode.startswith("I;16") or levels.max(initial=0) > 255 else 255
        return Image.fromarray((levels.clip(0, top) * 255 / top).round().astype(np.uint8))
    if image.mode == "F":
        levels = np.nan_to_num(np.asarray(image))
        white = 1.0 if levels.max(initial=0.0) <= 1.0 else 255.0
        return Image.fromarray((levels.clip(0.0, white) * (255.0 / white)).round().astype(np.uint8))
    return image


def for_request(data: Any) -> Any:
    """What a Request keeps of what it is given as a picture: a path or bytes."""
    if isinstance(data, Image.Image):
        return to_bytes(data)
    if isinstance(data, bytearray | memoryview):
        return bytes(data)
    return os.fspath(data) if isinstance(data, os.PathLike) else data
