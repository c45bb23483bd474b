"""Open the pictures of image-to-image and inpainting, and prepare them for a run. This module does not import torch.

A source is a path or the bytes of a file. EXIF orientation is applied, transparency is composited on white, 16-bit
pictures are reduced to 8 bits, and palettes and CMYK are converted to RGB. `prepare` turns the sources of a Request
into an `InitImage`: the canvas (enlarged by outpainting), the part of it that the run sees at its own size, and the
mask. `InitImage.finish` pastes the result back, so that outside the mask every pixel is the canvas's. An unusable
picture raises RequestError.
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
from mezzotint.files import read_bytes

Source = str | bytes  # a path, or the contents of a file
ResizeMode = Literal["resize", "crop", "fill"]
Box = tuple[int, int, int, int]  # left, top, right, bottom

HALF = 128  # of a mask: at this brightness and above, a pixel is inpainted
MAX_PIXELS = 80_000_000  # slightly below the limit at which Pillow warns of decompression bombs
MAX_BYTES = 256 * 2**20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no format that makes Pillow start another program
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
EXPECTED = f"it must be a picture ({', '.join(FORMATS)}) of at most {MAX_PIXELS // 10**6} million pixels"
ORIENTATION, SIDEWAYS = 0x0112, range(5, 9)  # the EXIF tag, and its values that swap the sides
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_bytes(image: Image.Image) -> bytes:
    """Encode a picture in memory as a lossless PNG file, so that later changes to it do not change a Request.

    Raises:
        RequestError: If Pillow cannot read the picture.
    """
    file = io.BytesIO()
    try:
        load(image)
        plain = _upright(image)
        if plain.mode not in PNG_MODES:
            plain = _to_eight_bits(plain)
        if plain.mode not in PNG_MODES:
            plain = plain.convert("RGBA" if plain.has_transparency_data else "RGB")
        plain.save(file, "PNG", compress_level=1)
    except Exception as error:  # the picture may be a broken file that is not decoded yet
        raise RequestError(f"the given picture cannot be read ({error}); {EXPECTED}") from None
    return file.getvalue()


def read(source: Source, name: str = "image") -> bytes:
    """Return the contents of a source.

    Raises:
        RequestError: If the file is missing, is not a regular file, or is larger than MAX_BYTES.
    """
    if isinstance(source, bytes):
        return source
    try:
        path = Path(source)
        if not path.is_file():
            what = "a folder" if path.is_dir() else "not a file" if path.exists() else "not there"
            raise RequestError(f"{name} is {source!r}, which is {what}; {EXPECTED}")
        if path.stat().st_size > MAX_BYTES:
            raise RequestError(f"{name} is {source!r}, larger than {MAX_BYTES // 2**20} MiB; {EXPECTED}")
        return read_bytes(path, MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: an impossible file name
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{name} is {source[:200]!r}, which cannot be read ({reason}); {EXPECTED}") from None


def digest(data: bytes) -> str:
    """Return the SHA-256 of a file's contents in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digests(sources: Mapping[str, Source]) -> dict[str, dict[str, str | None]]:
    """Return each picture's path (None if bytes were given) and SHA-256."""
    return {name: _source_digest(source, read(source, name)) for name, source in sources.items()}


def picture_size(source: Source, name: str = "image", data: bytes | None = None) -> tuple[int, int]:
    """Return (width, height) of the upright picture, from the file's header where possible.

    Args:
        source: A path or the contents of a file.
        name: The request's field, for error messages.
        data: The contents of the file, if already read.
    """
    data = read(source, name) if data is None else data
    image = _open(data, source, name)
    if image.format == "TIFF":  # Pillow rotates these itself, in some versions only when loading
        return _load(data, source, name).size
    return (image.height, image.width) if _orientation(image) in SIDEWAYS else image.size


def open_picture(source: Source, name: str = "image", data: bytes | None = None) -> Image.Image:
    """Open a picture as upright RGB, with transparency composited on white.

    Args:
        source: A path or the contents of a file.
        name: The request's field, for error messages.
        data: The contents of the file, if already read.

    Raises:
        RequestError: If the source is not a readable picture.
    """
    image = _load(read(source, name) if data is None else data, source, name)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def open_mask(source: Source, name: str = "mask", data: bytes | None = None) -> Image.Image:
    """Open a mask as upright greyscale ("L"): its alpha channel if it has transparent parts, else its luminance.

    Raises:
        RequestError: If the source is not a readable picture.
    """
    image = _load(read(source, name) if data is None else data, source, name)
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
    """Resize a picture to exactly `size`.

    Args:
        image: The picture or mask.
        size: (width, height) in pixels.
        mode: "resize" stretches; "crop" keeps the aspect ratio and crops the excess; "fill" keeps the aspect ratio,
            fits the whole picture inside and repeats its edge pixels.
        resample: Pillow's resampling filter; for a mask, one without overshoot.
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


def crop_region(mask: Image.Image, padding: int, size: tuple[int, int]) -> Box:
    """Return the box around the non-zero part of a mask, padded and with the aspect ratio of `size`.

    As in A1111 and diffusers, the box is widened to the aspect ratio, then shifted and finally clipped at the edges.

    Args:
        mask: Greyscale, non-zero where the run draws.
        padding: Pixels added on each side.
        size: (width, height) at which the run draws.
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


def fill_masked(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Fill the part of an RGB picture where the mask (L) is not black with the nearest colors outside it, blurred."""
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
class InitImage:
    """A picture prepared for image-to-image or inpainting.

    Attributes:
        image: RGB at the size of the run.
        mask: L at the same size, white where the run draws; None means everywhere. In differential diffusion its grey
            is how much a place may change.
        canvas: RGB picture that the result is pasted into.
        alpha: L at the canvas's size, the opacity of the result.
        box: The part of the canvas that the run sees; None means all of it.
        digests: The source's path (None if bytes were given) and SHA-256, by field of the request.
        notices: Sentences for the user.
    """

    image: Image.Image
    mask: Image.Image | None = None
    canvas: Image.Image | None = None
    alpha: Image.Image | None = None
    box: Box | None = None
    digests: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def finish(self, drawn: Image.Image) -> Image.Image:
        """Paste a result into the canvas, whose own pixels remain where the mask is black."""
        if self.canvas is None or self.alpha is None:
            return drawn
        if self.box is None:
            return Image.composite(drawn, self.canvas, self.alpha)
        left, top, right, bottom = self.box
        over = self.canvas.copy()
        over.paste(fit(drawn, (right - left, bottom - top), "crop"), (left, top))
        return Image.composite(over, self.canvas, self.alpha)


def prepare(
    sources: Mapping[str, Source],
    size: tuple[int, int],
    *,
    resize_mode: ResizeMode = "resize",
    mask_blur: float = 0.0,
    invert_mask: bool = False,
    differential: bool = False,
    masked_content: str = "original",
    only_masked: int | None = None,
    outpaint: Box | None = None,
) -> InitImage:
    """Prepare the `image`, and the `mask` if given, for a run. The options are fields of a Request.

    Args:
        sources: The request's "image" and optionally "mask".
        size: (width, height) at which the run draws.
        resize_mode: How `fit` brings the picture to `size`.
        mask_blur: Standard deviation in pixels of the blur of the mask's edge.
        invert_mask: Whether black, rather than white, marks what is inpainted.
        differential: Whether the mask is kept in its greys; only where it is black are the canvas's pixels kept.
        masked_content: "fill" replaces the masked part with nearby colors first; other values leave the pixels.
        only_masked: Padding in pixels around the masked crop_region if that is all the run sees.
        outpaint: Pixels added on the left, top, right and bottom.

    Raises:
        RequestError: If a source cannot be opened, or there is nothing to inpaint.
    """
    contents = {name: read(source, name) for name, source in sources.items()}
    digests = {name: _source_digest(source, contents[name]) for name, source in sources.items()}
    notices = []
    image = open_picture(sources["image"], data=contents["image"])
    mask = None
    if "mask" in sources:
        mask = open_mask(sources["mask"], data=contents["mask"])
        if mask.size != image.size:
            notices.append(
                f"the mask is {_format(mask.size)} and the image {_format(image.size)}; the mask was resized"
            )
            mask = fit(mask, image.size, resample=Image.Resampling.BILINEAR)
        mask = ImageOps.invert(mask) if invert_mask else mask
        if outpaint is None and mask.getbbox() is None:
            side, other = ("white", "black") if invert_mask else ("black", "white")
            raise RequestError(f"mask is {side} everywhere; it must have {other} areas, which are inpainted")
        brightest = int(np.asarray(mask).max())
        if outpaint is None and brightest < HALF and not differential:
            inverted = " once inverted" if invert_mask else ""
            raise RequestError(
                f"mask is too dark: its brightest value{inverted} is {brightest}, and only values from {HALF} to 255 "
                f"are inpainted; paint the area {'black' if invert_mask else 'white'}"
            )
    if mask is None and outpaint is None:
        return InitImage(fit(image, size, resize_mode), digests=digests)

    if outpaint is not None:
        left, top, right, bottom = outpaint
        inner = size[0] - left - right, size[1] - top - bottom
        if min(inner) < 8:
            raise RequestError(
                f"outpaint is {outpaint}, which leaves {_format(inner)} of {_format(size)} for the picture; "
                "each side must keep at least 8 pixels (width and height include the added borders)"
            )
        kept = Image.new("L", image.size) if mask is None else mask
        within = fit(kept, inner, resize_mode, Image.Resampling.BILINEAR)
        image, inside = Image.new("RGB", size), fit(image, inner, resize_mode)
        mask = Image.new("L", size, 255)
        image.paste(inside, (left, top))
        mask.paste(within, (left, top))
        outside = Image.new("L", size, 255)
        outside.paste(0, (left, top, left + inner[0], top + inner[1]))
        image = fill_masked(image, outside)
    assert mask is not None
    alpha = mask.filter(ImageFilter.GaussianBlur(mask_blur)) if mask_blur else mask
    if outpaint is not None:
        alpha = Image.composite(outside, alpha, outside)  # the added borders are always drawn
    if differential:
        mask = alpha
        alpha = alpha.point([0] + [255] * 255)
    content = fill_masked(image, alpha) if masked_content == "fill" else image
    if only_masked is None:
        canvas, marked, content = (fit(part, size, resize_mode) for part in (image, alpha, content))
        if differential:
            marked = fit(mask, size, resize_mode, Image.Resampling.BILINEAR)
        alpha = fit(alpha, size, resize_mode, Image.Resampling.BILINEAR)
        return InitImage(content, marked, canvas, alpha, None, digests, tuple(notices))
    box = crop_region(alpha, only_masked, size)
    shown, marked = (fit(part.crop(box), size, "fill") for part in (content, alpha))
    if differential:
        marked = fit(mask.crop(box), size, "fill", Image.Resampling.BILINEAR)
    return InitImage(shown, marked, image, alpha, box, digests, tuple(notices))


def _source_digest(source: Source, data: bytes) -> dict[str, str | None]:
    return {"path": source if isinstance(source, str) else None, "sha256": digest(data)}


def _format(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _describe(source: Source) -> str:
    return repr(source) if isinstance(source, str) else f"{len(source):,} bytes"


def _open(data: bytes, source: Source, name: str) -> Image.Image:
    """Open a picture without decoding its pixels."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        head = data[:1024].lstrip().lower()
        if head.startswith((b"<svg", b"<?xml", b"<!doctype svg")) and b"<svg" in data[:65536].lower():
            raise RequestError(f"{name} is {_describe(source)}, which is an SVG file; {EXPECTED}") from None
        raise RequestError(f"{name} is {_describe(source)}, which is not a picture; {EXPECTED}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(f"{name} is {_describe(source)}, which has too many pixels; {EXPECTED}") from None
    except Exception as error:  # decoders raise errors of many types on broken files
        raise RequestError(f"{name} is {_describe(source)}, which cannot be read ({error}); {EXPECTED}") from None
    if image.width * image.height > MAX_PIXELS:
        raise RequestError(f"{name} is {_describe(source)} of {_format(image.size)} pixels, too many; {EXPECTED}")
    return image


def _load(data: bytes, source: Source, name: str) -> Image.Image:
    """Decode a picture, upright and with at most 8 bits per channel."""
    image = _open(data, source, name)
    try:
        load(image)
    except Exception as error:  # see _open
        raise RequestError(
            f"{name} is {_describe(source)}, which is truncated or damaged ({error}); {EXPECTED}"
        ) from None
    return _to_eight_bits(_upright(image))


def load(image: Image.Image) -> None:
    """Decode a picture's pixels.

    Raises:
        ValueError: If its palette is missing, which Pillow does not notice.
    """
    image.load()
    if image.mode in ("P", "PA") and image.palette is None:
        raise ValueError("its palette is missing")


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # unreadable EXIF data is ignored
        return None


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation."""
    turn = TRANSPOSES.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey (I;16, and I of older files) and float pictures to L; Pillow would clip them at 255."""
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        top = 65535 if image.mode.startswith("I;16") or levels.max(initial=0) > 255 else 255
        return Image.fromarray((levels.clip(0, top) * 255 / top).round().astype(np.uint8))
    if image.mode == "F":
        levels = np.nan_to_num(np.asarray(image))
        white = 1.0 if levels.max(initial=0.0) <= 1.0 else 255.0
        return Image.fromarray((levels.clip(0.0, white) * (255.0 / white)).round().astype(np.uint8))
    return image


def to_source(data: Any) -> Any:
    """Convert a given picture to what a Request stores: a path or bytes."""
    if isinstance(data, Image.Image):
        return to_bytes(data)
    if isinstance(data, bytearray | memoryview):
        return bytes(data)
    return os.fspath(data) if isinstance(data, os.PathLike) else data
