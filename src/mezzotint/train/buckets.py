"""Pictures of like shape share a batch, so that none is squeezed and little is cut off (aspect-ratio buckets, NovelAI
2022), and what an epoch's batches are, as a function of (seed, epoch).

Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mezzotint.errors import RequestError
from mezzotint.train import keyed_rng

Size = tuple[int, int]


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """All sizes whose sides are multiples of `step` from half to twice `resolution` and whose area is at most its
    square; of each width the highest, and the same lying down. Raises RequestError for a resolution below a step.
    """
    if resolution < step:
        raise RequestError(f"resolution is {resolution}; it must be at least bucket_step, {step}")
    side = resolution // step * step
    least, most = max(resolution // 2 // step, 1) * step, 2 * resolution // step * step
    found = {(side, side)}
    for width in range(least, most + 1, step):
        height = min(resolution**2 // width // step * step, most)
        if height >= least:
            found |= {(width, height), (height, width)}
    return sorted(found)


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket of the most similar shape, by the ratio of the two; of equal ones the largest."""

    def apart(bucket: Size) -> tuple[float, int]:
        return abs(math.log(size[0] * bucket[1]) - math.log(size[1] * bucket[0])), -bucket[0] * bucket[1]

    return min(sizes, key=apart)


def epoch_batches(
    buckets: Mapping[Size, Sequence[int]], ids: Sequence[str], batch_size: int, seed: int, epoch: int
) -> list[tuple[int, ...]]:
    """An epoch: batches of places in `ids`, each place once and no batch of two buckets.

    The last batch of a bucket may be short, as with kohya and diffusers; so the number of batches is the same every
    epoch, and which pictures are in a short one is not.
    """
    batches = []
    for members in buckets.values():
        order = sorted(members, key=lambda place: keyed_rng.integer(seed, epoch, ids[place], "order"))
        batches += [tuple(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    return sorted(batches, key=lambda batch: keyed_rng.integer(seed, epoch, ids[batch[0]], "batch"))
