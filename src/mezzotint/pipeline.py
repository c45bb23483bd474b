"""The page: a Request becomes pictures. encode -> start -> solve -> decode; no mathematics, no file formats here.

    pipe = mezzotint.load()
    image = pipe("a lemon on a blue background", seed=7)

A Pipeline keeps nothing of a call but the prompts that it has encoded, which give the same whoever asks; what a run
needs travels in the run, so two threads may share one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mezzotint.conditioning.encode import EncodedPart
from mezzotint.devices import best_device, device_of, dtype_of
from mezzotint.diffusion.noise import SeededNoise
from mezzotint.diffusion.solvers import SOLVERS, Step
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.images.init_image import InitImage, fit
from mezzotint.images.io import Picture, from_pil, to_pil
from mezzotint.memory.planner import Budget, Plan
from mezzotint.memory.planner import plan as planned
from mezzotint.models.adapters import adapting, merge_copy
from mezzotint.models.offload import OffloadedLayer, onload, weight_shape
from mezzotint.models.unet import Condition, UNet
from mezzotint.placement import Placement
from mezzotint.records.record import describe
from mezzotint.request import Job, Request, Result
from mezzotint.run.execute import Executor
from mezzotint.run.initial import Run, Start, start
from mezzotint.run.loras import named_loras
from mezzotint.run.model_info import ModelInfo
from mezzotint.run.nan_guard import require_finite
from mezzotint.run.plan import RunFiles, RunPlan, plan_run
from mezzotint.run.prompts import PromptEncoder
from mezzotint.run.solve import guide, step_noise, unet_outputs
from mezzotint.weights.checkpoint import Parts, open_model
from mezzotint.weights.hub import BUNDLED
from mezzotint.weights.lora import Adapters, read_unet_lora

Requests = Sequence[Request] | list[str] | list[Request | str]
OnStep = Callable[[int, int], None]  # steps done, steps in all
OnImage = Callable[[int, Image.Image], None]  # index in the Result, picture


def load(
    path_or_id: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    placement: Placement | None = None,
    memory: int | str | Plan | None = None,
    request: Request | Sequence[Request] | None = None,
    **options: Any,
) -> Pipeline:
    """A pipeline of the bundled model, or of a diffusers folder, a single file or a hub id.

    device: the best there is. dtype: float32 on the CPU, bfloat16 elsewhere; or a name such as "float16". placement:
    where the weights are and how the work is cut, for less memory. memory: what the process may take, "4GiB" or "auto":
    then the placement is planned for that and for `request`, or several; the pipeline makes a batch smaller that would
    take more, and refuses a picture that would.
    options: `variant`, `family`, `prediction` and `config` of `open_model`. Raises CheckpointError, RequestError,
    BudgetError.
    """
    if placement is not None and memory is not None:
        raise RequestError("placement and memory are both given; a budget chooses the placement: leave one of them out")
    device = device_of(device or best_device())
    dtype = dtype_of(dtype) if dtype is not None else torch.float32 if device.type == "cpu" else torch.bfloat16
    budget = None
    if memory is not None:
        plan = planned(path_or_id, memory, request, device=device, dtype=dtype, **options)
        plan.keep()
        placement, budget = plan.placement, plan.budget
    placement = placement or Placement()
    parts = open_model(path_or_id or BUNDLED, device=device, dtype=dtype, placement=placement, **options)
    return Pipeline(parts, placement, budget)


class Pipeline:
    """A loaded model. `unet`, `vae`, `text_encoders`, `tokenizers` and `schedule` are the parts, plain modules."""

    def __init__(self, parts: Parts, placement: Placement | None = None, budget: Budget | None = None) -> None:
        """Wrap opened parts.

        Args:
            parts: The networks and what belongs to them.
            placement: The placement that `parts` were opened with.
            budget: What a request may not exceed.
        """
        self.parts, self._budget = parts, budget
        self._executor = Executor(placement or Placement(), one=budget is not None)
        self.unet, self.vae = parts.unet.eval().requires_grad_(False), parts.vae.eval().requires_grad_(False)
        self.text_encoders = [encoder.eval().requires_grad_(False) for encoder in parts.text_encoders]
        self.tokenizers = parts.tokenizers
        self._info = ModelInfo.of(parts, self.unet.config, self.vae.config, self.device.type)
        self._adapters = Adapters(self.unet, self.text_encoders)
        self._prompts = PromptEncoder(self.tokenizers, self.text_encoders, self._adapters)
        widths = [encoder.config.hidden_size for encoder in self.text_encoders]
        self._files = RunFiles(self._adapters, widths)
        self.schedule = plan_run(self._info, Request(prompt="")).schedule
        if self._info.vae_dtype(self.dtype) != self.dtype:
            self.vae.float()
        self.unet.fuse_projections()
        self._changed: dict[str, UNet] = {}  # by LoRA, made on their first use

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        millions = sum(map(_count_parameters, (self.unet, self.vae, *self.text_encoders))) / 1e6
        return f"Pipeline({self.name!r}, {self.parts.family}, {dtype} on {self.device}, {millions:,.1f}M parameters)"

    @property
    def name(self) -> str:
        """Name of the model's file or folder."""
        return self.parts.source.stem if self.parts.source.is_file() else self.parts.source.name

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The model's scheduler_config.json; another may be put in its place."""
        return self._info.scheduler_config

    @scheduler_config.setter
    def scheduler_config(self, config: dict[str, Any]) -> None:
        self._info = replace(self._info, scheduler_config=config)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that a LoRA may change, by the names that its file has for them."""
        return self._adapters.networks

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet's weights."""
        return self.unet.conv_in.weight.dtype

    @property
    def placement(self) -> Placement:
        """Where its weights are and how its work is cut."""
        return self._executor.placement

    def __call__(self, prompt: str, **fields: Any) -> Image.Image:
        """One picture; `fields` are those of a Request."""
        return self.generate(Request(prompt=prompt, **fields)).images[0]

    def plan(self, request: Request | str) -> RunPlan:
        """Plan the run of a request: its values, noise levels, parsed prompts, LoRAs and embeddings.

        Raises:
            RequestError: If the request does not fit the model.
            CheckpointError: If a LoRA or an embedding is missing, damaged or another model's.
        """
        return plan_run(self._info, _as_request(request), self._files)

    def resolve(self, request: Request | str) -> Request:
        """Return the request with the model's own values where it has None; no file that it names is opened.

        Raises:
            RequestError: If the request does not fit the model.
        """
        return plan_run(self._info, _as_request(request)).request

    @overload
    def generate(
        self,
        request: Request | str,
        latents: Tensor | None = ...,
        *,
        on_step: OnStep | None = ...,
        on_image: OnImage | None = ...,
    ) -> Result: ...
    @overload
    def generate(
        self,
        request: Requests,
        latents: Tensor | None = ...,
        *,
        on_step: OnStep | None = ...,
        on_image: OnImage | None = ...,
    ) -> list[Result]: ...

    def generate(
        self,
        request: Request | str | Requests,
        latents: Tensor | None = None,
        *,
        on_step: OnStep | None = None,
        on_image: OnImage | None = None,
    ) -> Result | list[Result]:
        """Generate the pictures of a request, or of several.

        Neighbours in a list that differ only in words and seeds share a batch.

        Args:
            request: A request, or a prompt; or a list of them.
            latents: Unit-variance starting noise of shape (pictures, C, h, w), instead of drawn noise.
            on_step: Called after each step with (steps done, steps in all). What it raises ends the run.
            on_image: Called with (index, picture) when a picture is finished. What it raises ends the run.

        Returns:
            A Result, or one for each request of a list.

        Raises:
            RequestError: If a request does not fit the model, or `latents` the requests.
            BudgetError: If one picture at a time takes more memory than the pipeline was loaded for.
        """
        one = isinstance(request, Request | str)
        requests = [request] if isinstance(request, Request | str) else request
        with self._executor.alone():
            results = self._generate([self.plan(each) for each in requests], latents, on_step, on_image)
        return results[0] if one else results

    def _generate(
        self, plans: list[RunPlan], latents: Tensor | None, on_step: OnStep | None, on_image: OnImage | None
    ) -> list[Result]:
        """Run the batches of these plans and sort their pictures into Results."""
        pictures = sum(plan.request.count for plan in plans)
        if self._budget:
            plans = [self._budget.fitted(plan, self._executor.now, pictures) for plan in plans]
        batches = self._batches(plans)
        if latents is not None and latents.shape[:1] != (pictures,):
            raise RequestError(f"latents has the shape {tuple(latents.shape)}; its first number must be {pictures}")
        report = _report_steps(on_step, sum(batch[0][0].steps for batch in batches))
        images: list[Image.Image] = []
        finals: list[Tensor] = []
        notices: list[tuple[str, ...]] = []  # one a picture
        timings = {"denoise": 0.0, "decode": 0.0}
        for batch in batches:
            begin = time.perf_counter()
            run = _make_run(batch, None if latents is None else latents[len(images) : len(images) + len(batch)])
            x = self._solve(run, report)
            finals += x.unbind()
            middle = time.perf_counter()
            for image in self._finish(run, x):
                images.append(image)
                if on_image:
                    on_image(len(images) - 1, image)
            notices += [(*run.notices, *run.plan.notices)] * len(batch)
            timings["denoise"] += middle - begin
            timings["decode"] += time.perf_counter() - middle
        results: list[Result] = []
        first = 0
        for request in (plan.request for plan in plans):
            part = slice(first, first + request.count)
            results.append(
                Result(images[part], torch.stack(finals[part]), _seeds(request), request, timings, notices[first])
            )
            first += request.count
        return results

    def draw(self, group: Sequence[Job], on_step: OnStep | None = None) -> list[Image.Image]:
        """Draw the pictures of one batch, whatever `batch` their requests say.

        Args:
            group: The request and the seed of each picture. The requests differ in words and seeds alone, as those
                that `generate` puts together do.
            on_step: As in `generate`.
        """
        with self._executor.alone():
            plans: list[tuple[Request, RunPlan]] = []
            for request, _ in group:
                known = next((plan for other, plan in plans if other == request), None)
                plans.append((request, known or self._affordable(request, len(group))))
            run = _make_run([(plan, seed) for (_, plan), (_, seed) in zip(plans, group, strict=True)])
            return self._finish(run, self._solve(run, _report_steps(on_step, run.plan.steps)))

    def stream(self, request: Request | str, latents: Tensor | None = None) -> Iterator[Step]:
        """Generate a request step by step, all its pictures in one batch.

        Args:
            request: A request, or a prompt.
            latents: As in `generate`.

        Returns:
            An iterator of the steps; Step.x and Step.denoised are of shape (count, C, h, w). With hires those of the
            second pass follow, larger.
        """
        plan = self._affordable(_as_request(request))
        return self._steps(_make_run([(plan, seed) for seed in _seeds(plan.request)], latents))

    def unet_for(self, plan: RunPlan) -> UNet:
        """Return the UNet that a plan runs: with its change merged where that is the model's few-step form.

        Raises:
            CheckpointError: If the change is missing or another UNet's.
        """
        few_step = plan.few_step
        if few_step is None:
            return self.unet
        if few_step.lora not in self._changed:  # two threads at once make the same one twice
            path = self.parts.source / few_step.lora
            if not path.exists():
                raise CheckpointError(f"{path} is missing: mezzotint.json names it for the sampler {few_step.sampler}")
            unet = merge_copy(self.unet, read_unet_lora(path, self.unet))
            unet.fuse_projections()
            self._changed[few_step.lora] = unet
        return self._changed[few_step.lora]

    def merge(self, loras: Any) -> None:
        """Make LoRA files part of the weights, in the place of those that are: as `loras` of a Request.

        The picture is that of the same `loras` in a request, up to rounding, and faster. No run may be under way.
        """
        self._adapters.merge(named_loras(Request(prompt="", loras=loras)))
        self._reweighted()

    def unmerge(self) -> None:
        """Put the weights back that were there before `merge`, bit for bit."""
        self._adapters.unmerge()
        self._reweighted()

    def _reweighted(self) -> None:
        self._changed.clear()
        self.unet.fuse_projections()

    def spare_memory(self, plan: RunPlan) -> int | None:
        """Return the bytes that a run of this plan leaves of the budget, guidance in one batch; None without one."""
        if self._budget is None:
            return None
        return self._budget.spare(plan, self._executor.now.model_copy(update={"guidance": "batched"}))

    def _affordable(self, request: Request, batch: int | None = None) -> RunPlan:
        """Plan a request. Raises BudgetError where `batch` such pictures (all) at once exceed the budget."""
        plan = self.plan(request)
        if self._budget:
            batch = batch or plan.request.count
            self._budget.check(plan.with_batch(batch, count=batch), self._executor.now)
        return plan

    def _batches(self, plans: Sequence[RunPlan]) -> list[list[tuple[RunPlan, int]]]:
        """Return pictures in order, cut where the batch is full or plans differ in more than words and seed.

        Prompts of different lengths, or of other parts, do not share a batch: a neighbour's length would change the
        picture.
        """
        batches: list[list[tuple[RunPlan, int]]] = []
        last: tuple[Any, ...] | None = None
        for plan in plans:
            r = plan.request
            alike = r.replace(prompt="", negative_prompt=r.negative_prompt and "", seed=0, count=1, variation_seed=None)
            shape = self._prompts.batch_shape(plan)
            for seed in _seeds(r):
                if (alike, shape) != last or len(batches[-1]) == r.batch:
                    batches.append([])
                batches[-1].append((plan, seed))
                last = alike, shape
        return batches

    def _solve(self, run: Run, report: Callable[[], None]) -> Tensor:
        """Return the last x of a batch as the VAE takes it; `report` is called after each step."""
        for step in self._steps(run):
            last = step
            report()
        return last.x / _last_plan(run.plan).final_scale(last.sigma)

    def _steps(self, run: Run) -> Iterator[Step]:
        """Run one batch to its last x; with hires, then the second pass on its larger form."""
        for last in self._pass(run):
            yield last
        if run.plan.second_pass:
            second = self._second_run(run, run.plan.second_pass, last.x / run.plan.final_scale(last.sigma))
            for step in self._pass(second):
                yield replace(step, index=last.index + 1 + step.index)

    def _second_run(self, run: Run, plan: RunPlan, x: Tensor) -> Run:
        """Return hires-fix's second pass on the first one's final latents."""
        plans = [each.second_pass or plan for each in run.plans]
        pictures: list[InitImage | Tensor]
        if run.request.hires_upscale == "latent":
            pictures = [*F.interpolate(x.float(), plan.latent_shape[1:], mode="bilinear")[:, None]]
        else:
            size = plan.request.width or 0, plan.request.height or 0
            images = self._decode(x, run.upcast_parts, run.request.seamless)
            pictures = [InitImage(fit(image, size)) for image in images]
        return Run(plans, run.seeds, pictures=pictures, upcast_parts=run.upcast_parts)

    def _pass(self, run: Run) -> Iterator[Step]:
        """Run one pass of a batch along its noise levels: encode, start, solve."""
        plan, unet = run.plan, self.unet_for(run.plan)
        changes = self._adapters.changes(plan.scaled_adapters)
        noise = SeededNoise(run.seeds, plan.latent_shape, self.device, plan.request.noise or "seeded")

        @contextmanager
        def computing() -> Iterator[None]:
            with self._executor.computing(plan.request.seamless), adapting({"unet": unet}, changes):
                yield

        with computing():
            begin = self._start(run, noise)
            conditions = self._prompts.encode_batch(run.plans, run.upcast_parts)
            split = self._executor.now.guidance == "split"
            denoise = begin.wrap(guide(plan, unet_outputs(run, unet, conditions, begin, split)))
        solver = SOLVERS[plan.sampler.solver](
            denoise, begin.x, plan.sigmas, step_noise(run, noise), **plan.solver_options
        )
        with onload(unet):
            while True:
                with computing():
                    step = next(solver, None)
                    if step is None:
                        return
                    if step.sigma == plan.sigmas[-1]:
                        step = replace(step, x=begin.kept(step.x, plan.final_scale(step.sigma)))
                yield require_finite(step)

    def _start(self, run: Run, noise: SeededNoise) -> Start:
        """Return where a run starts: from noise, or from its picture under noise."""
        plan, encode = run.plan, partial(self._executor.encode, self.vae, upcast_parts=run.upcast_parts)
        return start(run, self.vae, encode, noise, plan.sigmas[0], plan.noise_scale, plan.model.unet_channels)

    def encode(self, prompt: str, request: Request | None = None) -> Condition:
        """What a prompt means to the UNet: context (1, T, D) float32, and for SDXL pooled (1, P).

        Of a prompt that changes in the course of the run, what it means in the first step; of one with AND, its first
        part: `encode_parts` gives all of it.
        """
        return self.encode_parts(prompt, request)[0].timeline[0][1]

    def encode_parts(self, prompt: str, request: Request | None = None) -> list[EncodedPart]:
        """The whole meaning of a prompt: for each part (AND) its weight and its timeline of (last step that it holds
        for, Condition of batch 1). `request` says the syntax, the steps, clip_skip, emphasis and embeddings.
        """
        plan = self.plan(Request(prompt=prompt) if request is None else request.replace(prompt=prompt))
        with self._executor.computing():
            return [part.copy() for part in self._prompts.encode_prompt(plan, plan.positive)]

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) as a run leaves them -> B pictures."""
        return self._decode(latents, [])

    def _decode(self, latents: Tensor, upcast_parts: list[str], seamless: str | None = None) -> list[Image.Image]:
        """Decode latents; `seamless` says which of the pictures' sides join."""
        with self._executor.computing(seamless):
            z = self.vae.unscale(latents.to(self.device))
            return to_pil(self._executor.decode(self.vae, z, upcast_parts))

    def _finish(self, run: Run, x: Tensor) -> list[Image.Image]:
        """Return the pictures of a batch, put into what they were drawn on, each with its record."""
        images = self._decode(x, run.upcast_parts, run.request.seamless)
        if run.placed:
            images = [placed.finish(image) for placed, image in zip(run.placed, images, strict=True)]
        images = [Picture.from_image(image) for image in images]  # whose save() keeps the record
        inputs = run.placed[0].digests if run.placed else {}
        for k, (plan, seed, image) in enumerate(zip(run.plans, run.seeds, images, strict=True)):
            image.info.update(
                describe(
                    plan.request,
                    seed,
                    self._facts(plan),
                    run.group,
                    k,
                    image=image,
                    float32=run.upcast_parts,
                    latents=None if run.latents is None else run.latents[k],
                    inputs=inputs,
                )
            )
        return images

    def encode_image(self, image: Image.Image) -> Tensor:
        """A picture, its sides multiples of 8 -> the latents (1, C, h, w) float32 of its posterior's mean."""
        side = self.vae.config.downscale
        if image.width % side or image.height % side:
            raise RequestError(f"the picture is {image.width}x{image.height}; both must be multiples of {side}")
        with self._executor.computing():
            return self.vae.scale(self._executor.encode(self.vae, from_pil(image).to(self.device), []).mean).float()

    def _facts(self, plan: RunPlan) -> dict[str, Any]:
        """Return what the same bits depend on, beside the request."""
        optional = {
            "placement": self._executor.now.changes(),
            "lora": plan.few_step and plan.few_step.lora,
            "embeddings": plan.embedding_digests,
            "loras": plan.lora_digests,
            "merged": self._adapters.merged_digests(),
        }
        return {
            "name": self.name,
            "family": self.parts.family,
            "files": self.parts.identity,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            **{name: value for name, value in optional.items() if value},
        }


def _count_parameters(network: nn.Module) -> int:
    """Return the number of a network's parameters, wherever they are kept."""
    offloaded = sum(weight_shape(module).numel() for module in network.modules() if isinstance(module, OffloadedLayer))
    return offloaded + sum(parameter.numel() for parameter in network.parameters())


def _as_request(request: Request | str) -> Request:
    """Return the request, or that of a prompt."""
    return Request(prompt=request) if isinstance(request, str) else request


def _seeds(request: Request) -> list[int]:
    """Return the seed of each picture of a resolved request."""
    return [(request.seed or 0) + k for k in range(request.count)]


def _make_run(batch: Sequence[tuple[RunPlan, int]], latents: Tensor | None = None) -> Run:
    """Return a batch of (plan, seed) with what its pictures are drawn on."""
    init_image = batch[0][0].init_image
    plans, seeds = [plan for plan, _ in batch], [seed for _, seed in batch]
    return Run(plans, seeds, latents, [init_image] * len(batch) if init_image else ())


def _last_plan(plan: RunPlan) -> RunPlan:
    """Return the plan of the last pass."""
    return plan.second_pass or plan


def _report_steps(on_step: OnStep | None, total: int) -> Callable[[], None]:
    """Return a function that tells `on_step` how many steps are done each time it is called."""
    count = itertools.count(1)

    def report() -> None:
        done = next(count)
        if on_step:
            on_step(done, max(done, total))  # dpm_adaptive takes as many as it needs

    return report
