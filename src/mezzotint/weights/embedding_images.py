"""Read the textual inversion that AUTOMATIC1111's web UI puts into a PNG of it (modules/textual_inversion).

It is JSON, in which {"TORCHTENSOR": [[...], ...]} stands for a tensor, and is there in one of two ways, or both:

    text      base64, in the text chunk `sd-ti-embedding`
    pixels    compressed by zlib, half a byte in the low bits of each channel. Columns of black part the image in three:
              the bytes' low halves, a picture, and the high halves, all masked with a linear congruential generator

Nothing is executed, and sizes are bounded before anything is decoded.
"""

from __future__ import annotations

import base64
import json
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mezzotint.errors import CheckpointError
from mezzotint.files import open_regular

CHUNK = "sd-ti-embedding"
MAX_PIXELS = 2**23
MAX_FILE_BYTES = 2**27  # bytes
MAX_NAME = 1000  # characters of an embedding's name; with a longer one the file's counts
MAX_JSON_BYTES = 2**24  # bytes; 1,000 vectors of width 768
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
MULTIPLIER, INCREMENT = 1664525, 1013904223  # of the generator, modulo 2^32


def read_embedding_image(path: Path) -> tuple[str, Tensor] | None:
    """Read the embedding in a PNG file.

    Returns:
        Its name, or the file's, and its vectors of shape (n, width), in float32; None for a picture without one.

    Raises:
        CheckpointError: If it is not a PNG file, is too large, or its embedding is damaged.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path} is too large for a picture with an embedding; it must be at most 128 MiB")
        with open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL, for pictures that are checked below
            image = Image.open(file, formats=["PNG"])
            if image.width * image.height > MAX_PIXELS:
                raise CheckpointError(f"{path} has {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
            image.load()
        text = getattr(image, "text", {}).get(CHUNK)
        data = _from_pixels(np.asarray(image.convert("RGB"))) if text is None else _from_text(text)
    except CheckpointError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, zlib.error) as error:
        raise CheckpointError(f"{path} is not a whole PNG file with an embedding: {str(error)[:100]}") from None
    return None if data is None else _parse(path, data)


def _from_text(text: str) -> bytes:
    if len(text) > MAX_JSON_BYTES * 4 // 3:
        raise ValueError(f"its embedding has more than {MAX_JSON_BYTES:,} bytes")
    return base64.b64decode(text, validate=True)


def _from_pixels(pixels: Bytes) -> bytes | None:
    """Return the JSON in the low bits of pixels (h, w, 3), or None if there are no black columns or no JSON."""
    bright: np.ndarray[Any, np.dtype[np.bool_]] = np.all(pixels > 0, axis=2)
    if not bright.any():
        return None
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    halves: Bytes = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & np.uint8(0x0F)
    black = np.flatnonzero(~halves.any((0, 2)))
    if len(black) < 2:
        return None
    low, high = halves[:, : black[0]], halves[:, black[-1] + 1 :]
    if low.shape != high.shape or not low.size:
        return None
    packed = (_unmask(high) << 4 | _unmask(low)).tobytes()
    if packed[:1] != b"\x78" or int.from_bytes(packed[:2], "big") % 31:  # zlib's header
        return None
    stream = zlib.decompressobj()
    data = stream.decompress(packed, MAX_JSON_BYTES)
    if not stream.eof:
        raise ValueError(f"its embedding is cut short, or has more than {MAX_JSON_BYTES:,} bytes")
    return data


def _unmask(halves: Bytes) -> Bytes:
    """Undo the mask: the low bits of the generator's states modulo 255, from the state after 0."""
    states = np.array([INCREMENT], np.uint32)
    multiplier, increment = np.uint32(MULTIPLIER), np.uint32(INCREMENT)
    with np.errstate(over="ignore"):
        while len(states) < halves.size:  # state k + n follows from state k as k does from 0, in n steps at once
            states = np.concatenate([states, states * multiplier + increment])
            multiplier, increment = multiplier * multiplier, multiplier * increment + increment
    mask: Bytes = (states[: halves.size].reshape(halves.shape) % 255 & 0x0F).astype(np.uint8)
    return halves ^ mask


def _parse(path: Path, data: bytes) -> tuple[str, Tensor]:
    try:
        table = json.loads(data)
        (held,) = table["string_to_param"].values()
        vectors = torch.tensor(held["TORCHTENSOR"], dtype=torch.float32)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError, RecursionError):
        raise CheckpointError(
            f"{path} has an embedding that cannot be read; it must be JSON with one TORCHTENSOR in string_to_param"
        ) from None
    name = table.get("name")
    return name if isinstance(name, str) and 0 < len(name.strip()) <= MAX_NAME else path.stem, vectors
