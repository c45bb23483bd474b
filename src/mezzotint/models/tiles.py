"""The VAE in overlapping tiles: pixels and latents almost the same, from about what one tile needs.

The layers near the latents, where a picture is small, are done on the whole of it, exactly, in strips: the middle with
its attention, and as many more as need no more than a tile does (`vae_sizes.on_the_whole`). The others are tiled. They
are convolutions, which see few neighbours, and group norms, whose mean and variance are the whole picture's: tiles that
took their own would differ in colour and contrast, and the seams would show. So these are measured once, on a copy of
the picture with rows and columns left out until it is of a tile's size, and are the same in every tile. What is left of
the error is in those measures: a slight change over the whole picture, without seams. Overlaps are blended.

A batch goes one picture after another. No gradients are kept. `seamless` holds as it does in the whole way.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.errors import RequestError
from mezzotint.models.convolution import joined, pad, seamless
from mezzotint.models.strips import Moments, Strips, moments_in_strips
from mezzotint.models.vae import VAE, Downsample, Posterior
from mezzotint.models.vae_sizes import OVERLAP, STRIP, TILE, on_the_whole

Tiled = Callable[[Strips, Tensor], Tensor]  # the layers that are tiled


@torch.no_grad()
def decode_in_tiles(vae: VAE, z: Tensor, tile: int = TILE, overlap: int = OVERLAP, strip: int = STRIP) -> Tensor:
    """About what `vae.decode` gives of z (B, 4, h, w): pixels (B, 3, 8h, 8w).

    tile: its side in latents. overlap: those shared with the next one, at most a quarter of it. strip: as in strips.
    """
    decoder, side = vae.decoder, vae.config.downscale
    near = on_the_whole(vae.config, z.shape[2] * side, z.shape[3] * side, "decode", tile, z.itemsize, strip)
    first, rest = decoder.layers()[:near], decoder.layers()[near:]

    def tiled(way: Strips, x: Tensor) -> Tensor:
        for layer in rest:
            x = way.layer(layer, x)
        return way.convolved(decoder.conv_out, x, way.activation(decoder.conv_norm_out, x))

    def decoded(one: Tensor) -> Tensor:
        way = Strips(strip)
        x = way.convolved(decoder.conv_in, vae.post_quant_conv(one))
        for layer in first:
            x = way.layer(layer, x)
        cells = x.shape[2] // one.shape[2]
        return _tiled(tiled, x, tile, overlap, cells, side, strip) if rest else tiled(way, x)

    return torch.cat([decoded(one) for one in torch.split(z, 1)])


@torch.no_grad()
def encode_in_tiles(
    vae: VAE, pixels: Tensor, tile: int = TILE, overlap: int = OVERLAP, strip: int = STRIP
) -> Posterior:
    """About what `vae.encode` gives of pixels (B, 3, H, W) in [-1, 1]."""
    encoder, side = vae.encoder, vae.config.downscale
    near = on_the_whole(vae.config, pixels.shape[2], pixels.shape[3], "encode", tile, pixels.itemsize, strip)
    first, rest = encoder.layers()[:-near], encoder.layers()[-near:]

    def tiled(way: Strips, x: Tensor) -> Tensor:
        x = way.convolved(encoder.conv_in, x)
        for layer in first:
            x = way.layer(layer, x)
        return x

    def encoded(one: Tensor) -> Tensor:
        way = Strips(strip)
        halvings = sum(isinstance(layer, Downsample) for layer in first)
        x = _tiled(tiled, one, tile, overlap, side, side >> halvings, strip) if first else tiled(way, one)
        for layer in rest:
            x = way.layer(layer, x)
        moments = way.convolved(encoder.conv_out, x, way.activation(encoder.conv_norm_out, x))
        return vae.quant_conv(moments)  # type: ignore[no-any-return]

    return Posterior.from_moments(torch.cat([encoded(one) for one in torch.split(pixels, 1)]))


def _tiled(layers: Tiled, x: Tensor, tile: int, overlap: int, cells: int, made: int, strip: int) -> Tensor:
    """`layers` of x (1, C, h, w), tile by tile. cells and made: of x and of the result along the side of a latent."""
    given, channels = _measured(layers, x, tile * cells, strip)
    # joined sides go on with what lies opposite; what is made of that is cut off at the end
    down, across = (
        min(overlap, length // cells) if axis in joined.get() else 0
        for axis, length in zip("yx", x.shape[2:], strict=True)
    )
    x = pad(x, (across * cells, across * cells, down * cells, down * cells))
    rows, columns = (spans(length // cells, tile, overlap) for length in x.shape[2:])
    size = (1, channels, rows[-1].last * made, columns[-1].last * made)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).zero_()
    with seamless(None):
        for row in rows:
            for column in columns:
                part = layers(Strips(strip, given), x[:, :, row.cells(cells), column.cells(cells)].clone())
                part *= row.weights(made, part)[:, None]
                part *= column.weights(made, part)
                out[:, :, row.cells(made), column.cells(made)] += part
    return out[:, :, down * made : out.shape[2] - down * made, across * made : out.shape[3] - across * made]


def _measured(layers: Tiled, x: Tensor, side: int, strip: int) -> tuple[Moments, int]:
    """What the norms of `layers` measure on a copy of x at most as large as a tile, and the channels that they make.

    Rows and columns are left out, not averaged: that keeps the distribution of the values at a place.
    """
    found: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def measure(norm: nn.GroupNorm, h: Tensor) -> tuple[Tensor, Tensor]:
        found[norm] = moments_in_strips(norm, h, strip)
        return found[norm]

    size = [min(side, length) for length in x.shape[2:]]
    channels = layers(Strips(strip, measure), F.interpolate(x, size=size, mode="nearest")).shape[1]
    return lambda norm, _: found[norm], channels


class Span(NamedTuple):
    """A tile along one axis, in latents: where it begins and ends, and how many it shares with those next to it."""

    first: int
    last: int
    before: int
    after: int

    def cells(self, each: int) -> slice:
        return slice(self.first * each, self.last * each)

    def weights(self, each: int, like: Tensor) -> Tensor:
        """How much this tile counts in each of its cells: rising and falling evenly; with its neighbour's, 1."""
        place = torch.arange((self.last - self.first) * each, device=like.device, dtype=torch.float32) + 0.5
        rising = place / max(self.before * each, 0.5)
        falling = place.flip(0) / max(self.after * each, 0.5)
        return torch.minimum(rising, falling).clamp(max=1.0).to(like.dtype)


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """The fewest and then the smallest tiles that cover so many latents and share at least `overlap` with the next.

    Raises RequestError where that is more than a quarter of a tile: three would lie over one another.
    """
    if 4 * overlap > tile:
        raise RequestError(f"overlap is {overlap}; it must be at most a quarter of the tile, {tile // 4}")
    count = max(-(-(length - overlap) // (tile - overlap)), 1)
    size = min(-(-(length + (count - 1) * overlap) // count), length)
    firsts = [round(k * (length - size) / max(count - 1, 1)) for k in range(count)]
    shared = [0, *(a + size - b for a, b in pairwise(firsts)), 0]
    return [Span(first, first + size, *pair) for first, pair in zip(firsts, pairwise(shared), strict=True)]
