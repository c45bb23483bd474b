"""Limits for comparisons in float32, derived from its rounding and not from what one processor happened to give."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

EPS = torch.finfo(torch.float32).eps


def rounding_of_run(sigmas: Sequence[float], guidance: float = 1.0, calls: int = 1) -> float:
    """Return how far apart two runs through the same levels may end, relative to the final latents.

    A step adds to x, of size sigma, and so rounds it by eps * sigma. The network sees x in units of the next level, and
    the final latents follow from that with a derivative of about 1, so the step contributes
    eps * sigma / max(sigma_next, 1): a fall from 20291 to 600 costs 34 eps, one from 2 to 1 costs 2. Guidance at scale
    w forms w * a - (w - 1) * b of two outputs, which multiplies what they are off by by up to 2 w - 1, and each call of
    a step rounds anew. The constant allows for the operations of a step (its scaling, coefficients and sums: at most 8
    roundings of this size).

    Args:
        sigmas: Levels of the run.
        guidance: Guidance scale.
        calls: Calls of the network in each step.
    """
    steps = sum(sigma / max(sigma_next, 1.0) for sigma, sigma_next in pairwise(sigmas))
    return 8 * EPS * calls * max(2 * guidance - 1, 1.0) * steps
