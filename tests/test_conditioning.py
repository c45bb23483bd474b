"""Words to Condition: windows, joining, SDXL's two encoders. Against the encoders themselves, called by hand."""

from __future__ import annotations

import pytest
import torch

from mezzotint import Pipeline
from mezzotint.conditioning import encode, windows, zeros_like

WORDS = " ".join(["a lemon on a blue background"] * 40)  # 240 tokens: four windows


@torch.no_grad()
def test_one_window_is_the_encoders_own_output(sd1: Pipeline) -> None:
    (tokenizer,), (encoder,) = sd1.tokenizers, sd1.text_encoders
    for skip in (0, 1, 2):
        ids = torch.tensor([tokenizer.window(tokenizer.encode("a lemon"))])
        condition = encode(["a lemon"], [tokenizer], [encoder], skip)
        assert torch.equal(condition.context, encoder(ids, skip=skip)[0])
        assert condition.pooled is None and condition.time_ids is None


@torch.no_grad()
def test_windows_are_encoded_apart_and_joined(sd1: Pipeline) -> None:
    (tokenizer,), (encoder,) = sd1.tokenizers, sd1.text_encoders
    ids = tokenizer.encode(WORDS)
    assert len(ids) == 240
    context = sd1.encode(WORDS).context
    assert context.shape == (1, 4 * 77, 16)
    for k in range(4):
        window = torch.tensor([tokenizer.window(ids[75 * k : 75 * (k + 1)])])
        assert torch.equal(context[:, 77 * k : 77 * (k + 1)], encoder(window)[0])


@pytest.mark.parametrize(("tokens", "count"), [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_a_window_holds_75_tokens(sd1: Pipeline, tokens: int, count: int) -> None:
    text = " ".join(["lemon"] * tokens)
    assert windows([text], sd1.tokenizers) == windows(["", text, "a"], sd1.tokenizers) == count
    assert sd1.encode(text).context.shape[1] == 77 * count


@torch.no_grad()
def test_a_batch_is_its_texts_with_empty_windows(sd1: Pipeline) -> None:
    texts = ["a lemon", WORDS, ""]
    batch = encode(texts, sd1.tokenizers, sd1.text_encoders)
    assert batch.context.shape == (3, 4 * 77, 16)
    empty = sd1.encode("").context
    expected = torch.cat([sd1.encode("a lemon").context, *[empty] * 3], dim=1)
    torch.testing.assert_close(batch.context[:1], expected)
    torch.testing.assert_close(batch.context[1:2], sd1.encode(WORDS).context)
    torch.testing.assert_close(batch.context[2:], torch.cat([empty] * 4, dim=1))


@torch.no_grad()
def test_sdxl_joins_two_encoders(sdxl: Pipeline) -> None:
    condition = sdxl.encode("a lemon")
    hidden = []
    for tokenizer, encoder in zip(sdxl.tokenizers, sdxl.text_encoders, strict=True):
        ids = torch.tensor([tokenizer.window(tokenizer.encode("a lemon"))])
        hidden.append(encoder(ids, skip=1, normed=False))
    assert torch.equal(condition.context, torch.cat([hidden[0][0], hidden[1][0]], dim=-1))
    assert condition.pooled is not None and torch.equal(condition.pooled, hidden[1][1])


@torch.no_grad()
def test_the_pooled_vector_is_the_first_windows(sdxl: Pipeline) -> None:
    ids = sdxl.tokenizers[1].encode(WORDS)
    window = torch.tensor([sdxl.tokenizers[1].window(ids[:75])])
    pooled = sdxl.encode(WORDS).pooled
    assert pooled is not None and torch.equal(pooled, sdxl.text_encoders[1](window)[1])


def test_tokenizers_that_disagree_on_length(sdxl: Pipeline) -> None:
    """SDXL's second pads with "!" and so reads "!!!" as three tokens, the first as one."""
    text = "wow !!! " * 30
    first, second = (len(tokenizer.encode(text)) for tokenizer in sdxl.tokenizers)
    assert first <= 75 < second
    assert sdxl.encode(text).context.shape == (1, 2 * 77, 32)


def test_nothing_said_is_zeros(sdxl: Pipeline) -> None:
    condition = sdxl.encode("a lemon")
    nothing = zeros_like(condition)
    assert nothing.context.shape == condition.context.shape and not nothing.context.any()
    assert nothing.pooled is not None and not nothing.pooled.any()
