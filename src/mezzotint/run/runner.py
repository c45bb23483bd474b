"""Run batches: encode the prompts, prepare the initial latents, take the steps, decode, finish the pictures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

from PIL import Image
from torch import Tensor

from mezzotint.diffusion.noise import SeededNoise
from mezzotint.diffusion.solvers import Step
from mezzotint.errors import RequestError
from mezzotint.images.io import to_pil
from mezzotint.models.adapters import active_adapters, install_adapters
from mezzotint.models.offload import onload
from mezzotint.result import Result
from mezzotint.run.batches import Batch, finish_pictures, group_pictures, split_results, step_counter
from mezzotint.run.controls import prepare_controls
from mezzotint.run.execute import iterate_inside
from mezzotint.run.initial import encode_batch_image, enlarge_batch, prepare_latents
from mezzotint.run.model import LoadedModel
from mezzotint.run.networks import unwrap
from mezzotint.run.plan import RunPlan
from mezzotint.run.solve import Refining, solve
from mezzotint.run.tiling import Canvas, tile_plan, tiles_of

log = logging.getLogger("mezzotint")

TRIM_FROM = 64 * 64  # latent pixels of a batch; with fewer, trimming the heap takes a noticeable part of the decoding

OnStep = Callable[[int, int], None]  # steps done, steps in all
OnImage = Callable[[int, Image.Image], None]  # index in the Result, picture
OnEstimate = Callable[[Tensor], None]  # estimate of the final latents


class Runner:
    """Runs planned requests on a loaded model.

    Attributes:
        model: The model.
        trim_heap: Returns freed memory to the system; called before large decodings on the CPU.
    """

    def __init__(self, model: LoadedModel, trim_heap: Callable[[], None]) -> None:
        self.model, self.trim_heap = model, trim_heap

    def generate(
        self,
        plans: list[RunPlan],
        latents: Tensor | None,
        on_step: OnStep | None,
        on_image: OnImage | None,
        on_estimate: OnEstimate | None,
    ) -> list[Result]:
        """Run the batches of these plans and split their pictures into results."""
        for plan in plans:
            _log_plan(plan)
        groups = group_pictures(plans, self._batch_shape)
        report = step_counter(on_step, sum(group[0][0].steps for group in groups))
        images: list[Image.Image] = []
        finals: list[Tensor] = []
        notices: list[tuple[str, ...]] = []
        flagged: list[bool | None] = []
        timings = {"denoise": 0.0, "decode": 0.0}
        for group in groups:
            start = time.perf_counter()
            batch = Batch.of(group, None if latents is None else latents[len(images) : len(images) + len(group)])
            x = self._solve(batch, report, on_estimate)
            solved = time.perf_counter()
            for image in self._finish(batch, x):
                images.append(image)
                if on_image:
                    on_image(len(images) - 1, image)
            finals += x.unbind()
            notices += batch.notices
            flagged += batch.flagged
            timings["denoise"] += solved - start
            timings["decode"] += time.perf_counter() - solved
        log.info("denoised in %.2f s, decoded in %.2f s", timings["denoise"], timings["decode"])
        return split_results(plans, images, finals, notices, flagged, timings)

    def draw(self, batch: Batch, on_step: OnStep | None) -> list[Image.Image]:
        """Return the pictures of one batch."""
        return self._finish(batch, self._solve(batch, step_counter(on_step, batch.plan.steps)))

    def steps(self, batch: Batch) -> Iterator[Step]:
        """Yield the steps of a batch, with hires those of both passes."""
        for step in self._tiles(batch) if batch.request.tile else self._pass(batch):
            last = step
            yield step
        if batch.plan.second_pass:
            decode = partial(self.decode, upcast_parts=batch.upcast_parts, seamless=batch.request.seamless)
            second = enlarge_batch(batch, last.x / batch.plan.final_scale(last.sigma), decode)
            for step in self._pass(second):
                yield replace(step, index=last.index + 1 + step.index)

    def decode(self, latents: Tensor, upcast_parts: list[str], seamless: str | None = None) -> list[Image.Image]:
        """Decode latents; `seamless` names the directions in which the pictures tile."""
        executor, vae = self.model.executor, self.model.parts.vae
        if self.model.device.type == "cpu" and latents[:, 0].numel() >= TRIM_FROM:
            self.trim_heap()  # what the UNet has freed would otherwise add to the peak memory of decoding
        with executor.inference(seamless):
            return to_pil(executor.decode(vae, vae.unscale(latents.to(self.model.device)), upcast_parts))

    def check(self, images: Sequence[Image.Image]) -> list[bool]:
        """Return whether the model's safety checker flags each picture. Raises RequestError if it has none."""
        if self.model.checker is None:
            raise RequestError("the model has no safety checker; load one with safety_checker")
        with self.model.executor.inference():
            return self.model.checker.check(images)

    def _solve(self, batch: Batch, report: Callable[[], None], on_estimate: OnEstimate | None = None) -> Tensor:
        """Return the final latents of a batch; `report` is called after each step."""
        for step in self.steps(batch):
            last = step
            report()
            if on_estimate:
                on_estimate(step.denoised)
        return last.x / batch.plan.last_pass.final_scale(last.sigma)

    def _batch_shape(self, plan: RunPlan) -> tuple[object, ...]:
        """Return what two plans' prompts must have in common to share a batch."""
        shape, refined = self.model.prompts.batch_shape(plan), plan.last_pass.refined
        return (*shape, plan.refiner.batch_shape(refined)) if plan.refiner and refined else shape

    def _pass(self, batch: Batch) -> Iterator[Step]:
        """Run one pass of a batch: encode the prompts, prepare the initial latents, solve."""
        plan, model, executor = batch.plan, self.model, self.model.executor
        unet, few_step = model.unet_for(plan)
        changes = {**model.adapters.changes(plan.scaled_adapters)}
        for layer, more in few_step.items():
            changes[layer] = [*changes.get(layer, ()), *more]
        install_adapters({"unet": unwrap(unet)}, changes)
        kind = plan.request.noise or "seeded"
        noise = SeededNoise(batch.seeds, plan.latent_shape, model.device, kind, batch.window)
        for _ in range(batch.draws):
            noise.draw()

        @contextmanager
        def inference() -> Iterator[None]:
            with executor.inference(plan.request.seamless), active_adapters(changes):
                yield

        onloaded = ExitStack()
        with inference():
            conditions = model.prompts.encode_batch(batch.plans, batch.upcast_parts)
            refining = self._refining(batch, onloaded)
            encode_image = partial(executor.encode, model.parts.vae, upcast_parts=batch.upcast_parts)
            initial = prepare_latents(batch, model.parts.vae, encode_image, noise)
            split = executor.effective_placement.guidance == "split"
            networks = model.controls.load(plan.controls)
            controls = prepare_controls(plan, networks)
            images = model.image_prompts.prepare(plan)
            steps = solve(batch, unet, conditions, initial, noise, split, controls, images, refining)
        with onloaded:
            for network in (unet, *networks):
                onloaded.enter_context(onload(network))
            yield from iterate_inside(inference, steps)

    def _refining(self, batch: Batch, onloaded: ExitStack) -> Refining | None:
        """Return the refiner of a pass, its prompts encoded.

        Args:
            batch: The batch.
            onloaded: Holds the networks that are on the device, which make room for the refiner's when it takes over.
        """
        refiner = self.model.refiners.load(batch.plan.refiner)
        refined = [plan.refined for plan in batch.plans if plan.refined]
        if refiner is None or not refined:
            return None
        unet = refiner.unet

        def take_over() -> None:
            onloaded.close()
            onloaded.enter_context(onload(unet))

        return Refining(unet, refiner.prompts.encode_batch(refined, batch.upcast_parts), take_over)

    def _tiles(self, batch: Batch) -> Iterator[Step]:
        """Run a batch tile by tile; each step shows the whole pictures, and the last one is their blend."""
        plan, model, executor = batch.plan, self.model, self.model.executor
        noise = SeededNoise(batch.seeds, plan.latent_shape, model.device, plan.request.noise or "seeded")
        with executor.inference():
            encode_image = partial(executor.encode, model.parts.vae, upcast_parts=batch.upcast_parts)
            x0, unit, draws = encode_batch_image(batch, model.parts.vae, encode_image, noise)
        canvas, index = Canvas(x0), 0
        for tile in tiles_of(plan):
            part = Batch(
                [tile_plan(each, tile) for each in batch.plans],
                batch.seeds,
                tile.part(unit),
                [*tile.part(x0)[:, None]],
                batch.upcast_parts,
                window=tile.window(plan),
                draws=draws,
            )
            for step in self._pass(part):
                last = step
                x, denoised = canvas.with_tile(tile, step.x), canvas.with_tile(tile, step.denoised)
                yield Step(index, step.sigma, x, denoised)
                index += 1
            canvas.add(tile, last.x)

    def _finish(self, batch: Batch, x: Tensor) -> list[Image.Image]:
        """Decode the final latents of a batch to finished pictures with their records."""
        images = self.decode(x, batch.upcast_parts, batch.request.seamless)
        return finish_pictures(batch, images, self.model.record, self.check)


def _log_plan(plan: RunPlan) -> None:
    """Log what a run does."""
    request, levels = plan.request, plan.sigmas
    log.info(
        "plan: %d of %dx%d, %s, %s, %d steps, guidance %s, levels %.4g to %.4g",
        *(request.count, request.width, request.height, request.sampler, request.spacing or "its own spacing"),
        *(plan.steps, request.guidance_scale, levels[0], levels[-1]),
    )
    log.debug("levels: %s", ", ".join(f"{level:.6g}" for level in levels))
