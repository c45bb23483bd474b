"""CLIP's text encoder: token ids (B, T) -> hidden states (B, T, D) and a pooled vector for each text (B, P).

The encoders of SD 1 (ViT-L/14), SD 2 (OpenCLIP ViT-H/14) and SDXL (the second is OpenCLIP ViT-bigG/14) are
configurations of it. Attributes spell the keys of the hub's checkpoints
(`text_model.encoder.layers.0.self_attn.q_proj.weight`), with the `text_model.` that transformers 5 drops. Weights are
initialized like CLIP's, so a model can be trained from scratch. See Radford et al. 2021, "Learning Transferable Visual
Models From Natural Language Supervision".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mezzotint.config import CLIPConfig, CLIPVisionConfig
from mezzotint.errors import RequestError
from mezzotint.models.attention import attention
from mezzotint.models.linear import Linear

LEGACY_EOS = 2  # eos_token_id in configs older than transformers' pull request 24773; the EOS is then the highest id


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class SelfAttention(nn.Module):
    """Multi-head self-attention, (B, T, dim) -> (B, T, dim): causal in text, of all patches in pictures.

    An additive mask (B, 1, T, T) replaces the causal one.
    """

    def __init__(self, config: CLIPConfig | CLIPVisionConfig) -> None:
        super().__init__()
        dim, self.heads = config.hidden_size, config.num_attention_heads
        self.causal = isinstance(config, CLIPConfig)
        self.q_proj = _linear(dim, dim, dim**-0.5)
        self.k_proj = _linear(dim, dim, dim**-0.5)
        self.v_proj = _linear(dim, dim, dim**-0.5)
        self.out_proj = _linear(dim, dim, _residual_std(config))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention's output."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in projections)
        out = attention(q, k, v, mask=mask, is_causal=self.causal and mask is None)  # (B, heads, T, d)
        y: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return y


class MLP(nn.Module):
    """Two linear layers with the activation in between, (B, T, dim) -> (B, T, dim)."""

    def __init__(self, config: CLIPConfig | CLIPVisionConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.fc1 = _linear(dim, config.intermediate_size, (2 * dim) ** -0.5)
        self.activation = ACTIVATIONS[config.hidden_act]()
        self.fc2 = _linear(config.intermediate_size, dim, _residual_std(config))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        y: Tensor = self.fc2(self.activation(self.fc1(x)))
        return y


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP with residual connections."""

    def __init__(self, config: CLIPConfig | CLIPVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the layer."""
        x = x + self.self_attn(self.layer_norm1(x), mask)  # (B, T, dim)
        y: Tensor = x + self.mlp(self.layer_norm2(x))
        return y


class Embeddings(nn.Module):
    """The sum of token and position embeddings."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.token_embedding = _embedding(config.vocab_size, config.hidden_size, 0.02)
        self.position_embedding = _embedding(config.max_position_embeddings, config.hidden_size, 0.01)

    def forward(self, ids: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """Embed ids (B, T), or add positions to given token embeddings (B, T, dim)."""
        positions = self.position_embedding.weight[: ids.shape[1]]  # (T, dim)
        return (self.token_embedding(ids) if inputs_embeds is None else inputs_embeds) + positions


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: CLIPConfig | CLIPVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Return the input and the output of each layer, each (B, T, dim)."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return states


class TextTransformer(nn.Module):
    """The part that checkpoints call `text_model`: everything except the projection of the pooled vector."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)


class CLIPTextModel(nn.Module):
    """A CLIP text encoder, with a projection of the pooled vector if the configuration's architecture has one."""

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
        final_norm: bool = True,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode windows of token ids.

        Args:
            ids: Token ids (B, T); T is at most max_position_embeddings.
            skip: Number of last layers to skip.
            final_norm: Whether to apply the final layer norm to the hidden states (SD 1 and 2; SDXL uses skip=1 without
                it).
            inputs_embeds: Token embeddings (B, T, hidden_size) that replace the tokens' own; the ids determine the EOS.
            attention_mask: Boolean (B, T), False for tokens that no token attends to; the first must be True.

        Returns:
            The hidden states (B, T, hidden_size), and the pooled vector: the last layer's at the first EOS, normalized,
            and projected if the model has a projection (B, projection_dim; otherwise B, hidden_size).

        Raises:
            RequestError: If `skip` or T does not fit the model.
        """
        layers, window = self.config.num_hidden_layers, self.config.max_position_embeddings
        if not 0 <= skip < layers:
            raise RequestError(
                f"this text encoder has {layers} layers and can skip 0 to {layers - 1} of them, not {skip}"
            )
        if ids.shape[1] > window:
            raise RequestError(f"{ids.shape[1]} tokens were given; this text encoder takes at most {window} at a time")
        model = self.text_model
        x = model.embeddings(ids, inputs_embeds)
        states = model.encoder(x, None if attention_mask is None else _additive_mask(attention_mask, x.dtype))
        hidden = states[layers - skip]
        pooled = model.final_layer_norm(states[-1][torch.arange(len(ids), device=ids.device), self._eos(ids)])  # (B, D)
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return model.final_layer_norm(hidden) if final_norm else hidden, pooled

    def _eos(self, ids: Tensor) -> Tensor:
        """Return the position of the first EOS of each text, (B,)."""
        eos = self.config.eos_token_id
        return (ids if eos is None or eos == LEGACY_EOS else (ids == eos).int()).argmax(-1)


def _additive_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an additive causal mask (B, 1, T, T) that also excludes tokens where attention_mask (B, T) is False."""
    length, device = attention_mask.shape[1], attention_mask.device
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    allowed = causal & attention_mask[:, None, None, :]
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, -torch.inf)


def _linear(inputs: int, outputs: int, std: float, bias: bool = True) -> Linear:
    layer = Linear(inputs, outputs, bias=bias)
    _init_normal(layer.weight, std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _embedding(count: int, dim: int, std: float) -> nn.Embedding:
    layer = nn.Embedding(count, dim, _weight=torch.empty(count, dim))
    _init_normal(layer.weight, std)
    return layer


def _init_normal(weight: Tensor, std: float) -> None:
    if not weight.is_meta:  # on the meta device normal_ has no effect, but takes seconds to import its decompositions
        nn.init.normal_(weight, std=std)


def _residual_std(config: CLIPConfig | CLIPVisionConfig) -> float:
    """Return the standard deviation of layers that add to the residual stream, which preserves its variance."""
    return float((config.hidden_size * 2 * config.num_hidden_layers) ** -0.5)
