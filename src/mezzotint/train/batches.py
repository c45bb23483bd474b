"""Batches of training data.

Which pictures a batch has, and how each is cropped, mirrored, captioned and sampled, depends only on (seed, epoch,
sample), not on workers, processes or earlier draws.

A run is an endless sequence of batches, epoch after epoch: `batches.at(k)`. Micro-step m of process p of P takes
k = m P + p. So no two processes see the same sample in an epoch, all have the same number of batches, P processes see
what one sees with P times the accumulation, and a run resumes from a whole number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mezzotint.errors import RequestError
from mezzotint.train import keyed_rng
from mezzotint.train.buckets import Size, bucket_sizes, epoch_batches, nearest_bucket
from mezzotint.train.conditions import to_hint
from mezzotint.train.data import BrokenPolicy, Dataset, Example
from mezzotint.train.latents import Latents, View


@dataclass(frozen=True)
class DataOptions:
    """How pictures become batches; the fields of the same names of a Recipe.

    Attributes:
        resolution: square root of a picture's area in pixels.
        buckets: keep aspect ratios, with sides that are multiples of `bucket_step`; otherwise all pictures are square.
        batch: pictures per batch.
        random_crop: crop at random instead of in the middle.
        flip: mirror half of the pictures.
        repeats: uses of each picture per epoch, times those that its folder's name asks for.
        caption_dropout: fraction of captions replaced by the empty one, for guidance (Ho and Salimans 2022).
        shuffle_tags: shuffle the comma-separated parts of captions, except the first `keep_tags`.
    """

    resolution: int = 512
    buckets: bool = True
    bucket_step: int = 64
    batch: int = 1
    random_crop: bool = False
    flip: bool = False
    repeats: int = 1
    caption_dropout: float = 0.0
    shuffle_tags: bool = False
    keep_tags: int = 1

    def sizes(self) -> list[Size]:
        """Return the buckets. Raises RequestError if the resolution is too small for one."""
        if self.buckets:
            return bucket_sizes(self.resolution, self.bucket_step)
        side = self.resolution // 8 * 8
        return [(side, side)]


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of one bucket.

    Attributes:
        epoch: from 0.
        ids: of the samples; with repeats "cat.jpg", "cat.jpg*1" and so on.
        captions: after dropout and shuffling.
        latents: (B, C, h, w), sampled and scaled, float32 on the CPU.
        time_ids: (B, 6), SDXL's micro-conditioning.
        hints: conditioning pictures (B, 3, H, W) in [0, 1], cropped as their pictures, if the data has them.
    """

    epoch: int
    ids: tuple[str, ...]
    captions: tuple[str, ...]
    latents: Tensor
    time_ids: Tensor
    hints: Tensor | None = None


class Batches:
    """The endless sequence of a dataset's batches; its length is that of an epoch, which never changes."""

    def __init__(self, dataset: Dataset, options: DataOptions, latents: Latents, seed: int) -> None:
        """Sort the samples into buckets. `dataset` must have passed `prepare_dataset`."""
        self.options, self.latents, self.seed = options, latents, seed
        self.examples = [example for example in dataset for _ in range(options.repeats * example.repeats)]
        numbers = [number for example in dataset for number in range(options.repeats * example.repeats)]
        self.ids = [f"{e.id}*{n}" if n else e.id for e, n in zip(self.examples, numbers, strict=True)]
        sizes = options.sizes()
        self.buckets: dict[Size, list[int]] = {}
        for place, example in enumerate(self.examples):
            self.buckets.setdefault(nearest_bucket(example.size, sizes), []).append(place)
        self.sizes = {place: size for size, places in self.buckets.items() for place in places}
        self._places = lru_cache(maxsize=2)(self._places_of)

    def __len__(self) -> int:
        return sum(-(-len(places) // self.options.batch) for places in self.buckets.values())

    def at(self, k: int) -> Batch:
        """Return batch k, from 0 without end. Raises RequestError if a picture no longer decodes."""
        epoch, index = divmod(k, len(self))
        return self._batch(epoch, self._places(epoch)[index])

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch."""
        return (self._batch(epoch, places) for places in self._places(epoch))

    def _places_of(self, epoch: int) -> list[tuple[int, ...]]:
        return epoch_batches(self.buckets, self.ids, self.options.batch, self.seed, epoch)

    def _batch(self, epoch: int, places: tuple[int, ...]) -> Batch:
        latents, ids = [], tuple(self.ids[place] for place in places)
        views = [self._view(epoch, place) for place in places]
        for place, view in zip(places, views, strict=True):
            posterior = self.latents.posterior(self.examples[place], view, keep=not self.options.random_crop)
            generator = keyed_rng.generator(self.seed, epoch, self.ids[place], "latents")
            latents.append(self.latents.sample(posterior, generator))
        numbers = [
            (*self.examples[place].size[::-1], view.top, view.left, *view.size[::-1])
            for place, view in zip(places, views, strict=True)
        ]
        captions = tuple(self._caption(epoch, place) for place in places)
        conditions = [(self.examples[place].condition, view) for place, view in zip(places, views, strict=True)]
        hints = [to_hint(view(condition.open())) for condition, view in conditions if condition]
        return Batch(
            epoch,
            ids,
            captions,
            torch.cat(latents),
            torch.tensor(numbers, dtype=torch.float32),
            torch.stack(hints) if hints else None,
        )

    def _view(self, epoch: int, place: int) -> View:
        def draw(what: str) -> float:
            return keyed_rng.uniform(self.seed, epoch, self.ids[place], what)

        flip = self.options.flip and draw("flip") < 0.5
        cut = (draw("across"), draw("down")) if self.options.random_crop else None
        return View.of(self.examples[place].size, self.sizes[place], flip, cut)

    def _caption(self, epoch: int, place: int) -> str:
        key = self.seed, epoch, self.ids[place]
        if keyed_rng.uniform(*key, "caption dropout") < self.options.caption_dropout:
            return ""
        caption = self.examples[place].caption
        if not self.options.shuffle_tags:
            return caption
        tags = [tag.strip() for tag in caption.split(",")]
        kept, rest = tags[: self.options.keep_tags], tags[self.options.keep_tags :]
        order = sorted(range(len(rest)), key=lambda i: keyed_rng.integer(*key, "tag", i))
        return ", ".join([*kept, *(rest[i] for i in order)])


def prepare_dataset(
    dataset: Dataset,
    options: DataOptions,
    latents: Latents,
    broken: BrokenPolicy = "stop",
    on_picture: Callable[[int], None] = lambda count: None,
) -> Dataset:
    """Open every picture once and, unless crops are random, encode it, so that the VAE is not needed afterwards.

    Args:
        dataset: the pictures.
        options: how they become batches.
        latents: the VAE with its cache.
        broken: whether a picture that does not decode raises an error or is skipped.
        on_picture: called with the number of pictures done.

    Returns:
        The dataset without pictures that do not decode.

    Raises:
        RequestError: for a picture that does not decode, or if none is left.
        MezzotintError: if the VAE's output is not finite.
        WriteError: if the cache cannot be written.
    """
    sizes = options.sizes()
    decodable: list[Example] = []
    skipped = list(dataset.skipped)
    for count, example in enumerate(dataset, 1):
        try:
            if example.condition:
                example.condition.open()
            if options.random_crop:
                example.open()
            else:
                for flip in (False, True) if options.flip else (False,):
                    latents.posterior(example, View.of(example.size, nearest_bucket(example.size, sizes), flip))
        except RequestError as error:
            if broken == "stop":
                raise
            skipped.append(str(error))
        else:
            decodable.append(example)
        on_picture(count)
    if not decodable:
        raise RequestError(f"{str(dataset.path)!r} has no picture that decodes; the first: {skipped[0]}")
    return Dataset(dataset.path, tuple(decodable), tuple(skipped))
