"""The one attention function. Every network calls it; other ways to compute it come behind the same name.

Beside it, whoever watches: inside `recording(recorder)` each cross-attention of a UNet hands its queries and keys to
the recorder before it runs. The recorder travels in a context variable, so it is this thread's and this run's alone;
without one that is all it costs, a look at the variable. What is drawn never changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Recorder = Callable[[Any, Tensor, Tensor], None]  # (the Attention, q (B, heads, Tq, d), k (B, heads, Tk, d))
watcher: ContextVar[Recorder | None] = ContextVar("watcher", default=None)


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + mask) v, Vaswani et al. 2017 eq. 1.

    q: (B, heads, Tq, d); k, v: (B, heads, Tk, d); mask: additive, broadcastable to (B, heads, Tq, Tk).
    Returns (B, heads, Tq, d).
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(d)), what `attention` weighs the values by: (B, heads, Tq, Tk) float32, rows sum to 1."""
    return (q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Has `recorder` called by every cross-attention that runs inside, in this thread."""
    before = watcher.set(recorder)
    try:
        yield
    finally:
        watcher.reset(before)
