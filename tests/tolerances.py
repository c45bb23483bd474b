"""Limits for comparisons in float32, derived from its rounding and not from what one processor happened to give."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

EPS = torch.finfo(torch.float32).eps
ROUNDINGS = 12  # of a call, in either program: input scale, guidance (4), x0 (2), slope (2), coefficients (2), sum
OF_SLOPE = 3  # of (x - x0) / sigma: the output by sigma, x less that, and x less x0


def rounding_of_run(sizes: Sequence[float], falls: Sequence[float] = ()) -> float:
    """Return how far apart two runs of the same formulas may end, relative to the final latents.

    A call of the network rounds x, and what is added to it, by half an eps of x in each of the two runs for each
    operation, and the rest of the run keeps that, relative to x, about as it is; where x shrinks in a step (from sigma
    16800 to 600, say), the error stays and its share grows by the same factor.

    Two-call solvers form the slope (x - x0) / sigma_lower at a lower level and take it over the whole step: that
    multiplies the rounding of x - x0 by sigma / sigma_lower.

    Args:
        sizes: Greatest |x| at each call, and of the final latents.
        falls: sigma / sigma_lower of each step with two calls.
    """
    share = sum(max(1.0, size / after) for size, after in pairwise(sizes))
    starts = [*sizes[:-1:2], sizes[-1]] if falls else ()
    steep = sum(fall * max(1.0, size / after) for fall, (size, after) in zip(falls, pairwise(starts), strict=False))
    return EPS * (ROUNDINGS * share + OF_SLOPE * steep)
