"""The CLIP text encoder against transformers: same weights, same numbers; and the full-size models' keys and shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import tiny
from mezzotint.config import CLIPConfig
from mezzotint.models.clip import CLIPTextModel as Ours

BOS, EOS = tiny.TOKENS - 2, tiny.TOKENS - 1
# name: (projection, changes of tiny.CLIP, id of padding)
SHAPES: dict[str, tuple[bool, dict[str, Any], int]] = {
    "ViT-L": (False, {"hidden_act": "quick_gelu"}, EOS),
    "ViT-H": (False, {"hidden_act": "gelu", "eos_token_id": 2, "num_hidden_layers": 5}, 0),
    "ViT-L of SDXL": (False, {"hidden_act": "quick_gelu", "eos_token_id": 2}, EOS),
    "bigG": (True, {"hidden_act": "gelu", "num_attention_heads": 8, "projection_dim": 24}, 0),
    "bigG, old config": (True, {"hidden_act": "gelu", "eos_token_id": 2, "num_hidden_layers": 4}, 0),
}


def theirs(name: str) -> Any:
    projection, changes, _ = SHAPES[name]
    model = tiny.clip(projection=projection, **changes)
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # transformers starts biases at 0 and norms at 1, which would hide mistakes
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def ours(model: Any) -> Ours:
    """Our network with their weights, built on the meta device as a loader builds it."""
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    with torch.device("meta"):
        encoder = Ours(CLIPConfig.model_validate(config))
    weights = {tiny.with_prefix(key): tensor for key, tensor in model.state_dict().items()}
    encoder.load_state_dict(weights, strict=True, assign=True)
    return encoder.eval()


def windows(pad: int) -> Tensor:
    """Prompts of 0, 3, 40 and 75 tokens, id 2 among them."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for length in (0, 3, 40, 75):
        prompt = torch.randint(2, BOS, (length,), generator=generator)
        prompt[1:2] = 2
        rows.append(torch.cat([torch.tensor([BOS]), prompt, torch.tensor([EOS] + [pad] * (75 - length))]))
    return torch.stack(rows)


@pytest.mark.parametrize("length", [77, 30])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_same_numbers(name: str, length: int) -> None:
    reference = theirs(name)
    encoder = ours(reference)
    ids = windows(SHAPES[name][2])[:, :length]
    expected = reference(ids, output_hidden_states=True)
    hidden, pooled = encoder(ids)
    assert tiny.apart(hidden, expected.last_hidden_state) < 1e-4
    assert tiny.apart(pooled, expected.text_embeds if SHAPES[name][0] else expected.pooler_output) < 1e-4
    norm = getattr(reference, "text_model", reference).final_layer_norm
    for skip in range(reference.config.num_hidden_layers):
        raw = expected.hidden_states[-1 - skip]
        assert tiny.apart(encoder(ids, skip=skip, final_norm=False)[0], raw) < 1e-4
        assert tiny.apart(encoder(ids, skip=skip)[0], norm(raw)) < 1e-4


def test_an_added_token_does_not_move_the_eos() -> None:
    """The first EOS counts, though an added token has a higher id; in old configs the highest id does, as there."""
    ids = torch.tensor([[BOS, 5, tiny.TOKENS, EOS, EOS], [BOS, EOS, tiny.TOKENS, EOS, EOS]])
    for eos in (EOS, 2):
        reference = tiny.clip(vocab_size=tiny.TOKENS + 1, eos_token_id=eos)
        with torch.no_grad():
            assert tiny.apart(ours(reference)(ids)[1], reference(ids).pooler_output) < 1e-4


@torch.no_grad()
def test_half_precision_stays_close() -> None:
    reference = theirs("ViT-L").to(torch.bfloat16)
    ids = windows(EOS)
    assert tiny.apart(ours(reference)(ids)[0].float(), reference(ids).last_hidden_state.float()) < 0.05


_BIG: dict[str, Any] = {"vocab_size": 49408, "hidden_act": "gelu", "max_position_embeddings": 77}
FULL: dict[str, tuple[dict[str, Any], int]] = {
    "SD1, ViT-L": (
        _BIG
        | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"projection_dim": 768, "hidden_act": "quick_gelu", "architectures": ["CLIPTextModel"]},
        123_060_480,
    ),
    "SD2, OpenCLIP-H": (
        _BIG
        | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
        | {"projection_dim": 512, "architectures": ["CLIPTextModel"]},
        340_387_840,
    ),
    "SDXL, OpenCLIP-bigG": (
        _BIG
        | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
        | {"projection_dim": 1280, "architectures": ["CLIPTextModelWithProjection"]},
        694_659_840,
    ),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_keys_and_shapes(name: str) -> None:
    config, parameters = FULL[name]
    with torch.device("meta"):
        encoder = Ours(CLIPConfig(**config))
        architecture = CLIPTextModelWithProjection if encoder.config.has_projection else CLIPTextModel
        reference = architecture(CLIPTextConfig(**config))
    shapes = {key: tensor.shape for key, tensor in encoder.state_dict().items()}
    assert shapes == {tiny.with_prefix(key): tensor.shape for key, tensor in reference.state_dict().items()}
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters
