"""Sizes of buckets against kohya's rule by hand; an epoch's batches as a function of (seed, epoch); numbers by key."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.errors import RequestError
from mezzotint.train import keyed_rng
from mezzotint.train.buckets import bucket_sizes, epoch_batches, nearest_bucket

# resolution 512, step 64, from 256 to 1024 as kohya's make_bucket_resolutions has them: of each width the height is
# min(1024, 512^2 // width // 64 * 64), and both ways round.
KOHYA_512 = [(256, h) for h in range(832, 1025, 64)] + [
    *((320, 704), (320, 768), (384, 640), (448, 576), (512, 512), (576, 448), (640, 384), (704, 320), (768, 320)),
    *((w, 256) for w in range(832, 1025, 64)),
]


def test_sizes_are_those_people_know() -> None:
    assert bucket_sizes(512, 64) == KOHYA_512


@given(st.integers(8, 3000), st.sampled_from([8, 32, 64]))
def test_sizes_fill_the_area_and_no_more(resolution: int, step: int) -> None:
    if resolution < step:
        with pytest.raises(RequestError, match=f"at least bucket_step, {step}"):
            bucket_sizes(resolution, step)
        return
    sizes = bucket_sizes(resolution, step)
    most = 2 * resolution // step * step
    assert {(h, w) for w, h in sizes} == set(sizes)
    assert (resolution // step * step,) * 2 in sizes
    for w, h in sizes:
        assert w % step == h % step == 0 and w * h <= resolution**2
        assert min(w, h) + step > resolution // 2 and max(w, h) <= most
        sides = ((w, h), (h, w))
        assert w == h or any(long == most or (long + step) * side > resolution**2 for side, long in sides)
    assert nearest_bucket((resolution, resolution), sizes) == (resolution // step * step,) * 2


def test_nearest_is_by_ratio() -> None:
    sizes = bucket_sizes(512, 64)
    assert nearest_bucket((4000, 3000), sizes) == (576, 448)  # 4:3 is 1.333; 9:7 is 1.286, 5:3 1.667
    assert nearest_bucket((3000, 4000), sizes) == (448, 576)
    assert nearest_bucket((1920, 1080), sizes) == (640, 384)
    assert nearest_bucket((10_000, 10), sizes) == (1024, 256)
    assert nearest_bucket((7, 7), [(64, 64), (128, 128)]) == (128, 128)


IDS = [f"{k}.png" for k in range(23)]
BUCKETS = {(64, 64): list(range(11)), (64, 128): list(range(11, 22)), (128, 64): [22]}


def named(buckets: dict[tuple[int, int], list[int]], ids: list[str], seed: int, epoch: int) -> list[tuple[str, ...]]:
    return [tuple(ids[place] for place in batch) for batch in epoch_batches(buckets, ids, 4, seed, epoch)]


@given(st.integers(0, 2**63 - 1), st.integers(0, 10_000))
def test_an_epoch_has_each_picture_once_and_no_batch_two_sizes(seed: int, epoch: int) -> None:
    batches = epoch_batches(BUCKETS, IDS, 4, seed, epoch)
    assert sorted(place for batch in batches for place in batch) == list(range(23))
    assert all(any(set(batch) <= set(places) for places in BUCKETS.values()) for batch in batches)
    assert Counter(map(len, batches)) == {4: 4, 3: 2, 1: 1}


def test_an_epoch_is_a_function_of_seed_epoch_and_names() -> None:
    first = named(BUCKETS, IDS, 7, 0)
    assert first == named(BUCKETS, IDS, 7, 0)
    assert first != named(BUCKETS, IDS, 7, 1) and first != named(BUCKETS, IDS, 8, 0)
    backwards = {size: [22 - place for place in places] for size, places in reversed(BUCKETS.items())}
    assert first == named(backwards, IDS[::-1], 7, 0)
    shorts = {frozenset(batch) for epoch in range(6) for batch in named(BUCKETS, IDS, 7, epoch) if len(batch) == 3}
    assert len(shorts) > 8  # others each time


def test_every_picture_comes_first_as_often_as_any() -> None:
    epochs = 2000
    first = Counter(epoch_batches({(8, 8): list(range(5))}, IDS[:5], 2, 3, epoch)[0][0] for epoch in range(epochs))
    assert all(abs(first[k] - epochs / 5) < 5 * (epochs * 0.16) ** 0.5 for k in range(5))


GOLDEN = 7321343460618957498


def test_numbers_are_the_same_for_ever() -> None:
    """A change here would give every run that is resumed other pictures."""
    assert keyed_rng.integer(0, 1, "a", "flip") == GOLDEN
    assert keyed_rng.uniform(0, 1, "a", "flip") == (GOLDEN >> 10) / 2**53
    draws = torch.randn(3, generator=keyed_rng.generator(0, 1, "a", "flip"))
    assert torch.equal(draws, torch.randn(3, generator=torch.Generator().manual_seed(GOLDEN)))


def test_keys_are_told_apart() -> None:
    keys = [(1, "ab", "c"), (1, "a", "bc"), ("1", "ab", "c"), (1, "abc"), (1, "ab,c"), (1, "ab", "c", "")]
    assert len({keyed_rng.integer(*key) for key in keys}) == len(keys)
    keyed_rng.integer("name\udcff.png")  # a file's that is not UTF-8


def test_numbers_are_even() -> None:
    numbers = torch.tensor([keyed_rng.uniform(5, k) for k in range(4000)], dtype=torch.float64)
    counts = torch.histc(numbers, 16, 0.0, 1.0)
    assert float(((counts - 250) ** 2 / 250).sum()) < 40  # chi squared of 15 degrees: 40 is 1 in 2000
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
