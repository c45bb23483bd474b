"""The pipeline: load a model, and generate pictures from requests.

    pipe = mezzotint.load()
    image = pipe("a lemon on a blue background", seed=7)

A run is planned (run/plan.py) and split into batches; for each batch the prompts are encoded, the initial latents are
prepared, a solver takes its steps, and the VAE decodes the result. Between calls a Pipeline keeps only caches, whose
content does not depend on who fills them, so threads may share one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from copy import copy
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, cast, overload

import torch
from PIL import Image
from torch import Tensor

from mezzotint.conditioning.encode import EncodedPart
from mezzotint.devices import DTYPES, best_device, device_of, dtype_of, dtype_on
from mezzotint.diffusion.schedule import Schedule
from mezzotint.diffusion.solvers import Step
from mezzotint.errors import RequestError
from mezzotint.images.init_image import open_picture, to_source
from mezzotint.images.io import from_pil
from mezzotint.memory import system
from mezzotint.memory.planner import Budget, MemoryPlan
from mezzotint.memory.planner import plan as plan_memory
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.offload import count_parameters
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import Condition, UNet
from mezzotint.models.vae import VAE
from mezzotint.placement import Placement
from mezzotint.request import Job, Request
from mezzotint.result import Result
from mezzotint.run.batches import Batch, picture_seeds
from mezzotint.run.model import LoadedModel
from mezzotint.run.networks import adopt
from mezzotint.run.plan import RunPlan, plan_run
from mezzotint.run.preview import LatentPreview, TinyPreview, matrix_path
from mezzotint.run.runner import OnEstimate, OnImage, OnStep, Runner
from mezzotint.weights.checkpoint import Parts, open_model
from mezzotint.weights.hub import BUNDLED
from mezzotint.weights.model_files import encoder_names
from mezzotint.weights.save_model import save_model

log = logging.getLogger("mezzotint")

OneRequest = Request | RunPlan | str
Requests = Sequence[Request] | Sequence[RunPlan] | list[str] | list[Request | RunPlan | str]


def load(
    path_or_id: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    placement: Placement | None = None,
    memory: int | str | MemoryPlan | None = None,
    request: Request | Sequence[Request] | None = None,
    **options: Any,
) -> Pipeline:
    """Load a pipeline.

    Args:
        path_or_id: A diffusers folder, a single file or a hub id; None is the bundled model.
        device: Where the model runs; None is the best device there is.
        dtype: Of the weights, also as a name such as "float16"; None is float32 on the CPU and bfloat16 elsewhere.
            "auto" is bfloat16 also on a CPU that multiplies it natively.
        placement: Where the weights are kept and how the work is cut, to save memory.
        memory: What the process may take, such as "4GiB" or "auto". The placement is then planned for it; the
            pipeline makes a batch smaller that would take more, and refuses a picture that would.
        request: The request, or requests, that `memory` is planned for.
        options: `prediction`, `family`, `variant`, `config`, `vae` and `safety_checker`: the fields of `ModelOptions`,
            which overrule what is found in the model's files.

    Raises:
        CheckpointError: If the model is missing, damaged or of an unsupported kind.
        RequestError: If an argument is invalid.
        BudgetError: If the request does not fit into `memory`.
    """
    if placement is not None and memory is not None:
        raise RequestError("placement and memory are both given; a budget chooses the placement: leave one of them out")
    device = device_of(device or best_device())
    dtype = dtype_on(device, dtype)
    budget = None
    if memory is not None:
        plan = plan_memory(path_or_id, memory, request, device=device, dtype=dtype, **options)
        plan.prepare()
        placement, budget = plan.placement, plan.budget
    placement = placement or Placement()
    start = time.perf_counter()
    parts = open_model(path_or_id or BUNDLED, device=device, dtype=dtype, placement=placement, **options)
    for file in parts.files:
        log.info("read %s", file)
    seconds = time.perf_counter() - start
    log.info("loaded %s (%s), %s on %s, in %.2f s", parts.source, parts.family, dtype, device, seconds)
    log.info("memory: %s", placement.changes() or "all weights on the device, nothing is cut")
    return Pipeline(parts, placement, budget)


class Pipeline:
    """A loaded model, which generates pictures from requests."""

    def __init__(self, parts: Parts, placement: Placement | None = None, budget: Budget | None = None) -> None:
        """Wrap opened parts.

        Args:
            parts: The networks and what belongs to them.
            placement: The placement that `parts` were opened with.
            budget: The memory that a request may not exceed.
        """
        self._model, self._budget = LoadedModel(parts, placement or Placement(), budget is not None), budget
        self._runner, self._executor = Runner(self._model, system.trim_heap), self._model.executor

    def __deepcopy__(self, memo: dict[int, Any]) -> Pipeline:
        """Copy the networks and everything that belongs to them.

        Raises:
            RequestError: If LoRA files are merged, whose originals the copy would lack.
        """
        other = copy(self)
        other._model = self._model.copy(memo)
        other._runner, other._executor = Runner(other._model, system.trim_heap), other._model.executor
        return other

    @property
    def parts(self) -> Parts:
        """The networks and what belongs to them."""
        return self._model.parts

    # ---- the networks ------------------------------------------------------------------------------------------------

    @property
    def unet(self) -> UNet:
        """The denoising network; it may be replaced by another UNet, or by a UNet2DConditionModel of diffusers.

        Of a network of diffusers the weights are copied: editing it later changes nothing here.
        """
        return self.parts.unet

    @unet.setter
    def unet(self, unet: object) -> None:
        self._model.replace(unet=adopt("unet", unet))

    @property
    def vae(self) -> VAE:
        """The autoencoder; it may be replaced, as the UNet may, also by an AutoencoderKL of diffusers."""
        return self.parts.vae

    @vae.setter
    def vae(self, vae: object) -> None:
        self._model.replace(vae=adopt("vae", vae))

    @property
    def text_encoders(self) -> tuple[CLIPTextModel, ...]:
        """One text encoder, or SDXL's two; they may be replaced, also by a CLIPTextModel of transformers."""
        return tuple(self.parts.text_encoders)

    @text_encoders.setter
    def text_encoders(self, encoders: Sequence[object]) -> None:
        names = encoder_names(self.parts.model_index)
        self._model.replace(text_encoders=[adopt(name, one) for name, one in zip(names, encoders, strict=False)])

    @property
    def tokenizers(self) -> tuple[Tokenizer, ...]:
        """The tokenizer of each text encoder."""
        return tuple(self.parts.tokenizers)

    def _refuse_scheduler(self, *_: object) -> NoReturn:
        raise AttributeError(
            "a pipeline has no scheduler: give `sampler` and `spacing` in a request, or set `scheduler_config`"
        )

    scheduler = property(_refuse_scheduler, _refuse_scheduler)  # an attribute of diffusers' pipelines

    @property
    def schedule(self) -> Schedule:
        """The training schedule as the model's own sampler reads it; it follows `scheduler_config`."""
        return self._model.schedule

    def to(
        self,
        *targets: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Pipeline:
        """Move the model to a device, cast it to a dtype, or both. No run may be under way.

        Args:
            targets: A device or a dtype, or one of each, as in `pipe.to("cuda", torch.float16)`.
            device: The device.
            dtype: The dtype.

        Returns:
            This pipeline.

        Raises:
            RequestError: If the device is not available, a model cannot have the dtype, or the placement does not keep
                all weights on the device.
        """
        for target in targets:
            if isinstance(target, torch.dtype) or target in DTYPES:
                dtype = cast(torch.dtype, target)
            else:
                device = target
        self._model.to(device_of(device or self.device), dtype_of(dtype or self.dtype))
        return self

    def save(self, path: str | PathLike[str], dtype: str | torch.dtype | None = None) -> Path:
        """Save the model as it is now, edits and merged LoRAs included, but not hooks.

        Args:
            path: A file name that ends in .safetensors, for one file in the original layout; otherwise a folder in
                the layout of diffusers.
            dtype: The dtype of the weights in the files; None is each weight's own, which loses nothing.

        Returns:
            The path.

        Raises:
            RequestError: If the path has another ending, a module was replaced by one of another kind, or the placement
                stores weights in fewer bits.
            CheckpointError: If one file cannot express the model; a folder can.
            WriteError: If it cannot be written.
        """
        path = Path(path).expanduser()
        save_model(path, self._model.plain_parts(), dtype_of(dtype) if dtype is not None else None)
        return path

    def refresh(self) -> None:
        """Discard what was computed from weights.

        Needed only after writing single elements through `parameter.data`, which PyTorch does not count: weights that
        are edited under `torch.no_grad()`, `load_state_dict`, hooks, replaced modules, and layers that are rewritten
        through `.data` are noticed. Records then say that every network was edited.
        """
        self._model.refresh()

    @property
    def edited(self) -> list[str]:
        """Names of the networks that are not as in the files: replaced, with edited weights or modules, or hooks."""
        return self._model.edited()

    def __call__(self, prompt: str, **fields: Any) -> Image.Image:
        """Generate one picture.

        Args:
            prompt: The prompt.
            fields: Other fields of a Request.

        Raises:
            RequestError: If a field is unknown or does not fit, or `count` asks for several pictures.
        """
        request = Request(prompt=prompt, **fields)
        if request.count > 1:
            raise RequestError(
                f"count is {request.count}, but pipe(...) returns one picture; pipe.generate(mezzotint.Request(..., "
                f"count={request.count})).images are all of them"
            )
        return self.generate(request).images[0]

    @overload
    def generate(
        self,
        request: OneRequest,
        latents: Tensor | None = ...,
        *,
        on_step: OnStep | None = ...,
        on_image: OnImage | None = ...,
        on_estimate: OnEstimate | None = ...,
    ) -> Result: ...
    @overload
    def generate(
        self,
        request: Requests,
        latents: Tensor | None = ...,
        *,
        on_step: OnStep | None = ...,
        on_image: OnImage | None = ...,
        on_estimate: OnEstimate | None = ...,
    ) -> list[Result]: ...

    def generate(
        self,
        request: OneRequest | Requests,
        latents: Tensor | None = None,
        *,
        on_step: OnStep | None = None,
        on_image: OnImage | None = None,
        on_estimate: OnEstimate | None = None,
    ) -> Result | list[Result]:
        """Generate the pictures of a request, or of several.

        Neighbours in a list that differ only in prompts and seeds share a batch.

        Args:
            request: A request, a prompt, or a plan made by `plan`; or a list of them.
            latents: Unit-variance starting noise of shape (pictures, C, h, w), instead of drawn noise.
            on_step: Called after each step with (steps done, steps in all). What it raises ends the run.
            on_image: Called with (index, picture) when a picture is finished. What it raises ends the run.
            on_estimate: Called after each step with its estimate of the final latents of the batch, (B, C, h, w), for
                a preview; with hires those of the second pass are larger. What it raises ends the run.

        Returns:
            A Result, or one for each request of a list.

        Raises:
            RequestError: If a request does not fit the model, or `latents` the requests.
            BudgetError: If one picture at a time takes more memory than the pipeline was loaded for.
        """
        if isinstance(request, Request | RunPlan | str):
            return self.generate([request], latents, on_step=on_step, on_image=on_image, on_estimate=on_estimate)[0]
        with self._executor.exclusive():
            plans = [self.plan(each) for each in request]
            count = sum(plan.request.count for plan in plans)
            if latents is not None and latents.shape[:1] != (count,):
                raise RequestError(f"latents has the shape {tuple(latents.shape)}; its first number must be {count}")
            if self._budget:
                plans = [self._budget.fit_batch(plan, self._executor.effective_placement, count) for plan in plans]
            return self._runner.generate(plans, latents, on_step, on_image, on_estimate)

    def stream(self, request: OneRequest, latents: Tensor | None = None) -> Iterator[Step]:
        """Generate a request step by step, all its pictures in one batch.

        Args:
            request: A request, a prompt or a plan.
            latents: As in `generate`.

        Returns:
            An iterator of the steps; Step.x and Step.denoised are of shape (count, C, h, w). With hires the steps of
            the second pass follow, which are larger.
        """
        plan = self._check_budget(self.plan(request))
        return self._runner.steps(Batch.of([(plan, seed) for seed in picture_seeds(plan.request)], latents))

    def draw(self, jobs: Sequence[Job], on_step: OnStep | None = None) -> list[Image.Image]:
        """Generate pictures in one batch, whatever the `batch` of their requests.

        Args:
            jobs: The request and the seed of each picture. The requests may differ only in prompts and seeds.
            on_step: As in `generate`.
        """
        with self._executor.exclusive():
            plans: list[tuple[Request, RunPlan]] = []
            for request, _ in jobs:
                known = next((plan for other, plan in plans if other == request), None)
                plans.append((request, known or self._check_budget(self.plan(request), len(jobs))))
            batch = Batch.of([(plan, seed) for (_, plan), (_, seed) in zip(plans, jobs, strict=True)])
            return self._runner.draw(batch, on_step)

    # ---- planning ----------------------------------------------------------------------------------------------------

    def plan(self, request: OneRequest) -> RunPlan:
        """Plan the run of a request: its values, noise levels, parsed prompts, LoRAs and embeddings.

        A plan is returned as it is.

        Raises:
            RequestError: If the request does not fit the model.
            CheckpointError: If a LoRA or an embedding is missing, damaged or another model's.
        """
        return (
            request
            if isinstance(request, RunPlan)
            else plan_run(self._model.info, _as_request(request), self._model.files)
        )

    def resolve(self, request: Request | str) -> Request:
        """Return the request with the model's own values where it has None; no file that it names is opened.

        Raises:
            RequestError: If the request does not fit the model.
        """
        return plan_run(self._model.info, _as_request(request)).request

    def spare_memory(self, plan: RunPlan) -> int | None:
        """Return the bytes of the budget that a run leaves free, with guidance in one batch; None without a budget."""
        if self._budget is None:
            return None
        placement = self._executor.effective_placement.model_copy(update={"guidance": "batched"})
        return self._budget.spare(plan, placement)

    def _check_budget(self, plan: RunPlan, batch: int | None = None) -> RunPlan:
        """Return the plan if `batch` such pictures at once, or all, fit into the budget; raise BudgetError if not."""
        if self._budget:
            batch = batch or plan.request.count
            self._budget.check(plan.with_batch(batch, count=batch), self._executor.effective_placement)
        return plan

    # ---- the steps of a run on their own -----------------------------------------------------------------------------

    def encode(self, prompt: str, request: Request | None = None) -> Condition:
        """Encode a prompt to what the UNet is conditioned on.

        Args:
            prompt: The prompt. If it changes in the course of a run, the condition of the first step is returned, and
                for a prompt with AND that of its first part; `encode_parts` returns all of them.
            request: Gives the syntax, the steps, clip_skip, emphasis and embeddings.

        Returns:
            A Condition with the context (1, T, D) in float32, and for SDXL the pooled output (1, P).
        """
        return self.encode_parts(prompt, request)[0].timeline[0][1]

    def encode_parts(self, prompt: str, request: Request | None = None) -> list[EncodedPart]:
        """Encode every part of a prompt.

        Args:
            prompt: The prompt.
            request: As in `encode`.

        Returns:
            For each part that AND joins its weight and its timeline: pairs of the last step that a Condition of batch
            1 holds for, and the Condition.
        """
        plan = self.plan(Request(prompt=prompt) if request is None else request.replace(prompt=prompt))
        with self._executor.inference():
            return [part.copy() for part in self._model.prompts.encode_prompt(plan, plan.positive)]

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Decode the final latents of a run, (B, C, h, w), to B pictures.

        Raises:
            RequestError: If they have another shape, or another number of channels than the VAE's.
        """
        channels = self.vae.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise RequestError(f"latents has the shape {tuple(latents.shape)}; it must be (B, {channels}, h, w)")
        return self._runner.decode(latents, [])

    @overload
    def preview(self, vae: None = ...) -> LatentPreview: ...
    @overload
    def preview(self, vae: str) -> TinyPreview: ...

    def preview(self, vae: str | None = None) -> LatentPreview | TinyPreview:
        """Return what shows latents at once: `pipe.preview().picture(latents)` in `on_estimate` of `generate`.

        Args:
            vae: A TAESD that decodes them: a file, a folder or a hub id; its encoder may be missing. None multiplies
                them by a matrix, fitted to the VAE when it is first asked for, and then kept in the user's cache.

        Raises:
            CheckpointError: If `vae` is missing or something else.
        """
        config, parts = self.vae.config, self._model.parts
        if vae is not None:
            return TinyPreview.open(vae, config.latent_channels, self.device)
        path = None if "vae" in self.edited else matrix_path(parts.hashes, parts.given_hashes.get("vae"))
        return LatentPreview(self.decode, config.latent_channels, config.downscale, path)

    def check(self, images: Image.Image | Sequence[Image.Image]) -> list[bool]:
        """Return whether the model's safety checker flags each picture, or the one that is given.

        `generate` does so with every picture unless its request has `safety="off"`.

        Raises:
            RequestError: If the model has no safety checker.
        """
        return self._runner.check([images] if isinstance(images, Image.Image) else images)

    def encode_image(self, image: Image.Image | str | PathLike[str] | bytes) -> Tensor:
        """Encode a picture to latents (1, C, h, w) float32, the mean of the VAE's posterior.

        Args:
            image: A picture, or the path or the bytes of its file, whose transparency is composited on white.

        Raises:
            RequestError: If it cannot be read, or a side is not a multiple of the VAE's factor, 8.
        """
        if not isinstance(image, Image.Image):
            image = open_picture(to_source(image))
        side = self.vae.config.downscale
        if image.width % side or image.height % side:
            raise RequestError(f"the picture is {image.width}x{image.height}; both must be multiples of {side}")
        with self._executor.inference():
            return self.vae.scale(self._executor.encode(self.vae, from_pil(image).to(self.device), []).mean).float()

    # ---- weights -----------------------------------------------------------------------------------------------------

    def merge(self, loras: Any) -> None:
        """Merge LoRA files into the weights, in place of those that are merged now. No run may be under way.

        The pictures are those of a request with the same `loras`, up to rounding, and take less time.

        Args:
            loras: As `loras` of a Request.
        """
        self._model.merge(loras)

    def unmerge(self) -> None:
        """Restore the weights that were there before `merge`, bit for bit."""
        self._model.unmerge()

    def unet_for(self, plan: RunPlan) -> UNet:
        """Return the UNet that a plan runs: the model's own, or its few-step form."""
        return self._model.unet_for(plan)[0]

    # ---- facts -------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the model's file or folder."""
        return self._model.name

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user should know of the model, such as a guess of its prediction type; each Result repeats it."""
        return self._model.info.notices

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The model's scheduler_config.json; it may be replaced."""
        return self._model.info.scheduler_config

    @scheduler_config.setter
    def scheduler_config(self, config: dict[str, Any]) -> None:
        self._model.set_scheduler_config(config)

    @property
    def device(self) -> torch.device:
        """The device of the UNet."""
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the UNet's weights."""
        return self._model.dtype

    @property
    def placement(self) -> Placement:
        """Where the weights are kept and how the work is cut."""
        return self._executor.placement

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        millions = sum(map(count_parameters, (self.unet, self.vae, *self.text_encoders))) / 1e6
        return f"Pipeline({self.name!r}, {self.parts.family}, {dtype} on {self.device}, {millions:,.1f}M parameters)"


def _as_request(request: Request | str) -> Request:
    """Return the request, or one for a prompt."""
    return Request(prompt=request) if isinstance(request, str) else request
