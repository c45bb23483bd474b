"""The bodies of txt2img and img2img, and their translation to requests.

A body's settings are expressed in the terms of the infotext, which records/infotext.py translates. So a body and the
infotext of that program's picture give the same picture.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from mezzotint.records.infotext import Infotext, to_request
from mezzotint.request import MAX_SIDE, brief
from mezzotint.samplers import Spellings
from mezzotint.samplers.presets import A1111_SAMPLERS, A1111_SCHEDULES, A1111_WITHOUT_SCHEDULE
from mezzotint.server.a1111 import controlnet
from mezzotint.server.dialects import LooseBody, decode_picture
from mezzotint.server.errors import InvalidError

AUTOMATIC = "Automatic"
SUBSEEDS = 2**32
# the samplers whose function there takes eta; the others ignore it, though some of our solvers would not
TAKES_ETA = (
    *("Euler a", "DPM2 a", "DPM++ 2S a", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE"),
    *("DPM fast", "DPM adaptive", "DDIM", "DDIM CFG++"),
)
# the internal names of samplers: k_ and the solver's
ALIASES = {name: f"k_{preset.solver}" for name, preset in A1111_SAMPLERS.items()}
ALIASES |= {name: f"k_{sampler.solver}" for name, sampler in A1111_WITHOUT_SCHEDULE.items()}
ALIASES |= {"DPM++ 2M SDE Heun": "k_dpmpp_2m_sde_heun", "DPM adaptive": "k_dpm_ad"}
MORE = (("k_euler_ancestral", "Euler a"), ("k_dpm_adaptive", "DPM adaptive"))
RESIZE_MODES = ("resize", "crop", "fill", "resize")
MASKED_CONTENT = ("fill", "original", "noise", "noise")
# values that ask for nothing: these fields are not supported, and at others they are listed in `info`
IDLE: dict[str, tuple[Any, ...]] = {
    "styles": ([],),
    "restore_faces": (False,),
    "s_churn": (0,),
    "s_tmin": (0,),
    "s_tmax": (0,),
    "s_noise": (1,),
    "s_min_uncond": (0,),
    "image_cfg_scale": (1.5, 0),
    "disable_extra_networks": (False,),
    "hr_checkpoint_name": ("", "Use same checkpoint"),
    "hr_sampler_name": ("", "Use same sampler"),
    "hr_scheduler": ("", "Use same scheduler"),
    "hr_prompt": ("",),
    "hr_negative_prompt": ("",),
    "initial_noise_multiplier": (1,),
    "firstpass_image": ("",),
    "latent_mask": ("",),
    "infotext": ("",),
    "alwayson_scripts": ({},),
    "script_name": ("", "None"),
}
# where the pictures are kept, and what clients and extensions note for themselves: these ask for nothing to be drawn
NO_EFFECT = (
    *("do_not_save_samples", "do_not_save_grid", "save_images", "script_args", "force_task_id", "comments"),
    *("override_settings_restore_afterwards", "firstpass_image", "use_async", "id_task"),
)
ONLY_HIRES = ("hr_checkpoint_name", "hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt")
# the client's name of a field of Request, for sentences
NAMES = {
    "guidance_scale": "cfg_scale",
    "count": "batch_size",
    "batch": "batch_size",
    "sampler": "sampler_name",
    "hires": "hr_scale",
    "hires_steps": "hr_second_pass_steps",
    "hires_strength": "denoising_strength",
    "strength": "denoising_strength",
    "variation_seed": "subseed",
    "variation_strength": "subseed_strength",
    "seed_size": "seed_resize_from_w",
    "clip_skip": "CLIP_stop_at_last_layers",
    "image": "init_images",
    "only_masked": "inpaint_full_res_padding",
    "refiner": "refiner_checkpoint",
    "refiner_at": "refiner_switch_at",
}
Side = Annotated[int, Field(ge=8, le=MAX_SIDE)]
Pixels = Annotated[int, Field(ge=0, le=MAX_SIDE)]
Count = Annotated[int, Field(ge=1, le=10_000)]
_SAMPLERS = Spellings([*((name, name) for name in ALIASES), *((alias, name) for name, alias in ALIASES.items()), *MORE])
_SCHEDULES = Spellings((name, name) for name in (AUTOMATIC, *A1111_SCHEDULES))


class Text2Image(LooseBody):
    """The body of txt2img."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={"examples": [{"prompt": "a lemon on a blue background", "steps": 20, "seed": 7}]},
    )

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1
    subseed: int = -1
    subseed_strength: float = 0.0
    seed_resize_from_h: int = -1
    seed_resize_from_w: int = -1
    sampler_name: str = ""
    sampler_index: str = "Euler"
    scheduler: str = AUTOMATIC
    batch_size: Count = 1
    n_iter: Count = 1
    steps: int = 50
    cfg_scale: float = 7.0
    width: Side = 512
    height: Side = 512
    tiling: bool = False
    eta: float | None = None
    denoising_strength: float | None = None
    enable_hr: bool = False
    hr_scale: float = 2.0
    hr_upscaler: str = "Latent"
    hr_second_pass_steps: int = Field(default=0, ge=0)
    hr_resize_x: Pixels = 0
    hr_resize_y: Pixels = 0
    firstphase_width: Pixels = 0
    firstphase_height: Pixels = 0
    refiner_checkpoint: str = ""
    refiner_switch_at: float = 0.0
    override_settings: dict[str, Any] = Field(default={})
    send_images: bool = True

    @property
    def pictures(self) -> int:
        """Number of pictures of one iteration."""
        return self.batch_size

    def settings(self) -> dict[str, Any]:
        """Return the settings of this kind of body, by their names in the infotext."""
        if not self.enable_hr:
            return {}
        found: dict[str, Any] = {
            "Denoising strength": self.denoising_strength,
            "Hires upscaler": "Lanczos" if self.hr_upscaler == "None" else self.hr_upscaler,
            "Hires steps": self.hr_second_pass_steps or None,
        }
        if self.firstphase_width and self.firstphase_height:
            return found | {"First pass size": f"{self.firstphase_width}x{self.firstphase_height}"}
        wide, high = self.hr_resize_x, self.hr_resize_y
        if wide * self.height != high * self.width and wide and high:
            raise InvalidError(
                f"hr_resize_x and hr_resize_y are {wide} and {high}, which is another aspect ratio than that of width "
                f"and height, {self.width} and {self.height}; set one of them to 0",
                "hr_resize_x",
            )
        return found | {"Hires upscale": wide / self.width if wide else high / self.height if high else self.hr_scale}

    def fields(self, notes: list[str]) -> dict[str, Any]:
        """Return the fields of Request that the infotext has no name for."""
        return {}

    def images(self) -> list[bytes]:
        """Return the pictures to start from."""
        return []


class Image2Image(Text2Image):
    """The body of img2img."""

    denoising_strength: float | None = 0.75
    init_images: list[str] = Field(default=[])
    resize_mode: Annotated[int, Field(ge=0, le=3)] = 0
    mask: str = ""
    mask_blur: float | None = None
    mask_blur_x: float = 4
    mask_blur_y: float = 4
    inpainting_fill: Annotated[int, Field(ge=0, le=3)] = 0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: Pixels = 0
    inpainting_mask_invert: bool = False
    include_init_images: bool = False

    @property
    def pictures(self) -> int:
        """Number of pictures of one iteration; with several init images, one for each."""
        return len(self.init_images) if len(self.init_images) > 1 else self.batch_size

    def settings(self) -> dict[str, Any]:
        """Return the settings of this kind of body, by their names in the infotext."""
        return {"Denoising strength": self.denoising_strength}

    def fields(self, notes: list[str]) -> dict[str, Any]:
        """Return the fields of Request that the infotext has no name for."""
        if self.resize_mode == 3:
            notes.append("resize_mode: 3 (of latents): replaced by 0, of pixels")
        found: dict[str, Any] = {"resize_mode": RESIZE_MODES[self.resize_mode]}
        if not self.mask:
            return found
        if self.inpainting_fill == 3:
            notes.append("inpainting_fill: 3 (latent nothing): replaced by 2, latent noise")
        blur = self.mask_blur if self.mask_blur is not None else max(self.mask_blur_x, self.mask_blur_y)
        if self.mask_blur is None and self.mask_blur_x != self.mask_blur_y:
            notes.append(
                f"mask_blur_x and mask_blur_y: {self.mask_blur_x:g} and {self.mask_blur_y:g}: both are {blur:g}"
            )
        return found | {
            "mask": decode_picture(self.mask, "mask"),
            "mask_blur": blur,
            "invert_mask": self.inpainting_mask_invert,
            "masked_content": MASKED_CONTENT[self.inpainting_fill],
            "only_masked": self.inpaint_full_res_padding if self.inpaint_full_res else None,
        }

    def images(self) -> list[bytes]:
        """Return the pictures to start from. Raises InvalidError if there is none."""
        if not self.init_images:
            raise InvalidError("init_images is empty; it must have a picture in base64", "init_images")
        return [decode_picture(text, "init_images") for text in self.init_images]


@dataclass
class Task:
    """The requests that a body asks for.

    Attributes:
        requests: The fields of a Request for each iteration.
        settings: The options in force: those of the server, and override_settings.
        seed: The seed of the first picture.
        subseed: Its variation seed.
        sampler: The name of the sampler, and the label of its schedule.
        notes: A phrase for each setting that is not supported.
    """

    requests: list[dict[str, Any]]
    settings: Mapping[str, Any]
    seed: int
    subseed: int
    sampler: tuple[str, str]
    notes: list[str] = field(default_factory=list)


def translate(
    body: Text2Image, options: Mapping[str, Any], *, loads_networks: bool, refiner: str | None = None
) -> Task:
    """Translate a body.

    Args:
        body: The body.
        options: The options in force, as `options.Options` names them.
        loads_networks: Whether LoRAs that the prompt names are loaded.
        refiner: The listed name of the refiner, if the body asks for one.

    Raises:
        InvalidError: If a field is wrong.
        RequestError: Likewise; the sentence has the name of the field of Request.
    """
    notes = [*unsupported(body)]
    sampler, schedule = find_sampler(body.sampler_name or body.sampler_index, body.scheduler)
    if body.seed < -1:
        raise InvalidError(f"seed is {brief(body.seed)}; it must be -1 (random) or a whole number from 0", "seed")
    seed = secrets.randbelow(SUBSEEDS) if body.seed == -1 else body.seed
    subseed = secrets.randbelow(SUBSEEDS) if body.subseed < 0 else body.subseed
    eta = body.eta
    if eta is None:
        eta = options["eta_ddim"] if sampler.startswith("DDIM") else options["eta_ancestral"]
    varies = body.subseed_strength != 0.0
    resized = body.seed_resize_from_w > 0 and body.seed_resize_from_h > 0
    settings = {
        "Steps": body.steps,
        "CFG scale": body.cfg_scale,
        "Size": f"{body.width}x{body.height}",
        "Sampler": sampler,
        "Schedule type": schedule,
        "Eta": eta if sampler in TAKES_ETA else None,
        "Tiling": True if body.tiling else None,
        "Variation seed": subseed if varies else None,
        "Variation seed strength": body.subseed_strength if varies else None,
        "Seed resize from": f"{body.seed_resize_from_w}x{body.seed_resize_from_h}" if resized else None,
        "Clip skip": options["CLIP_stop_at_last_layers"],
        "Emphasis": options["emphasis"],
        "RNG": options["randn_source"],
        "Discard penultimate sigma": True if options["always_discard_next_to_last_sigma"] else None,
        **body.settings(),
    }
    text = {name: str(value) for name, value in settings.items() if value is not None}
    request, more = to_request(Infotext(body.prompt, body.negative_prompt, text))
    notes += [note for note in more if not (loads_networks and re.match("<(lora|lyco):", note))]
    fields = {name: value for name, value in request.model_dump().items() if value is not None} | body.fields(notes)
    if refiner is not None:
        fields |= {"refiner": refiner, "refiner_at": min(max(body.refiner_switch_at, 0.0), 1.0)}
    if options["img2img_fix_steps"] and "resize_mode" in fields:
        fields["fix_steps"] = True
    requests = [*_iterations(body, fields, seed, subseed if varies else None)]
    if units := controlnet.units((body.model_extra or {}).get("alwayson_scripts"), notes):
        requests = [one | controlnet.with_pictures(units, one.get("image")) for one in requests]
    return Task(requests, options, seed, subseed, (sampler, schedule), notes)


def _iterations(body: Text2Image, fields: dict[str, Any], seed: int, subseed: int | None) -> Iterator[dict[str, Any]]:
    """Yield the fields of each iteration's Request.

    Picture k has seed + k. Variations have all the same seed, and subseed + k; those, and pictures that start from
    different ones, are a request each.
    """
    images, count = body.images(), body.pictures
    if subseed is None and len(images) < 2:
        start = {"image": images[0]} if images else {}
        for k in range(body.n_iter):
            yield fields | start | {"seed": seed + k * count, "count": count, "batch": count}
        return
    for k in range(body.n_iter * count):
        one = fields | {"seed": seed + k, "count": 1, "batch": 1}
        if subseed is not None:
            one |= {"seed": seed, "variation_seed": subseed + k}
        if images:
            one["image"] = images[k % len(images)]
        yield one


def find_sampler(name: str, schedule: str) -> tuple[str, str]:
    """Return the sampler's name and the schedule's label; a schedule in the sampler's name wins, as in "Euler Karras".

    Raises:
        InvalidError: If one of them is unknown.
    """
    label = _SCHEDULES.find(schedule)
    if label is None:
        raise InvalidError(f"scheduler is {schedule[:60]!r}; it must be {', '.join(A1111_SCHEDULES)}", "scheduler")
    sampler = _SAMPLERS.find(name)
    words = name.split(" ")
    for k in range(1, len(words)):
        if sampler is not None:
            break
        suffix = _SCHEDULES.find(" ".join(words[k:]))
        if suffix is not None:
            sampler, label = _SAMPLERS.find(" ".join(words[:k])), suffix
    if sampler is None:
        known = [*A1111_SAMPLERS, *A1111_WITHOUT_SCHEDULE]
        near = get_close_matches(name[:60], known, 3, 0.5)
        sentence = f"did you mean {' or '.join(near)}?" if near else f"it must be {', '.join(known)}"
        raise InvalidError(f"sampler_name is {name[:60]!r}; {sentence}", "sampler_name")
    return sampler, label


def unsupported(body: Text2Image) -> Iterator[str]:
    """Yield a phrase for each field that is not supported and asks for something."""
    extra = body.model_extra or {}
    for name, idle in IDLE.items():
        value = extra.get(name)
        if value is None or value in idle or (name in ONLY_HIRES and not body.enable_hr):
            continue
        if name == "script_name":
            raise InvalidError(f"Script {str(value)[:60]!r} not found; there are no scripts", name)
        if name == "alwayson_scripts" and isinstance(value, dict):
            for script in [each for each in value if not controlnet.is_ours(each)][:20]:
                yield f"alwayson_scripts: {script[:100]}"
        else:
            yield f"{name}: {str(value)[:100]}"


def unknown(body: Text2Image) -> list[str]:
    """Return the names of the keys that mean nothing here: at most 50. Their values may be secrets."""
    names = [name for name in body.model_extra or {} if name not in IDLE and name not in NO_EFFECT]
    return [name[:100] for name in names[:50]]


def rename(error: InvalidError) -> InvalidError:
    """Return an error with the client's name of its field."""
    name = NAMES.get(error.param or "")
    if name is None:
        return error
    return InvalidError(str(error).replace(str(error.param), name, 1), name)
