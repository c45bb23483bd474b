"""What the user should know of a request before it is drawn: where something is ignored, or the picture will suffer.

Each function yields sentences that say what happens and what to do. An ordinary request gets none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mezzotint import prompt
from mezzotint.images.init_image import HALF, picture_size
from mezzotint.models.ip_adapter import is_active
from mezzotint.run.controls import control_scales
from mezzotint.run.loras import KINDS
from mezzotint.weights.model_files import join_names

if TYPE_CHECKING:
    from mezzotint.run.plan import RunPlan

ZERO_SNR_EPSILON = (
    "the schedule has zero terminal SNR (rescale_betas_zero_snr) and the model predicts epsilon, which says nothing of "
    "the picture where there is only noise (Lin et al. 2023); one of the two is probably wrong: --prediction "
    "v_prediction or --config scheduler.rescale_betas_zero_snr=false overrules the model's files"
)
ZERO_SNR_SIGMA = 1000.0  # only a schedule of zero terminal SNR has levels above
FORMS_PICTURE = (0.3, 80.0)  # levels between which a picture takes shape; above, there is only noise
# Largest step in ln(sigma) there, by whether the solver is stochastic. With the bundled model, blue becomes purple in
# DPM++ 2M SDE Karras at steps of 0.77 and more, not at 0.63; DPM++ 2M Karras falls apart at 2.6, not at 2.4.
LARGEST_STEP = {True: 0.7, False: 2.5}
WIDE_SPACINGS = ("karras", "exponential", "polyexponential")
LOWEST_START = 1.0  # of a run from noise: at this level half of the variance is the picture's
# Times the pixels of the model's own size. From noise, a subject is repeated at twice the sides and beyond; from a
# picture, whose layout is given, details are at four times. Up to there is what hires-fix is used for.
MOST_FROM_NOISE, MOST_FROM_PICTURE = 4, 16
LATENT_STRENGTH = 0.5  # lower, the blur of enlarged latents remains
FEW_CELLS, SHARE_OF_CELLS = 4, 0.25  # of a mask: fewer cells, or a smaller share of those that it touches, are few
STRETCHED = 0.02  # of a side: less is the rounding to multiples of 8
SCALES = ("te", "unet")  # the options of <lora:...> that have an effect


def find_notices(plan: RunPlan) -> Iterator[str]:
    """Yield the sentences on a planned request."""
    yield from _on_schedule(plan)
    yield from _on_refiner(plan)
    yield from _on_levels(plan)
    yield from _on_sizes(plan)
    yield from _on_ignored_fields(plan)
    yield from _on_loras(plan)
    yield from _on_controls(plan)
    yield from _on_ip_adapters(plan)
    yield from _on_prompts(plan)


def _on_schedule(plan: RunPlan) -> Iterator[str]:
    """Yield a sentence if the model predicts nothing at the first level."""
    config = plan.sampler.schedule
    if config.sigma_data is None and config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        yield ZERO_SNR_EPSILON


def _on_refiner(plan: RunPlan) -> Iterator[str]:
    """Yield a sentence if SDXL's refiner draws a picture from the start, or takes all of a run's steps or none."""
    if plan.model.has_aesthetic_score and plan.request.image is None:
        yield (
            "this model is SDXL's refiner, which was trained on the last fifth of the noise levels and draws poorly "
            "from noise: give a picture to start from (--image), or an SDXL model and this one as its refiner"
        )
    last = plan.last_pass
    if last.switch is None:
        return
    refined = sum(sigma <= last.switch.sigma for sigma in last.sigmas[:-1])
    if refined in (0, len(last.sigmas) - 1):
        yield (
            f"the refiner takes {'all' if refined else 'none'} of {len(last.sigmas) - 1} steps: refiner_at is "
            f"{last.request.refiner_at:g}, and the steps begin at the noise level {last.sigmas[0]:.2g}"
        )


def _on_levels(plan: RunPlan) -> Iterator[str]:
    """Yield sentences on noise levels that a solver cannot work with."""
    request, sampler, levels = plan.request, plan.sampler, plan.all_sigmas
    if request.strength is None and plan.sigmas[0] < LOWEST_START:
        yield (
            f"the run begins at the noise level {plan.sigmas[0]:.2g}, but starts from noise alone, which it cannot "
            "remove from there: give more steps, or spacing trailing"
        )
    multistep = sampler.solver.startswith(("dpmpp_2m", "dpmpp_3m"))
    if not multistep or request.spacing not in WIDE_SPACINGS or levels[0] < ZERO_SNR_SIGMA:
        return
    low, high = FORMS_PICTURE
    steps = [math.log(sigma / after) for sigma, after in pairwise(levels) if after > 0.0 and low < sigma < high]
    if max(steps, default=0.0) > LARGEST_STEP["sde" in sampler.solver and request.eta != 0.0]:
        wasted = sum(sigma > high for sigma in levels)
        yield (
            f"this model's noise levels reach {levels[0]:,.0f} (zero terminal SNR), and the spacing {request.spacing} "
            f"takes {wasted} of {len(levels) - 1} steps above {high:g}, where there is only noise; the rest is too "
            f"coarse for {sampler.name}, which will oversaturate: give spacing sgm_uniform, or more steps"
        )


def _on_sizes(plan: RunPlan) -> Iterator[str]:
    """Yield sentences on sizes far beyond the model's own, and on a second pass that stays blurry."""
    request, second = plan.request, plan.second_pass
    native = plan.model.native_size
    side = max(native, int(math.sqrt(plan.model.settings.get("width", 0) * plan.model.settings.get("height", 0))))
    from_noise = request.strength is None
    size, times = f"{request.width}x{request.height}", _area(plan) / side**2
    if times > (MOST_FROM_NOISE if from_noise else MOST_FROM_PICTURE):
        advice = "a smaller size (--size) with hires" if from_noise else "a smaller size (--size)"
        yield (
            f"the picture is drawn at {size}, {times:,.1f} times the pixels of the model's own {side}x{side}: subjects "
            f"are repeated, and time and memory grow with it; give {advice}"
        )
    if second and _area(second) > MOST_FROM_PICTURE * side**2:
        yield (
            f"hires {request.hires:g} draws at {second.request.width}x{second.request.height}, "
            f"{_area(second) / side**2:,.1f} times the pixels of the model's own {side}x{side}: details are repeated, "
            "and time and memory grow with it; give a smaller factor"
        )
    if request.hires and request.hires_upscale == "latent" and (request.hires_strength or 1.0) < LATENT_STRENGTH:
        yield (
            f"hires_strength is {request.hires_strength:g}, and enlarged latents stay blurry below {LATENT_STRENGTH}: "
            f"give {LATENT_STRENGTH} or more, or hires_upscale pixels"
        )


def _area(plan: RunPlan) -> int:
    """Return the number of pixels that a pass draws."""
    return (plan.request.width or 0) * (plan.request.height or 0)


def mask_notices(mask: Image.Image | None, side: int) -> Iterator[str]:
    """Yield a sentence on a mask of which few cells of the latents are left.

    Args:
        mask: L at the size of the run, white where it draws.
        side: Pixels of a cell.
    """
    if mask is None:
        return
    levels = np.asarray(mask)
    cells = int((levels[::side, ::side] >= HALF).sum())
    height, width = (number // side for number in levels.shape)
    touched = levels.reshape(height, side, width, side).max(axis=(1, 3)).sum() / 255
    if cells < SHARE_OF_CELLS * touched or (cells < FEW_CELLS and height * width >= FEW_CELLS * 16):
        yield (
            f"the mask leaves only {cells} of {height * width:,} cells of {side}x{side} pixels to repaint (a cell "
            f"counts if its first pixel is at least {HALF} of 255): paint a larger area white, or give only_masked, "
            "which draws it at a larger scale"
        )


def _on_ignored_fields(plan: RunPlan) -> Iterator[str]:
    """Yield a sentence on the fields that act on the unconditional output, if they are given and it is not used."""
    request = plan.request
    given = {
        "negative_prompt": bool(request.negative_prompt),
        "guidance_method": request.guidance_method != "cfg",
        "guidance_rescale": bool(request.guidance_rescale),
        "mimic_scale": request.mimic_scale is not None,
    }
    names = [name for name, is_given in given.items() if is_given]
    if plan.model.embeds_guidance and names:
        yield (
            f"{join_names(names)}: without effect, because this model takes the guidance scale as an input of its "
            "UNet (time_cond_proj_dim) and has no unconditional output"
        )


def _on_loras(plan: RunPlan) -> Iterator[str]:
    """Yield sentences on LoRAs that do not match the model, and on networks in the prompt that are ignored."""
    for adapter, (name, _) in zip(plan.adapters, plan.loras, strict=False):
        if adapter.coverage.unmatched:
            yield f"{name}: {adapter.coverage}"
    loaded = {Path(name).stem.lower() for name, _ in plan.loras}
    for network in plan.positive.networks:
        written = plan.positive.source[network.start : network.end][:200]
        if network.kind not in KINDS:
            yield f"{written} is ignored: only LoRAs can be loaded"
        elif plan.request.lora_folder:
            ignored = [f"{name}={value}" for name, value in network.options.items() if name not in SCALES]
            ignored += network.args[2:]
            if ignored:
                yield (
                    f"{join_names(ignored)} in {written} is ignored: a prompt gives only scales; factors by block "
                    '(LoRA block weight) are given in `loras`, such as {"unet.up_blocks": 0.5}'
                )
        elif network.name.lower() not in loaded:
            yield f"{written} is ignored: give lora_folder (--lora-folder) to load it"


def _on_controls(plan: RunPlan) -> Iterator[str]:
    """Yield sentences on entries of `control` that never act, and on conditioning pictures that are stretched."""
    request, steps = plan.request, len(plan.sigmas) - 1
    for k, entry in enumerate(request.control or ()):
        if not any(control_scales(entry, 1, steps, second_pass=False)):
            yield (
                f"control[{k}] acts in none of {steps} steps: from {entry.start:g} to {entry.end:g} there is no whole "
                "step, or its scale is 0"
            )
        if entry.resize_mode != "resize" or not (plan.controls and request.width):
            continue
        for field, picture in entry.pictures.items():
            if picture is None:
                continue
            width, height = picture_size(picture, f"control[{k}].{field}")
            if abs(width * (request.height or 0) - height * request.width) > STRETCHED * height * request.width:
                yield (
                    f"control[{k}].{field} is {width}x{height} and is stretched to {request.width}x{request.height}; "
                    "give resize_mode crop or fill to keep its shape"
                )


def _on_ip_adapters(plan: RunPlan) -> Iterator[str]:
    """Yield sentences on IP-Adapters that never act."""
    steps = len(plan.sigmas) - 1
    for k, entry in enumerate(plan.request.ip_adapter or ()):
        if not any(is_active(step, steps, entry.start, entry.end) for step in range(steps)) or not entry.scale:
            yield (
                f"ip_adapter[{k}] acts in none of {steps} steps: from {entry.start:g} to {entry.end:g} there is no "
                "whole step, or its scale is 0"
            )


def _on_prompts(plan: RunPlan) -> Iterator[str]:
    """Yield what `prompt.lint` remarks on the prompts."""
    meanings = {"prompt": plan.positive, "negative_prompt": plan.negative}
    meanings |= {f"regions[{k}].prompt": meaning for k, meaning in enumerate(plan.regions)}
    typed = [*plan.typed, *(meaning.source for meaning in plan.regions)]
    for (name, meaning), text in zip(meanings.items(), typed, strict=True):
        known = meaning if meaning.source == text else None  # its choices may have been drawn
        options: dict[str, Any] = {"negative": name == "negative_prompt", "embeddings": plan.embeddings}
        for remark in prompt.lint(text, meaning.syntax, known, **options):
            yield f"{name}: {remark.sentence}"
