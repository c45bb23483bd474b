"""The one attention function. Every network calls it; other ways to compute it come behind the same name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + mask) v, Vaswani et al. 2017 eq. 1.

    q: (B, heads, Tq, d); k, v: (B, heads, Tk, d); mask: additive, broadcastable to (B, heads, Tq, Tk).
    Returns (B, heads, Tq, d).
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
