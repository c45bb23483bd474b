"""Words become a Condition: tokenise, cut into windows, encode each with CLIP, and join.

A text longer than one window (75 tokens between BOS and EOS) fills several, which are encoded apart and joined along
the tokens, as A1111 does: nothing is cut off. The pooled vector is the first window's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import Condition


def encode(
    texts: Sequence[str], tokenizers: Sequence[Tokenizer], encoders: Sequence[CLIPTextModel], clip_skip: int = 0
) -> Condition:
    """A Condition of batch len(texts): context (B, window * k, D) float32, k windows as the longest text needs.

    With one encoder (SD 1, 2): the last layer but `clip_skip`, normed, and no pooled vector. With two (SDXL): of both
    the layer before, not normed, joined along D, and the second one's pooled vector (B, P).
    """
    two, count = len(encoders) > 1, windows(texts, tokenizers)
    contexts, pooled = [], None
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        rows = _windows(texts, tokenizer, count).to(encoder.text_model.final_layer_norm.weight.device)  # (k, B, T)
        states = [encoder(ids, skip=clip_skip + two, normed=not two) for ids in rows]
        contexts.append(torch.cat([hidden for hidden, _ in states], dim=1).float())
        pooled = states[0][1].float()
    return Condition(torch.cat(contexts, dim=-1), pooled if two else None)


def zeros_like(condition: Condition) -> Condition:
    """What SDXL means by no negative prompt (`force_zeros_for_empty_prompt`)."""
    pooled = None if condition.pooled is None else torch.zeros_like(condition.pooled)
    return Condition(torch.zeros_like(condition.context), pooled, condition.time_ids)


def windows(texts: Sequence[str], tokenizers: Sequence[Tokenizer]) -> int:
    """How many windows the longest text fills; SDXL's tokenizers split "!!" differently, and the longer list counts."""
    return max(1, *(-(-len(t.encode(text)) // (t.max_length - 2)) for t in tokenizers for text in texts))


def _windows(texts: Sequence[str], tokenizer: Tokenizer, count: int) -> Tensor:
    """(count, B, T) ids; texts that need fewer windows get empty ones."""
    room = tokenizer.max_length - 2
    ids = [tokenizer.encode(text) for text in texts]
    return torch.tensor([[tokenizer.window(row[i * room : (i + 1) * room]) for row in ids] for i in range(count)])
