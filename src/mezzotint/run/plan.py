"""The plan of a run: everything that follows from a request and a model's configuration, computed once.

    plan = plan_run(ModelInfo.of(...), request)

The pipeline and the memory prediction read the plan's fields; nothing resolves a sampler, parses a prompt or lists a
folder a second time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mezzotint import samplers
from mezzotint.conditioning.encode import parse_prompt
from mezzotint.diffusion.guidance import METHOD_OPTIONS
from mezzotint.diffusion.prediction import Prediction
from mezzotint.diffusion.schedule import Schedule
from mezzotint.errors import RequestError
from mezzotint.images import init_image
from mezzotint.models.tiles import spans
from mezzotint.models.upscaler import Upscaler
from mezzotint.prompt import Part, PromptPlan
from mezzotint.request import MAX_SIDE, Request
from mezzotint.run.controls import ControlInput, ControlNets, check_controls
from mezzotint.run.image_prompts import AdapterInput, ImagePrompts, check_ip_adapters
from mezzotint.run.levels import Switch, all_sigmas, refiner_switch, run_sigmas, schedule_steps
from mezzotint.run.loras import named_loras
from mezzotint.run.model_info import ModelInfo
from mezzotint.run.notices import find_notices
from mezzotint.run.refiners import RefinerInput, Refiners, plan_refined
from mezzotint.run.regions import open_masks
from mezzotint.run.resolve import expand_choices, few_step_of, resolve_request
from mezzotint.run.safety import check_mode, unchecked_notices
from mezzotint.samplers import SOLVERS, Sampler
from mezzotint.weights.embeddings import Library
from mezzotint.weights.lora import Adapter, Adapters, Scale
from mezzotint.weights.model_files import FewStep
from mezzotint.weights.upscaler_files import load_upscaler


@dataclass(frozen=True)
class RunFiles:
    """Reads the files that requests name, for one model.

    Attributes:
        adapters: Reads and caches LoRA files.
        widths: Hidden size of each text encoder.
        controls: Reads and caches ControlNets.
        device: Where an upscaler computes.
        refiners: Reads and caches refiners.
        image_prompts: Describes IP-Adapters.
    """

    adapters: Adapters
    widths: Sequence[int]
    controls: ControlNets
    device: torch.device
    refiners: Refiners
    image_prompts: ImagePrompts

    def read_loras(self, loras: Sequence[tuple[str, Scale]]) -> tuple[Adapter, ...]:
        """Read LoRA files."""
        return tuple(self.adapters.read(name) for name, _ in loras)

    def read_upscaler(self, source: str) -> Upscaler:
        """Read an upscaler's file, in float32 on the CPU and float16 elsewhere."""
        dtype = torch.float32 if self.device.type == "cpu" else torch.float16
        return load_upscaler(Path(source).expanduser(), self.device, dtype)

    def read_embeddings(self, sources: Sequence[str]) -> Library:
        """Read textual inversions from files, folders or hub ids."""
        return Library(sources, self.widths)


@dataclass(frozen=True, eq=False)
class RunPlan:
    """One request, planned for one model.

    Attributes:
        model: The model.
        request: The request with every value resolved.
        typed: The prompt and the negative prompt before ComfyUI's choices were drawn.
        sampler: Solver, spacing and their options.
        schedule: The training schedule as this sampler reads it.
        prediction: What the UNet's output is.
        sigmas: The run's falling noise levels, n + 1 for n steps.
        all_sigmas: The sampler's whole list of noise levels, of which img2img takes the last ones. In
            img2img it is the list of `Sampler.steps_from`, if there is one.
        schedule_steps: Number of steps that prompt schedules count.
        latent_shape: (C, h, w) of one picture's latents.
        positive: The parsed prompt.
        negative: The parsed negative prompt; None is parsed as "".
        regions: The parsed prompts of the regions.
        masks: The mask of each region; None for one with a box.
        loras: Each LoRA file of the request and its scale.
        adapters: The same files, read; empty if the plan was made without reading files.
        embeddings: The textual inversions that the prompts may name; empty likewise.
        few_step: The model's few-step form, if this run uses it.
        controls: The ControlNets and T2I-Adapters of the request, described; empty if the plan was made without reading
            files.
        ip_adapters: The IP-Adapters of the request, likewise.
        second_pass: Hires-fix's second pass, or None.
        upscaler: What enlarges the first pass's pictures, if it is a network; None if the plan was made without reading
            files.
        base_steps: In a second pass, `schedule_steps` of the first pass.
        refiner: The refiner of the last pass; None if the plan was made without reading files.
        refined: The refiner's plan of this pass, likewise; None if there is another pass.
        switch: Where the refiner takes over in this pass.
    """

    model: ModelInfo
    request: Request
    typed: tuple[str, str]
    sampler: Sampler
    schedule: Schedule
    prediction: Prediction
    sigmas: list[float]
    all_sigmas: list[float]
    schedule_steps: int
    latent_shape: tuple[int, int, int]
    positive: PromptPlan
    negative: PromptPlan
    regions: tuple[PromptPlan, ...]
    masks: tuple[Image.Image | None, ...]
    loras: tuple[tuple[str, Scale], ...]
    adapters: tuple[Adapter, ...]
    embeddings: Library
    few_step: FewStep | None
    controls: tuple[ControlInput, ...]
    ip_adapters: tuple[AdapterInput, ...]
    second_pass: RunPlan | None
    base_steps: int | None = None
    upscaler: Upscaler | None = None
    refiner: RefinerInput | None = None
    refined: RunPlan | None = None
    switch: Switch | None = None

    @property
    def steps(self) -> int:
        """Number of solver steps, of both passes and of all tiles."""
        return self.tiles * (len(self.sigmas) - 1) + (self.second_pass.steps if self.second_pass else 0)

    @property
    def tiles(self) -> int:
        """Number of tiles that the picture is drawn in."""
        side = (self.request.tile or 0) // self.model.downscale
        return math.prod(len(spans(length, side, side // 4)) for length in self.latent_shape[1:]) if side else 1

    @property
    def last_pass(self) -> RunPlan:
        """The plan of the last pass: hires-fix's second, or this one."""
        return self.second_pass or self

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the prompt, then those of each region's."""
        return tuple(part for prompt in (self.positive, *self.regions) for part in prompt.parts)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each part in its prompt; 1.0 unless that is joined with AND."""
        return tuple(part.weight for part in self.parts)

    @property
    def guides(self) -> bool:
        """Whether any step needs the unconditional output: CFG++ always does, and so does a sum of AND's parts."""
        if any(abs(sum(p.weight for p in prompt.parts) - 1.0) > 1e-6 for prompt in (self.positive, *self.regions)):
            return True
        extrapolates = max(self.guidance_scales) > 1.0 or SOLVERS[self.sampler.solver].cfg_pp
        return extrapolates and not self.model.embeds_guidance

    @property
    def condition_count(self) -> int:
        """Largest number of conditions per step: the prompt's parts, the unconditional, negative and perturbed ones."""
        perturbed = len(self.parts) if self.request.pag_scale else 0
        return len(self.parts) + self.guides + (self.guides and self.uses_empty_prompt) + perturbed

    @property
    def uses_empty_prompt(self) -> bool:
        """Whether guidance uses the empty prompt in addition to the negative one (Perp-Neg)."""
        return self.request.guidance_method == "perp_neg"

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """The guidance scale, or those that are spread over the run."""
        given = self.request.guidance_scale or 0.0
        return tuple(
            scale / self.sampler.guidance_divisor for scale in (given if isinstance(given, tuple) else (given,))
        )

    @property
    def method_options(self) -> dict[str, Any]:
        """The options of the guidance method."""
        method = self.request.guidance_method or "cfg"
        return {option: getattr(self.request, f"{method}_{option}") for option in METHOD_OPTIONS[method]}

    @property
    def solver_options(self) -> dict[str, Any]:
        """The options of the solver."""
        request, solver = self.request, SOLVERS[self.sampler.solver]
        options = self.schedule.bind_options(self.sampler.options)
        if "calls" in self.sampler.spacing_options and request.spacing:
            # three calls an interval, and fewer in the last ones, which no run skips
            skipped = len(self.all_sigmas) - len(self.sigmas)
            options["calls"] = max((request.steps or 1) - 3 * skipped, 1)
        if request.eta is not None:
            options["eta"] = request.eta
        if (request.strength is not None or len(self.sigmas) < len(self.all_sigmas)) and (
            "total_steps" in solver.options
        ):
            options["total_steps"] = len(self.all_sigmas) - 1
        return options

    @property
    def noise_scale(self) -> float:
        """Factor of the unit noise that a run from noise alone starts from."""
        return math.sqrt(self.sigmas[0] ** 2 + 1.0) if self.sampler.start == "vp" else self.sigmas[0]

    @property
    def picture_noise(self) -> tuple[float, float]:
        """Level of the noise that is added to a picture, and the factor that the sum is multiplied by."""
        first = self.sigmas[0]
        if self.sampler.noised_at == "first":
            return first, 1.0
        level = min((level for level in self.all_sigmas if level > first * (1.0 + 1e-9)), default=first)
        return level, math.sqrt((first**2 + 1.0) / (level**2 + 1.0))

    def final_scale(self, sigma: float) -> float:
        """Return what the last x, at this noise level, is divided by before the VAE."""
        return math.sqrt(1.0 + sigma**2) if self.sampler.rescale_final else 1.0

    @property
    def scaled_adapters(self) -> list[tuple[Adapter, Scale]]:
        """The LoRAs that were read, each with its scale."""
        return [(adapter, scale) for adapter, (_, scale) in zip(self.adapters, self.loras, strict=True)]

    @property
    def lora_digests(self) -> dict[str, str]:
        """SHA-256 of each LoRA file."""
        return {name: adapter.digest for adapter, (name, _) in zip(self.adapters, self.loras, strict=True)}

    @property
    def control_digests(self) -> dict[str, str]:
        """SHA-256 of the weights of each ControlNet."""
        return {one.entry.file: one.digest for one in self.controls}

    @property
    def ip_adapter_digests(self) -> dict[str, str]:
        """SHA-256 of the weights of each IP-Adapter."""
        return {one.entry.file: one.digest for one in self.ip_adapters}

    @property
    def image_encoder_digests(self) -> dict[str, str]:
        """SHA-256 of the weights of each vision encoder that pictures are encoded with."""
        return {str(one.encoder.network.path): one.encoder_digest for one in self.ip_adapters if one.encoder}

    @property
    def embedding_digests(self) -> dict[str, str]:
        """SHA-256 of the embeddings that occur in the prompts, by trigger word."""
        regions = " ".join(prompt.source for prompt in self.regions)
        words = f"{self.request.prompt} {self.request.negative_prompt} {regions}".lower()
        return {name: digest for name, digest in self.embeddings.digests.items() if name in words}

    @property
    def safety(self) -> str:
        """What is done with flagged pictures: "off" (they are not checked), "flag", "blur" or "black"."""
        return (self.request.safety or "flag") if self.model.has_checker else "off"

    @cached_property
    def notices(self) -> tuple[str, ...]:
        """Sentences for the user: on the model, on the request, and on a safety check that is not possible."""
        return (*self.model.notices, *self.request_notices, *unchecked_notices(self.model, self.request))

    @cached_property
    def request_notices(self) -> tuple[str, ...]:
        """Sentences on what the request asks for, which the picture's record keeps."""
        return tuple(dict.fromkeys(find_notices(self)))

    @cached_property
    def empty(self) -> PromptPlan:
        """The empty prompt, parsed."""
        return parse_prompt(self.request, "", self.schedule_steps, negative=True, base_steps=self.base_steps)

    @cached_property
    def init_image(self) -> init_image.InitImage | None:
        """The init image, opened and resized; None if the run starts from noise."""
        return _open_image(self.request)

    def with_batch(self, batch: int, count: int | None = None) -> RunPlan:
        """Return the plan with another batch, and another number of pictures if `count` is given."""
        changes = {"batch": batch} if count is None else {"batch": batch, "count": count}
        second, refined = (one and one.with_batch(batch, count) for one in (self.second_pass, self.refined))
        return replace(self, request=self.request.replace(**changes), second_pass=second, refined=refined)


def plan_run(model: ModelInfo, request: Request, files: RunFiles | None = None) -> RunPlan:
    """Plan the run of a request.

    Args:
        model: The model.
        request: The request; None in a field means the model's default.
        files: Reads the LoRAs and embeddings that the request names; without it they are not opened.

    Raises:
        RequestError: If the request does not fit the model.
        CheckpointError: If a LoRA or an embedding is missing, damaged or another model's.
    """
    sampler = samplers.resolve(
        request.sampler, model.scheduler_config, request.spacing, family=model.family, pipeline=model.pipeline_class
    )
    resolved = resolve_request(model, request, sampler)
    check_mode(model, resolved)
    check_controls(resolved)
    check_ip_adapters(resolved)
    schedule = Schedule.from_config(sampler.schedule)
    levels = all_sigmas(resolved, sampler, schedule)
    sigmas = run_sigmas(resolved, sampler, schedule, levels)  # raises RequestError
    typed = resolved.prompt, resolved.negative_prompt or ""
    resolved = expand_choices(resolved)
    steps = schedule_steps(resolved, sampler, levels)
    positive, negative = _parse_prompts(resolved, steps)
    regions = _parse_regions(resolved, steps)
    loras = named_loras(resolved, [network for one in (positive, *regions) for network in one.networks])
    adapters = files.read_loras(loras) if files else ()
    bundled = [name for adapter, (name, _) in zip(adapters, loras, strict=False) if adapter.coverage.bundled]
    plan = RunPlan(
        model=model,
        request=resolved,
        typed=typed,
        sampler=sampler,
        schedule=schedule,
        prediction=Prediction.from_config(sampler.schedule),
        sigmas=sigmas,
        all_sigmas=levels,
        schedule_steps=steps,
        latent_shape=_latent_shape(model, resolved),
        positive=positive,
        negative=negative,
        regions=regions,
        masks=open_masks(resolved),
        loras=loras,
        adapters=adapters,
        embeddings=files.read_embeddings([*(resolved.embeddings or ()), *bundled]) if files else Library((), ()),
        few_step=few_step_of(model, sampler),
        controls=files.controls.read(resolved.control or ()) if files else (),
        ip_adapters=files.image_prompts.read(resolved.ip_adapter or ()) if files else (),
        second_pass=None,
        upscaler=files.read_upscaler(resolved.upscaler) if files and resolved.upscaler else None,
        refiner=files.refiners.read(resolved.refiner) if files and resolved.refiner else None,
    )
    plan = replace(plan, second_pass=_add_refiner(_plan_second(plan))) if resolved.hires else _add_refiner(plan)
    if files:
        files.controls.check(plan)
    return plan


def _add_refiner(last: RunPlan) -> RunPlan:
    """Return the last pass with its refiner's plan, if there is a refiner."""
    if last.request.refiner is None:
        return last
    switch = refiner_switch(last.request.refiner_at or 0.0, last.sampler, last.schedule, last.sigmas)
    return replace(last, switch=switch, refined=plan_refined(last, last.refiner) if last.refiner else None)


def _plan_second(first: RunPlan) -> RunPlan:
    """Return the plan of hires-fix's second pass, which starts from the first one's result, enlarged."""
    request = _second_request(first.model, first.request)
    levels = all_sigmas(request, first.sampler, first.schedule, "hires_")
    steps = schedule_steps(request, first.sampler, levels)
    positive, negative = _parse_prompts(request, steps, first.schedule_steps)
    return replace(
        first,
        request=request,
        sigmas=run_sigmas(request, first.sampler, first.schedule, levels, "hires_"),
        all_sigmas=levels,
        schedule_steps=steps,
        latent_shape=_latent_shape(first.model, request),
        positive=positive,
        negative=negative,
        regions=_parse_regions(request, steps, first.schedule_steps),
        base_steps=first.schedule_steps,
    )


def _second_request(model: ModelInfo, request: Request) -> Request:
    """Return the request of the second pass."""
    assert request.width and request.height and request.hires
    side = model.downscale
    width, height = (int(number * request.hires) // side * side for number in (request.width, request.height))
    if max(width, height) > MAX_SIDE:
        raise RequestError(
            f"hires is {request.hires}, which gives {width}x{height}; a side may have at most {MAX_SIDE} pixels"
        )
    changes: dict[str, Any] = {"width": width, "height": height, "strength": request.hires_strength}
    if request.hires_steps and not request.sigmas and not request.timesteps:
        changes["steps"] = request.hires_steps
    for name in ("original_size", "target_size"):
        if getattr(request, name) == (request.height, request.width):
            changes[name] = (height, width)
    return request.replace(hires=None, variation_strength=None, seed_size=None, **changes)


def _parse_prompts(request: Request, steps: int, base_steps: int | None = None) -> tuple[PromptPlan, PromptPlan]:
    """Return the parsed prompt and negative prompt."""
    positive = parse_prompt(request, request.prompt, steps, negative=False, base_steps=base_steps)
    return positive, parse_prompt(request, request.negative_prompt or "", steps, negative=True, base_steps=base_steps)


def _parse_regions(request: Request, steps: int, base_steps: int | None = None) -> tuple[PromptPlan, ...]:
    """Return the parsed prompts of the regions."""
    texts = (region.prompt for region in request.regions or ())
    return tuple(parse_prompt(request, text, steps, negative=False, base_steps=base_steps) for text in texts)


def _latent_shape(model: ModelInfo, request: Request) -> tuple[int, int, int]:
    """Return (C, h, w) of the latents."""
    side = model.downscale
    if not request.height or not request.width or request.height % side or request.width % side:
        raise RequestError(f"the size is {request.width}x{request.height}; both must be multiples of {side}")
    return model.latent_channels, request.height // side, request.width // side


def _open_image(request: Request) -> init_image.InitImage | None:
    """Open the picture that a resolved request starts from."""
    if request.image is None:
        return None
    assert request.width and request.height
    options = {
        name: value
        for name in (
            *("resize_mode", "mask_blur", "invert_mask", "differential", "masked_content", "only_masked", "outpaint"),
        )
        if (value := getattr(request, name)) is not None
    }
    return init_image.prepare(request.sources, (request.width, request.height), **options)
