"""The denoising network: a UNet with cross-attention to the prompt (SD 1.x, 2.x, XL, and smaller ones).

`unet(sample, timestep, condition)` takes noisy latents (B, C, h, w), scaled as in training, their timesteps and their
condition, and returns the network's output (B, C_out, h, w): noise, velocity or x0, as trained. denoiser.py converts it
to a denoised estimate. Attribute names are the keys of diffusers' UNet2DConditionModel, so its checkpoints load
unchanged (`load_state_dict(strict=True)`). See Rombach et al. 2022, "High-Resolution Image Synthesis with Latent
Diffusion Models", and Podell et al. 2023 (SDXL).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.config import UNetConfig
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.models import freeu
from mezzotint.models.blocks import (
    Attention,
    Downsample,
    KeysValues,
    ResnetBlock,
    Transformer,
    Upsample,
    norm_silu,
    repeat_to,
)
from mezzotint.models.convolution import Conv2d
from mezzotint.models.edits import has_hooks, source_state, tensor_state
from mezzotint.models.linear import PLAIN_TYPES, Linear
from mezzotint.models.offload import OffloadedLinear

Kind = TypeVar("Kind", bound=nn.Module)


@dataclass(frozen=True, eq=False, repr=False)
class Condition:
    """Encoded prompts, which the UNet is conditioned on.

    Attributes:
        context: Hidden states of the text encoders, (B, T, D).
        pooled: Pooled text embedding, (B, P); SDXL only.
        time_ids: Original height and width, crop top and left, target height and width in pixels, (B, 6); SDXL only.
            Its refiner takes an aesthetic score in place of the last two, (B, 5).
    """

    context: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __repr__(self) -> str:
        parts = {"context": self.context, "pooled": self.pooled, "time_ids": self.time_ids}
        shapes = [f"{name}: {tuple(part.shape)}" for name, part in parts.items() if part is not None]
        dtype = str(self.context.dtype).removeprefix("torch.")
        return f"Condition({', '.join(shapes)}, {dtype} on {self.context.device})"

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move or cast the condition. `time_ids`, numbers of pixels, keep their dtype: bfloat16 would round 1001."""
        return Condition(
            self.context.to(device=device, dtype=dtype),
            None if self.pooled is None else self.pooled.to(device=device, dtype=dtype),
            None if self.time_ids is None else self.time_ids.to(device=device),
        )

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Concatenate conditions of equal T to one batch; `pooled` and `time_ids` are None if one of them has none."""

        def cat_or_none(parts: list[Tensor | None]) -> Tensor | None:
            present = [part for part in parts if part is not None]
            return torch.cat(present) if len(present) == len(parts) else None

        return Condition(
            torch.cat([condition.context for condition in conditions]),
            cat_or_none([condition.pooled for condition in conditions]),
            cat_or_none([condition.time_ids for condition in conditions]),
        )

    def repeat(self, n: int) -> Condition:
        """Repeat the whole batch n times: rows 0, 1, 0, 1 for n = 2."""
        return Condition.cat([self] * n)


class TimestepEmbedding(nn.Module):
    """An MLP over a sinusoid, (B, inputs) -> (B, dim), with an optional second input (guidance of LCM models)."""

    def __init__(self, inputs: int, dim: int, cond_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = Linear(inputs, dim)
        self.linear_2 = Linear(dim, dim)
        self.cond_proj = Linear(cond_dim, inputs, bias=False) if cond_dim is not None else None

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Embed the sinusoid, with the second input if it is given."""
        if cond is not None:
            if self.cond_proj is None:
                raise RequestError("timestep_cond was given, but this UNet has no time_cond_proj_dim to take it.")
            x = x + self.cond_proj(cond)
        y: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return y


class DownBlock(nn.Module):
    """One level of the down path: residual blocks, each followed by a transformer if the level has attention."""

    def __init__(self, resnets: list[ResnetBlock], attentions: list[Transformer], downsample: int | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([] if downsample is None else [Downsample(downsample)])

    def forward(
        self, x: Tensor, times: Iterator[Tensor], contexts: Iterator[KeysValues], feature: Tensor | None = None
    ) -> list[Tensor]:
        """Return the feature map after every layer, for the skip connections; the last is the next block's input.

        A T2I-Adapter's `feature` is added before the downsampling where the level has attention, else after it.
        """
        skips = []
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            x = resnet(x, next(times))
            x = x if transformer is None else transformer(x, contexts)
            skips.append(x)
        if feature is not None and len(self.attentions):
            skips[-1] = x = repeat_to(len(feature), x) + feature
        for downsample in self.downsamplers:
            skips.append(downsample(x))
        if feature is not None and not len(self.attentions):
            skips[-1] = repeat_to(len(feature), skips[-1]) + feature
        return skips


class MidBlock(nn.Module):
    """At the lowest level: residual block, transformer and residual block, or one residual block alone."""

    def __init__(self, resnets: list[ResnetBlock], attentions: list[Transformer]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor, times: Iterator[Tensor], contexts: Iterator[KeysValues]) -> Tensor:
        """Apply the block."""
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            x = resnet(x, next(times))
            x = x if transformer is None else transformer(x, contexts)
        return x


class UpBlock(nn.Module):
    """One level of the up path; each residual block also takes the skip connection of the same size."""

    def __init__(self, resnets: list[ResnetBlock], attentions: list[Transformer], upsample: int | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList([] if upsample is None else [Upsample(upsample)])

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        times: Iterator[Tensor],
        contexts: Iterator[KeysValues],
        factors: tuple[float, float] | None = None,
    ) -> Tensor:
        """Apply the block, taking its skip connections from the end of the list; `factors` are FreeU's of its level."""
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            # without a name for the joined tensor, which would keep it in memory
            x = resnet(
                freeu.concatenate(x, skips.pop(), factors) if factors else torch.cat([x, skips.pop()], dim=1),
                next(times),
            )
            x = x if transformer is None else transformer(x, contexts)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[-2:])
        return x


class DownPath(nn.Module):
    """What a UNet and a ControlNet both begin with: the first convolution, the embeddings, the way down, the middle."""

    def __init__(self, config: UNetConfig) -> None:
        """Build the layers.

        Raises:
            CheckpointError: If the configuration needs something that this network does not have; the message names the
                field.
        """
        super().__init__()
        _check_config(config)
        self.config = config
        channels, layers = config.block_out_channels, config.per_level(config.layers_per_block)
        time_dim, levels = 4 * channels[0], len(channels)
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_dim, config.time_cond_proj_dim)
        self.add_embedding = (
            TimestepEmbedding(config.projection_class_embeddings_input_dim or 0, time_dim)
            if config.addition_embed_type == "text_time"
            else None
        )

        width = channels[0]  # of the feature map
        self.skip_channels = [width]  # of each skip connection
        self.down_blocks = nn.ModuleList()
        for level, depths in enumerate(config.down_depths):
            resnets = []
            for _ in range(layers[level]):
                resnets.append(self._resnet(width, channels[level]))
                width = channels[level]
                self.skip_channels.append(width)
            attentions = [self._transformer(level, depth) for depth in depths if depth]
            below = level + 1 < levels
            self.down_blocks.append(DownBlock(resnets, attentions, width if below else None))
            self.skip_channels += [width] if below else []

        depth = config.mid_depth
        middle = [self._transformer(levels - 1, depth)] if depth else []
        resnets = [] if depth is None else [self._resnet(width, width) for _ in (*middle, None)]
        self.mid_block = None if depth is None else MidBlock(resnets, middle)

    def _resnet(self, inputs: int, outputs: int) -> ResnetBlock:
        config = self.config
        return ResnetBlock(inputs, outputs, 4 * config.block_out_channels[0], config.norm_num_groups, config.norm_eps)

    def _transformer(self, level: int, depth: int) -> Transformer:
        config = self.config
        return Transformer(
            config.block_out_channels[level],
            config.heads[level],
            depth,
            config.cross_attention_dim,
            config.norm_num_groups,
            linear=config.use_linear_projection,
            upcast=config.upcast_attention,
        )

    def descend(
        self,
        x: Tensor,
        times: Iterator[Tensor],
        contexts: Iterator[KeysValues],
        batch: int,
        features: Iterable[Tensor] = (),
    ) -> tuple[list[Tensor], Tensor]:
        """Return the skip connections, of which x is the first, and the output of the middle, each of batch `batch`.

        Args:
            x: Output of the first convolution, (B, channels[0], h, w). Where B is smaller than `batch`, what does not
                depend on the condition is computed once for all conditions.
            times: Time projections.
            contexts: Keys and values.
            batch: Batch of the conditions.
            features: Those of T2I-Adapters, one for each level and then one for the middle, or fewer.
        """
        skips, given = [x], iter(features)
        for block in self.down_blocks:
            # the last: (B, channels[-1], h / 2^(levels-1), w / ...)
            skips += block(skips[-1], times, contexts, *islice(given, 1))
        x = skips[-1] if self.mid_block is None else self.mid_block(skips[-1], times, contexts)
        return [repeat_to(batch, skip) for skip in skips], sum(given, repeat_to(batch, x))

    def keys_values(self, condition: Condition) -> list[KeysValues]:
        """Return the keys and values of every cross-attention, in module order; they are the same at every step."""
        return [attn.keys_values(condition.context) for attn in self.cross_attentions()]

    def time_projections(
        self,
        timestep: Tensor | float,
        condition: Condition,
        timestep_cond: Tensor | None = None,
        added: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the time embedding's projection for every residual block, in module order: (B or 1, channels).

        `added` is a further embedding, (B or 1, 4 * channels[0]).
        """
        weight = self.conv_in.weight
        timestep = torch.as_tensor(timestep, device=weight.device).reshape(-1)
        embedding = self.time_embedding(self._sinusoid(timestep, self.config.block_out_channels[0]), timestep_cond)
        embedding = embedding if added is None else embedding + added
        if self.add_embedding is not None:
            if condition.pooled is None or condition.time_ids is None:
                raise RequestError("This UNet (addition_embed_type text_time) needs condition.pooled and .time_ids.")
            ids = self._sinusoid(condition.time_ids.flatten(), self.config.addition_time_embed_dim or 0)
            ids = ids.reshape(condition.time_ids.shape[0], -1)  # (B, numbers * addition_time_embed_dim)
            embedding = embedding + self.add_embedding(torch.cat([condition.pooled.to(ids.dtype), ids], dim=1))
        embedding = F.silu(embedding)  # (B, time_dim)
        return [resnet.time_emb_proj(embedding) for resnet in self.resnets()]

    def resnets(self) -> Iterator[ResnetBlock]:
        """Yield the residual blocks in module order, looked up anew because a user may have replaced one."""
        for block in self._blocks():
            for layer in block.resnets:  # type: ignore[union-attr]  # a ModuleList
                yield from (layer,) if type(layer) is ResnetBlock else _find(layer, ResnetBlock)

    def cross_attentions(self) -> Iterator[Attention]:
        """Yield the cross-attentions in module order, looked up as the residual blocks are."""
        for block in self._blocks():
            for layer in block.attentions:  # type: ignore[union-attr]
                if type(layer) is Transformer:
                    yield from (inner.attn2 for inner in layer.transformer_blocks)  # type: ignore[misc]
                else:
                    yield from (attn for attn in _find(layer, Attention) if attn.cross)

    def self_attentions(self, parts: Iterable[str]) -> set[Attention]:
        """Return the self-attentions whose name contains one of these parts, such as "mid" or "up_blocks.0"."""
        named = ((name, layer) for name, layer in self.named_modules() if isinstance(layer, Attention))
        return {layer for name, layer in named if not layer.cross and any(part in name for part in parts)}

    def keys_values_state(self) -> Hashable:
        """Return what changes when the layers of `keys_values` are edited; None if their every call must be made."""
        states: list[object] = []
        for attn in self.cross_attentions():
            for layer in (attn.to_k, attn.to_v):
                if type(layer) not in (*PLAIN_TYPES, OffloadedLinear) or has_hooks(layer):
                    return None  # a module of a user's own may give another result at each step
                states += [tensor_state(tensor) for tensor in layer._parameters.values() if tensor is not None]
                if isinstance(layer, OffloadedLinear):
                    states.append(source_state(layer.weight_source))
        return tuple(states)

    def _blocks(self) -> list[nn.Module]:
        return [*self.down_blocks, *([] if self.mid_block is None else [self.mid_block])]

    def fuse_projections(self) -> None:
        """Fuse the attention projections (Attention.fuse); call it once the weights are on their final device."""
        for attn in _find(self, Attention):
            attn.fuse()

    def _sinusoid(self, numbers: Tensor, dim: int) -> Tensor:
        """Return the sinusoidal embedding (Vaswani et al. 2017, section 3.5), computed in float32: (N,) -> (N, dim)."""
        half = dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=numbers.device)
        frequencies = torch.exp(-math.log(10000) * steps / (half - self.config.freq_shift))
        angles = numbers.float()[:, None] * frequencies  # (N, half)
        waves = [angles.cos(), angles.sin()] if self.config.flip_sin_to_cos else [angles.sin(), angles.cos()]
        return torch.cat(waves, dim=1).to(self.conv_in.weight.dtype)


class UNet(DownPath):
    """The UNet of Stable Diffusion; see the module's docstring.

    It runs in the memory format of its weights; `.to(memory_format=torch.channels_last)` is the fastest.
    """

    def __init__(self, config: UNetConfig) -> None:
        """Build the network.

        Raises:
            CheckpointError: If the configuration needs something that this network does not have; the message names the
                field.
        """
        super().__init__(config)
        channels, layers = config.block_out_channels, config.per_level(config.layers_per_block)
        width, skips = channels[-1], [*self.skip_channels]
        self.up_blocks = nn.ModuleList()
        for level, depths in zip(reversed(range(len(channels))), config.up_depths, strict=True):
            resnets = []
            for _ in range(layers[level] + 1):
                resnets.append(self._resnet(width + skips.pop(), channels[level]))
                width = channels[level]
            attentions = [self._transformer(level, depth) for depth in depths if depth]
            self.up_blocks.append(UpBlock(resnets, attentions, width if level > 0 else None))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        condition: Condition,
        *,
        keys_values: Iterable[KeysValues] | None = None,
        time_projections: Iterable[Tensor] | None = None,
        timestep_cond: Tensor | None = None,
        down_residuals: Sequence[Tensor] | None = None,
        mid_residual: Tensor | None = None,
        features: Sequence[Tensor] = (),
        freeu_factors: freeu.FreeU | None = None,
    ) -> Tensor:
        """Return the network's output, (B, C_out, h, w).

        Args:
            sample: Latents (B, C, h, w), scaled; or (B / n, C, h, w) if they are the same for each of n conditions.
            timestep: One timestep for each, (B,), or one number for all.
            condition: The prompts, of batch B.
            keys_values: The result of `keys_values`, which saves computing it at each step.
            time_projections: The result of `time_projections`, likewise.
            timestep_cond: Guidance embedding of LCM models, (B, time_cond_proj_dim).
            down_residuals: Residuals that ControlNet adds to the skip connections, one for each.
            mid_residual: Residual that ControlNet adds to the output of the middle block.
            features: What T2I-Adapters add: one for each level of the way down, then one for the middle, or fewer.
            freeu_factors: b1, b2, s1 and s2 of FreeU.

        Raises:
            RequestError: If the inputs do not fit the network.
        """
        if time_projections is None:
            time_projections = self.time_projections(timestep, condition, timestep_cond)
        times = iter(time_projections)
        contexts = iter(self.keys_values(condition) if keys_values is None else keys_values)
        if self.config.center_input_sample:
            sample = 2 * sample - 1

        skips, x = self.descend(self.conv_in(sample), times, contexts, len(condition.context), features)
        if down_residuals is not None:
            if len(down_residuals) != len(skips):
                raise RequestError(f"{len(down_residuals)} down_residuals were given; this UNet takes {len(skips)}.")
            skips = [skip + residual for skip, residual in zip(skips, down_residuals, strict=True)]
        if mid_residual is not None:
            x = x + mid_residual
        for level, block in enumerate(self.up_blocks):
            x = block(x, skips, times, contexts, freeu.of_level(freeu_factors, level))
        output: Tensor = self.conv_out(norm_silu(self.conv_norm_out, x))  # (B, out_channels, h, w)
        return output

    def guidance_embedding(self, scale: float) -> Tensor:
        """Return the `timestep_cond` for a guidance scale, (1, time_cond_proj_dim).

        It is a sinusoid of 1000 (scale - 1) (Luo et al. 2023, "Latent Consistency Models", section 4.3). Unlike that of
        the timestep its sines come first, and its lowest frequency is 1/10000.

        Raises:
            RequestError: If the UNet does not take one.
        """
        if self.config.time_cond_proj_dim is None:
            raise RequestError("A guidance embedding is for a UNet with time_cond_proj_dim, which this one lacks.")
        half = self.config.time_cond_proj_dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=self.conv_in.weight.device)
        angles = 1000.0 * (scale - 1.0) * torch.exp(-math.log(10000) * steps / max(half - 1, 1))
        waves = F.pad(torch.cat([angles.sin(), angles.cos()]), (0, self.config.time_cond_proj_dim % 2))
        return waves[None].to(self.conv_in.weight.dtype)

    def _blocks(self) -> list[nn.Module]:
        return [*super()._blocks(), *self.up_blocks]


def _find(module: nn.Module, kind: type[Kind]) -> Iterator[Kind]:
    """Yield the modules of a kind in a module, in module order."""
    return (inner for inner in module.modules() if isinstance(inner, kind))


def _check_config(config: UNetConfig) -> None:
    """Raise CheckpointError for what this network does not support, with a clearer message than torch's."""
    for field, kinds, known in (
        ("down_block_types", config.down_block_types, ("DownBlock2D", "CrossAttnDownBlock2D")),
        ("mid_block_type", (config.mid_block_type,), ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)),
        ("up_block_types", config.up_block_types, ("UpBlock2D", "CrossAttnUpBlock2D")),
        ("act_fn", (config.act_fn,), ("silu", "swish")),
        ("only_cross_attention", (config.only_cross_attention,), (False,)),
    ):
        for kind in kinds:
            if kind not in known:
                raise CheckpointError(f"The UNet's {field} has {kind!r}; it must be {' or '.join(map(repr, known))}.")
    levels = len(config.block_out_channels)
    heads_field = "attention_head_dim" if config.num_attention_heads is None else "num_attention_heads"
    reverse = "reverse_transformer_layers_per_block"
    for field in ("layers_per_block", "transformer_layers_per_block", reverse, heads_field):
        numbers = getattr(config, field)
        if isinstance(numbers, tuple) and len(numbers) != levels:
            raise CheckpointError(f"The UNet's {field} has {len(numbers)} numbers for {levels} block_out_channels.")
    layers = config.per_level(config.layers_per_block)
    for field, depths, counts in (
        ("transformer_layers_per_block", config.down_depths, layers),
        (reverse, config.up_depths, [count + 1 for count in reversed(layers)]),
    ):
        for level, count in zip(depths, counts, strict=True):
            if len(level) != count:
                raise CheckpointError(f"The UNet's {field} has {list(level)} for a block of {count} layers.")
    for channels, heads in zip(config.block_out_channels, config.heads, strict=True):
        if channels % heads or channels % config.norm_num_groups:
            raise CheckpointError(
                f"The UNet's block_out_channels hold {channels}, which {heads} heads ({heads_field}) and "
                f"{config.norm_num_groups} groups (norm_num_groups) must both divide."
            )
    if config.addition_embed_type and not (
        config.addition_time_embed_dim and config.projection_class_embeddings_input_dim
    ):
        raise CheckpointError(
            "The UNet's addition_embed_type text_time needs addition_time_embed_dim and "
            "projection_class_embeddings_input_dim."
        )
