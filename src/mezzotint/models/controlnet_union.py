"""ControlNet Union (ControlNet++, Qi 2024): one ControlNet for several types of picture, and several of them at once.

The features of each picture are shifted by a vector that a small transformer makes of their mean and of its type's
embedding, and summed; the set of types is embedded beside the timestep. Attribute names are the keys of diffusers'
ControlNetUnionModel, so its checkpoints load unchanged ("transformer_layes" is spelled so).

In the published code the transformer attends over the batch, which its attention takes as the sequence. The rows of a
batch have the same pictures there, so what it averages is copies of one vector: each token attends to itself alone.
This is what is computed here (docs/fidelity.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mezzotint.config import ControlNetUnionConfig
from mezzotint.models.controlnet import ControlNet, ControlRun
from mezzotint.models.linear import Linear, linear
from mezzotint.models.unet import TimestepEmbedding


class SelfAttention(nn.Module):
    """Attention of a token to itself alone: values and the output, with the keys of torch's MultiheadAttention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for tokens (..., width)."""
        width = x.shape[-1]
        y: Tensor = self.out_proj(linear(x, self.in_proj_weight[-width:], self.in_proj_bias[-width:]))
        return y


class MLP(nn.Module):
    """Two layers around the quick GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        x = self.c_fc(x)
        y: Tensor = self.c_proj(x * torch.sigmoid(1.702 * x))
        return y


class ResidualBlock(nn.Module):
    """A block of the transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = SelfAttention(width)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        x = x + self.attn(self.ln_1(x))
        y: Tensor = x + self.mlp(self.ln_2(x))
        return y


class ControlNetUnion(ControlNet):
    """A ControlNet Union; see the module's docstring."""

    config: ControlNetUnionConfig

    def __init__(self, config: ControlNetUnionConfig) -> None:
        """Build the network.

        Raises:
            CheckpointError: If the configuration needs something that this network does not have.
        """
        super().__init__(config)
        width, types = config.num_trans_channel, config.num_control_type
        self.task_embedding = nn.Parameter(width**0.5 * torch.randn(types, width))
        self.transformer_layes = nn.ModuleList(ResidualBlock(width) for _ in range(config.num_trans_layer))
        self.spatial_ch_projs = Linear(width, config.num_proj_channel)
        self.control_add_embedding = TimestepEmbedding(
            (config.addition_time_embed_dim or 0) * types, 4 * config.block_out_channels[0]
        )

    def fuse(self, hints: Sequence[Tensor], types: Sequence[int], scales: Sequence[float]) -> Tensor:
        """Return the features (1, channels, h, w) of one picture or of several in one pass.

        Args:
            hints: The pictures, (1, 3, H, W) in [0, 1].
            types: The type of each.
            scales: The factor of each. They do not count where there is only one: its residuals are multiplied instead.
        """
        alone = len(hints) == 1
        total: Tensor | None = None
        for hint, kind, scale in zip(hints, types, (1.0,) if alone else scales, strict=True):
            features = self.embed(hint)
            token = (features.mean(dim=(2, 3)) + self.task_embedding[kind]) * scale
            for layer in self.transformer_layes:
                token = layer(token)
            one = features * scale + self.spatial_ch_projs(token)[:, :, None, None] * scale
            total = one if total is None else total + one
        assert total is not None
        return total

    def embed_types(self, types: Sequence[int]) -> Tensor:
        """Return the embedding of a set of types, (1, 4 * channels), which is added to that of the timestep."""
        weight = self.control_add_embedding.linear_1.weight
        given = torch.zeros(self.config.num_control_type, device=weight.device)
        given[list(types)] = 1.0
        waves = self._sinusoid(given, self.config.addition_time_embed_dim or 0)
        embedding: Tensor = self.control_add_embedding(waves.flatten()[None])
        return embedding


class UnionRun(ControlRun):
    """A ControlNet Union in one run: its pictures in one pass, with the type and factor of each.

    Attributes:
        hints: The conditioning pictures, (1, 3, H, W) in [0, 1].
        types: The type of each.
        hint_scales: The factor of each; see `ControlNetUnion.fuse`.
    """

    network: ControlNetUnion

    def __init__(
        self,
        network: ControlNetUnion,
        hints: Sequence[Tensor],
        types: Sequence[int],
        hint_scales: Sequence[float],
        scales: Sequence[Sequence[float] | None],
        conditional_only: bool = False,
    ) -> None:
        super().__init__(network, hints[0], scales, conditional_only)
        self.hints, self.types, self.hint_scales = hints, types, hint_scales

    def prepare(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the pictures' features and the embedding of their types."""
        hints = [hint.to(weight.device, weight.dtype) for hint in self.hints]
        return self.network.fuse(hints, self.types, self.hint_scales), self.network.embed_types(self.types)
