"""Batches: what is in them, the same wherever and whenever they are made; the cache of latents and texts on disk."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import mezzotint
from mezzotint.config import VAEConfig
from mezzotint.errors import MezzotintError, RequestError, WriteError
from mezzotint.images.io import from_pil
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import Condition
from mezzotint.models.vae import VAE
from mezzotint.train import keyed_rng, latents
from mezzotint.train.batches import Batch, Batches, DataOptions, prepare_dataset
from mezzotint.train.data import Dataset, open_data
from mezzotint.train.latents import Latents, Texts, View

OPTIONS = DataOptions(resolution=32, bucket_step=8, batch=2)
SHAPES = {
    "square": (40, 40),
    "other": (33, 33),
    "third": (32, 32),
    "wide": (64, 24),
    "high": (16, 80),
    "broad": (60, 22),
}


def tiny_vae(seed: int = 0) -> VAE:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VAE(VAEConfig(block_out_channels=(8,) * 4, norm_num_groups=4, sample_size=32, scaling_factor=0.5))


@pytest.fixture(scope="module")
def vae() -> VAE:
    return tiny_vae()


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k, (name, (width, height)) in enumerate(SHAPES.items()):
        levels = np.random.default_rng(k).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name}, one, two, three, four")
    return open_data(folder)


def same(a: Batch, b: Batch) -> bool:
    tensors = torch.equal(a.latents, b.latents) and torch.equal(a.time_ids, b.time_ids)
    return tensors and (a.epoch, a.ids, a.captions) == (b.epoch, b.ids, b.captions)


def unused(*_: Any) -> Any:
    raise AssertionError("the network should not have been asked")


# Views


def coordinates(width: int, height: int) -> Image.Image:
    """Red is the column, green the row."""
    levels = np.zeros((height, width, 3), dtype=np.uint8)
    levels[..., 0], levels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(levels)


def test_a_view_is_the_middle_of_the_picture() -> None:
    view = View.of((40, 24), (24, 24))
    seen = np.asarray(view(coordinates(40, 24)))
    assert (view.left, view.top, view.resized) == (8, 0, (40, 24))
    assert seen[0, :, 0].tolist() == list(range(8, 32)) and seen[:, 0, 1].tolist() == list(range(24))
    mirrored = replace(view, flip=True)
    assert np.asarray(mirrored(coordinates(40, 24)))[0, :, 0].tolist() == list(range(31, 7, -1))


@given(st.tuples(st.integers(1, 500), st.integers(1, 500)), st.tuples(st.integers(1, 16), st.integers(1, 16)))
def test_a_view_covers_its_size_and_keeps_the_shape(picture: tuple[int, int], eighths: tuple[int, int]) -> None:
    size = eighths[0] * 8, eighths[1] * 8
    last = View.of(picture, size, cut=(1 - 2**-53,) * 2)
    for axis in range(2):
        assert last.resized[axis] >= size[axis]
        assert last.resized[axis] == pytest.approx(
            picture[axis] * max(s / p for s, p in zip(size, picture, strict=True)), abs=1
        )
    assert (last.left + size[0], last.top + size[1]) == last.resized  # the last place that there is
    assert 0 in (last.left, last.top)  # one way it just covers
    first = View.of(picture, size, cut=(0.0, 0.0))
    assert (first.left, first.top) == (0, 0)


# Batches


def test_a_batch_is_what_its_parts_say(dataset: Dataset, vae: VAE) -> None:
    batches = Batches(dataset, OPTIONS, Latents(vae), seed=5)
    epoch = list(batches.epoch(1))
    assert len(epoch) == len(batches)
    assert sorted(name for batch in epoch for name in batch.ids) == sorted(f"{name}.png" for name in SHAPES)
    examples = {example.id: example for example in dataset}
    for batch in epoch:
        assert batch.captions == tuple(examples[name].caption for name in batch.ids)
        for name, latent, ids in zip(batch.ids, batch.latents, batch.time_ids, strict=True):
            size = latent.shape[2] * 8, latent.shape[1] * 8
            view = View.of(examples[name].size, size)
            with torch.no_grad():
                posterior = vae.encode(from_pil(view(examples[name].open())))
            noise = torch.randn(posterior.mean.shape, generator=keyed_rng.generator(5, 1, name, "latents"))
            expected = (posterior.mean + (0.5 * posterior.logvar).exp() * noise) * 0.5
            assert torch.equal(latent, expected[0])
            assert ids.tolist() == [*examples[name].size[::-1], view.top, view.left, *size[::-1]]
    assert {tuple(batch.latents.shape[2:]) for batch in epoch} >= {(4, 4), (2, 6), (8, 2)}
    assert not any(batch.latents.requires_grad for batch in epoch)


def test_the_run_goes_on_from_any_batch(dataset: Dataset, vae: VAE) -> None:
    options = replace(OPTIONS, random_crop=True, flip=True, caption_dropout=0.5, shuffle_tags=True, repeats=2)
    one, other = (Batches(dataset, options, Latents(vae), seed=3) for _ in range(2))
    run = [one.at(k) for k in range(2 * len(one) + 1)]
    assert [batch.epoch for batch in run] == [0] * len(one) + [1] * len(one) + [2]
    for k in reversed(range(len(run))):  # in another order
        assert same(other.at(k), run[k])
    assert all(same(a, b) for a, b in zip(other.epoch(1), run[len(one) :], strict=False))


def test_processes_share_an_epoch(dataset: Dataset, vae: VAE) -> None:
    batches = Batches(dataset, replace(OPTIONS, batch=1), Latents(vae), seed=3)
    assert len(batches) == 6
    for rank_count in (1, 2, 3):
        shares = [[batches.at(m * rank_count + rank).ids for m in range(6 // rank_count)] for rank in range(rank_count)]
        assert Counter(name for share in shares for ids in share for name in ids) == Counter(e.id for e in dataset)


def test_chance_is_new_each_epoch_and_each_sample(dataset: Dataset, vae: VAE) -> None:
    options = replace(OPTIONS, flip=True, random_crop=True, batch=1, repeats=2)
    batches = Batches(dataset, options, Latents(vae), seed=0)
    views = {
        batches._view(epoch, place) for epoch in range(8) for place in range(12) if dataset[place // 2].id == "wide.png"
    }
    assert {view.flip for view in views} == {False, True}
    assert {(view.left, view.top) for view in views} == {(0, 0), (0, 1), (0, 2)}  # 48x18 seen as 48x16
    still = Batches(dataset, replace(OPTIONS, batch=1, repeats=2), Latents(vae), seed=0)
    draws = [
        batch.latents for epoch in range(2) for batch in still.epoch(epoch) if batch.ids[0].startswith("third.png")
    ]
    assert len({tuple(latents.flatten().tolist()) for latents in draws}) == 4  # of one posterior
    assert sorted(batch.ids[0] for batch in batches.epoch(0))[:2] == ["broad.png", "broad.png*1"]
    flips = [batches._view(epoch, 0).flip for epoch in range(1000)]
    assert abs(sum(flips) - 500) < 80


def test_repeats_of_a_folder_and_of_the_recipe_multiply(dataset: Dataset, vae: VAE) -> None:
    few = replace(dataset, examples=(replace(dataset[0], repeats=3), dataset[1]))
    batches = Batches(few, replace(OPTIONS, repeats=2, batch=1), Latents(vae), seed=0)
    ids = [id for batch in batches.epoch(0) for id in batch.ids]
    assert sorted(ids) == sorted(
        f"{example.id}{'*' * bool(n)}{n or ''}" for example in few for n in range(2 * example.repeats)
    )


def test_captions_of_an_epoch(dataset: Dataset, vae: VAE) -> None:
    options = replace(OPTIONS, caption_dropout=0.25, shuffle_tags=True, keep_tags=2)
    batches = Batches(dataset, options, Latents(vae), seed=0)
    captions = [batches._caption(epoch, 0) for epoch in range(1000)]
    assert abs(captions.count("") - 250) < 70
    shuffled = Counter(caption for caption in captions if caption)
    assert set(shuffled) == {
        f"broad, one, {rest}"
        for rest in (
            "two, three, four",
            "two, four, three",
            "three, two, four",
            "three, four, two",
            "four, two, three",
            "four, three, two",
        )
    }
    assert min(shuffled.values()) > 80
    plain = Batches(dataset, OPTIONS, Latents(vae), seed=0)
    assert {plain._caption(epoch, 0) for epoch in range(20)} == {"broad, one, two, three, four"}


def test_without_buckets_all_are_square(dataset: Dataset, vae: VAE) -> None:
    batches = Batches(dataset, replace(OPTIONS, buckets=False, resolution=36), Latents(vae), seed=0)
    assert [batch.latents.shape for batch in batches.epoch(0)] == [(2, 4, 4, 4)] * 3


# Before training


def test_prepared_leaves_the_vae_nothing_to_do(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, vae, counts = replace(OPTIONS, flip=True), tiny_vae(), list[int]()
    held, cached = Latents(vae), Latents(vae, tmp_path / "cache")
    assert prepare_dataset(dataset, options, held, on_picture=counts.append) == dataset
    assert counts == [1, 2, 3, 4, 5, 6]
    prepare_dataset(dataset, options, cached)
    expected = list(Batches(dataset, options, held, seed=1).epoch(0))
    monkeypatch.setattr(VAE, "encode", unused)
    again = Latents(tiny_vae(), tmp_path / "cache")  # another process: the same weights have the same name
    prepare_dataset(dataset, options, again)
    for source in (held, cached, again):
        assert all(
            same(a, b) for a, b in zip(Batches(dataset, options, source, seed=1).epoch(0), expected, strict=True)
        )


@pytest.mark.parametrize("random_crop", [False, True])
def test_a_picture_that_breaks_off(dataset: Dataset, vae: VAE, random_crop: bool) -> None:
    options = replace(OPTIONS, random_crop=random_crop)
    path = dataset.path / "wide.png"
    path.write_bytes(path.read_bytes()[:-2000])
    dataset = open_data(dataset.path)  # its header is whole
    with pytest.raises(RequestError, match=r"wide\.png', which is truncated or damaged"):
        prepare_dataset(dataset, options, Latents(vae))
    sound = prepare_dataset(dataset, options, Latents(vae), broken="skip")
    assert len(sound) == 5 and "wide.png" in sound.skipped[0]
    alone = Dataset(dataset.path, tuple(e for e in dataset if e.id == "wide.png"))
    with pytest.raises(RequestError, match="has no picture that decodes; the first: the picture"):
        prepare_dataset(alone, options, Latents(vae), broken="skip")


def test_a_random_crop_is_not_kept(dataset: Dataset, vae: VAE, tmp_path: Path) -> None:
    cache = Latents(vae, tmp_path / "cache")
    options = replace(OPTIONS, random_crop=True)
    list(Batches(prepare_dataset(dataset, options, cache), options, cache, seed=0).epoch(0))
    assert not (tmp_path / "cache").exists()


# The cache


def test_other_content_has_another_name(dataset: Dataset, tmp_path: Path) -> None:
    def count() -> int:
        return len(list((tmp_path / "latents").rglob("*.safetensors")))

    example, view = dataset[0], View.of(dataset[0].size, (32, 32))
    cache = Latents(tiny_vae(), tmp_path)
    first = cache.posterior(example, view)
    assert torch.equal(cache.posterior(replace(example, id="another", caption="x"), view).mean, first.mean)
    assert count() == 1
    changed = tiny_vae()
    with torch.no_grad():
        changed.encoder.conv_in.bias[0] += 1e-3
    for k, (vae, picture, seen) in enumerate(
        [
            (tiny_vae(), dataset[1], view),
            (tiny_vae(), example, replace(view, flip=True)),
            (tiny_vae(), example, View.of(example.size, (24, 40))),
            (tiny_vae(), example, replace(view, left=0)),
            (changed, example, view),
            (tiny_vae().bfloat16(), example, view),
        ],
        2,
    ):
        assert Latents(vae, tmp_path).posterior(picture, seen).mean.dtype == torch.float32
        assert count() == k


def test_a_damaged_file_is_made_again_and_parts_are_never_seen(dataset: Dataset, tmp_path: Path, vae: VAE) -> None:
    view = View.of(dataset[0].size, (32, 32))
    first = Latents(vae, tmp_path).posterior(dataset[0], view)
    (path,) = (tmp_path / "latents").rglob("*.safetensors")
    whole = path.read_bytes()
    for damage in (b"", whole[:100], whole[:-1]):
        path.write_bytes(damage)
        assert torch.equal(Latents(vae, tmp_path).posterior(dataset[0], view).logvar, first.logvar)
        assert path.read_bytes() == whole
    assert [file for file in path.parent.iterdir()] == [path]


def test_a_full_disk(dataset: Dataset, tmp_path: Path, vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(latents, "write_atomically", full)
    with pytest.raises(WriteError, match="No space left"):
        Latents(vae, tmp_path).posterior(dataset[0], View.of(dataset[0].size, (32, 32)))


def test_latents_that_are_no_numbers_are_named(dataset: Dataset, tmp_path: Path) -> None:
    vae = tiny_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight.fill_(torch.inf)
    with pytest.raises(MezzotintError, match=r"broad\.png.*not finite"):
        Latents(vae, tmp_path).posterior(dataset[0], View.of(dataset[0].size, (32, 32)))
    assert not list(tmp_path.rglob("*.safetensors"))


# Texts


LONG = " ".join(["a lemon on a blue background"] * 20)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_texts_are_those_that_generating_has(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe: mezzotint.Pipeline = request.getfixturevalue(name)
    plain = mezzotint.Request(prompt="", prompt_syntax="plain")
    captions = ["(a lemon:1.3)", "", "a blue lemon"]

    def texts() -> Texts:
        return Texts(pipe.tokenizers, pipe.text_encoders, tmp_path)

    made = texts()(captions)
    expected = Condition.cat([pipe.encode(caption, plain) for caption in captions])
    assert torch.equal(made.context, expected.context)
    assert (made.pooled is None) == (name == "sd1")
    if made.pooled is not None and expected.pooled is not None:
        assert torch.equal(made.pooled, expected.pooled)
    assert not made.context.requires_grad
    for encoder in pipe.text_encoders:
        monkeypatch.setattr(type(encoder), "forward", unused)
    assert torch.equal(texts()(captions[::-1]).context, made.context.flip(0))


def test_short_captions_go_on_with_the_empty_one(sd1: mezzotint.Pipeline) -> None:
    texts = Texts(sd1.tokenizers, sd1.text_encoders)
    window = sd1.tokenizers[0].max_length
    made = texts(["a lemon", LONG]).context
    assert made.shape[1] == 2 * window
    assert torch.equal(made[0], torch.cat([texts(["a lemon"]).context[0], texts([""]).context[0]]))
    assert torch.equal(made[1:], texts([LONG]).context)


def test_texts_of_another_encoder_or_tokenizer_have_other_names(sd1: mezzotint.Pipeline, tmp_path: Path) -> None:
    def kept(make: Callable[[], Texts], keep: bool = True) -> tuple[Tensor, int]:
        context = make()(["a lemon"], keep=keep).context
        return context, len(list(tmp_path.rglob("*.safetensors")))

    (encoder,), (tokenizer,) = sd1.text_encoders, sd1.tokenizers
    other = Tokenizer.subset(["a lemon on a blue background"], max_length=40)
    assert kept(lambda: Texts([tokenizer], [encoder], tmp_path), keep=False)[1] == 0
    first, count = kept(lambda: Texts([tokenizer], [encoder], tmp_path))
    assert count == 1
    skipped, count = kept(lambda: Texts([tokenizer], [encoder], tmp_path, clip_skip=1))
    assert count == 2 and not torch.equal(first, skipped)
    shorter, count = kept(lambda: Texts([other], [encoder], tmp_path))
    assert count == 3 and shorter.shape[1] == 40
