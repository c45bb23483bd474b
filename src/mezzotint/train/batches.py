"""Batches to learn from. Which pictures they hold, and how each is cut, mirrored, captioned and sampled, is a function
of (seed, epoch, sample): never of a worker, of a process or of what came before.

A run is one unending row of batches, epoch after epoch: `batches.at(k)`. Micro-step m of process p of P takes
k = m P + p; so no two processes see the same sample in an epoch, each has as many batches as the other, P processes
see what one sees with P times the accumulation, and a run goes on from a whole number.
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
from mezzotint.train.data import BrokenPolicy, Dataset, Example
from mezzotint.train.latents import Latents, View


@dataclass(frozen=True)
class DataOptions:
    """How pictures become batches; a Recipe's fields of the same names.

    resolution: pixels; a picture has about its square. buckets: each in about its own aspect ratio, sides multiples of
    `bucket_step`; else all are square. batch: pictures at once. random_crop: what is over is cut off anywhere, else
    from the middle. flip: half of the time mirrored. repeats: how often an epoch has each picture. caption_dropout:
    share of captions left empty, for guidance (Ho and Salimans 2022). shuffle_tags: the caption's parts between commas
    in another order each time, but for the first `keep_tags`.
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
        """The buckets. Raises RequestError where the resolution is too small for one."""
        if self.buckets:
            return bucket_sizes(self.resolution, self.bucket_step)
        side = self.resolution // 8 * 8
        return [(side, side)]


@dataclass(frozen=True, eq=False)
class Batch:
    """ids: of the samples; with repeats "cat.jpg", "cat.jpg*1" and so on. captions: as this epoch has them. latents
    (B, C, h, w): sampled, scaled, float32 on the CPU. time_ids (B, 6): as of a Condition, for SDXL.
    """

    epoch: int
    ids: tuple[str, ...]
    captions: tuple[str, ...]
    latents: Tensor
    time_ids: Tensor


class Batches:
    """Of a dataset, by this seed; its length is that of an epoch, the same for all."""

    def __init__(self, dataset: Dataset, options: DataOptions, latents: Latents, seed: int) -> None:
        """dataset: sound (`prepare_dataset`)."""
        self.options, self.latents, self.seed = options, latents, seed
        self.examples = [example for example in dataset for _ in range(options.repeats)]
        numbers = [number for _ in dataset for number in range(options.repeats)]
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
        """Batch k of the run, from 0 without end. Raises RequestError where a picture no longer decodes."""
        epoch, index = divmod(k, len(self))
        return self._batch(epoch, self._places(epoch)[index])

    def epoch(self, epoch: int) -> Iterator[Batch]:
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
        return Batch(epoch, ids, captions, torch.cat(latents), torch.tensor(numbers, dtype=torch.float32))

    def _view(self, epoch: int, place: int) -> View:
        def drawn(what: str) -> float:
            return keyed_rng.uniform(self.seed, epoch, self.ids[place], what)

        flip = self.options.flip and drawn("flip") < 0.5
        cut = (drawn("across"), drawn("down")) if self.options.random_crop else None
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
    seen: Callable[[int], None] = lambda count: None,
) -> Dataset:
    """The dataset without what does not decode: every picture is opened once, and encoded if it is cut the same way
    each epoch, so that after this the VAE has nothing more to do.

    broken: whether one that does not decode stops or is skipped. seen: is told how many have been. Raises RequestError,
    also where none is left, and as `Latents.posterior`.
    """
    sizes = options.sizes()
    sound: list[Example] = []
    skipped = list(dataset.skipped)
    for count, example in enumerate(dataset, 1):
        try:
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
            sound.append(example)
        seen(count)
    if not sound:
        raise RequestError(f"{str(dataset.path)!r} has no picture that decodes; the first: {skipped[0]}")
    return Dataset(dataset.path, tuple(sound), tuple(skipped))
