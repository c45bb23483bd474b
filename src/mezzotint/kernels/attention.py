"""The attention of attention.c, in blocks of keys, without a table of scores in memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mezzotint.kernels import can_take, library_bfloat16, products

LARGEST_HEAD = 192  # with larger heads torch's attention is as fast, and more accurate
LEAST_WORK = 2**20  # multiply-accumulates of each product: with fewer, the call itself takes as long


def is_supported(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> bool:
    """Tell whether `attend` can be used: on the CPU, without mask and gradients, and where it is the faster one."""
    inputs = (q, k, v)
    if mask is not None or is_causal or any(x.ndim != 4 for x in inputs):
        return False
    batch, heads, _, dim = q.shape
    return (
        all(x.stride(-1) == 1 for x in inputs)
        and k.shape == v.shape == (batch, heads, k.shape[2], dim)
        and dim <= LARGEST_HEAD
        and q.numel() * k.shape[2] >= max(LEAST_WORK, 1)
        and can_take(*inputs, dtype=q.dtype)
        and _library(q.dtype) is not None
    )


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q kᵀ / sqrt(d)) v, where `is_supported` says so.

    The result differs from `torch.nn.functional.scaled_dot_product_attention` by the rounding of float32; in bfloat16
    scores and sums are in float32, exponentials and the result are rounded. It depends neither on the number of threads
    nor on the other pictures of the batch.

    Args:
        q: (B, heads, Tq, d).
        k: (B, heads, Tk, d).
        v: (B, heads, Tk, d).

    Returns:
        (B, heads, Tq, d), as a view of a contiguous (B, Tq, heads, d).
    """
    return _attend(q, k, v, None)


def attend_with_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `attend`, and the logsumexp of each query's scores, which the backward pass needs.

    Returns:
        The output of `attend`, and the logarithm of the sum of exp(q kᵀ / sqrt(d)) over the keys, (B, heads, Tq).
    """
    logsumexp = torch.empty(q.shape[:3])
    return _attend(q, k, v, logsumexp), logsumexp


def _attend(q: Tensor, k: Tensor, v: Tensor, logsumexp: Tensor | None) -> Tensor:
    kernels = _library(q.dtype)
    assert kernels is not None
    batch, heads, queries, dim = q.shape
    threads = torch.get_num_threads()
    out = torch.empty(batch, queries, heads, dim, dtype=q.dtype)
    scratch = torch.empty(kernels.attend_scratch(batch, heads, queries, dim, threads))
    strides = (ctypes.c_ssize_t * 9)(*(stride for x in (q, k, v) for stride in x.stride()[:3]))
    pointers = (None if x is None else x.data_ptr() for x in (q, k, v, out, logsumexp, scratch))
    kernels.attend(*pointers, strides, batch, heads, queries, k.shape[2], dim, threads)
    return out.transpose(1, 2)


def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    if dtype == torch.float32:
        return products()
    return library_bfloat16() if dtype == torch.bfloat16 else None
