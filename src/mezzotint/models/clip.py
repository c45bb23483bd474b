"""CLIP's text encoder: ids (B, T) -> hidden states (B, T, D) and one pooled vector a text (B, P).

SD1's ViT-L/14, SD2's OpenCLIP ViT-H/14 and SDXL's second, OpenCLIP ViT-bigG/14, are configurations of it. Attributes
spell the keys of the hub's checkpoints (`text_model.encoder.layers.0.self_attn.q_proj.weight`), with the `text_model.`
that transformers 5 drops. Weights start as CLIP's own did, so a model can be trained from nothing.
Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mezzotint.config import CLIPConfig
from mezzotint.errors import RequestError
from mezzotint.models.attention import attention

OLD_EOS = 2  # eos_token_id in configs older than transformers' pull request 24773; the EOS then is the highest id


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class SelfAttention(nn.Module):
    """Multi-head attention of each token to itself and those before it: (B, T, dim) -> (B, T, dim).

    A mask, additive (B, 1, T, T), takes the place of the causal one.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        dim, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj = _linear(dim, dim, dim**-0.5)
        self.k_proj = _linear(dim, dim, dim**-0.5)
        self.v_proj = _linear(dim, dim, dim**-0.5)
        self.out_proj = _linear(dim, dim, _residual_std(config))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in projections)
        out = attention(q, k, v, mask=mask, is_causal=mask is None)  # (B, heads, T, d)
        y: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return y


class MLP(nn.Module):
    """Two linear layers and the activation: (B, T, dim) -> (B, T, dim)."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.fc1 = _linear(dim, config.intermediate_size, (2 * dim) ** -0.5)
        self.activation = ACTIVATIONS[config.hidden_act]()
        self.fc2 = _linear(config.intermediate_size, dim, _residual_std(config))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.activation(self.fc1(x)))
        return y


class EncoderLayer(nn.Module):
    """Attention and MLP, each on normed tokens and added to them."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)  # (B, T, dim)
        y: Tensor = x + self.mlp(self.layer_norm2(x))
        return y


class Embeddings(nn.Module):
    """A vector for each token and each position."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.token_embedding = _embedding(config.vocab_size, config.hidden_size, 0.02)
        self.position_embedding = _embedding(config.max_position_embeddings, config.hidden_size, 0.01)

    def forward(self, ids: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        positions = self.position_embedding.weight[: ids.shape[1]]  # (T, dim)
        return (self.token_embedding(ids) if inputs_embeds is None else inputs_embeds) + positions


class Encoder(nn.Module):
    """The layers, one after another."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """The input and the output of each layer, (B, T, dim) all."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return states


class TextTransformer(nn.Module):
    """What the checkpoints call `text_model`: all but the projection of the pooled vector."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)


class CLIPTextModel(nn.Module):
    """A CLIP text encoder, with the projection of its pooled vector where the config's architecture has one."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        dim = config.hidden_size
        self.text_projection = (
            _linear(dim, config.projection_dim, dim**-0.5, bias=False) if config.has_projection else None
        )

    def forward(
        self,
        ids: Tensor,
        *,
        skip: int = 0,
        normed: bool = True,
        inputs_embeds: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode windows of ids (B, T), integers, T at most max_position_embeddings.

        Returns the hidden states (B, T, hidden_size) after all layers but the last `skip`, through the final layer
        norm if `normed` (SD; SDXL takes skip=1, normed=False), and the pooled vector: the last layer's at the first
        EOS, normed, and projected if the model has a projection (B, projection_dim; else B, hidden_size).
        `inputs_embeds` (B, T, hidden_size) replaces the tokens' own vectors; the ids still say where the EOS is. `seen`
        (B, T), boolean, is False where no token may look; the first of each text must be True.
        Raises RequestError if `skip` or T does not fit the model.
        """
        layers, window = self.config.num_hidden_layers, self.config.max_position_embeddings
        if not 0 <= skip < layers:
            raise RequestError(
                f"The text encoder has {layers} layers: it can skip 0 to {layers - 1} of them, not {skip}."
            )
        if ids.shape[1] > window:
            raise RequestError(f"The text encoder takes {window} tokens at a time, not {ids.shape[1]}.")
        model = self.text_model
        x = model.embeddings(ids, inputs_embeds)
        states = model.encoder(x, None if seen is None else _mask(seen, x.dtype))
        hidden = states[layers - skip]
        pooled = model.final_layer_norm(states[-1][torch.arange(len(ids), device=ids.device), self._eos(ids)])  # (B, D)
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return model.final_layer_norm(hidden) if normed else hidden, pooled

    def _eos(self, ids: Tensor) -> Tensor:
        """Where the first EOS of each text stands, (B,)."""
        eos = self.config.eos_token_id
        return (ids if eos is None or eos == OLD_EOS else (ids == eos).int()).argmax(-1)


def _mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive, (B, 1, T, T): each token may look at those of `seen` (B, T) that are not after it."""
    before = torch.ones(seen.shape[1], seen.shape[1], dtype=torch.bool, device=seen.device).tril()
    allowed = before & seen[:, None, None, :]
    return torch.zeros(allowed.shape, dtype=dtype, device=seen.device).masked_fill(~allowed, -torch.inf)


def _linear(inputs: int, outputs: int, std: float, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    _start(layer.weight, std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _embedding(count: int, dim: int, std: float) -> nn.Embedding:
    layer = nn.Embedding(count, dim, _weight=torch.empty(count, dim))
    _start(layer.weight, std)
    return layer


def _start(weight: Tensor, std: float) -> None:
    if not weight.is_meta:  # where normal_ would do nothing, and take seconds to import what it does it with
        nn.init.normal_(weight, std=std)


def _residual_std(config: CLIPConfig) -> float:
    """Of the layers that add to the residual stream: the sum of all 2 x layers then keeps its variance."""
    return float((config.hidden_size * 2 * config.num_hidden_layers) ** -0.5)
