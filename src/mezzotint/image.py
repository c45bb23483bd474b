"""Pixels in and out, and the record that a picture carries.

Pixels are (B, 3, H, W) in [-1, 1], as the VAE has them. A picture's record is two text chunks of its PNG file:
`mezzotint`, JSON from which the same picture can be drawn again, and `parameters`, the text that AUTOMATIC1111's web UI
writes and many tools read. In memory they live in `image.info`. The record holds no clock and no host name.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from mezzotint.errors import MezzotintError, RequestError
from mezzotint.presets import A1111_WITHOUT_SCHEDULE
from mezzotint.request import Request
from mezzotint.samplers import TABLE

CHUNKS = ("mezzotint", "parameters")
A1111_NAMES: dict[str | None, str] = {row.name: row.a1111.split(", ")[0] for row in TABLE if row.a1111}


def to_pil(pixels: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] to B pictures, rounded as diffusers' VaeImageProcessor does. Values outside are clamped.

    Raises MezzotintError where a value is not finite: a black picture is no picture.
    """
    pixels = pixels.detach().to("cpu", torch.float32)
    if not torch.isfinite(pixels).all():
        raise MezzotintError("the picture has values that are not numbers (NaN); dtype float32 may hold them")
    levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).numpy()]  # (H, W, 3)


def from_pil(image: Image.Image) -> torch.Tensor:
    """A picture of any mode to (1, 3, H, W) float32 in [-1, 1]; transparency is dropped."""
    levels = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3) uint8
    return levels.permute(2, 0, 1)[None].to(torch.float32) / 255 * 2 - 1


def describe(
    request: Request, seed: int, model: Mapping[str, Any], group: Sequence[int] | None = None
) -> dict[str, str]:
    """The record of one picture: the two text chunks, to be put into `image.info`.

    request: resolved, as it ran. seed: this picture's own. model: facts for JSON, `name` among them, and what else the
    same bits depend on (dtype, device, threads, identity of the weights). group: the seeds of the pictures drawn in one
    batch with this one, itself among them; alone when None.
    """
    versions = {name: _version(name) for name in ("mezzotint", "torch")}
    record = {
        "request": request.model_dump(mode="json"),
        "seed": seed,
        "group": [seed] if group is None else list(group),
        "model": dict(model),
        "versions": versions,
    }
    scale = request.guidance_scale
    if request.sampler == "euler_cfg_pp" and scale is not None:  # DDIM CFG++ there, which divides its scale
        divisor = A1111_WITHOUT_SCHEDULE["DDIM CFG++"].guidance_divisor
        scale = tuple(divisor * w for w in scale) if isinstance(scale, tuple) else divisor * scale
    facts = {
        "Steps": request.steps,
        "Sampler": A1111_NAMES.get(request.sampler, request.sampler),
        "Schedule type": request.spacing and request.spacing.capitalize(),
        "CFG scale": scale,
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        "Model": model["name"],
        "Clip skip": request.clip_skip + 1 if request.clip_skip else None,  # A1111 counts from the last layer, as 1
        "Emphasis": {"no_norm": "No norm", "ignore": "Ignore"}.get(request.emphasis or ""),
        "Eta": request.eta,
        "CFG rescale": request.guidance_rescale or None,
        "Version": f"mezzotint {versions['mezzotint']}",
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in facts.items() if value is not None))
    return {
        "mezzotint": json.dumps(record, ensure_ascii=False),
        "parameters": "\n".join(lines).replace("\0", "\ufffd"),  # a PNG's text ends at NUL
    }


def save_png(image: Image.Image, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Writes the picture with its record, and nothing else of `image.info`.

    The file appears whole or not at all: it is written under another name in the same folder and then renamed. Raises
    FileExistsError where the file is there and `overwrite` is False, RequestError where it cannot be written.
    """
    path = Path(path)
    text = PngInfo()
    for chunk in CHUNKS:
        if isinstance(value := image.info.get(chunk), str):
            text.add_text(chunk, value)  # tEXt, or iTXt where Latin-1 does not spell it
    try:
        part = path.with_name(f".mezzotint-{secrets.token_hex(8)}.part")
        try:
            with part.open("xb") as file:
                image.save(file, format="PNG", pnginfo=text, icc_profile=None)
                file.flush()
                os.fsync(file.fileno())
            if not overwrite:
                path.open("xb").close()  # takes the name, so that no other process can between now and the rename
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except FileExistsError:
        raise
    except (OSError, ValueError) as error:  # ValueError: no name, or one that no file can have
        raise RequestError(f"{str(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The record in a PNG file: those of `mezzotint` and `parameters` that it has. The pixels are not decoded.

    Raises RequestError where there is no such file, or where it is not a PNG. What a file says is not to be trusted.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return {chunk: str(image.info[chunk]) for chunk in CHUNKS if chunk in image.info}
    except UnidentifiedImageError:
        raise RequestError(f"{str(path)!r} is not a PNG file; a picture's record is read from a PNG") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError(f"{str(path)!r} cannot be read as a PNG file: {error}") from None


def _quoted(value: object) -> str:
    """A value as A1111 writes it into `parameters`: JSON where a comma, colon or line end would be misread."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


@functools.cache
def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"
