"""Batches: which pictures are generated together, and which result each of them belongs to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mezzotint.diffusion.noise import Window
from mezzotint.images.init_image import InitImage
from mezzotint.images.io import Picture
from mezzotint.records.record import describe
from mezzotint.request import Job, Request
from mezzotint.result import Result
from mezzotint.run.controls import control_digests
from mezzotint.run.image_prompts import ip_adapter_digests
from mezzotint.run.notices import mask_notices
from mezzotint.run.plan import RunPlan
from mezzotint.run.regions import mask_digests
from mezzotint.run.safety import conceal

UPCAST = "the {} returned values that are not finite in its own dtype, and was run again in float32, which takes longer"

PlannedPicture = tuple[RunPlan, int]  # one picture: the plan of its request and its own seed


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures that are generated together; their plans differ only in prompts and seeds.

    Attributes:
        plans: The plan of each picture.
        seeds: The seed of each picture.
        latents: Starting noise of shape (pictures, C, h, w) if it is given instead of drawn.
        init_images: What each picture starts from; empty for a run from noise. Tensors are latents (1, C, h, w).
        upcast_parts: Receives the names of networks that had to run in float32.
        flagged: Receives whether each picture was flagged; None for one that was not checked.
        window: Where the latents lie in those of the whole pictures, of which they are tiles.
        draws: How often the noise was drawn from before the steps, for the whole pictures.
    """

    plans: Sequence[RunPlan]
    seeds: Sequence[int]
    latents: Tensor | None = None
    init_images: Sequence[InitImage | Tensor] = ()
    upcast_parts: list[str] = field(default_factory=list)
    flagged: list[bool | None] = field(default_factory=list)
    window: Window | None = None
    draws: int = 0

    @classmethod
    def of(cls, pictures: Sequence[PlannedPicture], latents: Tensor | None = None) -> Batch:
        """Make a batch and open the picture that it starts from."""
        init_image = pictures[0][0].init_image
        plans, seeds = [plan for plan, _ in pictures], [seed for _, seed in pictures]
        return cls(plans, seeds, latents, [init_image] * len(pictures) if init_image else ())

    @property
    def plan(self) -> RunPlan:
        """The first plan, for everything that all of them share."""
        return self.plans[0]

    @property
    def request(self) -> Request:
        """The first plan's request."""
        return self.plan.request

    @property
    def jobs(self) -> list[Job]:
        """The request and the seed of each picture."""
        return [(plan.request, seed) for plan, seed in zip(self.plans, self.seeds, strict=True)]

    @property
    def opened_images(self) -> list[InitImage]:
        """The init images that came from files, into which the results are put back."""
        return [image for image in self.init_images if isinstance(image, InitImage)]

    @property
    def notices(self) -> list[tuple[str, ...]]:
        """Remarks for the user on each picture; after the run also on the networks that ran in float32."""
        repeated = [UPCAST.format(name) for name in dict.fromkeys(self.upcast_parts)]
        return [(*self.image_notices, *plan.notices, *repeated) for plan in self.plans]

    @property
    def image_notices(self) -> tuple[str, ...]:
        """Remarks on the pictures that the batch starts from."""
        side = self.plan.model.downscale
        images = distinct_images(self.opened_images)
        if self.request.differential:  # whose mask is not one of black and white
            return tuple(notice for image in images for notice in image.notices)
        return tuple(notice for image in images for notice in (*image.notices, *mask_notices(image.mask, side)))


def group_pictures(
    plans: Sequence[RunPlan], batch_shape: Callable[[RunPlan], tuple[object, ...]]
) -> list[list[PlannedPicture]]:
    """Group the pictures of several plans into batches, in order.

    A batch ends when it is full, or when the next plan differs in more than prompts, seed and what happens to flagged
    pictures. Prompts of different lengths do not share a batch: the padding would change the picture.

    Args:
        plans: The plans.
        batch_shape: What the prompts of two plans must have in common, `PromptEncoder.batch_shape`.
    """
    groups: list[list[PlannedPicture]] = []
    last: tuple[Any, ...] | None = None
    for plan in plans:
        r = plan.request
        free = {"prompt": "", "seed": 0, "count": 1, "variation_seed": None, "safety": None}
        common = r.replace(**free, negative_prompt=r.negative_prompt and "")
        key = common, batch_shape(plan)
        for seed in picture_seeds(r):
            if key != last or len(groups[-1]) == r.batch:
                groups.append([])
            groups[-1].append((plan, seed))
            last = key
    return groups


def picture_seeds(request: Request) -> list[int]:
    """Return the seed of each picture of a resolved request."""
    return [(request.seed or 0) + k for k in range(request.count)]


def distinct_images(images: Sequence[InitImage]) -> list[InitImage]:
    """Return each init image once, in order."""
    return list({id(image): image for image in images}.values())


def finish_pictures(
    batch: Batch,
    images: Sequence[Image.Image],
    model_record: Callable[[RunPlan], Mapping[str, Any]],
    check: Callable[[Sequence[Image.Image]], list[bool]],
) -> list[Image.Image]:
    """Put decoded pictures back into what they were drawn on, check them, and attach their records.

    Args:
        batch: The batch; its `flagged` is filled in.
        images: Its decoded pictures.
        model_record: Returns what the record of a plan's pictures says of the model.
        check: Returns whether each of some pictures is flagged.
    """
    opened = batch.opened_images
    if opened:
        images = [init_image.finish(image) for init_image, image in zip(opened, images, strict=True)]
    asked = [plan.safety != "off" for plan in batch.plans]
    flags = iter(check([image for image, one in zip(images, asked, strict=True) if one]) if any(asked) else ())
    batch.flagged[:] = [next(flags) if one else None for one in asked]
    images = [
        conceal(image, plan.safety) if flag else image
        for image, plan, flag in zip(images, batch.plans, batch.flagged, strict=True)
    ]
    given = control_digests(batch.plan) | ip_adapter_digests(batch.plan) | mask_digests(batch.request)
    finished: list[Image.Image] = [Picture.from_image(image) for image in images]  # whose save() keeps the record
    models = {plan: model_record(plan) for plan in dict.fromkeys(batch.plans)}  # which looks at every weight
    for k, (plan, seed, image) in enumerate(zip(batch.plans, batch.seeds, finished, strict=True)):
        record = describe(
            plan.request,
            seed,
            models[plan],
            batch.jobs,
            k,
            image=image,
            flagged=batch.flagged[k],
            float32=batch.upcast_parts,
            latents=None if batch.latents is None else batch.latents[k],
            inputs={**(opened[0].digests if opened else {}), **given},
            notices=(*batch.image_notices, *plan.request_notices),
        )
        image.info.update(record)
    return finished


def split_results(
    plans: Sequence[RunPlan],
    images: Sequence[Image.Image],
    latents: Sequence[Tensor],
    notices: Sequence[tuple[str, ...]],
    flagged: Sequence[bool | None],
    timings: dict[str, float],
) -> list[Result]:
    """Split pictures into one Result for each plan.

    Args:
        plans: The plans, in the order of their pictures.
        images: All pictures.
        latents: The final latents of each picture, (C, h, w).
        notices: The notices on each picture.
        flagged: Whether each picture was flagged; None for one that was not checked.
        timings: Seconds by stage, of all of them.
    """
    results: list[Result] = []
    first = 0
    for request in (plan.request for plan in plans):
        own = slice(first, first + request.count)
        seeds, flags = picture_seeds(request), [flag for flag in flagged[own] if flag is not None]
        told = tuple(dict.fromkeys(notice for each in notices[own] for notice in each))
        final = torch.stack([*latents[own]])
        results.append(Result([*images[own]], final, seeds, request, timings, told, flags or None))
        first += request.count
    return results


def step_counter(on_step: Callable[[int, int], None] | None, total: int) -> Callable[[], None]:
    """Return a function to be called after each step, which passes (steps done, steps in all) to `on_step`."""
    count = itertools.count(1)

    def report() -> None:
        done = next(count)
        if on_step:
            on_step(done, max(done, total))  # dpm_adaptive takes as many as it needs

    return report
