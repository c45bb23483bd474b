"""The VAE of latent diffusion (diffusers' AutoencoderKL; Rombach et al. 2022), from pixels to 8 times smaller latents.

Pixels are (B, 3, H, W) in [-1, 1]; latents are (B, 4, H/8, W/8), and the diffusion model uses them as `scale(z)`.
Attribute names spell the keys of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.config import VAEConfig
from mezzotint.models.attention import attention
from mezzotint.models.blocks import norm_silu
from mezzotint.models.convolution import Conv2d, pad
from mezzotint.models.edits import has_hooks
from mezzotint.models.linear import Linear

EPS = 1e-6  # for every group norm of this network


class ResnetBlock(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, channels_in: int, channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, EPS)
        self.conv1 = Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels, EPS)
        self.conv2 = Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        h = self.conv1(norm_silu(self.norm1, x))
        h = norm_silu(self.norm2, h)  # frees the input of the norm
        h = self.conv2(h)
        return h.add_(self.conv_shortcut(x))  # type: ignore[no-any-return]


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention."""
        h = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1)  # (B, 1, H*W, C)
        h = self.to_out[0](attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        h = h.squeeze(1).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return x + h  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Halve the size by a convolution of stride 2, padded at the bottom and on the right."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the convolution."""
        return self.conv(pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Double the size by nearest-neighbor interpolation and a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the interpolation and the convolution."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]


def _layers(blocks: nn.ModuleList) -> Iterator[nn.Module]:
    """Yield the layers of the blocks, or a block itself if somebody waits for it to be called."""
    for block in blocks:
        if has_hooks(block) or type(block) not in (DownBlock, UpBlock):
            yield block
            continue
        for part in block.children():  # its resnets, then its sampler
            yield from part.children()


class Block(nn.Module):
    """The layers of one level, called one after another."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        for part in self.children():
            for layer in part.children():
                x = layer(x)
        return x


class DownBlock(Block):
    """The layers of one level of the encoder."""

    def __init__(self, channels_in: int, channels: int, layers: int, groups: int, downsample: bool):
        super().__init__()
        widths = [channels_in] + [channels] * layers
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        self.downsamplers = nn.ModuleList([Downsample(channels)] if downsample else [])


class UpBlock(Block):
    """The layers of one level of the decoder."""

    def __init__(self, channels_in: int, channels: int, layers: int, groups: int, upsample: bool):
        super().__init__()
        widths = [channels_in] + [channels] * layers
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        self.upsamplers = nn.ModuleList([Upsample(channels)] if upsample else [])


class MidBlock(nn.Module):
    """Residual block, attention and residual block at the lowest level."""

    def __init__(self, channels: int, groups: int, with_attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups)] if with_attention else [])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """The encoder, from pixels to the moments of the latents."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[max(i - 1, 0)], width, config.layers_per_block, groups, downsample=i < last)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def layers(self) -> list[nn.Module]:
        """Return the layers between conv_in and conv_norm_out, in order."""
        return [*_layers(self.down_blocks), self.mid_block]

    def forward(self, x: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) to moments (B, 8, h, w)."""
        x = self.conv_in(x)
        for layer in self.layers():  # not in the blocks, whose callers would keep x alive
            x = layer(x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """The decoder, from latents to pixels."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, upsample=i < last)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def layers(self) -> list[nn.Module]:
        """Return the layers between conv_in and conv_norm_out, in order."""
        return [self.mid_block, *_layers(self.up_blocks)]

    def forward(self, z: Tensor) -> Tensor:
        """Decode latents (B, 4, h, w) to pixels (B, 3, 8h, 8w)."""
        x = self.conv_in(z)
        for layer in self.layers():
            x = layer(x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian distribution over unscaled latents.

    Attributes:
        mean: Its mean, (B, 4, h, w).
        logvar: The logarithm of its variance, (B, 4, h, w).
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:
        """Return the distribution of the encoder's output (B, 8, h, w)."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a sample; the noise is drawn on the generator's device, so a CPU generator works for every device."""
        device = generator.device if generator else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)


class VAE(nn.Module):
    """A KL autoencoder.

    Attributes:
        draws_noise: Whether an encoded picture's latents are drawn, because their posterior has a variance.
    """

    draws_noise: ClassVar[bool] = True

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        moments = 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(moments, moments, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = (
            Conv2d(config.latent_channels, config.latent_channels, 1) if config.use_post_quant_conv else nn.Identity()
        )

    def encode(self, pixels: Tensor) -> Posterior:
        """Encode pixels (B, 3, H, W) in [-1, 1], with H and W multiples of 8, to the posterior of unscaled latents."""
        return Posterior.from_moments(self.quant_conv(self.encoder(pixels)))

    def decode(self, z: Tensor) -> Tensor:
        """Decode unscaled latents (B, 4, h, w) to pixels (B, 3, 8h, 8w), approximately in [-1, 1] and not clamped."""
        return self.decoder(self.post_quant_conv(z))  # type: ignore[no-any-return]

    def scale(self, z: Tensor) -> Tensor:
        """Scale latents to the unit variance that the UNet denoises."""
        if self.config.latents_mean and self.config.latents_std:
            mean, std = (_channels(values, z) for values in (self.config.latents_mean, self.config.latents_std))
            return (z - mean) * self.config.scaling_factor / std
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def unscale(self, latents: Tensor) -> Tensor:
        """Undo `scale`."""
        if self.config.latents_mean and self.config.latents_std:
            mean, std = (_channels(values, latents) for values in (self.config.latents_mean, self.config.latents_std))
            return latents * std / self.config.scaling_factor + mean
        return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Return one value per channel, (1, C, 1, 1)."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
