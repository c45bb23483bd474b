"""The page: a Request becomes pictures. encode -> start -> solve -> decode; no mathematics, no file formats here.

    pipe = mezzotint.load()
    image = pipe("a lemon on a blue background", seed=7)

A Pipeline keeps nothing of a call but the prompts that it has encoded, which give the same whoever asks; what a run
needs travels in the run, so two threads may share one.
"""

from __future__ import annotations

import inspect
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor

from mezzotint import samplers
from mezzotint.conditioning import Cache, Encoded, Reader, drawn, lengthened, plan_of, together, zeros_like
from mezzotint.denoiser import Denoiser, Timeline
from mezzotint.diffusion.guidance import METHODS, guided
from mezzotint.diffusion.noise import BrownianNoise, SeededNoise
from mezzotint.diffusion.prediction import Prediction
from mezzotint.diffusion.schedule import Schedule
from mezzotint.diffusion.solvers import SOLVERS, Noise, Step
from mezzotint.diffusion.spacing import SPACINGS, from_timesteps
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.image import describe, from_pil, to_pil
from mezzotint.models.unet import Condition, UNet
from mezzotint.request import Request, Result
from mezzotint.weights.checkpoint import Parts, open_model
from mezzotint.weights.embeddings import Library
from mezzotint.weights.lora import merged, read_lora
from mezzotint.weights.part import FewStep

BUNDLED = Path(__file__).parent / "data" / "emoji"
STEPS, GUIDANCE, GUIDANCE_XL = 50, 7.5, 5.0  # diffusers' defaults, where the model does not say
GUIDANCE_CFG_PP = 0.6  # what Chung et al. 2024 take in place of 7.5
GPU_BATCH = 4  # pictures at once where the request does not say; 1 on the CPU

OnStep = Callable[[int, int], None]  # steps done, steps in all
OnImage = Callable[[int, Image.Image], None]  # index in the Result, picture
Job = tuple[Request, int]  # one picture: its resolved request and its own seed


def load(
    path_or_id: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> Pipeline:
    """A pipeline of the bundled model, or of a diffusers folder, a single file or a hub id.

    device: the best there is. dtype: float32 on the CPU, bfloat16 elsewhere; or a name such as "float16". options:
    `variant`, `family`, `prediction` and `config` of `open_model`. Raises CheckpointError, RequestError.
    """
    device = _device(device or best_device())
    dtype = _dtype(dtype) if dtype is not None else torch.float32 if device.type == "cpu" else torch.bfloat16
    return Pipeline(open_model(path_or_id or BUNDLED, device=device, dtype=dtype, **options))


def best_device() -> str:
    """cuda, mps or cpu: the first that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class Pipeline:
    """A loaded model. `unet`, `vae`, `text_encoders`, `tokenizers` and `schedule` are the parts, plain modules."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.unet, self.vae = parts.unet.eval().requires_grad_(False), parts.vae.eval().requires_grad_(False)
        self.text_encoders = [encoder.eval().requires_grad_(False) for encoder in parts.text_encoders]
        self.tokenizers = parts.tokenizers
        self.scheduler_config = dict(parts.scheduler_config)
        self.schedule = Schedule.from_config(self._sampler(Request(prompt="")).schedule)
        if self.dtype == torch.float16 and parts.family == "sdxl" and self.vae.config.force_upcast:
            self.vae.float()  # its activations pass float16's range
        self.unet.fuse_projections()
        self._changed: dict[str, UNet] = {}  # by LoRA, made on their first use
        self._encoded = Cache()

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet's weights."""
        return self.unet.conv_in.weight.dtype

    def __call__(self, prompt: str, **fields: Any) -> Image.Image:
        """One picture; `fields` are those of a Request."""
        return self.generate(Request(prompt=prompt, **fields)).images[0]

    def resolve(self, request: Request) -> Request:
        """The request with the model's own values where it has None. Raises RequestError where it does not fit."""
        settings = self.parts.settings
        xl = self.parts.family == "sdxl"
        native = (self.unet.config.sample_size or 64) * self.vae.config.downscale
        sampler = self._sampler(request)
        width = request.width or settings.get("width", native)
        height = request.height or settings.get("height", native)
        eta = inspect.signature(SOLVERS[sampler.solver]).parameters.get("eta")
        if request.eta is not None and eta is None:
            raise RequestError(f"eta is {request.eta}; the sampler {sampler.name} takes none, ddim and euler_a do")
        for name in ("original_size", "crop", "target_size"):
            if getattr(request, name) is not None and not xl:
                raise RequestError(f"{name} is given; only models of the SDXL family are conditioned on it")
        method = request.guidance_method or settings.get("guidance_method", "cfg")
        for owner in METHODS:
            for name in _options(owner):
                if owner != method and getattr(request, name) is not None:
                    raise RequestError(f"{name} is given; it is for guidance_method {owner}, which here is {method}")
        made_for = self._few_step(sampler) or sampler
        scale = made_for.guidance_scale or settings.get("guidance_scale", GUIDANCE_XL if xl else GUIDANCE)
        if samplers.SOLVERS[sampler.solver].cfg_pp:
            scale = GUIDANCE_CFG_PP * sampler.guidance_divisor
        defaults: dict[str, Any] = {
            "negative_prompt": self._empty_prompt,
            "width": width,
            "height": height,
            "steps": made_for.steps or settings.get("steps", STEPS),
            "guidance_scale": scale,
            "sampler": sampler.name,
            "spacing": sampler.spacing,
            "seed": secrets.randbelow(2**32),
            "batch": 1 if self.device.type == "cpu" else GPU_BATCH,
            "prompt_syntax": "a1111",
            "clip_skip": 0,
            "eta": eta and sampler.options.get("eta", eta.default),
            "guidance_method": method,
            "guidance_rescale": 0.0,
            "threshold_percentile": None if request.mimic_scale is None else 1.0,
        }
        if request.sigmas or request.timesteps:
            defaults["steps"] = len(request.sigmas) - 1 if request.sigmas else len(request.timesteps or ())
            del defaults["spacing"]
        # the length of a difference grows with the picture: the paper's SDXL value at 1024x1024
        own = {"apg_norm_threshold": 15.0 * math.sqrt(width * height) / 1024} | settings
        defaults |= {name: own.get(name, option.default) for name, option in _options(method).items()}
        if xl:
            defaults |= {"original_size": (height, width), "crop": (0, 0), "target_size": (height, width)}
        syntax = request.prompt_syntax or "a1111"
        if syntax == "a1111":
            defaults["emphasis"] = "original"
        elif request.emphasis is not None:
            raise RequestError(f"emphasis is given; it is for prompt_syntax a1111, which here is {syntax}")
        for name in ("choices", "wildcards"):
            if syntax != "comfy" and getattr(request, name) is not None:
                raise RequestError(f"{name} is given; it is for prompt_syntax comfy, which here is {syntax}")
        resolved = request.replace(
            **{name: value for name, value in defaults.items() if getattr(request, name) is None}
        )
        self._sigmas(resolved)  # raises where the steps do not fit
        return drawn(resolved) if syntax == "comfy" and request.choices != "keep" else resolved

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
        requests = [self.resolve(r) for r in ([request] if isinstance(request, Request) else request)]
        groups = self._groups(requests)
        pictures = sum(r.count for r in requests)
        if latents is not None and latents.shape[:1] != (pictures,):
            raise RequestError(f"latents has the shape {tuple(latents.shape)}; its first number must be {pictures}")
        total, done = sum(len(self._sigmas(group[0][0])) - 1 for group in groups), 0
        images: list[Image.Image] = []
        finals: list[Tensor] = []
        timings = {"denoise": 0.0, "decode": 0.0}
        for group in groups:
            start = time.perf_counter()
            given = None if latents is None else latents[len(images) : len(images) + len(group)]
            for step in self._steps(group, given):
                last = step
                done += 1
                if on_step:
                    on_step(done, max(done, total))  # dpm_adaptive takes as many as it needs
            x = self._final(group[0][0], last)
            finals += x.unbind()
            middle = time.perf_counter()
            for (job, seed), image in zip(group, self.decode(x), strict=True):
                image.info.update(describe(job, seed, self._facts(job), [s for _, s in group]))
                images.append(image)
                if on_image:
                    on_image(len(images) - 1, image)
            timings["denoise"] += middle - start
            timings["decode"] += time.perf_counter() - middle
        results: list[Result] = []
        first = 0
        for r in requests:
            part = slice(first, first + r.count)
            seeds = [r.seed + k for k in range(r.count)]  # type: ignore[operator]
            results.append(Result(images[part], torch.stack(finals[part]), seeds, r, timings))
            first += r.count
        return results[0] if isinstance(request, Request) else results

    def stream(self, request: Request, latents: Tensor | None = None) -> Iterator[Step]:
        """The steps of a request, all its pictures in one batch: Step.index, .sigma, .x, .denoised (count, C, h, w)."""
        request = self.resolve(request)
        return self._steps([(request, request.seed + k) for k in range(request.count)], latents)  # type: ignore[operator]

    def unet_for(self, request: Request) -> UNet:
        """The UNet that draws this request: with its change merged where the sampler is the few-step form's.

        Raises CheckpointError where the change is missing or of another UNet.
        """
        few_step = self._few_step(self._sampler(request))
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

    def _steps(self, group: Sequence[Job], latents: Tensor | None) -> Iterator[Step]:
        """One batch from noise to its last x."""
        request = group[0][0]
        sampler, sigmas = self._sampler(request), self._sigmas(request)
        shape, seeds = self._latent_shape(request), [seed for _, seed in group]
        noise = SeededNoise(seeds, shape, self.device)
        if latents is None:
            latents = noise.draw()
        elif latents.shape != (len(group), *shape):
            raise RequestError(f"latents has the shape {tuple(latents.shape)}; it must be {(len(group), *shape)}")
        start = math.sqrt(sigmas[0] ** 2 + 1.0) if sampler.start == "vp" else sigmas[0]
        x = latents.to(self.device, torch.float32) * start
        schedule, prediction = Schedule.from_config(sampler.schedule), Prediction.from_config(sampler.schedule)
        options = schedule.timed(sampler.options)
        options |= {"calls": request.steps} if "calls" in sampler.spacing_options and request.spacing else {}
        options |= {} if request.eta is None else {"eta": request.eta}
        given = request.guidance_scale or 0.0
        scales = given if isinstance(given, tuple) else (given,)
        unet = self.unet_for(request)
        with torch.inference_mode():
            conditions, weights = self._conditions([job for job, _ in group])
            denoiser = Denoiser(unet, schedule, prediction, conditions, sampler.timestep, sigmas)
            method = request.guidance_method or "cfg"
            denoise = guided(
                denoiser.outputs,
                prediction,
                tuple(scale / sampler.guidance_divisor for scale in scales),
                request.guidance_rescale or 0.0,
                request.guidance_interval,
                request.guidance_steps,
                sigmas,
                METHODS[method](**{option.name: getattr(request, name) for name, option in _options(method).items()}),
                weights,
                mimic_scale=request.mimic_scale,
                threshold_percentile=request.threshold_percentile or 0.0,
            )
        fresh: Noise = noise
        if sampler.noise != "seeded":
            midpoints = sampler.noise == "brownian midpoints"
            fresh = BrownianNoise(seeds, shape, sigmas, self.device, midpoints=midpoints)
        solver = SOLVERS[sampler.solver](denoise, x, sigmas, fresh, **options)
        while True:  # inference mode is the thread's: it must not stay on while the caller looks at a step
            with torch.inference_mode():
                step = next(solver, None)
            if step is None:
                return
            yield step

    def _sampler(self, request: Request) -> samplers.Sampler:
        facts = {"family": self.parts.family, "pipeline": str(self.parts.model_index.get("_class_name", ""))}
        return samplers.resolve(request.sampler, self.scheduler_config, request.spacing, **facts)

    def _few_step(self, sampler: samplers.Sampler) -> FewStep | None:
        """What the model says of drawing with this solver in few steps, if it does."""
        few_step = self.parts.few_step
        return few_step if few_step and few_step.sampler == sampler.solver else None

    def _sigmas(self, request: Request) -> list[float]:
        if request.sigmas:
            return list(request.sigmas)
        sampler = self._sampler(request)
        schedule = Schedule.from_config(sampler.schedule)
        if request.timesteps:
            return from_timesteps(schedule, request.timesteps, last=sampler.spacing_options.get("last", "zero"))
        return SPACINGS[sampler.spacing](schedule, request.steps or STEPS, **sampler.spacing_options)

    def _final(self, request: Request, last: Step) -> Tensor:
        """The last step's x as the VAE takes it."""
        rescale = self._sampler(request).rescale_final
        return last.x / math.sqrt(1.0 + last.sigma**2) if rescale else last.x

    def _latent_shape(self, request: Request) -> tuple[int, int, int]:
        side = self.vae.config.downscale
        if not request.height or not request.width or request.height % side or request.width % side:
            raise RequestError(f"the size is {request.width}x{request.height}; both must be multiples of {side}")
        return self.vae.config.latent_channels, request.height // side, request.width // side

    @property
    def _empty_prompt(self) -> str | None:
        """What stands for no prompt: None is zeros."""
        return None if self.parts.model_index.get("force_zeros_for_empty_prompt") else ""

    def _guides(self, request: Request, weights: Sequence[float]) -> bool:
        """Whether any step asks for the unconditional output; CFG++ always does, and so does a sum of AND's parts."""
        scale = request.guidance_scale or 0.0
        highest = max(scale) if isinstance(scale, tuple) else scale
        return highest > 1.0 or abs(sum(weights) - 1.0) > 1e-6 or samplers.SOLVERS[self._sampler(request).solver].cfg_pp

    def _conditions(self, requests: Sequence[Request]) -> tuple[list[Timeline], tuple[float, ...]]:
        """For one batch (conditionals, unconditional, negative) and the weights of the conditionals: one for each part
        of the prompt, the second only where guidance asks for it, the third only where Perp-Neg does; else the second
        is the negative one.
        """
        request = requests[0]
        same = all(r.prompt == request.prompt and r.negative_prompt == request.negative_prompt for r in requests)
        rows = requests[:1] if same else requests
        prompts = [self._parts(r, r.prompt) for r in rows]
        weights = tuple(part.weight for part in prompts[0])
        slots: list[list[Timeline]] = [[part.timeline for part in parts] for parts in zip(*prompts, strict=True)]
        unskipped = request.replace(clip_skip=0)  # clip_skip is the prompt's alone, as in diffusers
        if self._guides(request, weights):
            texts: list[list[str | None]] = [[r.negative_prompt for r in rows]]
            empty = [self._empty_prompt for _ in rows]
            if request.guidance_method == "perp_neg" and texts[0] != empty:
                texts.insert(0, empty)
            for column in texts:
                slots.append(
                    [
                        [(0, zeros_like(first[0][1]))] if text is None else self._negative(unskipped, text)
                        for text, first in zip(column, slots[0], strict=True)
                    ]
                )
        if request.prompt_syntax == "compel":
            empties = [self._negative(request, "")] * len(weights) + [self._negative(unskipped, "")] * 2
            slots = lengthened(slots, empties)
        ids = None
        if request.original_size and request.crop and request.target_size:
            numbers = [*request.original_size, *request.crop, *request.target_size]
            ids = torch.tensor([numbers], dtype=torch.float32)
        return [together(slot, ids) for slot in slots], weights

    def _negative(self, request: Request, text: str) -> Timeline:
        """A negative prompt, which has no AND."""
        return self._parts(request, text, negative=True)[0].timeline

    def _parts(self, request: Request, text: str, negative: bool = False) -> list[Encoded]:
        """A prompt of this request, encoded; from the cache where it was before."""
        planned = plan_of(request, text, len(self._sigmas(request)) - 1, negative)
        library = self._library(request)
        reader = Reader(
            self.tokenizers, self.text_encoders, request.clip_skip or 0, request.emphasis or "original", library
        )
        key = (*reader.key(planned), *sorted(library.digests.items()))
        return self._encoded.get(key, lambda: reader.encode(planned))

    def _library(self, request: Request) -> Library:
        return Library(request.embeddings or (), [encoder.config.hidden_size for encoder in self.text_encoders])

    def _used(self, request: Request) -> dict[str, str]:
        """Trigger -> sha256 of the embeddings that the prompts may name."""
        words = f"{request.prompt} {request.negative_prompt}".lower()
        return {name: digest for name, digest in self._library(request).digests.items() if name in words}

    def _groups(self, requests: Sequence[Request]) -> list[list[Job]]:
        """Pictures in order, cut where the batch is full or the next request differs in more than words and seed.

        Prompts of different lengths, or of other parts, do not meet: a neighbour's length would change the picture.
        """
        groups: list[list[Job]] = []
        last: tuple[Any, ...] | None = None
        for r in requests:
            alike = r.replace(prompt="", negative_prompt=r.negative_prompt and "", seed=0, count=1)
            reader = Reader(self.tokenizers, self.text_encoders, embeddings=self._library(r))
            steps = len(self._sigmas(r)) - 1
            shapes = [
                reader.shape(plan_of(r, text or "", steps, negative))
                for text, negative in ((r.prompt, False), (r.negative_prompt, True))
            ]
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
        with torch.inference_mode():
            return [part.copy() for part in self._parts(request, request.prompt)]

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) as a run leaves them -> B pictures."""
        with torch.inference_mode():
            z = self.vae.unscale(latents.to(self.device)).to(self.vae.decoder.conv_in.weight.dtype)
            return to_pil(self.vae.decode(z))

    def encode_image(self, image: Image.Image) -> Tensor:
        """A picture, its sides multiples of 8 -> the latents (1, C, h, w) float32 of its posterior's mean."""
        side = self.vae.config.downscale
        if image.width % side or image.height % side:
            raise RequestError(f"the picture is {image.width}x{image.height}; both must be multiples of {side}")
        with torch.inference_mode():
            weight = self.vae.encoder.conv_in.weight
            return self.vae.scale(self.vae.encode(from_pil(image).to(weight.device, weight.dtype)).mean).float()

    def _facts(self, request: Request) -> dict[str, Any]:
        """What the same bits depend on, beside the request."""
        few_step = self._few_step(self._sampler(request))
        return {
            "name": self.parts.source.stem if self.parts.source.is_file() else self.parts.source.name,
            "family": self.parts.family,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            **({"lora": few_step.lora} if few_step else {}),
            **({"embeddings": self._used(request)} if request.embeddings else {}),
        }


def _options(method: str) -> dict[str, inspect.Parameter]:
    """The fields of a Request that are options of a guidance method."""
    return {f"{method}_{name}": option for name, option in inspect.signature(METHODS[method]).parameters.items()}


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # torch raises any of them
        raise RequestError(f"device is {str(name)!r}, which is not here; the best here is {best_device()!r}") from None
    return device


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    found = known.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in known.values():
        raise RequestError(f"dtype is {dtype!r}; it can be {', '.join(known)}")
    return found
