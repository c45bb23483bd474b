"""The CLIP text encoder by itself: causality, skipped layers, pooling, training. Against transformers: tests/parity."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mezzotint.config import CLIPConfig
from mezzotint.errors import RequestError
from mezzotint.models.clip import CLIPTextModel

TINY: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "projection_dim": 12,
    "bos_token_id": 18,
    "eos_token_id": 19,
}
IDS = torch.tensor([[18, 4, 5, 19, 19, 19], [18, 7, 19, 19, 19, 19]])


def tiny(**changes: Any) -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(CLIPConfig(**TINY | changes)).eval()


def test_shapes() -> None:
    hidden, pooled = tiny()(IDS)
    assert hidden.shape == (2, 6, 16) and pooled.shape == (2, 16)
    _, projected = tiny(architectures=["CLIPTextModelWithProjection"])(IDS)
    assert projected.shape == (2, 12)


def test_a_token_sees_only_those_before_it() -> None:
    model = tiny()
    changed = IDS.clone()
    changed[:, 3:] = 1
    torch.testing.assert_close(model(IDS)[0][:, :3], model(changed)[0][:, :3])
    assert not torch.allclose(model(IDS)[0][:, 3:], model(changed)[0][:, 3:])


def test_pooled_is_the_last_layer_at_the_first_eos() -> None:
    model = tiny()
    hidden, pooled = model(IDS)
    torch.testing.assert_close(pooled, hidden[[0, 1], [3, 2]])
    torch.testing.assert_close(model(IDS, skip=2, final_norm=False)[1], pooled)  # whatever is skipped


def test_pooled_is_at_the_highest_id_in_old_configs() -> None:
    ids = torch.tensor([[17, 2, 18, 5, 0, 0], [17, 4, 5, 18, 0, 0]])
    hidden, pooled = tiny(eos_token_id=2)(ids)
    torch.testing.assert_close(pooled, hidden[[0, 1], [2, 3]])


def test_skipped_layers_do_not_count() -> None:
    model = tiny()
    hidden = model(IDS, skip=1)[0]
    for parameter in model.text_model.encoder.layers[-1].parameters():
        torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(model(IDS, skip=1)[0], hidden)
    torch.testing.assert_close(model(IDS)[0], hidden)  # a layer of zeros adds nothing


def test_given_embeddings_replace_the_tokens() -> None:
    model = tiny()
    table = model.text_model.embeddings.token_embedding.weight
    torch.testing.assert_close(model(IDS, inputs_embeds=table[IDS]), model(IDS))
    other = IDS.clone()
    other[:, 1] = 9
    torch.testing.assert_close(model(IDS, inputs_embeds=table[other])[0], model(other)[0])


@pytest.mark.parametrize("skip", [-1, 3])
def test_too_many_layers_skipped(skip: int) -> None:
    with pytest.raises(RequestError, match=f"3 layers and can skip 0 to 2 of them, not {skip}"):
        tiny()(IDS, skip=skip)


def test_too_many_tokens() -> None:
    with pytest.raises(RequestError, match="takes at most 8 at a time"):
        tiny()(torch.zeros(1, 9, dtype=torch.long))


def test_starts_as_clip_did() -> None:
    """OpenAI's initialisation: 0.02 and 0.01 for the embeddings, less where a layer adds to the residual stream."""
    model = tiny(vocab_size=2000, hidden_size=128, intermediate_size=512, max_position_embeddings=64)
    weights = {name: weight.detach().std().item() for name, weight in model.named_parameters() if weight.ndim == 2}
    layer = "text_model.encoder.layers.1."
    expected = {
        "text_model.embeddings.token_embedding.weight": 0.02,
        "text_model.embeddings.position_embedding.weight": 0.01,
        layer + "self_attn.q_proj.weight": 128**-0.5,
        layer + "self_attn.out_proj.weight": (128 * 6) ** -0.5,
        layer + "mlp.fc1.weight": 256**-0.5,
        layer + "mlp.fc2.weight": (128 * 6) ** -0.5,
    }
    assert {name: weights[name] for name in expected} == pytest.approx(expected, rel=0.05)
    assert not any(bias.any() for name, bias in model.named_parameters() if name.endswith("bias"))


def test_learns() -> None:
    model = tiny(architectures=["CLIPTextModelWithProjection"]).train()
    target = torch.randn(2, 12)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        hidden, pooled = model(IDS)
        loss = (pooled - target).square().mean() + hidden.square().mean() * 1e-3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses[-1] < losses[0] / 4


def test_from_the_meta_device() -> None:
    """A loader builds the model without memory and assigns each tensor: nothing else is needed."""
    with torch.device("meta"):
        model = CLIPTextModel(CLIPConfig(**TINY)).eval()
    assert all(parameter.is_meta for parameter in model.parameters()) and not list(model.buffers())
    model.load_state_dict(tiny().state_dict(), strict=True, assign=True)
    torch.testing.assert_close(model(IDS), tiny()(IDS))
