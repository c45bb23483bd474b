"""Enlarge pictures by a network, whole or in tiles that overlap.

    pixels (1, 3, H, W) in [0, 1]  ->  (1, 3, sH, sW)

Two tiles next to each other share `overlap` pixels. A quarter of them on either side, whose values depend on what a
tile does not see, is left out; between these, one tile passes into the other by linear weights. So a network whose
receptive field reaches at most `overlap / 4` pixels gives the same as without tiles, up to rounding, and any other no
seam.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from PIL import Image
from torch import Tensor, nn

from mezzotint.images.io import from_pil, to_pil
from mezzotint.models.tiles import Span, spans

TILE, OVERLAP = 256, 64  # pixels
MIN_TILE = 16


@dataclass(frozen=True, eq=False)
class Upscaler:
    """A network that enlarges pictures.

    Attributes:
        name: Its architecture, such as "ESRGAN".
        module: The network, whose weights are on the device that it computes on.
        call: Applies it to pixels (1, 3, H, W) in [0, 1] of the weights' device and dtype.
        scale: How much larger the result is, in each direction.
        tiled: Whether it may see a part of a picture.
        file: The base name of its file, and the SHA-256 of that.
    """

    name: str
    module: nn.Module
    call: Callable[[Tensor], Tensor]
    scale: int
    tiled: bool = True
    file: tuple[str, str] = ("", "")

    def enlarge(
        self,
        pixels: Tensor,
        tile: int | None = TILE,
        overlap: int = OVERLAP,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Return pixels (1, 3, H, W) in [0, 1] enlarged, float32 on the CPU.

        Args:
            pixels: The picture.
            tile: The largest side of a tile in pixels of the picture; None computes the whole picture at once.
            overlap: The pixels that neighbours share; of a tile at most a quarter.
            on_step: Called with (tiles done, tiles in all).
        """
        weight = next(self.module.parameters())
        tile = tile if self.tiled else None
        total, done = tile_count(pixels.shape[2:], tile, overlap), itertools.count(1)

        def enlarge(part: Tensor) -> Tensor:
            made = self.call(part.to(weight.device, weight.dtype)).float().cpu()
            if on_step:
                on_step(next(done), total)
            return made

        with torch.inference_mode():
            if tile is None:
                return enlarge(pixels)
            return blend_tiles(pixels, enlarge, tile, min(overlap, tile // 4), self.scale)

    def __call__(self, image: Image.Image, tile: int | None = TILE) -> Image.Image:
        """Return a picture enlarged, in tiles of at most `tile` pixels."""
        (made,) = to_pil(self.enlarge(from_pil(image) / 2 + 0.5, tile) * 2 - 1)
        return made


def blend_tiles(pixels: Tensor, draw: Callable[[Tensor], Tensor], tile: int, overlap: int, scale: int = 1) -> Tensor:
    """Apply a function to a picture (1, C, H, W) tile by tile, and blend the results to one (1, C', sH, sW).

    Args:
        pixels: The picture.
        draw: Returns a tile `scale` times as large.
        tile: The largest side of a tile.
        overlap: The least that neighbours share.
        scale: How much larger the result is.
    """
    rows, columns = (spans(length, tile, overlap) for length in pixels.shape[2:])
    out: Tensor | None = None
    for row, column in product(rows, columns):
        part = draw(pixels[:, :, row.cells(1), column.cells(1)])
        if out is None:
            out = part.new_zeros(1, part.shape[1], rows[-1].last * scale, columns[-1].last * scale)
        weights = ramp(row, scale).to(part)[:, None] * ramp(column, scale).to(part)
        out[:, :, row.cells(scale), column.cells(scale)] += part * weights
    assert out is not None
    return out


def ramp(span: Span, scale: int = 1) -> Tensor:
    """Return the weight of each pixel of a tile along one axis, which adds up to 1 with its neighbour's, in float64."""
    place = torch.arange((span.last - span.first) * scale, dtype=torch.float64) + 0.5
    rising, falling = (
        ((there - 0.25 * shared * scale) / (0.5 * shared * scale)).clamp(0, 1) if shared else torch.ones_like(there)
        for there, shared in ((place, span.before), (place.flip(0), span.after))
    )
    return torch.minimum(rising, falling)


def tile_sides(height: int, width: int) -> Iterator[int | None]:
    """Yield how a picture may be cut, the largest first: None is not at all."""
    yield None
    yield from (side for side in (1024, 512, 256, 128, 64) if side < max(height, width))


def tile_count(size: Sequence[int], tile: int | None, overlap: int = OVERLAP) -> int:
    """Return the number of tiles of a picture of this size."""
    if tile is None:
        return 1
    rows, columns = (len(spans(length, tile, min(overlap, tile // 4))) for length in size)
    return rows * columns
