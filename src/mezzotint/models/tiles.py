"""The VAE in overlapping tiles: almost the same pixels and latents, from about the memory of one tile.

The layers near the latents, where the feature maps are small, run on the whole picture, exactly, in strips: the middle
with its attention, and as many others as need no more memory than a tile (`untiled_layers`). The others are tiled. They
are convolutions, which depend on few neighbours, and group norms, which need the mean and variance of the whole
picture: with each tile's own, tiles would differ in colour and contrast, and seams would be visible. So these are
measured once, on a copy of the picture subsampled to the size of a tile, and used in every tile. The remaining error
comes from these measures: a slight change over the whole picture, without seams. Overlaps are blended.

The pictures of a batch are processed one by one, without gradients. `seamless` applies as in the whole VAE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product, takewhile
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.config import VAEConfig
from mezzotint.errors import RequestError
from mezzotint.models.convolution import joined, pad, seamless
from mezzotint.models.strips import STRIP, Moments, Strips, strip_rows
from mezzotint.models.vae import VAE, Downsample, Posterior

TILE = 64  # latents along a side of a tile
OVERLAP = 16  # of them shared with the next one
Half = Literal["encode", "decode"]
Layers = Callable[[Strips, Tensor], Tensor]  # the tiled layers


@torch.no_grad()
def decode_in_tiles(vae: VAE, z: Tensor, tile: int = TILE, overlap: int = OVERLAP, strip: int = STRIP) -> Tensor:
    """Decode z (B, 4, h, w) to about the pixels (B, 3, 8h, 8w) of `vae.decode`.

    Args:
        vae: The autoencoder.
        z: Unscaled latents.
        tile: The side of a tile in latents.
        overlap: The latents shared with the next tile, at most a quarter of `tile`.
        strip: As in `decode_in_strips`.
    """
    return torch.cat([decode_one(Strips(strip), vae, one, tile, overlap) for one in torch.split(z, 1)])


@torch.no_grad()
def encode_in_tiles(
    vae: VAE, pixels: Tensor, tile: int = TILE, overlap: int = OVERLAP, strip: int = STRIP
) -> Posterior:
    """Encode pixels (B, 3, H, W) in [-1, 1] to about the posterior of `vae.encode`."""
    return Posterior.from_moments(
        torch.cat([encode_one(Strips(strip), vae, one, tile, overlap) for one in torch.split(pixels, 1)])
    )


def decode_one(strips: Strips, vae: VAE, z: Tensor, tile: int = TILE, overlap: int = OVERLAP) -> Tensor:
    """Decode one picture's latents (1, 4, h, w)."""
    decoder, side = vae.decoder, vae.config.downscale
    height, width = z.shape[2] * side, z.shape[3] * side
    near = untiled_layers(vae.config, height, width, "decode", tile, z.itemsize, strips.strip)
    first, rest = decoder.layers()[:near], decoder.layers()[near:]

    def outer(strips: Strips, x: Tensor) -> Tensor:
        for layer in rest:
            x = strips.layer(layer, x)
        return strips.convolve(decoder.conv_out, x, strips.activation(decoder.conv_norm_out, x))

    x = strips.convolve(decoder.conv_in, vae.post_quant_conv(z))
    for layer in first:
        x = strips.layer(layer, x)
    cells = x.shape[2] // z.shape[2]
    return _in_tiles(outer, strips, x, tile, overlap, cells, side) if rest else outer(strips, x)


def encode_one(strips: Strips, vae: VAE, pixels: Tensor, tile: int = TILE, overlap: int = OVERLAP) -> Tensor:
    """Encode one picture (1, 3, H, W) to the moments of its posterior (1, 8, h, w)."""
    encoder, side = vae.encoder, vae.config.downscale
    height, width = pixels.shape[2:]
    near = untiled_layers(vae.config, height, width, "encode", tile, pixels.itemsize, strips.strip)
    first, rest = encoder.layers()[:-near], encoder.layers()[-near:]

    def outer(strips: Strips, x: Tensor) -> Tensor:
        x = strips.convolve(encoder.conv_in, x)
        for layer in first:
            x = strips.layer(layer, x)
        return x

    halvings = sum(isinstance(layer, Downsample) for layer in first)
    x = _in_tiles(outer, strips, pixels, tile, overlap, side, side >> halvings) if first else outer(strips, pixels)
    for layer in rest:
        x = strips.layer(layer, x)
    moments = strips.convolve(encoder.conv_out, x, strips.activation(encoder.conv_norm_out, x))
    return vae.quant_conv(moments)  # type: ignore[no-any-return]


def _in_tiles(
    layers: Layers, strips: Strips, x: Tensor, tile: int, overlap: int, cells_in: int, cells_out: int
) -> Tensor:
    """Compute `layers` on x (1, C, h, w) tile by tile.

    `cells_in` and `cells_out` are the pixels along the side of one latent, in x and in the result.
    """
    moments, channels = _measure(layers, strips, x, tile * cells_in)
    # seamless sides are padded with the opposite side, and the padding is cropped at the end
    down, across = (
        min(overlap, length // cells_in) if axis in joined.get() else 0
        for axis, length in zip("yx", x.shape[2:], strict=True)
    )
    x = pad(x, (across * cells_in, across * cells_in, down * cells_in, down * cells_in))
    rows, columns = (spans(length // cells_in, tile, overlap) for length in x.shape[2:])
    size = (1, channels, rows[-1].last * cells_out, columns[-1].last * cells_out)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).zero_()
    inner = replace(strips, moments=moments)
    with seamless(None):
        for row, column in strips.each(list(product(rows, columns))):
            part = layers(inner, x[:, :, row.cells(cells_in), column.cells(cells_in)].clone())
            part *= row.weights(cells_out, part)[:, None]
            part *= column.weights(cells_out, part)
            out[:, :, row.cells(cells_out), column.cells(cells_out)] += part
    top, left = down * cells_out, across * cells_out
    return out[:, :, top : out.shape[2] - top, left : out.shape[3] - left]


def _measure(layers: Layers, strips: Strips, x: Tensor, side: int) -> tuple[Moments, int]:
    """Measure the norms of `layers` on a copy of x at most as large as a tile; return also the channels they make.

    Rows and columns are left out, not averaged: that keeps the distribution of the values at a place.
    """
    found: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def measure(norm: nn.GroupNorm, h: Tensor) -> tuple[Tensor, Tensor]:
        found[norm] = strips.measure(norm, h)
        return found[norm]

    size = [min(side, length) for length in x.shape[2:]]
    channels = layers(replace(strips, moments=measure), F.interpolate(x, size=size, mode="nearest")).shape[1]
    return lambda norm, _: found[norm], channels


class Span(NamedTuple):
    """A tile along one axis, in latents: where it begins and ends, and how many it shares with those next to it."""

    first: int
    last: int
    before: int
    after: int

    def cells(self, each: int) -> slice:
        """Return the cells of this tile where a latent has `each` of them along a side."""
        return slice(self.first * each, self.last * each)

    def weights(self, each: int, like: Tensor) -> Tensor:
        """Return the blending weight of each cell: linear ramps that add up to 1 with the neighbour's."""
        place = torch.arange((self.last - self.first) * each, device=like.device, dtype=torch.float32) + 0.5
        rising = place / max(self.before * each, 0.5)
        falling = place.flip(0) / max(self.after * each, 0.5)
        return torch.minimum(rising, falling).clamp(max=1.0).to(like.dtype)


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Cover a side with the fewest, and then the smallest, tiles that overlap by at least `overlap` latents.

    Raises:
        RequestError: If `overlap` is more than a quarter of a tile, so that three tiles would overlap.
    """
    if 4 * overlap > tile:
        raise RequestError(f"overlap is {overlap}; it must be at most a quarter of the tile, {tile // 4}")
    count = max(-(-(length - overlap) // (tile - overlap)), 1)
    size = min(-(-(length + (count - 1) * overlap) // count), length)
    firsts = [round(k * (length - size) / max(count - 1, 1)) for k in range(count)]
    shared = [0, *(a + size - b for a, b in pairwise(firsts)), 0]
    return [Span(first, first + size, *pair) for first, pair in zip(firsts, pairwise(shared), strict=True)]


# ---- which layers are not tiled --------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A step of the network: its channels in and out, and the rows and columns of its larger side."""

    kind: Literal["end", "resnet", "attention", "behind attention", "upsample", "downsample"]
    channels_in: int
    channels: int
    height: int
    width: int

    @property
    def places(self) -> int:
        """Number of positions of the feature map."""
        return self.height * self.width

    @property
    def weight(self) -> int:
        """Elements of its larger 3x3 convolution's weight."""
        return 0 if self.kind == "attention" else 9 * max(self.channels_in, self.channels) * self.channels


def layers(config: VAEConfig, height: int, width: int, half: Half) -> tuple[list[Layer], list[Layer]]:
    """Split the steps into those next to the latents and those from there to the pixels."""
    widths, side, last = config.block_out_channels, config.downscale, len(config.block_out_channels) - 1
    deep = height // side, width // side
    inner = [Layer("resnet", widths[-1], widths[-1], *deep)]
    if config.mid_block_add_attention:
        inner.append(Layer("attention", widths[-1], widths[-1], *deep))
    inner.append(Layer("behind attention", widths[-1], widths[-1], *deep))
    outer: list[Layer] = []
    for i, channels in reversed(list(enumerate(widths))):
        here = height >> i, width >> i
        if half == "decode":
            outer.append(Layer("resnet", widths[min(i + 1, last)], channels, *here))
            outer += [Layer("resnet", channels, channels, *here)] * config.layers_per_block
            outer += [Layer("upsample", channels, channels, height >> i - 1, width >> i - 1)] if i else []
        else:
            outer += [Layer("downsample", channels, channels, *here)] if i < last else []
            outer += [Layer("resnet", channels, channels, *here)] * (config.layers_per_block - 1)
            outer.append(Layer("resnet", widths[max(i - 1, 0)], channels, *here))
    if half == "decode":
        inner.insert(0, Layer("end", config.latent_channels, widths[-1], *deep))
        outer.append(Layer("end", widths[0], config.out_channels, height, width))
    else:
        inner.insert(0, Layer("end", widths[-1], 2 * config.latent_channels, *deep))
        outer.append(Layer("end", config.in_channels, widths[0], height, width))
    return inner, outer


def untiled_layers(
    config: VAEConfig, height: int, width: int, half: Half, tile: int = TILE, itemsize: int = 4, strip: int = STRIP
) -> int:
    """How many of the network's `layers()` are not tiled, from the latents on: all that need no more than a tile does.

    The first level at least, with the sampler behind it where there are others: the norms there decide most.
    """
    side = tile * config.downscale
    inner, outer = layers(config, side, side, half)
    limit = max(_in_strips(layer, itemsize, strip) for layer in inner + outer)
    _, outer = layers(config, height, width, half)
    fit = len(list(takewhile(lambda layer: _in_strips(layer, itemsize, strip) <= limit, outer[:-1])))
    samplers = [k for k, layer in enumerate(outer, 1) if layer.kind in ("upsample", "downsample")]
    return 1 + (max(fit, samplers[0]) if len(samplers) > 1 else fit)


def _in_strips(layer: Layer, itemsize: int, strip: int) -> int:
    """Elements that a layer needs in strips."""
    a, b, places = layer.channels_in, layer.channels, layer.places
    copies = 3 if itemsize >= 4 else 4

    def strips(a: int, down: int = 1) -> int:
        rows = min(strip_rows(max(a, b), layer.width, strip), layer.height // down)
        return 2 * b * rows * layer.width // down + copies * a * (rows * down + 2) * layer.width + layer.weight

    match layer.kind:
        case "resnet" | "behind attention":
            return (a + b) * places + max(strips(a), strips(b))
        case "attention":
            return 3 * a * places + strips(a)
        case "upsample":
            return b * places + a * places // 4 + strips(a)
        case "downsample":
            return a * places + b * places // 4 + strips(a, down=2)
        case "end":
            return (a + b) * places + strips(a)
