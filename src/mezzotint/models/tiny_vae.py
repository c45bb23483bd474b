"""TAESD, a small autoencoder for the latents of Stable Diffusion (diffusers' AutoencoderTiny; O. Boer Bohan 2023).

It takes and returns the latents that the UNet denoises, so its scaling factor is 1, and its encoder has no variance:
nothing is drawn. All its layers are convolutions without norms, so it can be computed in strips exactly. Attribute
names spell the keys of diffusers' checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from mezzotint.config import TinyVAEConfig, VAEConfig
from mezzotint.models.convolution import Conv2d, joined, pad, seamless
from mezzotint.models.vae import VAE, Posterior

LIMIT = 3.0  # latents are bounded by LIMIT * tanh(z / LIMIT) before they are decoded
STRIP_ROWS = 32  # rows of latents in a strip


class Block(nn.Module):
    """Three convolutions with a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        convolutions = [Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return torch.relu_(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """The encoder, from pixels to latents."""

    def __init__(self, config: TinyVAEConfig):
        super().__init__()
        width, self.blocks = config.encoder_block_out_channels[0], config.num_encoder_blocks
        layers: list[nn.Module] = []
        for level, blocks in enumerate(config.num_encoder_blocks):
            layers.append(
                Conv2d(width, width, 3, padding=1, stride=2, bias=False)
                if level
                else Conv2d(config.in_channels, width, 3, padding=1)
            )
            layers += [Block(width) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, Conv2d(width, config.latent_channels, 3, padding=1))

    @property
    def conv_in(self) -> Conv2d:
        """The first layer."""
        return cast(Conv2d, self.layers[0])

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] to latents (B, 4, h, w)."""
        return self.layers(pixels.add(1).div(2))  # type: ignore[no-any-return]

    def in_strips(self, pixels: Tensor, rows: int = STRIP_ROWS) -> Tensor:
        """Compute the same in strips of `rows` rows of latents."""
        return _in_strips(self, pixels, rows, reach(self.blocks[::-1]), cells=2 ** (len(self.blocks) - 1), cells_out=1)


class TinyDecoder(nn.Module):
    """The decoder, from latents to pixels."""

    def __init__(self, config: TinyVAEConfig):
        super().__init__()
        width, self.blocks = config.decoder_block_out_channels[0], config.num_decoder_blocks
        layers: list[nn.Module] = [Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
        for level, blocks in enumerate(config.num_decoder_blocks):
            layers += [Block(width) for _ in range(blocks)]
            if level < len(self.blocks) - 1:
                layers += [nn.Upsample(scale_factor=2), Conv2d(width, width, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers, Conv2d(width, config.out_channels, 3, padding=1))

    @property
    def conv_in(self) -> Conv2d:
        """The first layer."""
        return cast(Conv2d, self.layers[0])

    def forward(self, z: Tensor) -> Tensor:
        """Decode latents (B, 4, h, w) to pixels (B, 3, 8h, 8w)."""
        return self.layers(torch.tanh(z / LIMIT) * LIMIT).mul(2).sub(1)  # type: ignore[no-any-return]

    def in_strips(self, z: Tensor, rows: int = STRIP_ROWS) -> Tensor:
        """Compute the same in strips of `rows` rows of latents."""
        return _in_strips(self, z, rows, reach(self.blocks), cells=1, cells_out=2 ** (len(self.blocks) - 1))


class TinyVAE(VAE):
    """A TAESD autoencoder in place of a KL autoencoder."""

    config: TinyVAEConfig
    encoder: TinyEncoder  # type: ignore[assignment]
    decoder: TinyDecoder  # type: ignore[assignment]
    draws_noise: ClassVar[bool] = False

    def __init__(self, config: TinyVAEConfig):
        nn.Module.__init__(self)  # without the layers of a KL autoencoder
        self.config = config
        self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)

    def encode(self, pixels: Tensor) -> Posterior:
        """Encode pixels (B, 3, H, W) in [-1, 1] to latents, as a posterior of variance 0."""
        return _exactly(self.encoder(pixels))

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, 4, h, w) to pixels (B, 3, 8h, 8w), approximately in [-1, 1] and not clamped."""
        return self.decoder(z)  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode_in_strips(self, pixels: Tensor, rows: int = STRIP_ROWS) -> Posterior:
        """Encode as `encode` does, in strips of `rows` rows of latents."""
        return _exactly(self.encoder.in_strips(pixels, rows))

    @torch.no_grad()
    def decode_in_strips(self, z: Tensor, rows: int = STRIP_ROWS) -> Tensor:
        """Decode as `decode` does, in strips of `rows` rows of latents."""
        return self.decoder.in_strips(z, rows)


def make_vae(config: VAEConfig) -> VAE:
    """Build the autoencoder of a config."""
    return TinyVAE(config) if isinstance(config, TinyVAEConfig) else VAE(config)


def reach(blocks: Sequence[int]) -> int:
    """Return how many rows of latents away a row of the result is affected by one.

    Args:
        blocks: The number of blocks at each level, from the latents on.
    """
    rows = sum((3 * count + 1) / 2.0**level for level, count in enumerate(blocks))
    return math.ceil(rows) + 2  # the samplers shift by less than one


def _in_strips(network: nn.Module, x: Tensor, rows: int, margin: int, cells: int, cells_out: int) -> Tensor:
    """Compute a half of the autoencoder strip by strip, each with the rows around it that affect it.

    Args:
        network: The half.
        x: Its input.
        rows: Rows of latents in a strip.
        margin: Rows of latents around it.
        cells: Rows of x for one of latents.
        cells_out: Rows of the result for one of latents.
    """
    wraps = margin if "y" in joined.get() else 0  # rows of the opposite side, where the two are joined
    x = pad(x, (0, 0, wraps * cells, wraps * cells))
    height = x.shape[2] // cells
    strips = []
    with seamless(joined.get().replace("y", "")):
        for top in range(wraps, height - wraps, rows):
            bottom = min(top + rows, height - wraps)
            start, stop = max(top - margin, 0), min(bottom + margin, height)
            strip = network(x[:, :, start * cells : stop * cells])
            strips.append(strip[:, :, (top - start) * cells_out : (bottom - start) * cells_out].clone())
    return torch.cat(strips, dim=2)


def _exactly(latents: Tensor) -> Posterior:
    return Posterior(latents, torch.full_like(latents, -math.inf))
