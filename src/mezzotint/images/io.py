"""Convert between tensors and pictures, and write and read picture files with their records.

Tensors are (B, 3, H, W) in [-1, 1], as the VAE takes and returns them. A picture carries its record
(records/record.py) in `image.info` as two texts, which `save` and `Picture.save` write into the file:

                  `mezzotint`, JSON                    `parameters`, A1111's text
    PNG           text chunk                           text chunk
    JPEG, WebP    EXIF MakerNote (0x927C), UTF-8       EXIF UserComment (0x9286), "UNICODE" and UTF-16, as A1111 does

WebP is written lossless. JPEG is not (quality 95, no chroma subsampling), and its EXIF holds at most 64 KiB.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import IFD, Base
from PIL.PngImagePlugin import PngInfo

from mezzotint.errors import MezzotintError, RequestError, WriteError
from mezzotint.files import DISK_ERRORS, write_atomically
from mezzotint.images.init_image import load

CHUNKS = ("mezzotint", "parameters")
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SETTINGS: dict[str, dict[str, Any]] = {
    "PNG": {"icc_profile": None, "compress_level": 4},  # zlib's default of 6 takes twice the time for 5 % less
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
}
UNICODE = b"UNICODE\0"  # prefix of a UserComment in UTF-16
MAX_EXIF = 65_000  # bytes in a JPEG file, whose segments are at most 64 KiB


def to_pil(pixels: torch.Tensor) -> list[Image.Image]:
    """Convert pixels to pictures, rounded as diffusers' VaeImageProcessor does.

    Args:
        pixels: Shape (B, 3, H, W), in [-1, 1]; values outside are clamped.

    Raises:
        MezzotintError: If a value is not finite.
    """
    pixels = pixels.detach().to("cpu", torch.float32)
    if not torch.isfinite(pixels).all():
        raise MezzotintError("the picture has values that are not finite (NaN or infinity); try dtype float32")
    levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).numpy()]  # (H, W, 3)


def from_pil(image: Image.Image) -> torch.Tensor:
    """Convert a picture of any mode to (1, 3, H, W) float32 in [-1, 1]. Transparency is dropped."""
    levels = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3) uint8
    return levels.permute(2, 0, 1)[None].to(torch.float32) / 255 * 2 - 1


def save(image: Image.Image, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Write a picture with its record, and nothing else of `image.info`.

    The file appears whole or not at all: it is written under another name in the same folder and then renamed.

    Args:
        image: The picture.
        path: A file name that ends in .png, .jpg, .jpeg or .webp.
        overwrite: Whether an existing file is replaced.

    Raises:
        FileExistsError: If the file exists and `overwrite` is False.
        RequestError: If the file cannot be written under this name.
        WriteError: If the disk is full or broken.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise RequestError(f"{str(path)!r} cannot be written: its name must end in {', '.join(FORMATS)}")
    _write(image, Path(path), FORMATS[suffix], overwrite)


def save_png(image: Image.Image, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Write a PNG file as `save` does; its name may have any extension but that of another format.

    Raises:
        FileExistsError, RequestError, WriteError: As `save` does.
    """
    suffix = Path(path).suffix.lower()
    if FORMATS.get(suffix, "PNG") != "PNG":
        raise RequestError(f"{str(path)!r} would be a PNG file under the name of {suffix}; use save, which writes that")
    _write(image, Path(path), "PNG", overwrite)


class Picture(Image.Image):
    """A PIL image whose `save` keeps its record in PNG, JPEG and WebP files.

    Pillow itself writes a record only where it is passed as `pnginfo` or `exif`. Copies and edited versions of a
    picture (`copy`, `resize`, `crop`, ...) are plain PIL images, and Pillow saves those without it.
    """

    @classmethod
    def from_image(cls, image: Image.Image) -> Picture:
        """Return a Picture with the pixels and the info of a PIL image."""
        picture = cls()
        picture.__setstate__([image.info, image.mode, image.size, image.getpalette(), image.tobytes()])
        return picture

    def save(
        self,
        fp: str | bytes | os.PathLike[str] | os.PathLike[bytes] | IO[bytes],
        format: str | None = None,
        **params: Any,
    ) -> None:
        """Save as `PIL.Image.Image.save` does, and add the record.

        Args:
            fp: A file name or an open file.
            format: "PNG", "JPEG", ...; by default the one that the file name ends in.
            **params: Options of Pillow's writer. An own `pnginfo` or `exif` replaces the record.

        Raises:
            RequestError: If the record is too long for a JPEG file.
        """
        name = os.fsdecode(fp) if isinstance(fp, str | bytes | os.PathLike) else str(getattr(fp, "name", ""))
        kind = format.upper() if format else FORMATS.get(Path(name).suffix.lower(), "")
        super().save(fp, format, **{**_record_options(self.info, kind), **params})


def encode_file(image: Image.Image, format: str) -> bytes:
    """Return the bytes of a file ("PNG", "JPEG" or "WEBP") of the picture with its record.

    Raises:
        RequestError: If the record is too long for a JPEG file.
    """
    file = io.BytesIO()
    bare = image.copy()
    bare.info = {}  # Pillow would write some of it
    bare.save(file, format=format, **SETTINGS[format], **_record_options(image.info, format))
    return file.getvalue()


def _record_options(info: Mapping[Any, Any], format: str) -> dict[str, Any]:
    """Return what Pillow's writer of a format must be passed to keep the record."""
    texts = {chunk: info[chunk] for chunk in CHUNKS if isinstance(info.get(chunk), str)}
    if format == "PNG" and texts:
        pnginfo = PngInfo()
        for chunk, text in texts.items():
            pnginfo.add_text(chunk, text)  # tEXt, or iTXt if Latin-1 cannot encode it
        return {"pnginfo": pnginfo}
    if format in ("JPEG", "WEBP") and texts:
        exif = _exif(texts)
        if format == "JPEG" and len(exif) > MAX_EXIF:
            raise RequestError(
                f"the picture's record is {len(exif):,} bytes long and a JPEG file holds at most {MAX_EXIF:,}; save it "
                "as .png or .webp"
            )
        return {"exif": exif}
    return {}


def _exif(texts: Mapping[str, str]) -> bytes:
    exif = Image.Exif()
    fields = exif.get_ifd(IFD.Exif)
    if "parameters" in texts:
        fields[Base.UserComment] = UNICODE + texts["parameters"].encode("utf-16-be", "surrogatepass")
    if "mezzotint" in texts:
        fields[Base.MakerNote] = texts["mezzotint"].encode()
    exif[IFD.Exif] = fields
    return exif.tobytes()


def _write(image: Image.Image, path: Path, format: str, overwrite: bool) -> None:
    data = encode_file(image, format)
    try:
        write_atomically(path, data, overwrite=overwrite)
    except FileExistsError:
        raise
    except (OSError, ValueError) as error:  # ValueError: an empty or impossible file name
        kind = WriteError if getattr(error, "errno", None) in DISK_ERRORS else RequestError
        raise kind(f"{str(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def read_metadata(path: str | os.PathLike[str] | bytes, chunks: Sequence[str] | None = CHUNKS) -> dict[str, str]:
    """Read the texts of a PNG, JPEG or WebP file without decoding its pixels. The texts are untrusted.

    Args:
        path: The file, or its contents.
        chunks: The text chunks to read from a PNG file; None for all.

    Returns:
        The texts that the file has, by chunk.

    Raises:
        RequestError: If there is no such file, or it is of another format.
    """
    with open_file(path) as image:
        if image.format == "PNG":
            if chunks is None:
                return {str(chunk): text for chunk, text in image.info.items() if isinstance(text, str)}
            return {chunk: str(image.info[chunk]) for chunk in chunks if chunk in image.info}
        fields = image.getexif().get_ifd(IFD.Exif)
        texts = {"mezzotint": _text(fields.get(Base.MakerNote)), "parameters": _text(fields.get(Base.UserComment))}
        return {chunk: text for chunk, text in texts.items() if text}


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read the pixels of a PNG, JPEG or WebP file as RGB.

    Raises:
        RequestError: If there is no such file, or it is of another format.
    """
    with open_file(path) as image:
        load(image)
        return image.convert("RGB")


@contextmanager
def open_file(path: str | os.PathLike[str] | bytes) -> Iterator[Image.Image]:
    """Open a PNG, JPEG or WebP file, or its contents, without decoding it.

    Raises:
        RequestError: If it cannot be opened, or for any error while it is open.
    """
    kinds = "a PNG, JPEG or WebP file"
    name = f"the picture of {len(path):,} bytes" if isinstance(path, bytes) else repr(str(path))
    try:
        if not isinstance(path, bytes) and not Path(path).is_file() and Path(path).exists():
            raise RequestError(f"{name} is not a regular file; it must be {kinds}")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            source = io.BytesIO(path) if isinstance(path, bytes) else path
            with Image.open(source, formats=["PNG", "JPEG", "WEBP"]) as image:
                yield image
    except UnidentifiedImageError:
        raise RequestError(f"{name} is not {kinds}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise RequestError(f"{name} is too large a picture: {error}") from None
    except MezzotintError:
        raise
    except Exception as error:  # decoders raise errors of many types on broken files
        raise RequestError(f"{name} cannot be read as {kinds}: {error}") from None


def _text(value: Any) -> str:
    """Decode an EXIF field as UTF-8, or by the prefix of a UserComment; return "" if it is not text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        return ""
    if value[:8] == UNICODE:
        body = value[8:]
        little = body[:2] == b"\xff\xfe" or (body[1:2] == b"\0" and body[:1] != b"\0")  # some tools write little-endian
        return body.decode("utf-16-le" if little else "utf-16-be", "replace").lstrip("\ufeff").rstrip("\0")
    return value.removeprefix(b"ASCII\0\0\0").removeprefix(b"\0" * 8).decode("utf-8", "replace").rstrip("\0")
