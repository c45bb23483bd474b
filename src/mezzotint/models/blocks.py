"""The building blocks of the UNet: residual blocks, attention, transformers, and resampling between levels.

Feature maps are (B, C, h, w), in either memory format; tokens are (B, T, C). A residual block takes its own time
projection, and a transformer the keys and values of its context; both are computed beforehand (UNet.time_projections,
UNet.keys_values). Attribute names are the keys of diffusers' checkpoints. See Ho et al. 2020 (residual blocks), Rombach
et al. 2022 (transformer blocks) and Shazeer 2020 (GEGLU).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mezzotint.kernels import is_eager
from mezzotint.kernels import linear as kernel
from mezzotint.models.adapters import is_adapted
from mezzotint.models.attention import attention, perturbation, watcher
from mezzotint.models.convolution import Conv2d
from mezzotint.models.edits import has_hooks
from mezzotint.models.linear import PLAIN_TYPES, Linear, linear


@dataclass(frozen=True, eq=False)
class ImageAttention:
    """What an IP-Adapter adds to one cross-attention: scale * mask * attention(q, keys, values).

    Attributes:
        keys: Of the pictures' tokens, (B, heads, T, d).
        values: Likewise.
        scale: The adapter's scale in this layer.
        mask: How much each place of the picture takes from it, 0 to 1, (1, 1, H, W); None is 1 everywhere.
    """

    keys: Tensor
    values: Tensor
    scale: float = 1.0
    mask: Tensor | None = None
    _weights: dict[int, Tensor] = field(default_factory=dict)  # by the number of queries

    def __call__(self, q: Tensor) -> Tensor:
        """Return the term for queries (B, heads, h * w, d), of the shape of q."""
        out = attention(q, self.keys.to(q.dtype), self.values.to(q.dtype))
        return out * (self.scale if self.mask is None else self._weights_of(self.mask, q))

    def _weights_of(self, mask: Tensor, q: Tensor) -> Tensor:
        """Return scale * mask at the resolution of the queries, (h * w, 1), as diffusers resizes it."""
        tokens = q.shape[2]
        if tokens not in self._weights:
            height, width = mask.shape[-2:]
            rows = max(int(math.sqrt(tokens * height / width)), 1)
            rows += tokens % rows != 0
            small = F.interpolate(mask, size=(rows, max(tokens // rows, 1)), mode="bicubic").flatten()
            self._weights[tokens] = self.scale * F.pad(small, (0, tokens - len(small)))[:, None].to(q)
        return self._weights[tokens]


# what a cross-attention attends to: keys and values, each (B, heads, T, d), and the terms of IP-Adapters
KeysValues = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Sequence[ImageAttention]]


def repeat_to(batch: int, x: Tensor) -> Tensor:
    """Repeat x (B, ...) along the batch up to (batch, ...): rows 0, 1, 0, 1 for B = 2 and batch = 4."""
    return x if len(x) >= batch else torch.cat([x] * (batch // len(x)))


def recompute(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call a cheap function. Only its inputs are saved; the backward pass recomputes the intermediate results."""
    if any(x.requires_grad for x in inputs) and torch.is_grad_enabled() and is_eager(*inputs):
        y: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return y
    return function(*inputs)


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm and SiLU to x."""
    if has_hooks(norm) or is_adapted(norm):  # which would be called again, perhaps outside of the adapters' context
        return _norm_silu(norm, x)
    return recompute(partial(_norm_silu, norm), x)


def _norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def _gate(projected: Tensor) -> Tensor:
    """Multiply the first half of each token by the GELU of the second: (B, T, 2 inner) -> (B, T, inner)."""
    h, gate = projected.chunk(2, dim=-1)
    gated = F.gelu(gate)
    return h * gated if torch.is_grad_enabled() else gated.mul_(h)


class ResnetBlock(nn.Module):
    """Two convolutions with the time embedding in between, and a shortcut: (B, inputs, h, w) -> (B, outputs, h, w)."""

    def __init__(self, inputs: int, outputs: int, time_dim: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = Linear(time_dim, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Apply the block; `time` (B, outputs) is time_emb_proj of the activated time embedding."""
        h: Tensor = self.conv1(norm_silu(self.norm1, x))  # (B, outputs, h, w)
        h = repeat_to(len(time), h)
        h = norm_silu(self.norm2, h.add_(time[:, :, None, None]))  # frees the input of the norm before the convolution
        h = self.conv2(h)
        return h.add_(repeat_to(len(h), x if self.conv_shortcut is None else self.conv_shortcut(x)))


class Attention(nn.Module):
    """Multi-head self-attention or, with `context_dim`, cross-attention to the keys and values of a context.

    `upcast` computes the attention in float32, which SD 2.1 needs in half precision.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, upcast: bool = False) -> None:
        super().__init__()
        self.heads, self.cross, self.upcast = heads, context_dim is not None, upcast
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(context_dim or dim, dim, bias=False)
        self.to_v = Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.ModuleList([Linear(dim, dim)])

    def forward(self, x: Tensor, keys_values: KeysValues | None = None) -> Tensor:
        """Apply the attention to tokens (B, T, dim); cross-attention needs the result of `keys_values`."""
        if keys_values is None:
            q, k, v = self._project(x, self.to_q, self.to_k, self.to_v)  # (B, heads, T, d)
        else:
            (q,), (k, v) = self._project(x, self.to_q), keys_values[:2]
            if (record := watcher.get()) is not None:
                record(self, q, k)
        identity = perturbation.get()
        if identity is None or self not in identity.layers:
            out = self._attend(q, k, v)
        elif identity.rows == len(v):
            out = v
        else:
            own = slice(len(v) - identity.rows)
            out = torch.cat([self._attend(q[own], k[own], v[own]), v[own.stop :]])
        if keys_values is not None and len(keys_values) == 3:
            for image in keys_values[2]:
                out = out + image(q)
        y: Tensor = self.to_out[0](out.transpose(1, 2).flatten(2))  # (B, T, dim)
        return y

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q.float(), k.float(), v.float()).to(q.dtype) if self.upcast else attention(q, k, v)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a context (B, T, context_dim), each (B, heads, T, d)."""
        k, v = self._project(context, self.to_k, self.to_v)
        return k, v

    def fuse(self) -> None:
        """Store the weights that share an input in one tensor, so that one matmul computes them all.

        to_q, to_k and to_v remain the parameters, as views of that storage. Moving or replacing one of them undoes it.
        """
        layers = (self.to_k, self.to_v) if self.cross else (self.to_q, self.to_k, self.to_v)
        weights = [layer.weight for layer in layers if type(layer) in PLAIN_TYPES]
        if len(weights) == len(layers) and len({(w.shape, w.dtype, w.device) for w in weights}) == 1:
            parts = torch.cat([layer.weight.detach() for layer in layers]).chunk(len(layers))
            for layer, part in zip(layers, parts, strict=True):
                layer.weight.data = part

    def _project(self, x: Tensor, *layers: nn.Linear) -> list[Tensor]:
        """Return the output of every layer, split into heads, (B, heads, T, d) each."""
        weight = _fused_weight(layers)
        parts = [layer(x) for layer in layers] if weight is None else linear(x, weight).chunk(len(layers), -1)
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]


def _fused_weight(layers: tuple[nn.Linear, ...]) -> Tensor | None:
    """Return the tensor that these layers' weights are consecutive views of; None if they are not, or are trained."""
    if len(layers) == 1 or not all(_is_plain(layer) and layer.bias is None for layer in layers):
        return None
    first = layers[0].weight
    if first.requires_grad and torch.is_grad_enabled():  # the gradient belongs to three parameters, not to one
        return None
    storage, size = first.untyped_storage().data_ptr(), first.nbytes
    for position, layer in enumerate(layers[1:], start=1):
        weight = layer.weight
        is_adjacent = weight.data_ptr() == first.data_ptr() + position * size and weight.shape == first.shape
        if not is_adjacent or weight.untyped_storage().data_ptr() != storage:
            return None
    return first.as_strided((len(layers) * first.shape[0], first.shape[1]), (first.shape[1], 1))


def _is_plain(layer: nn.Module) -> bool:
    """Return whether the layer is no more than its weight and bias: a subclass, a hook or an adapter must be called."""
    return type(layer) in PLAIN_TYPES and not has_hooks(layer) and not is_adapted(layer)


class GEGLU(nn.Module):
    """A projection gated by the GELU of its other half: (B, T, dim) -> (B, T, inner)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the projection and the gate."""
        if _is_plain(self.proj) and kernel.is_supported(x, self.proj.weight, self.proj.bias, gated=True):
            return kernel.geglu(x, self.proj.weight, self.proj.bias)
        return recompute(_gate, self.proj(x))


class FeedForward(nn.Module):
    """The MLP of a transformer block, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # index 1 is dropout in diffusers
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP."""
        y: Tensor = self.net(x)
        return y


class TransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention and MLP with residual connections."""

    def __init__(self, dim: int, heads: int, context_dim: int, upcast: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim, upcast)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        """Apply the block. The result has the batch of `keys_values` where x has a smaller one."""
        x = self.attn1(self.norm1(x)).add_(x)  # (B, T, dim)
        x = repeat_to(len(keys_values[0]), x)
        x = self.attn2(self.norm2(x), keys_values).add_(x)
        y: Tensor = self.ff(self.norm3(x)).add_(x)
        return y


class Transformer(nn.Module):
    """`depth` transformer blocks over the positions of a feature map, (B, dim, h, w) -> (B, dim, h, w)."""

    def __init__(
        self, dim: int, heads: int, depth: int, context_dim: int, groups: int, linear: bool, upcast: bool
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = Linear(dim, dim) if linear else Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(dim, heads, context_dim, upcast) for _ in range(depth))
        self.proj_out = Linear(dim, dim) if linear else Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, contexts: Iterator[KeysValues]) -> Tensor:
        """Apply the blocks; each takes the next of `contexts`, the keys and values of its cross-attention."""
        size = x.shape[-2:]
        h = self.norm(x)
        h = self.proj_in(_tokens(h)) if self.linear else _tokens(self.proj_in(h))  # (B, h*w, dim)
        for block in self.transformer_blocks:
            h = block(h, next(contexts))
        h = _grid(self.proj_out(h), size) if self.linear else self.proj_out(_grid(h, size))
        y: Tensor = repeat_to(len(h), x) + h  # x first: a sum keeps the memory format of its first term
        return y


def _tokens(x: Tensor) -> Tensor:
    """Reshape (B, C, h, w) to (B, h*w, C), without a copy in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _grid(x: Tensor, size: torch.Size) -> Tensor:
    """Reshape (B, h*w, C) to (B, C, h, w) in channels_last, without a copy."""
    return x.reshape(x.shape[0], *size, x.shape[2]).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halve the size, rounding up, by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the convolution."""
        y: Tensor = self.conv(x)
        return y


class Upsample(nn.Module):
    """Enlarge to `size`, that of the next skip connection, by nearest-neighbor interpolation and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """Apply the interpolation and the convolution."""
        y: Tensor = self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))
        return y
