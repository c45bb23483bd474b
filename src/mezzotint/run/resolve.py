"""Resolve a request for a model: fill in the model's defaults, and check that the fields fit together."""

from __future__ import annotations

import math
import secrets
from typing import Any

from mezzotint import prompt
from mezzotint.diffusion.guidance import METHOD_OPTIONS
from mezzotint.errors import RequestError
from mezzotint.images import init_image
from mezzotint.request import MAX_SIDE, Request
from mezzotint.run.model_info import ModelInfo
from mezzotint.samplers import SOLVERS, Sampler
from mezzotint.weights.model_files import FewStep, join_names

STEPS, GUIDANCE, GUIDANCE_XL = 50, 7.5, 5.0  # diffusers' defaults, for models without their own
STEPS_LCM, GUIDANCE_LCM = 4, 8.5  # likewise of LatentConsistencyModelPipeline
GUIDANCE_CFG_PP = 0.6  # corresponds to 7.5 in Chung et al. 2024
REGION_BASE = 0.0  # regions are drawn by their own prompts alone
PAG_LAYERS = ("mid",)  # diffusers' default
REFINER_AT = 0.8  # diffusers' and A1111's documentation
AESTHETIC_SCORES = 6.0, 2.5  # diffusers' defaults, and A1111's
GPU_BATCH = 4  # default batch on a GPU; it is 1 on the CPU
STRENGTH, STRENGTH_XL, STRENGTH_MASKED = 0.8, 0.3, 1.0  # diffusers' img2img, SDXL img2img and inpainting
STRENGTH_HIRES = 0.7  # A1111's default

# fields that are valid only with a certain model, prompt syntax or other field
ONLY_SDXL = ("original_size", "crop", "target_size")
ONLY_REFINER = ("aesthetic_score", "negative_aesthetic_score")
ONLY_COMFY = ("choices", "wildcards")
NEEDS_IMAGE = ("mask", "strength", "resize_mode", "outpaint", "tile")
NEEDS_MASKED = ("mask_blur", "masked_content")
NEEDS_MASK = ("invert_mask", "only_masked", "differential")
NEEDS_HIRES = ("hires_upscale", "hires_steps", "hires_strength")
EXCLUSIVE = (
    ("hires", "image"),
    ("only_masked", "outpaint"),
    ("tile", "mask"),
    ("tile", "outpaint"),
    ("tile", "seamless"),
    ("tile", "control"),
    ("tile", "refiner"),
    ("discard_penultimate_sigma", "sigmas"),
    ("discard_penultimate_sigma", "timesteps"),
    ("regions", "only_masked"),
    ("tile", "regions"),
)


def resolve_request(model: ModelInfo, request: Request, sampler: Sampler) -> Request:
    """Return the request with the model's defaults in place of None.

    Args:
        model: The model that is to draw it.
        request: The request as given.
        sampler: The request's sampler and spacing, as resolved by `samplers.resolve`.

    Raises:
        RequestError: If a field does not fit the model, the sampler or another field.
    """
    method = request.guidance_method or model.settings.get("guidance_method", "cfg")
    syntax = request.prompt_syntax or "a1111"
    _check_sampler(request, sampler)
    _check_model(model, request, sampler)
    _check_method(request, method)
    check_pag(model, request, sampler)
    _check_embedded_guidance(model, sampler)
    _check_syntax(request, syntax)
    _check_dependent(request)
    defaults = {
        **_sampling_defaults(model, request, sampler),
        **_size_defaults(model, request),
        **_prompt_defaults(model, syntax),
        **_start_defaults(model, request),
        **_pass_defaults(request, sampler),
    }
    defaults |= _method_defaults(model, method, defaults["width"], defaults["height"])
    steps = request.steps or defaults["steps"]
    if request.hires is not None and not _lists_levels(request):
        defaults["hires_steps"] = steps
    return request.replace(**{name: value for name, value in defaults.items() if getattr(request, name) is None})


def expand_choices(request: Request) -> Request:
    """Return a resolved request with ComfyUI's choices and wildcards expanded by its seed."""
    if request.prompt_syntax != "comfy" or request.choices == "keep":
        return request
    texts = {
        name: text and prompt.expand(text, request.seed or 0, request.wildcards)
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt))
    }
    regions = request.regions and tuple(
        region.replace(prompt=prompt.expand(region.prompt, request.seed or 0, request.wildcards))
        for region in request.regions
    )
    return request.replace(**texts, regions=regions, choices="keep")


def few_step_of(model: ModelInfo, sampler: Sampler) -> FewStep | None:
    """Return the model's few-step form if this sampler draws with it."""
    return model.few_step if model.few_step and model.few_step.sampler == sampler.solver else None


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_sampler(request: Request, sampler: Sampler) -> None:
    """Check the options of the sampler."""
    if request.eta is not None and SOLVERS[sampler.solver].eta is None:
        raise RequestError(
            f"eta is {request.eta}; the sampler {sampler.name} does not take eta, as ddim and euler_a do"
        )


def _check_model(model: ModelInfo, request: Request, sampler: Sampler) -> None:
    """Check the fields that only some models are conditioned on."""
    if request.differential and model.unet_channels != model.latent_channels:
        raise RequestError(
            "differential is given, but this model's UNet is made for inpainting and takes a mask of black and white; "
            "use a text-to-image model, or leave differential out"
        )
    if request.differential and request.masked_content == "noise":
        raise RequestError("differential starts from the picture; masked_content must be original or fill, not noise")
    for name in ONLY_SDXL:
        if getattr(request, name) is not None and not model.is_sdxl:
            raise RequestError(f"{name} is given; only models of the SDXL family are conditioned on it")
    for name in ONLY_REFINER:
        if getattr(request, name) is not None and not (model.has_aesthetic_score or request.refiner):
            raise RequestError(f"{name} is given; only SDXL's refiner is conditioned on it")
    if request.refiner is not None:
        _check_base(model, sampler)


def _check_base(model: ModelInfo, sampler: Sampler) -> None:
    """Check that a refiner can follow the model."""
    wrong = None
    if not model.is_sdxl:
        wrong = f"this model is of the family {model.family}"
    elif model.has_aesthetic_score:
        wrong = "this model is SDXL's refiner itself"
    elif model.unet_channels != model.latent_channels:
        wrong = "this model's UNet is made for inpainting, and a refiner would repaint what it keeps"
    elif sampler.timestep == "edm":
        wrong = "this model has no timesteps (EDM)"
    if wrong:
        raise RequestError(f"refiner is given, but {wrong}; it follows a text-to-image model of the SDXL family")


def _check_embedded_guidance(model: ModelInfo, sampler: Sampler) -> None:
    """Check that the sampler does not need the unconditional output of a model that has none."""
    if model.embeds_guidance and SOLVERS[sampler.solver].cfg_pp:
        raise RequestError(
            f"the sampler {sampler.name} needs an unconditional output; this model takes the guidance scale as an "
            "input of its UNet (time_cond_proj_dim) and has none: choose another sampler, such as lcm"
        )


def _check_method(request: Request, method: str) -> None:
    """Check that no option of another guidance method is given."""
    for owner, options in METHOD_OPTIONS.items():
        for option in options:
            name = f"{owner}_{option}"
            if owner != method and getattr(request, name) is not None:
                raise RequestError(f"{name} is given; it is for guidance_method {owner}, which here is {method}")


def check_pag(model: ModelInfo, request: Request, sampler: Sampler) -> None:
    """Check that the model has the layers of perturbed-attention guidance, and timesteps for its adaptive scale."""
    for part in (request.pag_layers or PAG_LAYERS) if request.pag_scale else ():
        if not any(part in name for name in model.self_attentions):
            blocks = dict.fromkeys(name.split(".attentions")[0] for name in model.self_attentions)
            raise RequestError(
                f"pag_layers has {part[:100]!r}, which is in the name of none of this model's self-attentions; it must "
                f"be a part of a name, such as {join_names(list(blocks)) or 'none: it has no self-attention'}"
            )
    if request.pag_adaptive_scale and sampler.timestep == "edm":
        raise RequestError(
            f"pag_adaptive_scale is {request.pag_adaptive_scale}; it counts timesteps, which this model has not (EDM)"
        )


def _check_syntax(request: Request, syntax: str) -> None:
    """Check that no option of another prompt syntax is given."""
    for owner, names in (("a1111", ("emphasis",)), ("comfy", ONLY_COMFY)):
        for name in names:
            if syntax != owner and getattr(request, name) is not None:
                raise RequestError(f"{name} is given; it is for prompt_syntax {owner}, which here is {syntax}")


def _check_dependent(request: Request) -> None:
    """Check the fields that require another field, and those that exclude each other."""
    needs = [
        (NEEDS_IMAGE, request.image is not None, "there is no image to start from"),
        (NEEDS_MASKED, _is_masked(request), "there is neither mask nor outpaint"),
        (NEEDS_MASK, request.mask is not None, "there is no mask"),
        (("fix_steps",), _starts_from_picture(request), "there is neither image nor hires"),
        (NEEDS_HIRES, request.hires is not None, "there is no hires, the scale factor of the second pass"),
        (("refiner_at",), request.refiner is not None, "there is no refiner"),
        (("pag_layers", "pag_adaptive_scale"), request.pag_scale is not None, "there is no pag_scale"),
        (("region_base",), request.regions is not None, "there are no regions"),
        (("variation_seed",), request.variation_strength is not None, "there is no variation_strength"),
    ]
    for names, present, missing in needs:
        for name in names:
            if getattr(request, name) is not None and not present:
                raise RequestError(f"{name} is given, but {missing}; give it, or leave {name} out")
    for first, second in EXCLUSIVE:
        if getattr(request, first) is not None and getattr(request, second) is not None:
            raise RequestError(f"{first} and {second} are both given, but exclude each other; leave one of them out")


# ---- defaults --------------------------------------------------------------------------------------------------------


def _sampling_defaults(model: ModelInfo, request: Request, sampler: Sampler) -> dict[str, Any]:
    """Return the defaults of sampler, steps, guidance, seed and batch."""
    settings, solver = model.settings, SOLVERS[sampler.solver]
    source = few_step_of(model, sampler) or sampler
    usual = GUIDANCE_LCM if model.embeds_guidance else GUIDANCE_XL if model.is_sdxl else GUIDANCE
    guidance = source.guidance_scale or settings.get("guidance_scale", usual)
    steps = source.steps or settings.get("steps", STEPS_LCM if model.embeds_guidance else STEPS)
    if request.sigmas or request.timesteps:
        steps = len(request.sigmas) - 1 if request.sigmas else len(request.timesteps or ())
    return {
        "sampler": sampler.name,
        "spacing": None if _lists_levels(request) else sampler.spacing,
        "steps": steps,
        "guidance_scale": GUIDANCE_CFG_PP * sampler.guidance_divisor if solver.cfg_pp else guidance,
        "guidance_rescale": 0.0,
        "eta": None if solver.eta is None else sampler.options.get("eta", solver.eta),
        "seed": secrets.randbelow(2**32),
        "noise": "seeded",
        "batch": 1 if model.device_type == "cpu" else GPU_BATCH,
        "threshold_percentile": None if request.mimic_scale is None else 1.0,
        "region_base": None if request.regions is None else REGION_BASE,
        "pag_layers": None if request.pag_scale is None else PAG_LAYERS,
        "pag_adaptive_scale": None if request.pag_scale is None else 0.0,
    }


def _size_defaults(model: ModelInfo, request: Request) -> dict[str, Any]:
    """Return the defaults of the size, and for SDXL of the size conditioning and the refiner's."""
    width, height = _size(model, request)
    sizes: dict[str, Any] = {"width": width, "height": height}
    if model.is_sdxl:
        sizes |= {"original_size": (height, width), "crop": (0, 0), "target_size": (height, width)}
    if request.refiner is not None:
        sizes["refiner_at"] = REFINER_AT
    if model.has_aesthetic_score or request.refiner is not None:
        sizes |= dict(zip(ONLY_REFINER, AESTHETIC_SCORES, strict=True))
    return sizes


def _prompt_defaults(model: ModelInfo, syntax: str) -> dict[str, Any]:
    """Return the defaults of the prompt fields."""
    defaults = {"negative_prompt": model.empty_prompt, "prompt_syntax": "a1111", "clip_skip": 0}
    return defaults | ({"emphasis": "original"} if syntax == "a1111" else {})


def _method_defaults(model: ModelInfo, method: str, width: int, height: int) -> dict[str, Any]:
    """Return the guidance method and the defaults of its options."""
    # the norm grows with the picture; this is the paper's value for SDXL at 1024x1024
    own = {"apg_norm_threshold": 15.0 * math.sqrt(width * height) / 1024} | model.settings
    options = {f"{method}_{option}": default for option, default in METHOD_OPTIONS[method].items()}
    return {"guidance_method": method} | {name: own.get(name, default) for name, default in options.items()}


def _start_defaults(model: ModelInfo, request: Request) -> dict[str, Any]:
    """Return the defaults of the img2img, inpainting, hires and variation fields."""
    strength = STRENGTH_MASKED if _is_masked(request) else STRENGTH_XL if model.is_sdxl else STRENGTH
    table: tuple[tuple[bool, dict[str, Any]], ...] = (
        (request.image is not None, {"strength": strength, "resize_mode": "resize"}),
        (_is_masked(request), {"mask_blur": 0.0, "masked_content": "original"}),
        (request.mask is not None, {"invert_mask": False, "differential": False}),
        (request.hires is not None, {"hires_upscale": "latent", "hires_strength": STRENGTH_HIRES}),
        (request.variation_strength is not None, {"variation_seed": secrets.randbelow(2**32)}),
    )
    return {name: value for present, defaults in table if present for name, value in defaults.items()}


def _pass_defaults(request: Request, sampler: Sampler) -> dict[str, Any]:
    """Return the default of fix_steps, whether `steps` counts the steps taken; in A1111 only hires-fix does."""
    if not _starts_from_picture(request) or _lists_levels(request):
        return {}
    return {"fix_steps": sampler.counts != "diffusers" if request.hires else sampler.counts == "comfyui"}


def _size(model: ModelInfo, request: Request) -> tuple[int, int]:
    """Return (width, height): the request's; or those of its image, in whole latents; or the model's."""
    settings, side = model.settings, model.downscale
    size = settings.get("width", model.native_size), settings.get("height", model.native_size)
    if request.image is not None and request.only_masked is None and not (request.width and request.height):
        left, top, right, bottom = request.outpaint or (0, 0, 0, 0)
        width, height = (max(number // side, 1) * side for number in init_image.picture_size(request.image))
        size = width + left + right, height + top + bottom
        if max(size) > MAX_SIDE:
            raise RequestError(
                f"the image gives a picture of {size[0]}x{size[1]} pixels, but a side may have at most {MAX_SIDE}; "
                "give width and height"
            )
    return request.width or size[0], request.height or size[1]


def _is_masked(request: Request) -> bool:
    """Return whether a part of the init image is kept."""
    return request.mask is not None or request.outpaint is not None


def _starts_from_picture(request: Request) -> bool:
    """Return whether the run, or its second pass, starts from an image."""
    return request.image is not None or request.hires is not None


def _lists_levels(request: Request) -> bool:
    """Return whether the request lists its own noise levels."""
    return bool(request.sigmas or request.timesteps)
