"""The page: a Request becomes pictures. encode -> start -> solve -> decode; no mathematics, no file formats here.

    pipe = mezzotint.load()
    image = pipe("a lemon on a blue background", seed=7)

A Pipeline keeps nothing of a call but the prompts that it has encoded, which give the same whoever asks; what a run
needs travels in the run, so two threads may share one.
"""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mezzotint.conditioning.encode import Encoded
from mezzotint.denoiser import Denoiser
from mezzotint.devices import best_device, device_of, dtype_of
from mezzotint.diffusion.guidance import METHODS, guided
from mezzotint.diffusion.noise import BrownianNoise, SeededNoise
from mezzotint.diffusion.prediction import Prediction
from mezzotint.diffusion.schedule import Schedule
from mezzotint.diffusion.solvers import SOLVERS, Noise, Step
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.images.init_image import Placed, fit
from mezzotint.images.io import Picture, from_pil, to_pil
from mezzotint.memory.planner import Budget, Plan
from mezzotint.memory.planner import plan as planned
from mezzotint.models.adapters import adapting
from mezzotint.models.offload import turn
from mezzotint.models.unet import Condition, UNet
from mezzotint.placement import Placement
from mezzotint.records.record import describe
from mezzotint.request import Job, Request, Result
from mezzotint.run.execute import Placing
from mezzotint.run.initial import Run, start
from mezzotint.run.nan_guard import checked, watched_outputs
from mezzotint.run.prompts import Wording
from mezzotint.run.resolve import Resolver, options_of, place
from mezzotint.samplers.names import Sampler
from mezzotint.weights.checkpoint import Parts, open_model
from mezzotint.weights.hub import BUNDLED
from mezzotint.weights.lora import Adapters
from mezzotint.weights.low_rank import merged, read_lora

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
        """placement: the one that `parts` were opened with. budget: what a request may not pass."""
        self.parts, self.budget = parts, budget
        self.placing = Placing(placement or Placement(), one=budget is not None)
        self.unet, self.vae = parts.unet.eval().requires_grad_(False), parts.vae.eval().requires_grad_(False)
        self.text_encoders = [encoder.eval().requires_grad_(False) for encoder in parts.text_encoders]
        self.tokenizers = parts.tokenizers
        self.resolver = Resolver(parts, dict(parts.scheduler_config))
        self.adapters = Adapters(self.unet, self.text_encoders)
        self.wording = Wording(self.tokenizers, self.text_encoders, self.resolver, self.adapters)
        self.schedule = Schedule.from_config(self.resolver.sampler(Request(prompt="")).schedule)
        if self.dtype == torch.float16 and parts.family == "sdxl" and self.vae.config.force_upcast:
            self.vae.float()  # its activations pass float16's range
        self.unet.fuse_projections()
        self._changed: dict[str, UNet] = {}  # by LoRA, made on their first use

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The model's scheduler_config.json; another may be put in its place."""
        return self.resolver.scheduler_config

    @scheduler_config.setter
    def scheduler_config(self, config: dict[str, Any]) -> None:
        self.resolver.scheduler_config = config

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
        return self.placing.placement

    def __call__(self, prompt: str, **fields: Any) -> Image.Image:
        """One picture; `fields` are those of a Request."""
        return self.generate(Request(prompt=prompt, **fields)).images[0]

    def resolve(self, request: Request) -> Request:
        """The request with the model's own values where it has None. Raises RequestError where it does not fit."""
        return self.resolver.resolve(request)

    @overload
    def generate(
        self,
        request: Request,
        latents: Tensor | None = ...,
        *,
        on_step: OnStep | None = ...,
        on_image: OnImage | None = ...,
    ) -> Result: ...
    @overload
    def generate(
        self,
        request: Sequence[Request],
        latents: Tensor | None = ...,
        *,
        on_step: OnStep | None = ...,
        on_image: OnImage | None = ...,
    ) -> list[Result]: ...

    def generate(
        self,
        request: Request | Sequence[Request],
        latents: Tensor | None = None,
        *,
        on_step: OnStep | None = None,
        on_image: OnImage | None = None,
    ) -> Result | list[Result]:
        """Draw a request, or several, of which neighbours that differ only in words and seeds share a batch.

        latents: (pictures, C, h, w) unit-variance starting noise, instead of drawn. on_step(done, total) is called
        after each step, on_image(index, picture) when a picture is finished; what they raise ends the run.
        """
        with self.placing.alone():
            return self._generate(request, latents, on_step, on_image)

    def _generate(
        self,
        request: Request | Sequence[Request],
        latents: Tensor | None,
        on_step: OnStep | None,
        on_image: OnImage | None,
    ) -> Result | list[Result]:
        requests = [self.resolve(r) for r in ([request] if isinstance(request, Request) else request)]
        pictures = sum(r.count for r in requests)
        if self.budget:
            requests = [self.budget.fitted(r, self.placing.now, pictures) for r in requests]
        groups = self._groups(requests)
        if latents is not None and latents.shape[:1] != (pictures,):
            raise RequestError(f"latents has the shape {tuple(latents.shape)}; its first number must be {pictures}")
        stepped = _counted(on_step, sum(self._length(group[0][0]) for group in groups))
        images: list[Image.Image] = []
        finals: list[Tensor] = []
        notices: list[tuple[str, ...]] = []  # one a picture
        timings = {"denoise": 0.0, "decode": 0.0}
        for group in groups:
            begun = time.perf_counter()
            run = self._run(group, None if latents is None else latents[len(images) : len(images) + len(group)])
            x = self._solved(run, stepped)
            finals += x.unbind()
            middle = time.perf_counter()
            for image in self._finished(run, x):
                images.append(image)
                if on_image:
                    on_image(len(images) - 1, image)
            notices += [(*run.notices, *self.wording.uncovered(run.request))] * len(group)
            timings["denoise"] += middle - begun
            timings["decode"] += time.perf_counter() - middle
        results: list[Result] = []
        first = 0
        for r in requests:
            part = slice(first, first + r.count)
            seeds = [r.seed + k for k in range(r.count)]  # type: ignore[operator]
            results.append(Result(images[part], torch.stack(finals[part]), seeds, r, timings, notices[first]))
            first += r.count
        return results[0] if isinstance(request, Request) else results

    def draw(self, group: Sequence[Job], on_step: OnStep | None = None) -> list[Image.Image]:
        """The pictures of one batch, whatever `batch` their requests say: (request, the picture's own seed) of each.

        The requests differ in words and seeds alone, as those that `generate` puts together do.
        """
        with self.placing.alone():
            run = self._run([(self._affordable(r, len(group)), seed) for r, seed in group])
            return self._finished(run, self._solved(run, _counted(on_step, self._length(run.request))))

    def stream(self, request: Request, latents: Tensor | None = None) -> Iterator[Step]:
        """The steps of a request, all its pictures in one batch: Step.index, .sigma, .x, .denoised (count, C, h, w).

        With hires those of the second pass follow, larger.
        """
        request = self._affordable(request, request.count)
        jobs = [(request, request.seed + k) for k in range(request.count)]  # type: ignore[operator]
        return self._steps(self._run(jobs, latents))

    def unet_for(self, request: Request) -> UNet:
        """The UNet that draws this request: with its change merged where the sampler is the few-step form's.

        Raises CheckpointError where the change is missing or of another UNet.
        """
        few_step = self.resolver.few_step(self.resolver.sampler(request))
        if few_step is None:
            return self.unet
        if few_step.lora not in self._changed:  # two threads at once make the same one twice
            path = self.parts.source / few_step.lora
            if not path.exists():
                raise CheckpointError(f"{path} is missing: mezzotint.json names it for the sampler {few_step.sampler}")
            unet = merged(self.unet, read_lora(path, self.unet))
            unet.fuse_projections()
            self._changed[few_step.lora] = unet
        return self._changed[few_step.lora]

    def merge(self, loras: Any) -> None:
        """Make LoRA files part of the weights, in the place of those that are: as `loras` of a Request.

        The picture is that of the same `loras` in a request, up to rounding, and faster. No run may be under way.
        """
        self.adapters.merge(self.wording.loras(Request(prompt="", loras=loras)))
        self._reweighted()

    def unmerge(self) -> None:
        """Put the weights back that were there before `merge`, bit for bit."""
        self.adapters.unmerge()
        self._reweighted()

    def _reweighted(self) -> None:
        self._changed.clear()
        self.unet.fuse_projections()

    def _affordable(self, request: Request, batch: int) -> Request:
        """The request, resolved. Raises BudgetError where `batch` such pictures at once take more than is allowed."""
        request = self.resolve(request)
        if self.budget:
            self.budget.check(request.replace(count=batch, batch=batch), self.placing.now)
        return request

    def _run(self, group: Sequence[Job], latents: Tensor | None = None) -> Run:
        """A batch with its pictures opened."""
        placed = place(group[0][0])
        return Run(group, latents, [placed] * len(group) if placed else ())

    def _length(self, request: Request) -> int:
        """The steps of a run, both passes."""
        passes = [request, *([self.resolver.second_pass(request)] if request.hires else [])]
        return sum(len(self.resolver.sigmas(r)) - 1 for r in passes)

    def _steps(self, run: Run) -> Iterator[Step]:
        """One batch from where it starts to its last x; with hires, and on from its larger form."""
        for last in self._pass(run):
            yield last
        if run.request.hires:
            for step in self._pass(self._second(run, self._final(run, last))):
                yield replace(step, index=last.index + 1 + step.index)

    def _solved(self, run: Run, stepped: Callable[[], None]) -> Tensor:
        """The last x of a batch as the VAE takes it; `stepped` is called after each step."""
        for step in self._steps(run):
            last = step
            stepped()
        return self._final(run, last)

    def _second(self, run: Run, x: Tensor) -> Run:
        """The second pass of hires-fix, on the first one's final latents: the run of their larger form."""
        group = [(self.resolver.second_pass(request), seed) for request, seed in run.group]
        before = self.resolver.counted(run.request)
        _, height, width = self.resolver.latent_shape(group[0][0])
        if run.request.hires_upscale == "latent":
            larger = F.interpolate(x.float(), (height, width), mode="bilinear")
            return Run(group, pictures=[*larger[:, None]], noted=run.noted, before=before)
        size = group[0][0].width or 0, group[0][0].height or 0
        images = self._decode(x, run.noted, run.request.seamless)
        return Run(group, pictures=[Placed(fit(image, size)) for image in images], noted=run.noted, before=before)

    def _pass(self, run: Run) -> Iterator[Step]:
        """One pass of a batch along its noise levels."""
        request, noted = run.request, run.noted
        sampler, sigmas = self.resolver.sampler(request), self.resolver.sigmas(request)
        noise = SeededNoise(run.seeds, self.resolver.latent_shape(request), self.device, request.noise or "seeded")
        schedule, prediction = Schedule.from_config(sampler.schedule), Prediction.from_config(sampler.schedule)
        options = schedule.bind_options(sampler.options)
        if "calls" in sampler.spacing_options and request.spacing:
            # three an interval, less in the last ones, which every run has
            cut = len(self.resolver.all_sigmas(request)) - len(sigmas)
            options |= {"calls": max((request.steps or 1) - 3 * cut, 1)}
        options |= {} if request.eta is None else {"eta": request.eta}
        if request.strength is not None and "total_steps" in inspect.signature(SOLVERS[sampler.solver]).parameters:
            options |= {"total_steps": len(self.resolver.all_sigmas(request)) - 1}
        given = request.guidance_scale or 0.0
        scales = given if isinstance(given, tuple) else (given,)
        unet = self.unet_for(request)
        changes = self.adapters.changes(self.wording.loras(request))
        with self.placing.computing(request.seamless), adapting({"unet": unet}, changes):
            pure = math.sqrt(sigmas[0] ** 2 + 1.0) if sampler.start == "vp" else sigmas[0]
            encode = partial(self.placing.encode, self.vae, noted=noted)
            begun = start(run, self.vae, encode, noise, sigmas[0], pure, self.unet.config.in_channels)
            conditions, weights = self.wording.conditions([job for job, _ in run.group], noted, run.before)
            kind, split = sampler.timestep, self.placing.now.guidance == "split"
            outputs = watched_outputs(
                unet,
                lambda unet: Denoiser(unet, schedule, prediction, conditions, kind, sigmas, begun.beside, split),
                noted,
            )
            method = request.guidance_method or "cfg"
            own = {option.name: getattr(request, name) for name, option in options_of(method).items()}
            denoise = guided(
                outputs,
                prediction,
                tuple(scale / sampler.guidance_divisor for scale in scales),
                request.guidance_rescale or 0.0,
                request.guidance_interval,
                request.guidance_steps,
                sigmas,
                METHODS[method](**own),
                weights,
                mimic_scale=request.mimic_scale,
                threshold_percentile=request.threshold_percentile or 0.0,
            )
        solver = SOLVERS[sampler.solver](
            begun.wrap(denoise), begun.x, sigmas, self._fresh(run, noise, sampler), **options
        )
        with turn(unet):
            while True:
                with self.placing.computing(request.seamless), adapting({"unet": unet}, changes):
                    step = next(solver, None)
                    if step is None:
                        return
                    if step.sigma == sigmas[-1]:
                        step = replace(step, x=begun.kept(step.x, self._shrink(sampler, step.sigma)))
                yield checked(step)

    def _fresh(self, run: Run, noise: SeededNoise, sampler: Sampler) -> Noise:
        """The noise of the steps."""
        if sampler.noise == "seeded":
            return noise
        # of the whole list of levels, as diffusers: the path does not depend on where a run from a picture begins
        levels = self.resolver.all_sigmas(run.request)
        return BrownianNoise(
            run.seeds, noise.shape, levels, self.device, midpoints=sampler.noise == "brownian midpoints"
        )

    def _final(self, run: Run, last: Step) -> Tensor:
        """The last step's x as the VAE takes it."""
        return last.x / self._shrink(self.resolver.sampler(run.request), last.sigma)

    def _shrink(self, sampler: Sampler, sigma: float) -> float:
        """What a final x at this level is divided by before the VAE."""
        return math.sqrt(1.0 + sigma**2) if sampler.rescale_final else 1.0

    def _groups(self, requests: Sequence[Request]) -> list[list[Job]]:
        """Pictures in order, cut where the batch is full or the next request differs in more than words and seed.

        Prompts of different lengths, or of other parts, do not meet: a neighbour's length would change the picture.
        """
        groups: list[list[Job]] = []
        last: tuple[Any, ...] | None = None
        for r in requests:
            alike = r.replace(prompt="", negative_prompt=r.negative_prompt and "", seed=0, count=1, variation_seed=None)
            shapes = self.wording.shapes(r)
            for k in range(r.count):
                if (alike, shapes) != last or len(groups[-1]) == r.batch:
                    groups.append([])
                groups[-1].append((r, r.seed + k))  # type: ignore[operator]
                last = alike, shapes
        return groups

    def encode(self, prompt: str, request: Request | None = None) -> Condition:
        """What a prompt means to the UNet: context (1, T, D) float32, and for SDXL pooled (1, P).

        Of a prompt that changes in the course of the run, what it means in the first step; of one with AND, its first
        part: `encode_parts` gives all of it.
        """
        return self.encode_parts(prompt, request)[0].timeline[0][1]

    def encode_parts(self, prompt: str, request: Request | None = None) -> list[Encoded]:
        """The whole meaning of a prompt: for each part (AND) its weight and its timeline of (last step that it holds
        for, Condition of batch 1). `request` says the syntax, the steps, clip_skip, emphasis and embeddings.
        """
        request = self.resolve(Request(prompt=prompt) if request is None else request.replace(prompt=prompt))
        with self.placing.computing():
            return [part.copy() for part in self.wording.parts(request, request.prompt)]

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) as a run leaves them -> B pictures."""
        return self._decode(latents, [])

    def _decode(self, latents: Tensor, noted: list[str], joined: str | None = None) -> list[Image.Image]:
        with self.placing.computing(joined):
            return to_pil(self.placing.decode(self.vae, self.vae.unscale(latents.to(self.device)), noted))

    def _finished(self, run: Run, x: Tensor) -> list[Image.Image]:
        """The pictures of a batch, put into what they were drawn on, each with its record."""
        images = self._decode(x, run.noted, run.request.seamless)
        if run.placed:
            images = [placed.finish(image) for placed, image in zip(run.placed, images, strict=True)]
        images = [Picture.from_image(image) for image in images]  # whose save() keeps the record
        inputs = run.placed[0].digests if run.placed else {}
        for k, ((job, seed), image) in enumerate(zip(run.group, images, strict=True)):
            image.info.update(
                describe(
                    job,
                    seed,
                    self._facts(job),
                    run.group,
                    k,
                    image=image,
                    float32=run.noted,
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
        with self.placing.computing():
            return self.vae.scale(self.placing.encode(self.vae, from_pil(image).to(self.device), []).mean).float()

    def _facts(self, request: Request) -> dict[str, Any]:
        """What the same bits depend on, beside the request."""
        few_step = self.resolver.few_step(self.resolver.sampler(request))
        where_there_is = {
            "placement": self.placing.now.changes(),
            "lora": few_step and few_step.lora,
            "embeddings": self.wording.used(request),
            "loras": self.adapters.digests(self.wording.loras(request)),
            "merged": self.adapters.merged_digests(),
        }
        return {
            "name": self.parts.source.stem if self.parts.source.is_file() else self.parts.source.name,
            "family": self.parts.family,
            "files": self.parts.identity,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            **{name: value for name, value in where_there_is.items() if value},
        }


def _counted(on_step: OnStep | None, total: int) -> Callable[[], None]:
    """Tells on_step how many steps are done each time that it is called."""
    count = itertools.count(1)

    def stepped() -> None:
        done = next(count)
        if on_step:
            on_step(done, max(done, total))  # dpm_adaptive takes as many as it needs

    return stepped
