"""The attention function that every network calls. backends.py has the implementations to choose from.

    with mezzotint.attention.backend("sliced", bytes="32MiB"):
        pipe("a lemon")

Inside `recording(recorder)`, each cross-attention of a UNet passes its queries and keys to the recorder before it runs.
The output does not change. Backend, recorder and perturbation are context variables: they affect only this thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor

from mezzotint.models.backends import Backend

Recorder = Callable[[Any, Tensor, Tensor], None]  # (the Attention, q (B, heads, Tq, d), k (B, heads, Tk, d))


class Perturbation(NamedTuple):
    """Self-attentions that are the identity for the last `rows` of a batch: each token attends only to itself."""

    layers: Container[Any]
    rows: int


watcher: ContextVar[Recorder | None] = ContextVar("watcher", default=None)
perturbation: ContextVar[Perturbation | None] = ContextVar("perturbation", default=None)
_chosen: ContextVar[Backend | None] = ContextVar("backend", default=None)
_AUTO = Backend()


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Compute softmax(q kᵀ / sqrt(d) + mask) v (Vaswani et al. 2017, eq. 1).

    Args:
        q: Queries, (B, heads, Tq, d).
        k: Keys, (B, heads, Tk, d).
        v: Values, (B, heads, Tk, d).
        mask: Additive, broadcastable to (B, heads, Tq, Tk). It must not mask all keys of a query.
        is_causal: Whether query i attends only to keys 0 to i. It excludes a mask.

    Returns:
        (B, heads, Tq, d).
    """
    return (_chosen.get() or _AUTO)(q, k, v, mask, is_causal)


@contextmanager
def backend(name: str | Backend, *, bytes: int | str | None = None) -> Iterator[None]:
    """Use a backend for the attention of this thread inside the block.

    Inputs that a package does not support are computed by SDPA.

    Args:
        name: auto, sdpa, math, sliced, xformers, flash, sage, or a Backend of your own.
        bytes: Memory for the scores of one slice of "sliced", as a number or "64MiB"; "sliced:64MiB" is the same.

    Raises:
        RequestError: If the name is unknown.
        MissingExtraError: If the package is not installed, or was built for another torch.
    """
    before = _chosen.set(name if isinstance(name, Backend) else Backend.of(name, bytes))
    try:
        yield
    finally:
        _chosen.reset(before)


def chosen() -> Backend | None:
    """Return the backend of the enclosing `backend` block; None outside of one."""
    return _chosen.get()


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """Return the attention probabilities softmax(q kᵀ / sqrt(d)): (B, heads, Tq, Tk) float32, rows sum to 1."""
    return (q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)


@contextmanager
def perturbing(layers: Container[Any], rows: int) -> Iterator[None]:
    """Replace the attention of these self-attentions by the identity for the last `rows` of a batch, in this thread."""
    before = perturbation.set(Perturbation(layers, rows))
    try:
        yield
    finally:
        perturbation.reset(before)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Call `recorder` in every cross-attention that runs inside the block, in this thread."""
    before = watcher.set(recorder)
    try:
        yield
    finally:
        watcher.reset(before)
