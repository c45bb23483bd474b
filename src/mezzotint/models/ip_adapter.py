"""IP-Adapter: a picture as a prompt, through keys and values of its own in every cross-attention of the UNet.

A CLIP vision encoder turns the picture into an embedding, or into the hidden states of its patches; the adapter's
projection turns those into a few tokens of the width of the prompt, and `keys_values` into keys and values for each
cross-attention, which adds scale * attention(q, k, v) to its own result (`ImageAttention`, blocks.py). Attribute names
are the keys of the published files. See Ye et al. 2023, "IP-Adapter: Text Compatible Image Prompt Adapter".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.config import UNetConfig
from mezzotint.errors import CheckpointError
from mezzotint.models.linear import Linear
from mezzotint.models.unet import UNet

KEYS = re.compile(r"ip_adapter\.\d{1,4}\.to_k_ip\.weight")
PREFIX = "image_proj."
HEAD_DIM = 64  # of the resampler's attention
TOKENS = 4  # of the plain adapter

Shapes = Mapping[str, Sequence[int]]


class LinearProjection(nn.Module):
    """The plain adapter's: the embedding of a picture (N, E) -> (N, tokens, D)."""

    uses_patches = False

    def __init__(self, embed_dim: int, context_dim: int, tokens: int = TOKENS) -> None:
        super().__init__()
        self.input_width, self.context_dim, self.tokens = embed_dim, context_dim, tokens
        self.proj = Linear(embed_dim, tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, embeds: Tensor) -> Tensor:
        """Project embeddings."""
        y: Tensor = self.norm(self.proj(embeds).unflatten(-1, (self.tokens, -1)))
        return y


class PatchProjection(nn.Module):
    """The full-face adapter's: an MLP over the hidden states of the patches, (N, T, E) -> (N, T, D)."""

    uses_patches = True
    tokens = 0  # as many as there are patches

    def __init__(self, embed_dim: int, context_dim: int) -> None:
        super().__init__()
        self.input_width, self.context_dim = embed_dim, context_dim
        self.proj = nn.Sequential(
            Linear(embed_dim, embed_dim), nn.GELU(), Linear(embed_dim, context_dim), nn.LayerNorm(context_dim)
        )

    def forward(self, states: Tensor) -> Tensor:
        """Project hidden states."""
        y: Tensor = self.proj(states)
        return y


class PerceiverAttention(nn.Module):
    """Attention of learned queries (N, Q, dim) to the hidden states (N, T, dim) and to themselves."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.heads = inner // HEAD_DIM
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = Linear(dim, inner, bias=False)
        self.to_kv = Linear(dim, 2 * inner, bias=False)
        self.to_out = Linear(inner, dim, bias=False)

    def forward(self, states: Tensor, latents: Tensor) -> Tensor:
        """Apply the attention."""
        latents = self.norm2(latents)
        keys, values = self.to_kv(torch.cat([self.norm1(states), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.to_q(latents), keys, values))
        y: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class Resampler(nn.Module):
    """The Plus adapters': learned queries that read the hidden states of the patches, (N, T, E) -> (N, Q, D)."""

    uses_patches = True

    def __init__(
        self, embed_dim: int, context_dim: int, dim: int, inner: int, mlp: int, queries: int, depth: int
    ) -> None:
        super().__init__()
        self.input_width, self.context_dim, self.tokens = embed_dim, context_dim, queries
        self.latents = nn.Parameter(torch.zeros(1, queries, dim))
        self.proj_in = Linear(embed_dim, dim)
        self.proj_out = Linear(dim, context_dim)
        self.norm_out = nn.LayerNorm(context_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim, inner),
                    nn.Sequential(
                        nn.LayerNorm(dim), Linear(dim, mlp, bias=False), nn.GELU(), Linear(mlp, dim, bias=False)
                    ),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, states: Tensor) -> Tensor:
        """Read hidden states."""
        states = self.proj_in(states)
        latents = self.latents.expand(len(states), -1, -1)
        for layer in self.layers:
            attention, mlp = layer.children()
            latents = latents + attention(states, latents)
            latents = latents + mlp(latents)
        y: Tensor = self.norm_out(self.proj_out(latents))
        return y


Projection = LinearProjection | PatchProjection | Resampler


class ImageProjections(nn.Module):
    """The key and value projections of one cross-attention."""

    def __init__(self, context_dim: int, dim: int) -> None:
        super().__init__()
        self.to_k_ip = Linear(context_dim, dim, bias=False)
        self.to_v_ip = Linear(context_dim, dim, bias=False)


class CrossLayer(NamedTuple):
    """A cross-attention of a UNet: its name, its width and its heads."""

    name: str
    dim: int
    heads: int


class IPAdapterModel(nn.Module):
    """An IP-Adapter for one UNet.

    Args:
        shapes: The tensors' shapes in the adapter's file, by name.
        layers: The UNet's cross-attentions, in module order.
        context_dim: Width of what they attend to.

    Raises:
        CheckpointError: If the file is no adapter for this UNet; the sentence says why.
    """

    def __init__(self, shapes: Shapes, layers: Sequence[CrossLayer], context_dim: int) -> None:
        super().__init__()
        self.image_proj = image_projection(shapes)
        # the files count the middle block's after all others
        self._layers, order = layers, sorted(layers, key=lambda layer: layer.name.startswith("mid_block"))
        numbers = sorted({int(name.split(".")[1]) for name in shapes if KEYS.fullmatch(name)})
        if numbers != list(range(1, 2 * len(layers), 2)):
            raise CheckpointError(
                f"it has keys and values for {len(numbers)} cross-attentions; this model's UNet has {len(layers)}"
            )
        self.ip_adapter = nn.ModuleDict()
        for number, layer in zip(numbers, order, strict=True):
            name, wanted = f"ip_adapter.{number}.to_k_ip.weight", (layer.dim, context_dim)
            if tuple(shapes[name]) != wanted:
                raise CheckpointError(f"its {name} has shape {tuple(shapes[name])}; for this model it must be {wanted}")
            self.ip_adapter[str(number)] = ImageProjections(context_dim, layer.dim)
        self._numbers = {layer.name: str(number) for number, layer in zip(numbers, order, strict=True)}

    def keys_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and values of every cross-attention, in module order, each (B, heads, T, d).

        Args:
            tokens: The result of `image_proj` for pictures, (B, T, D).
        """
        found = []
        for layer in self._layers:
            own: Any = self.ip_adapter[self._numbers[layer.name]]
            parts = (own.to_k_ip(tokens), own.to_v_ip(tokens))
            k, v = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in parts)
            found.append((k, v))
        return found


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """What one or several pictures add in a run, through an adapter.

    Attributes:
        positive: Keys and values of the pictures in every cross-attention, in module order, each (1, heads, T, d).
        negative: Those of no picture, likewise.
        scales: The scale in every cross-attention.
        mask: How much each place takes from the pictures, 0 to 1, (1, 1, H, W); None is 1 everywhere.
        start: The share of the steps after which it begins to act.
        end: The share of the steps after which it no longer acts.
    """

    positive: Sequence[tuple[Tensor, Tensor]]
    negative: Sequence[tuple[Tensor, Tensor]]
    scales: Sequence[float]
    mask: Tensor | None = None
    start: float = 0.0
    end: float = 1.0


def is_active(step: int, steps: int, start: float, end: float) -> bool:
    """Return whether a step, counted from 0, lies wholly between two shares of the steps."""
    return start <= step / steps and (step + 1) / steps <= end


@lru_cache(maxsize=8)
def cross_layers(config: UNetConfig) -> tuple[CrossLayer, ...]:
    """Return the cross-attentions of a UNet, in module order."""
    with torch.device("meta"):
        unet = UNet(config)
    names = {id(module): name for name, module in unet.named_modules()}
    return tuple(CrossLayer(names[id(attn)], attn.to_k.out_features, attn.heads) for attn in unet.cross_attentions())


def image_projection(shapes: Shapes) -> Projection:
    """Return the projection that a file's tensors belong to. Raises CheckpointError."""
    own = {name.removeprefix(PREFIX): tuple(shape) for name, shape in shapes.items() if name.startswith(PREFIX)}
    try:
        if any(size < 1 for shape in own.values() for size in shape):
            raise ValueError("numbers")
        if "proj.weight" in own:
            outputs, embed_dim = own["proj.weight"]
            (context_dim,) = own["norm.weight"]
            return LinearProjection(embed_dim, context_dim, outputs // context_dim)
        if "proj.3.weight" in own:
            return PatchProjection(own["proj.0.weight"][1], own["proj.2.weight"][0])
        if "perceiver_resampler.proj_in.weight" in own or "norm.weight" in own:
            raise CheckpointError(
                "it is a FaceID adapter, which reads the embeddings of a face recognition model (insightface) that "
                "mezzotint does not have; give a plain, Plus or Plus face adapter"
            )
        (_, queries, dim), inner = own["latents"], own["layers.0.0.to_q.weight"][0]
        if inner % HEAD_DIM:
            raise ValueError(f"heads of {HEAD_DIM}")
        depth = len({name.split(".")[1] for name in own if name.startswith("layers.")})
        return Resampler(
            own["proj_in.weight"][1],
            own["proj_out.weight"][0],
            dim,
            inner,
            own["layers.0.1.1.weight"][0],
            queries,
            depth,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"its image projection is that of no known IP-Adapter ({error})") from None
