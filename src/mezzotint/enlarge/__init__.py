"""Enlarge a finished picture, which keeps its record: by Lanczos resampling, or by an upscaler's file.

mezzotint.upscale("lemon.png").save("large.png")                          # 4 times as large, Lanczos
mezzotint.upscale(image, "4x_UltraSharp.safetensors", memory="2GiB")      # needs the extra [upscale]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mezzotint.devices import best_device, device_of, dtype_on
from mezzotint.errors import BudgetError, RequestError
from mezzotint.images.init_image import fit, open_picture, to_source
from mezzotint.images.io import CHUNKS, Picture, from_pil, read_metadata, to_pil
from mezzotint.memory import system
from mezzotint.memory.walk import count_upscaler
from mezzotint.models.upscaler import MIN_TILE, Upscaler, tile_sides
from mezzotint.placement import format_size, parse_size
from mezzotint.records.record import add_enlargement
from mezzotint.weights.upscaler_files import load_upscaler

SCALE = 4.0  # of Lanczos
MAX_SIDE = 32768  # pixels of the result
SHARE = 0.9  # of the free memory that "auto" is
SPARE = 1.1  # of a prediction, for what the allocator rounds up
FALLBACK_TILE = 256  # of a network whose memory cannot be predicted


def upscale(
    image: Image.Image | str | PathLike[str] | bytes,
    model: str | PathLike[str] | Upscaler | None = None,
    *,
    scale: float | None = None,
    tile: int | None = None,
    memory: int | str = "auto",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Picture:
    """Enlarge a picture.

    Args:
        image: A picture, or the path or the bytes of its file, whose transparency is composited on white.
        model: The file of an upscaler, or one that is loaded; None resamples by Lanczos.
        scale: How much larger the result is, above 0; None is 4, or the upscaler's own. The result of an upscaler is
            resampled to it.
        tile: The largest side of the tiles that an upscaler sees, in pixels of the picture, at least 16; None chooses
            the largest that `memory` allows.
        memory: What the process may take on the CPU, or torch on a GPU; "auto" is 90 % of what is free.
        device: Where an upscaler runs; None is the best device.
        dtype: Of an upscaler's weights; None is float32 on the CPU and float16 elsewhere, where it supports that.
        on_step: Called with (tiles done, tiles in all).

    Returns:
        The picture. Its record is that of the picture it was made from, with how it was enlarged.

    Raises:
        RequestError: If the picture cannot be read, or an argument is invalid.
        CheckpointError: If the file is no upscaler.
        MissingExtraError: If spandrel is not installed.
        BudgetError: If the smallest tile needs more memory.
    """
    if scale is not None and not 0.0 < scale <= 64.0:
        raise RequestError(f"scale is {scale}; it must be a number above 0 and at most 64")
    if tile is not None and tile < MIN_TILE:
        raise RequestError(f"tile is {tile}; it must be a whole number of pixels from {MIN_TILE}")
    source = to_source(image)
    info = image.info if isinstance(image, Image.Image) else _texts(source)
    picture = open_picture(source)
    network = model if isinstance(model, Upscaler) or model is None else _load(model, device, dtype)
    own = float(network.scale) if network else SCALE
    size = _size(picture.size, scale or own)
    if network is None:
        enlarged, cut = fit(picture, size), None
    else:
        _size(picture.size, own)
        cut = tile or choose_tile(network, picture.size, memory)
        pixels = from_pil(picture) / 2 + 0.5
        (enlarged,) = to_pil(network.enlarge(pixels, cut, on_step=on_step) * 2 - 1)
        enlarged = enlarged if enlarged.size == size else fit(enlarged, size)
    made = Picture.from_image(enlarged)
    texts = add_enlargement(
        {name: info[name] for name in CHUNKS if isinstance(info.get(name), str)},
        made,
        method=network.name if network else "Lanczos",
        scale=scale or own,
        model=dict([network.file]) if network and network.file[0] else {},
        tile=cut,
    )
    made.info.update(texts)
    return made


def choose_tile(network: Upscaler, size: tuple[int, int], memory: int | str = "auto") -> int | None:
    """Return the largest side of tiles with which a picture (width, height) fits into memory; None is all of it.

    Raises:
        BudgetError: If the smallest does not fit.
    """
    width, height = size
    weight = next(network.module.parameters())
    cuda = weight.device.type == "cuda"
    base = 0 if cuda else system.resident()
    if memory != "auto":
        limit = parse_size(memory)
    elif cuda:
        limit = int(SHARE * torch.cuda.mem_get_info(weight.device)[0])
    else:
        limit = base + int(SHARE * (system.available() or 0))
    picture = 0 if cuda else 4 * 3 * width * height * (1 + 4 * network.scale**2)  # float32, blended and converted
    needed = 0
    for side in tile_sides(height, width):
        if side is None and not network.tiled:
            return None
        found = count_upscaler(network, min(side or height, height), min(side or width, width))
        if found is None:
            return FALLBACK_TILE
        needed = int(SPARE * (base + picture + found))
        if needed <= limit:
            return side
    raise BudgetError(
        f"memory is {format_size(limit)}, but enlarging {width}x{height} with this upscaler needs at least "
        f"{format_size(needed)}"
    )


def _load(model: str | PathLike[str], device: str | torch.device | None, dtype: str | torch.dtype | None) -> Upscaler:
    place = device_of(device or best_device())
    return load_upscaler(Path(model).expanduser(), place, dtype_on(place, dtype, torch.float16))


def _texts(source: str | bytes) -> Mapping[str, Any]:
    """Return the record's texts of a picture's file; none for a format that carries none."""
    try:
        return read_metadata(source)
    except RequestError:
        return {}


def _size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return the size of the result. Raises RequestError if it is too large."""
    width, height = (max(round(side * scale), 1) for side in size)
    if max(width, height) > MAX_SIDE:
        raise RequestError(
            f"scale is {scale:g}, which gives {width}x{height}; a side may have at most {MAX_SIDE} pixels"
        )
    return width, height
