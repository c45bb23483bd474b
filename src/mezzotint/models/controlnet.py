"""ControlNet (Zhang et al. 2023): a copy of a UNet's way down that reads a picture, and adds to the UNet's features.

`controlnet(sample, timestep, condition, hint)` takes what the UNet takes, and the conditioning picture. It returns a
residual for each skip connection of the UNet and one for its middle block, the `down_residuals` and `mid_residual` of
`UNet.forward`. Attribute names are the keys of diffusers' ControlNetModel, so its checkpoints load unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.config import ControlNetConfig
from mezzotint.models.blocks import KeysValues
from mezzotint.models.convolution import Conv2d
from mezzotint.models.unet import Condition, DownPath, UNet

Residuals = tuple[list[Tensor], Tensor]  # for each skip connection, and for the middle block


class ControlNetConditioningEmbedding(nn.Module):
    """Convolutions from the conditioning picture (B, 3, H, W) to the UNet's first features (B, channels, h, w)."""

    def __init__(self, inputs: int, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.conv_in = Conv2d(inputs, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in pairwise(widths):
            self.blocks.append(Conv2d(width, width, 3, padding=1))
            self.blocks.append(Conv2d(width, wider, 3, padding=1, stride=2))
        self.conv_out = Conv2d(widths[-1], outputs, 3, padding=1)
        _fill_with_zeros(self.conv_out)

    def forward(self, hint: Tensor) -> Tensor:
        """Apply the convolutions."""
        x = F.silu(self.conv_in(hint))
        for block in self.blocks:
            x = F.silu(block(x))
        y: Tensor = self.conv_out(x)
        return y


class ControlNet(DownPath):
    """A ControlNet; see the module's docstring."""

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig) -> None:
        """Build the network.

        Raises:
            CheckpointError: If the configuration needs something that this network does not have.
        """
        super().__init__(config)
        widths = config.block_out_channels
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            config.conditioning_channels, config.conditioning_embedding_out_channels, widths[0]
        )
        self.controlnet_down_blocks = nn.ModuleList(Conv2d(width, width, 1) for width in self.skip_channels)
        self.controlnet_mid_block = Conv2d(widths[-1], widths[-1], 1)
        for layer in (*self.controlnet_down_blocks, self.controlnet_mid_block):
            _fill_with_zeros(layer)

    @classmethod
    def from_unet(cls, unet: UNet, condition_widths: Sequence[int]) -> ControlNet:
        """Return a ControlNet that is a copy of a UNet's way down and adds nothing yet, to be trained."""
        fields = {**unet.config.model_dump(), "conditioning_embedding_out_channels": tuple(condition_widths)}
        network = cls(ControlNetConfig.model_validate({**fields, "time_cond_proj_dim": None}))
        own, state = network.state_dict(), unet.state_dict()
        network.load_state_dict({name: state.get(name, tensor) for name, tensor in own.items()})
        return network.to(unet.conv_in.weight.device, unet.conv_in.weight.dtype)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        condition: Condition,
        hint: Tensor,
        *,
        keys_values: Iterable[KeysValues] | None = None,
        scales: Sequence[float] | None = None,
        time_embedding: Tensor | None = None,
    ) -> Residuals:
        """Return the residuals for each skip connection of the UNet and for its middle block.

        Args:
            sample: Latents (B, C, h, w), scaled; or (B / n, C, h, w) if they are the same for each of n conditions.
            timestep: One timestep for each, (B,), or one number for all.
            condition: The prompts, of batch B.
            hint: The result of `embed`, of the batch of `sample` or 1.
            keys_values: The result of `keys_values`, which saves computing it at each step.
            scales: Factor of each residual, that of the middle block last.
            time_embedding: An embedding to add to that of the timestep, of batch B or 1.
        """
        times = iter(self.time_projections(timestep, condition, added=time_embedding))
        contexts = iter(self.keys_values(condition) if keys_values is None else keys_values)
        skips, x = self.descend(self.conv_in(sample) + hint, times, contexts, len(condition.context))
        convolutions = (*self.controlnet_down_blocks, self.controlnet_mid_block)
        residuals = [convolve(skip) for convolve, skip in zip(convolutions, (*skips, x), strict=True)]
        if scales is not None:
            residuals = [residual * scale for residual, scale in zip(residuals, scales, strict=True)]
        if self.config.global_pool_conditions:
            residuals = [residual.mean(dim=(2, 3), keepdim=True) for residual in residuals]
        return residuals[:-1], residuals[-1]

    def embed(self, hint: Tensor) -> Tensor:
        """Return the features (B, channels, h, w) of conditioning pictures (B, 3, H, W) in [0, 1]; once for a run."""
        flipped = hint.flip(1) if self.config.controlnet_conditioning_channel_order == "bgr" else hint
        features: Tensor = self.controlnet_cond_embedding(flipped)
        return features

    @property
    def residual_count(self) -> int:
        """Number of residuals, that of the middle block included."""
        return len(self.skip_channels) + 1


def _fill_with_zeros(layer: nn.Module) -> None:
    """Make a layer return zeros, so that training begins with the UNet as it is."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class ControlRun:
    """A ControlNet in one run: its picture, its scales, and what is computed once.

    Attributes:
        network: The network.
        hint: The conditioning picture, (1, 3, H, W) in [0, 1], or -1 where it is masked.
        scales: For each step the factor of each residual, or None where the network does not act.
        conditional_only: Whether it acts on the prompts' outputs alone, not on the unconditional and negative ones.
    """

    def __init__(
        self,
        network: ControlNet,
        hint: Tensor,
        scales: Sequence[Sequence[float] | None],
        conditional_only: bool = False,
    ) -> None:
        self.network, self.hint, self.scales, self.conditional_only = network, hint, scales, conditional_only
        self._prepared: tuple[Tensor, Tensor | None] | None = None
        self._batched: dict[tuple[object, ...], tuple[Condition, list[KeysValues]]] = {}

    def of(self, network: ControlNet) -> ControlRun:
        """Return the same with another network."""
        run = copy(self)
        run.network, run._prepared, run._batched = network, None, {}
        return run

    def prepare(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the picture's features, like `weight` in device and dtype, and what is added to the time embedding."""
        return self.network.embed(self.hint.to(weight.device, weight.dtype)), None

    def residuals(
        self, step: int, sample: Tensor, timestep: float, conditions: Sequence[Condition], acts: Sequence[bool]
    ) -> Residuals | None:
        """Return the residuals for conditions that share a batch, or None if there are none.

        Args:
            step: Index of the step.
            sample: Latents (B, C, h, w), scaled.
            timestep: The timestep.
            conditions: The conditions, each of batch B or 1, of the same length.
            acts: For each condition whether it is one of the prompts'.
        """
        scales = self.scales[min(step, len(self.scales) - 1)]
        rows = [k for k, one in enumerate(acts) if one or not self.conditional_only]
        if scales is None or not rows:
            return None
        weight = self.network.conv_in.weight
        if self._prepared is None:
            self._prepared = self.prepare(weight)
        features, embedding = self._prepared
        condition, keys_values = self._batch(len(sample), [conditions[k] for k in rows])
        down, mid = self.network(
            sample.to(weight.dtype),
            timestep,
            condition,
            features,
            keys_values=keys_values,
            scales=scales,
            time_embedding=embedding,
        )
        if len(rows) == len(acts):
            return down, mid
        down = [_spread(residual, rows, len(acts)) for residual in down]
        return down, _spread(mid, rows, len(acts))

    def _batch(self, batch: int, conditions: Sequence[Condition]) -> tuple[Condition, list[KeysValues]]:
        """Concatenate the conditions, each `batch` times, with their keys and values; computed once."""
        key = (batch, *conditions)
        if key not in self._batched:
            weight = self.network.conv_in.weight
            placed = [condition.to(weight.device, weight.dtype) for condition in conditions]
            joined = Condition.cat([c if len(c.context) == batch else c.repeat(batch) for c in placed])
            self._batched[key] = joined, self.network.keys_values(joined)
        return self._batched[key]


def _spread(residual: Tensor, rows: Sequence[int], count: int) -> Tensor:
    """Return a residual with zeros for those of `count` conditions that are not in `rows`."""
    parts = dict(zip(rows, residual.chunk(len(rows)), strict=True))
    zeros = torch.zeros_like(residual[: len(residual) // len(rows)])
    return torch.cat([parts.get(k, zeros) for k in range(count)])


def add_residuals(first: Residuals | None, second: Residuals | None) -> Residuals | None:
    """Return the sum of the residuals of two networks, either of which may not act."""
    if first is None or second is None:
        return first or second
    return [one + other for one, other in zip(first[0], second[0], strict=True)], first[1] + second[1]
