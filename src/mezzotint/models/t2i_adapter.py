"""T2I-Adapter (Mou et al. 2023): a small network whose features of a picture are added to those of a UNet's way down.

`adapter(picture)` takes the conditioning picture alone, once for a run, and returns the `features` of `UNet.forward`.
Attribute names are the keys of diffusers' T2IAdapter, so its checkpoints load unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.config import T2IAdapterConfig
from mezzotint.models.convolution import Conv2d


class AdapterResnet(nn.Module):
    """Two convolutions around a ReLU, added to their input; the second is 1x1 in a full adapter."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.block1 = Conv2d(width, width, 3, padding=1)
        self.block2 = Conv2d(width, width, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y: Tensor = self.block2(F.relu(self.block1(x)))
        return y + x


class AdapterBlock(nn.Module):
    """One feature of an adapter: optional pooling, then residual blocks, which a light adapter has at a quarter width.

    Where the sides are odd, pooling rounds up, as the UNet's convolution of stride 2 does.
    """

    def __init__(self, inputs: int, outputs: int, layers: int, *, down: bool, light: bool) -> None:
        super().__init__()
        self.down = down
        width = outputs // 4 if light else outputs
        self.in_conv = Conv2d(inputs, width, 1) if light or inputs != outputs else None
        self.resnets = nn.Sequential(*(AdapterResnet(width, 3 if light else 1) for _ in range(layers)))
        self.out_conv = Conv2d(width, outputs, 1) if light else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        x = F.avg_pool2d(x, 2, 2, ceil_mode=True) if self.down else x
        x = self.resnets(x if self.in_conv is None else self.in_conv(x))
        if self.out_conv is not None:
            x = self.out_conv(x)
        return x


class AdapterBody(nn.Module):
    """The blocks of an adapter, after a first convolution if it is a full one."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        light, layers = config.adapter_type == "light_adapter", config.num_res_blocks
        width, features = config.in_channels * config.downscale_factor**2, config.features
        self.conv_in = None if light else Conv2d(width, features[0][0], 3, padding=1)
        width, scale = width if light else features[0][0], config.downscale_factor
        self.body = nn.ModuleList()
        for outputs, pixels in features:
            self.body.append(AdapterBlock(width, outputs, layers, down=pixels > scale, light=light))
            width, scale = outputs, pixels


class T2IAdapter(nn.Module):
    """A T2I-Adapter; see the module's docstring."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        """Build the network."""
        super().__init__()
        self.config = config
        self.adapter = AdapterBody(config)

    def forward(self, picture: Tensor) -> list[Tensor]:
        """Return the features of pictures (B, 1 or 3, H, W) in [0, 1], each (B, channels, H / pixels, W / pixels)."""
        x = F.pixel_unshuffle(picture, self.config.downscale_factor)
        if self.adapter.conv_in is not None:
            x = self.adapter.conv_in(x)
        features = []
        for block in self.adapter.body:
            x = block(x)
            features.append(x)
        return features


class T2IRun:
    """A T2I-Adapter in one run: its picture, its scales, and its features, which are computed once.

    Attributes:
        network: The network.
        hint: The conditioning picture, (1, 1 or 3, H, W) in [0, 1].
        scales: For each step the factor of each feature, or None where the network does not act.
        conditional_only: Whether it acts on the prompts' outputs alone, not on the unconditional and negative ones.
    """

    def __init__(
        self,
        network: T2IAdapter,
        hint: Tensor,
        scales: Sequence[Sequence[float] | None],
        conditional_only: bool = False,
    ) -> None:
        self.network, self.hint, self.scales, self.conditional_only = network, hint, scales, conditional_only
        self._features: list[Tensor] | None = None

    def of(self, network: T2IAdapter) -> T2IRun:
        """Return the same with another network."""
        return T2IRun(network, self.hint, self.scales, self.conditional_only)

    def features(self, step: int, batch: int, acts: Sequence[bool]) -> list[Tensor] | None:
        """Return the features for conditions that share a batch, of batch 1 if all have the same; None if none act.

        Args:
            step: Index of the step.
            batch: Number of latents.
            acts: For each condition whether it is one of the prompts'.
        """
        scales = self.scales[min(step, len(self.scales) - 1)]
        rows = [one or not self.conditional_only for one in acts]
        if scales is None or not any(rows):
            return None
        if self._features is None:
            weight = next(self.network.parameters())
            self._features = self.network(self.hint.to(weight.device, weight.dtype))
        features = [feature * scale for feature, scale in zip(self._features, scales, strict=True)]
        if all(rows):
            return features
        factors = torch.tensor([float(row) for row in rows for _ in range(batch)])
        return [feature * factors.to(feature)[:, None, None, None] for feature in features]


def add_features(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """Return the sums of the features of two adapters, either of which may have fewer."""
    pairs = zip_longest(first, second)
    return [one if other is None else other if one is None else one + other for one, other in pairs]
