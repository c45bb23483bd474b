"""What the networks hold while they run, and how much they compute, from their shapes alone: no torch, no weights.

Each function here goes through the forward of the module of its name, line by line, and notes in a `Ledger` what is
allocated, what is let go, and what is needed for a moment only. A tensor counts from the operation that makes it until
nothing names it any more, in the callers' frames too. Beside the results of the operations there are

    the weight of a convolution wider than 1x1, which oneDNN lays out anew at each call (on the CPU); in a dtype that
    oneDNN has no convolution for on this processor, each pixel's whole neighbourhood instead
    a weight that is not where it is computed with, or not in that dtype, made whole for the one call that uses it
    the scores of an attention, as far as its backend writes them down
"""

from __future__ import annotations

from dataclasses import dataclass

from mezzotint.config import CLIPConfig, UNetConfig, VAEConfig
from mezzotint.models.vae_sizes import STRIP, Half, layers, strip_peak, tile_peak, whole_peak
from mezzotint.placement import LEAST, SLICE, bytes_of

PEAKS = {"whole": whole_peak, "strips": strip_peak, "tiles": tile_peak}


class Ledger:
    """Bytes that are held, now and at most; and the multiplications so far."""

    def __init__(self) -> None:
        self.now = self.peak = self.work = 0

    def hold(self, count: int) -> None:
        """These are allocated."""
        self.now += count
        self.peak = max(self.peak, self.now)

    def drop(self, count: int) -> None:
        """These are let go."""
        self.now -= count

    def touch(self, count: int) -> None:
        """These are allocated and let go again."""
        self.peak = max(self.peak, self.now + count)


@dataclass(frozen=True)
class Working:
    """How networks run: bytes of a number; whether convolutions lay out their weights, or unfold their inputs (both on
    the CPU); whether a large weight is made for each use, and with how many bytes beside it; the attention's backend.
    """

    itemsize: int = 4
    lays_out: bool = True
    unfolds: bool = False
    makes: bool = False
    beside: int = 0
    attention: str = "auto"

    def weight(self, inputs: int, outputs: int, kernel: int = 1, cells: int = 0) -> int:
        """Bytes that a layer takes while it is used, beyond its result and what is always there; cells: of a
        convolution's result, over the batch.
        """
        numbers = inputs * outputs * kernel * kernel
        made = numbers * self.itemsize + self.beside if self.makes and numbers >= LEAST else 0
        if kernel == 1:
            return made
        if self.unfolds:
            return made + cells * inputs * kernel * kernel * self.itemsize
        return made + (numbers * self.itemsize if self.lays_out else 0)

    def scores(self, heads: int, queries: int, keys: int) -> int:
        """Bytes of scores, of `heads` over the whole batch, that the backend writes down."""
        whole = 2 * heads * queries * keys * self.itemsize  # and their softmax
        if self.attention.startswith("sliced"):
            return min(whole, bytes_of(self.attention.partition(":")[2] or SLICE))
        return whole if self.attention == "math" else 0


def unet(config: UNetConfig, batch: int, height: int, width: int, tokens: int, working: Working) -> Ledger:
    """One call of the UNet on latents (batch, C, height, width), beyond its weights and inputs.

    batch counts each condition; tokens: of the context, whose keys and values are the run's (`keys_values`).
    """
    return _UNet(config, batch, height, width, tokens, working).run()


def keys_values(config: UNetConfig, tokens: int) -> int:
    """Numbers in the keys and values of one condition, over all layers."""
    layers, depths = config.per_level(config.layers_per_block), config.per_level(config.transformer_layers_per_block)
    total = 0
    for level, channels in enumerate(config.block_out_channels):
        down = config.down_block_types[level].startswith("CrossAttn")
        up = config.up_block_types[len(layers) - 1 - level].startswith("CrossAttn")
        blocks = depths[level] * (down * layers[level] + up * (layers[level] + 1))
        if level == len(layers) - 1 and config.mid_block_type is not None:
            blocks += depths[level]
        total += blocks * 2 * tokens * channels
    return total


def text(config: CLIPConfig, working: Working) -> Ledger:
    """One call of a text encoder on one window, beyond its weights."""
    ledger, dim, inner, window = Ledger(), config.hidden_size, config.intermediate_size, config.max_position_embeddings
    states = window * dim * working.itemsize
    ledger.hold(states)
    for _ in range(config.num_hidden_layers):
        ledger.hold(2 * states)  # this layer's output, kept to the end, and what becomes of it
        ledger.touch(4 * states + working.weight(dim, dim) + working.scores(config.num_attention_heads, window, window))
        ledger.touch(3 * window * inner * working.itemsize + working.weight(dim, inner))
        ledger.drop(states)
        ledger.work += window * (4 * dim * dim + 2 * dim * inner + 2 * window * dim)
    return ledger


def vae_peak(config: VAEConfig, batch: int, height: int, width: int, half: Half, way: str, working: Working) -> int:
    """Bytes at most of one half of the VAE on `batch` pictures of this size in pixels, beyond its weights.

    way: as in Placement.vae. What vae_sizes.py says, and what `working` adds to it.
    """
    inner, outer = layers(config, height, width, half)
    peak = PEAKS[way](config, height, width, half, working.itemsize, batch)
    largest = max(max(layer.channels_in, layer.channels) for layer in inner)
    if working.makes:
        peak += 9 * largest * largest * working.itemsize + working.beside
    if working.unfolds:
        widest = max(layer.channels_in * layer.places for layer in (*inner, *outer)) * batch
        peak += 9 * (widest if way == "whole" else min(widest, STRIP)) * working.itemsize
    if config.mid_block_add_attention:
        deep = inner[1].places
        peak = max(peak, batch * 6 * largest * deep * working.itemsize + working.scores(batch, deep, deep))
    return peak


def vae_work(config: VAEConfig, height: int, width: int, half: Half) -> int:
    """Multiplications of one half of the VAE on one picture."""
    total = 0
    for layer in (layer for some in layers(config, height, width, half) for layer in some):
        inputs, outputs = layer.channels_in, layer.channels
        if layer.kind == "attention":
            total += layer.places * inputs * (4 * inputs + 2 * layer.places)
            continue
        total += 9 * inputs * outputs * layer.places // (4 if layer.kind == "downsample" else 1)
        if layer.kind in ("resnet", "behind attention"):
            total += (9 * outputs + (inputs if inputs != outputs else 0)) * outputs * layer.places
    return total


class _UNet:
    """One call. `x` everywhere: bytes of the feature map that the caller holds."""

    def __init__(self, config: UNetConfig, batch: int, height: int, width: int, tokens: int, working: Working) -> None:
        self.config, self.batch, self.tokens, self.working = config, batch, tokens, working
        self.sizes = [(height, width)]
        for _ in config.block_out_channels[1:]:
            height, width = (height + 1) // 2, (width + 1) // 2
            self.sizes.append((height, width))
        self.ledger = Ledger()

    def run(self) -> Ledger:
        """As `unet`."""
        config, channels = self.config, self.config.block_out_channels
        layers = config.per_level(config.layers_per_block)
        last = len(channels) - 1
        self.ledger.hold(self.map(0, channels[0]))
        skips = [(0, channels[0])]  # (level of its size, channels) of each
        for level, kind in enumerate(config.down_block_types):
            for _ in range(layers[level]):
                self.resnet(level, skips[-1][1], channels[level])
                if kind.startswith("CrossAttn"):
                    self.transformer(level)
                skips.append((level, channels[level]))
            if level < last:
                self.convolution(level + 1, channels[level], channels[level], 3)
                skips.append((level + 1, channels[level]))
        x = 0  # so far that of the last skip
        if config.mid_block_type is not None:
            x = self.map(last, channels[-1])
            self.resnet(last, channels[-1], channels[-1])
            self.transformer(last)
            self.resnet(last, channels[-1], channels[-1])
            self.ledger.drop(x)
        inputs = channels[-1]
        for level, kind in zip(reversed(range(len(channels))), config.up_block_types, strict=True):
            outputs = channels[level]
            for number in range(layers[level] + 1):
                skip = skips.pop()[1]
                joined = self.map(level, inputs + skip)
                self.ledger.hold(joined)
                self.ledger.drop(self.map(level, skip))
                self.resnet(level, inputs + skip, outputs)
                self.ledger.drop(joined)
                if number:  # the block's own input is its caller's until it is done
                    self.ledger.drop(self.map(level, inputs))
                if kind.startswith("CrossAttn"):
                    self.transformer(level)
                inputs = outputs
            if level:
                enlarged = self.map(level - 1, outputs)
                self.ledger.hold(enlarged)
                self.convolution(level - 1, outputs, outputs, 3)
                self.ledger.drop(enlarged + self.map(level, outputs))
            self.ledger.drop(x)
            x = self.map(level - 1 if level else 0, outputs)
        self.ledger.hold(x)  # normed
        self.convolution(0, channels[0], config.out_channels, 3)
        return self.ledger

    def map(self, level: int, channels: int) -> int:
        """Bytes of a feature map."""
        height, width = self.sizes[level]
        return self.batch * channels * height * width * self.working.itemsize

    def convolution(self, level: int, inputs: int, outputs: int, kernel: int) -> None:
        """One convolution, or linear layer, to a map of this level."""
        self.made(level, inputs, outputs, kernel)
        self.ledger.touch(self.working.weight(inputs, outputs, kernel, self.map(level, 1) // self.working.itemsize))

    def made(self, level: int, inputs: int, outputs: int, kernel: int = 1) -> None:
        """The same but for its weight."""
        size = self.map(level, outputs)
        self.ledger.hold(size)
        self.ledger.work += size // self.working.itemsize * inputs * kernel * kernel

    def resnet(self, level: int, inputs: int, outputs: int) -> None:
        """blocks.ResnetBlock; leaves its output."""
        x, y = self.map(level, inputs), self.map(level, outputs)
        self.ledger.hold(x)  # normed
        self.convolution(level, inputs, outputs, 3)
        self.ledger.drop(x)
        self.ledger.hold(y)  # normed
        self.ledger.drop(y)
        self.convolution(level, outputs, outputs, 3)
        self.ledger.drop(y)
        if inputs != outputs:
            self.convolution(level, inputs, outputs, 1)
            self.ledger.drop(y)

    def transformer(self, level: int) -> None:
        """blocks.Transformer; its output takes the place of its input, of the same size."""
        width = self.config.block_out_channels[level]
        x = self.map(level, width)
        self.ledger.hold(x)  # normed
        self.convolution(level, width, width, 1)
        self.ledger.drop(x)
        for _ in range(self.config.per_level(self.config.transformer_layers_per_block)[level]):
            self.block(level, width, x)
        self.convolution(level, width, width, 1)
        self.ledger.drop(x)
        self.ledger.hold(x)  # the sum
        self.ledger.drop(2 * x)

    def block(self, level: int, width: int, x: int) -> None:
        """blocks.TransformerBlock; its output takes the place of its input, of the same size."""
        ledger, working = self.ledger, self.working
        heads = self.config.heads[level] * self.batch
        cells = self.sizes[level][0] * self.sizes[level][1]
        # its input stays its caller's to the end; each sum takes the place of the one before
        for number, (keys, made) in enumerate(((cells, 3), (self.tokens, 1))):
            ledger.hold(x)  # normed
            self.made(level, width, made * width)  # q, k, v; or q alone
            ledger.touch(working.weight(width, width))
            ledger.hold(x)  # attended
            ledger.touch(working.scores(heads, cells, keys))
            ledger.work += 2 * self.batch * cells * keys * width
            self.convolution(level, width, width, 1)
            ledger.drop((made + 2) * x)
            ledger.drop(x if number else 0)
        ledger.hold(x)  # normed
        self.made(level, width, 8 * width)  # both halves of GEGLU's projection
        ledger.touch(working.weight(width, 8 * width))
        ledger.hold(4 * x)
        ledger.drop(8 * x)
        self.made(level, 4 * width, width)
        ledger.touch(working.weight(4 * width, width))
        ledger.drop(7 * x)  # the gated, the normed, the sum before, and the input, once its caller lets it go
