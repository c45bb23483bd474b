"""Aspect-ratio buckets (NovelAI 2022): pictures of similar shape share a batch, so that little is cropped.

Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mezzotint.errors import RequestError
from mezzotint.train import keyed_rng

Size = tuple[int, int]


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """Return the largest bucket of each width, in portrait and landscape.

    Args:
        resolution: Side in pixels; a bucket has at most its square as area, and sides from half to twice of it.
        step: Pixels of which every side is a multiple.

    Raises:
        RequestError: If the resolution is below a step.
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
    """Return the bucket with the closest aspect ratio (in logarithm); of equally close ones the largest."""

    def distance(bucket: Size) -> tuple[float, int]:
        return abs(math.log(size[0] * bucket[1]) - math.log(size[1] * bucket[0])), -bucket[0] * bucket[1]

    return min(sizes, key=distance)


def epoch_batches(
    buckets: Mapping[Size, Sequence[int]], ids: Sequence[str], batch_size: int, seed: int, epoch: int
) -> list[tuple[int, ...]]:
    """Return an epoch's batches as indices of `ids`, shuffled by (seed, epoch); each batch is from one bucket.

    The last batch of a bucket may be short, as with kohya and diffusers. So the number of batches is the same in every
    epoch, but which pictures are in a short one differs.
    """
    batches = []
    for members in buckets.values():
        order = sorted(members, key=lambda place: keyed_rng.integer(seed, epoch, ids[place], "order"))
        batches += [tuple(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    return sorted(batches, key=lambda batch: keyed_rng.integer(seed, epoch, ids[batch[0]], "batch"))
