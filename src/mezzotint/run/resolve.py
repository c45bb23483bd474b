"""What a model makes of a request: its own values where the request has None, its sampler and its noise levels."""

from __future__ import annotations

import inspect
import math
import secrets
from dataclasses import dataclass
from typing import Any

from mezzotint import prompt, samplers
from mezzotint.diffusion.guidance import METHODS
from mezzotint.diffusion.schedule import Schedule
from mezzotint.diffusion.solvers import SOLVERS
from mezzotint.diffusion.spacing import SPACINGS, from_timesteps
from mezzotint.errors import RequestError
from mezzotint.images import init_image
from mezzotint.request import MAX_SIDE, Request
from mezzotint.weights.checkpoint import Parts
from mezzotint.weights.model_plan import FewStep

STEPS, GUIDANCE, GUIDANCE_XL = 50, 7.5, 5.0  # diffusers' defaults, where the model does not say
GUIDANCE_CFG_PP = 0.6  # what Chung et al. 2024 take in place of 7.5
GPU_BATCH = 4  # pictures at once where the request does not say; 1 on the CPU
STRENGTH, STRENGTH_XL, STRENGTH_MASKED = 0.8, 0.3, 1.0  # diffusers', of its three kinds of pipelines
STRENGTH_HIRES = 0.7  # A1111's
FROM_A_PICTURE = ("mask", "strength", "resize_mode", "outpaint")
WITH_A_MASK = ("mask_blur", "masked_content")
BEYOND = {"a1111": 1, "a1111 timesteps": -1, "a1111 unipc": 0}  # of the steps that A1111 calls t_enc, those it runs
HIRES = ("hires_upscale", "hires_steps", "hires_strength")


@dataclass
class Resolver:
    """Of one model. scheduler_config: the model's own, or another to be taken for it."""

    parts: Parts
    scheduler_config: dict[str, Any]

    @property
    def xl(self) -> bool:
        """Whether the model is of the SDXL family."""
        return self.parts.family == "sdxl"

    @property
    def native(self) -> int:
        """The side, in pixels, of the pictures that it was made for."""
        return (self.parts.unet.config.sample_size or 64) * self.parts.vae.config.downscale

    @property
    def empty_prompt(self) -> str | None:
        """What stands for no prompt: None is zeros."""
        return None if self.parts.model_index.get("force_zeros_for_empty_prompt") else ""

    def sampler(self, request: Request) -> samplers.Sampler:
        """All that the run needs to know of the request's sampler and spacing."""
        facts = {"family": self.parts.family, "pipeline": str(self.parts.model_index.get("_class_name", ""))}
        return samplers.resolve(request.sampler, self.scheduler_config, request.spacing, **facts)

    def few_step(self, sampler: samplers.Sampler) -> FewStep | None:
        """What the model says of drawing with this solver in few steps, if it does."""
        few_step = self.parts.few_step
        return few_step if few_step and few_step.sampler == sampler.solver else None

    def sigmas(self, request: Request) -> list[float]:
        """The run's noise levels: all, or where it starts from a picture the last of them."""
        levels = self.all_sigmas(request)
        if request.strength is None:
            return levels
        steps = len(levels) - 1
        left = min(self._left(request, steps), steps)
        if left < 1:
            raise RequestError(
                f"strength is {request.strength}, which of {steps} steps leaves none; it must be at least 1/{steps}, "
                "or the steps more"
            )
        return levels[steps - left :]

    def counted(self, request: Request) -> int:
        """The steps by which the prompt changes: all of them, though a run from a picture begins in their middle."""
        return len(self.all_sigmas(request)) - 1 if self._own_list(request) else request.steps or STEPS

    def all_sigmas(self, request: Request) -> list[float]:
        """The noise levels of a run of this request from noise alone."""
        if request.sigmas:
            return list(request.sigmas)
        sampler = self.sampler(request)
        schedule = Schedule.from_config(sampler.schedule)
        if request.timesteps:
            return from_timesteps(schedule, request.timesteps, last=sampler.spacing_options.get("last", "zero"))
        steps = request.steps or STEPS
        if request.fix_steps and request.strength:
            steps = int(steps / _capped(sampler, request.strength))
        return SPACINGS[sampler.spacing](schedule, steps, **sampler.spacing_options)

    def _left(self, request: Request, steps: int) -> int:
        """How many of a list's `steps` a run from a picture takes."""
        sampler, own = self.sampler(request), self._own_list(request)
        fixed = bool(request.fix_steps) and not own
        steps = steps if own else request.steps or STEPS
        left = steps if fixed else int(steps * _capped(sampler, request.strength or 0.0))
        return left + BEYOND[sampler.counts] - fixed if sampler.counts in BEYOND else left

    def _own_list(self, request: Request) -> bool:
        """Whether the list of levels is not as long as the request's steps say."""
        return bool(request.sigmas or request.timesteps or "calls" in self.sampler(request).spacing_options)

    def latent_shape(self, request: Request) -> tuple[int, int, int]:
        """(C, h, w). Raises RequestError where the size is no multiple of a latent's side."""
        side = self.parts.vae.config.downscale
        if not request.height or not request.width or request.height % side or request.width % side:
            raise RequestError(f"the size is {request.width}x{request.height}; both must be multiples of {side}")
        return self.parts.vae.config.latent_channels, request.height // side, request.width // side

    def second_pass(self, request: Request) -> Request:
        """The second pass of hires-fix: the first's picture, enlarged, drawn on as from an image."""
        side = self.parts.vae.config.downscale
        assert request.width and request.height and request.hires
        width, height = (int(number * request.hires) // side * side for number in (request.width, request.height))
        if max(width, height) > MAX_SIDE:
            raise RequestError(
                f"hires is {request.hires}, which makes {width}x{height}; at most {MAX_SIDE} is possible"
            )
        changes: dict[str, Any] = {"width": width, "height": height, "strength": request.hires_strength}
        if request.hires_steps and not request.sigmas and not request.timesteps:
            changes["steps"] = request.hires_steps
        for name in ("original_size", "target_size"):
            if getattr(request, name) == (request.height, request.width):
                changes[name] = (height, width)
        return request.replace(hires=None, variation_strength=None, seed_size=None, **changes)

    def resolve(self, request: Request) -> Request:
        """The request with the model's own values where it has None. Raises RequestError where it does not fit."""
        settings, xl = self.parts.settings, self.xl
        sampler = self.sampler(request)
        width, height = self._size(request)
        eta = inspect.signature(SOLVERS[sampler.solver]).parameters.get("eta")
        if request.eta is not None and eta is None:
            raise RequestError(f"eta is {request.eta}; the sampler {sampler.name} takes none, ddim and euler_a do")
        for name in ("original_size", "crop", "target_size"):
            if getattr(request, name) is not None and not xl:
                raise RequestError(f"{name} is given; only models of the SDXL family are conditioned on it")
        method = request.guidance_method or settings.get("guidance_method", "cfg")
        for owner in METHODS:
            for name in options_of(owner):
                if owner != method and getattr(request, name) is not None:
                    raise RequestError(f"{name} is given; it is for guidance_method {owner}, which here is {method}")
        made_for = self.few_step(sampler) or sampler
        scale = made_for.guidance_scale or settings.get("guidance_scale", GUIDANCE_XL if xl else GUIDANCE)
        if samplers.SOLVERS[sampler.solver].cfg_pp:
            scale = GUIDANCE_CFG_PP * sampler.guidance_divisor
        defaults: dict[str, Any] = {
            "negative_prompt": self.empty_prompt,
            "width": width,
            "height": height,
            "steps": made_for.steps or settings.get("steps", STEPS),
            "guidance_scale": scale,
            "sampler": sampler.name,
            "spacing": sampler.spacing,
            "seed": secrets.randbelow(2**32),
            "batch": 1 if next(self.parts.unet.parameters()).device.type == "cpu" else GPU_BATCH,
            "prompt_syntax": "a1111",
            "clip_skip": 0,
            "eta": eta and sampler.options.get("eta", eta.default),
            "guidance_method": method,
            "guidance_rescale": 0.0,
            "noise": "seeded",
            "threshold_percentile": None if request.mimic_scale is None else 1.0,
        }
        if request.sigmas or request.timesteps:
            defaults["steps"] = len(request.sigmas) - 1 if request.sigmas else len(request.timesteps or ())
            del defaults["spacing"]
        # the length of a difference grows with the picture: the paper's SDXL value at 1024x1024
        own = {"apg_norm_threshold": 15.0 * math.sqrt(width * height) / 1024} | settings
        defaults |= {name: own.get(name, option.default) for name, option in options_of(method).items()}
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
        defaults |= self._start(request)
        if request.hires is not None and "spacing" in defaults:
            defaults["hires_steps"] = request.steps or defaults["steps"]
        if (request.image is not None or request.hires is not None) and "spacing" in defaults:
            # A1111 fixes them in hires-fix alone
            defaults["fix_steps"] = sampler.counts != "diffusers" if request.hires else sampler.counts == "comfyui"
        resolved = request.replace(
            **{name: value for name, value in defaults.items() if getattr(request, name) is None}
        )
        self.sigmas(resolved)  # raises where the steps do not fit
        if resolved.hires:
            self.sigmas(self.second_pass(resolved))
        return drawn(resolved) if syntax == "comfy" and request.choices != "keep" else resolved

    def _size(self, request: Request) -> tuple[int, int]:
        """(width, height): the request's; else those of the picture that it starts from, cut to whole latents."""
        settings, side = self.parts.settings, self.parts.vae.config.downscale
        size = settings.get("width", self.native), settings.get("height", self.native)
        if request.image is not None and request.only_masked is None and not (request.width and request.height):
            left, top, right, bottom = request.outpaint or (0, 0, 0, 0)
            width, height = (max(number // side, 1) * side for number in init_image.size_of(request.image))
            size = width + left + right, height + top + bottom
            if max(size) > MAX_SIDE:
                raise RequestError(
                    f"the image makes a picture of {size[0]}x{size[1]} pixels, and at most {MAX_SIDE} a side is "
                    "possible; give width and height"
                )
        return request.width or size[0], request.height or size[1]

    def _start(self, request: Request) -> dict[str, Any]:
        """The values of the fields that say what a run starts from. Raises RequestError where they do not fit."""
        masked = request.mask is not None or request.outpaint is not None
        drawn_on = request.image is not None or request.hires is not None
        needs = [
            (FROM_A_PICTURE, request.image is not None, "there is no image to start from"),
            (WITH_A_MASK, masked, "there is neither mask nor outpaint to say where"),
            (("invert_mask", "only_masked"), request.mask is not None, "there is no mask"),
            (("fix_steps",), drawn_on, "there is neither image nor hires"),
            (HIRES, request.hires is not None, "there is no hires, the factor of the second pass"),
            (("variation_seed",), request.variation_strength is not None, "there is no variation_strength"),
        ]
        for names, there, missing in needs:
            for name in names:
                if getattr(request, name) is not None and not there:
                    raise RequestError(f"{name} is given, and {missing}; give it, or leave {name} out")
        for first, second in (("hires", "image"), ("only_masked", "outpaint")):
            if getattr(request, first) is not None and getattr(request, second) is not None:
                raise RequestError(f"{first} and {second} are given, which do not go together; leave one out")
        defaults: dict[str, Any] = {}
        if request.image is not None:
            strength = STRENGTH_MASKED if masked else STRENGTH_XL if self.xl else STRENGTH
            defaults |= {"strength": strength, "resize_mode": "resize"}
        if masked:
            defaults |= {"mask_blur": 0.0, "masked_content": "original"}
        if request.mask is not None:
            defaults |= {"invert_mask": False}
        if request.hires is not None:
            defaults |= {"hires_upscale": "latent", "hires_strength": STRENGTH_HIRES}
        if request.variation_strength is not None:
            defaults |= {"variation_seed": secrets.randbelow(2**32)}
        return defaults


def _capped(sampler: samplers.Sampler, strength: float) -> float:
    """The strength that its program reckons with."""
    return min(strength, 0.999) if sampler.counts.startswith("a1111") else strength


def options_of(method: str) -> dict[str, inspect.Parameter]:
    """The fields of a Request that are options of a guidance method."""
    return {f"{method}_{name}": option for name, option in inspect.signature(METHODS[method]).parameters.items()}


def place(request: Request) -> init_image.Placed | None:
    """The picture that a resolved request starts from, opened and laid out; None where it starts from noise alone."""
    if request.image is None:
        return None
    assert request.width and request.height
    options = {
        name: value
        for name in ("resize_mode", "mask_blur", "invert_mask", "masked_content", "only_masked", "outpaint")
        if (value := getattr(request, name)) is not None
    }
    return init_image.place(request.sources, (request.width, request.height), **options)


def drawn(request: Request) -> Request:
    """ComfyUI's choices and wildcards, drawn from the seed; the request then says what was drawn."""
    texts = {
        name: text and prompt.expand(text, request.seed or 0, request.wildcards)
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt))
    }
    return request.replace(**texts, choices="keep")
