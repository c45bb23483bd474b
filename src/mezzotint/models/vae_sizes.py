"""What the VAE's activations need while it runs, from its configuration alone: no torch, no weights.

A figure is the maximum over the layers of what lives at once: values, in the dtype that is computed in, and the second
copy of its weight that a 3x3 convolution makes on the CPU. The weights themselves are not in it, nor the scores of an
attention backend that makes them. With C channels of a layer's input, D of its output, and n places of the larger:

    whole   resnet (C + max(C, D) + D) n   the input, that normalised, and what the convolution makes of it
            upsample (C / 4 + C + D) n     the input, that repeated, the output
            downsample (2 C + D / 4) n     the input, that with its border, the output
            attention 6 C n                the input, that normalised, q, k, v, and what they give; behind it, and in
                                           the resnet there, the middle block's own input too
    strips  resnet (C + D) n               upsample (C / 4 + D) n          downsample (C + D / 4) n
            attention 3 C n                the input, all keys, all values
            and of strips: two of the output (one before), three of the input (one before, the next, that with its
            border) with the rows around it; of 16-bit values one more, as they are normalised in float32
    tiles   the layers next to the latents as strips; for the others what lies between the two (C n there), the pixels
            that are made, and what strips need of one tile
"""

from __future__ import annotations

from itertools import takewhile
from typing import Literal, NamedTuple

from mezzotint.config import VAEConfig

STRIP = 2**21  # elements of a strip where it is widest: 8 MiB in float32, little beside a layer of a large picture
TILE = 64  # latents along a side of a tile
OVERLAP = 16  # of them shared with the next one
Half = Literal["encode", "decode"]


def strip_rows(channels: int, width: int, strip: int = STRIP) -> int:
    """Rows in one strip of a layer whose wider side, in or out, has so many channels and such a width; at least 2."""
    return max(strip // (channels * width) & ~1, 2)


class Layer(NamedTuple):
    """A step of the network: its channels in and out, and the rows and columns of its larger side."""

    kind: Literal["end", "resnet", "attention", "behind attention", "upsample", "downsample"]
    channels_in: int
    channels: int
    height: int
    width: int

    @property
    def places(self) -> int:
        return self.height * self.width

    @property
    def weight(self) -> int:
        """Elements of its larger 3x3 convolution's weight."""
        return 0 if self.kind == "attention" else 9 * max(self.channels_in, self.channels) * self.channels


def layers(config: VAEConfig, height: int, width: int, half: Half) -> tuple[list[Layer], list[Layer]]:
    """The steps next to the latents, and those from there to the pixels, for a picture of that size in pixels."""
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


def whole_peak(config: VAEConfig, height: int, width: int, half: Half, itemsize: int = 4, count: int = 1) -> int:
    """Bytes that `VAE.decode` or `VAE.encode` of so many pictures of that size in pixels needs, less its weights."""
    inner, outer = layers(config, height, width, half)
    return itemsize * max(count * _whole(layer) + layer.weight for layer in inner + outer)


def strip_peak(
    config: VAEConfig, height: int, width: int, half: Half, itemsize: int = 4, count: int = 1, strip: int = STRIP
) -> int:
    """Bytes that `decode_in_strips` or `encode_in_strips` needs, less the weights."""
    inner, outer = layers(config, height, width, half)
    others = _others(config, height, width, half, count)
    return itemsize * (others + max(_in_strips(layer, itemsize, strip) for layer in inner + outer))


def on_the_whole(
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


def tile_peak(
    config: VAEConfig,
    height: int,
    width: int,
    half: Half,
    itemsize: int = 4,
    count: int = 1,
    tile: int = TILE,
    strip: int = STRIP,
) -> int:
    """Bytes that `decode_in_tiles` or `encode_in_tiles` needs, less the weights."""
    near = on_the_whole(config, height, width, half, tile, itemsize, strip) - 1
    inner, outer = layers(config, height, width, half)
    if near == len(outer) - 1:
        return strip_peak(config, height, width, half, itemsize, count, strip)
    side = tile * config.downscale
    _, tiled = layers(config, min(side, height), min(side, width), half)

    def beside(layer: Layer) -> int:  # what lies between it and the latents
        channels = layer.channels_in if half == "decode" else layer.channels
        return channels * layer.places // (4 if layer.kind in ("upsample", "downsample") else 1)

    handed = beside(outer[near])  # by one part to the other
    steps = tiled[near:] if half == "decode" else tiled[near:][::-1]
    begun = beside(steps[0]) if half == "decode" else config.in_channels * steps[0].places  # lives until a tile is done
    first, *others = (_in_strips(layer, itemsize, strip) for layer in steps)
    piece = max(first, begun + max(others)) + (config.out_channels * height * width if half == "decode" else 0)
    whole = max(_in_strips(layer, itemsize, strip) for layer in inner + outer[:near])
    most = max(whole, handed + piece)
    return itemsize * (_others(config, height, width, half, count) + most)


def _others(config: VAEConfig, height: int, width: int, half: Half, count: int) -> int:
    """Elements that a batch has made, and once more when they are put together."""
    side = config.downscale
    made = config.out_channels if half == "decode" else 2 * config.latent_channels / side**2
    return 2 * (count - 1) * int(made * height * width)


def _whole(layer: Layer) -> int:
    """Elements of values that a layer needs."""
    a, b, places = layer.channels_in, layer.channels, layer.places
    match layer.kind:
        case "resnet":
            return (a + max(a, b) + b) * places
        case "attention":
            return 6 * a * places
        case "behind attention":
            return 4 * a * places
        case "upsample":
            return (a + b) * places + a * places // 4
        case "downsample":
            return a * (places + (layer.height + 1) * (layer.width + 1)) + b * places // 4
        case "end":
            return (2 * a + b) * places


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
