"""Request, the record of what to generate. Importing this does not import torch.

A `Request` is a frozen, validated record. The Python call, the command line, a row of a bulk file and the metadata of a
picture are all this record. A field that is None takes the model's default, which `Pipeline.resolve` fills in. An
invalid field raises a `RequestError` of the form "<field> is <value>; it must be <description>", where the description
is the one of the field below.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from os import PathLike, fspath
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mezzotint import samplers
from mezzotint.entries.control import Control, ControlPicture
from mezzotint.entries.fields import MAX_PROMPT as MAX_PROMPT
from mezzotint.entries.fields import Bytes, Name, Picture, Share, Text, picture_source, to_uri
from mezzotint.entries.ip_adapter import IPAdapter
from mezzotint.entries.regions import MAX_REGIONS, Region
from mezzotint.errors import REQUEST_ALIASES, RequestError, suggest

MAX_SIDE = 8192  # pixels
MAX_COUNT = 10_000  # pictures
MAX_SEED = 2**64 - 1  # what torch.Generator.manual_seed takes

_TEXT = f"a text (valid Unicode) of at most {MAX_PROMPT:,} characters"
_SIDE = f"a multiple of 8 from 8 to {MAX_SIDE}"
_PICTURE = "a picture: the path of a file, its bytes, or a PIL image"
UPSCALER_FILES = ("safetensors", "pth", "pt", "ckpt", "bin")  # how an upscaler's file ends
FLAGS = ("invert_mask", "differential", "fix_steps", "discard_penultimate_sigma")
_EXTENT = "(height, width) in pixels, two whole numbers above 0 (SDXL's micro-conditioning)"
_SCORE = "a number from 0 to 10 (how beautiful people find pictures such as these; SDXL's refiner is conditioned on it)"

Side = Annotated[int, Field(multiple_of=8, ge=8, le=MAX_SIDE)]
Extent = Annotated[int, Field(ge=1, le=1_000_000)]
Offset = Annotated[int, Field(ge=0, le=1_000_000)]
Sigma = Annotated[float, Field(ge=0.0, le=1e6)]
Scale = Annotated[float, Field(ge=0.0, le=1000.0)]
Factor = Annotated[float, Field(gt=0.0, le=10.0)]
Score = Annotated[float, Field(ge=0.0, le=10.0)]
Timestep = Annotated[float, Field(ge=0.0, le=1e6)]
Padding = Annotated[int, Field(ge=0, le=MAX_SIDE)]
Extension = Annotated[int, Field(multiple_of=8, ge=0, le=MAX_SIDE)]
Amount = Annotated[float, Field(ge=-100.0, le=100.0)]
Blocks = Annotated[tuple[tuple[Name, Amount], ...], Field(max_length=1000)]  # given as a dictionary too
Lora = tuple[Name, Amount] | tuple[Name, Amount, Amount] | tuple[Name, Amount, Amount, Blocks]
Scales = Annotated[tuple[Scale, ...], Field(min_length=1, max_length=1000)]


def _optional(description: str, **limits: Any) -> Any:
    """Return a field that is None by default; `description` completes "<field> is <value>; it must be"."""
    return Field(default=None, description=description, **limits)


def _choice(*names: str, meaning: str = "") -> Any:
    """Return a field that takes one of a few words."""
    description = f"{', '.join(names[:-1])} or {names[-1]}{meaning and f' ({meaning})'}"
    return _optional(description, pattern=f"^({'|'.join(names)})$")


# by the field whose entries they are, as pydantic locates it
ENTRIES: dict[tuple[str, ...], type[BaseModel]] = {
    ("control",): Control,
    ("ip_adapter",): IPAdapter,
    ("regions",): Region,
}


class Request(BaseModel):
    """What to generate: one frozen, validated record with a field for every option.

    `prompt` may be given as the one positional argument: `Request("a lemon", seed=7)`. A field that is None takes the
    model's default. Picture k of the `count` has the seed `seed + k`, so it does not depend on the others.

    Raises:
        RequestError: If a field is unknown or its value is not allowed; the message says what would be right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # kw_only=False is for type checkers, which derive the signature from the fields
    prompt: Text = Field(kw_only=False, description=_TEXT)
    negative_prompt: Text | None = _optional(_TEXT)
    prompt_syntax: str | None = _choice("a1111", "comfy", "compel", "plain")
    emphasis: str | None = _choice("original", "no_norm", "ignore", meaning="how the a1111 syntax applies weights")
    embeddings: tuple[Name, ...] | None = _optional(
        "a list of at most 1000 textual inversions: files, folders or hub ids (owner/name)", max_length=1000
    )
    loras: tuple[Lora, ...] | None = _optional(
        "a list of at most 100 LoRAs: (a file, scale) or (a file, UNet scale, text encoder scale), each "
        "scale from -100 to 100; a fourth element may give factors by block, such as {'unet.down_blocks.1': 0.5}",
        max_length=100,
    )
    lora_folder: Name | None = _optional("a folder with the files that <lora:name:0.8> in a prompt refers to")
    choices: str | None = _optional(
        "draw (choose by the seed) or keep (as text), for {this|that} in a comfy prompt", pattern="^(draw|keep)$"
    )
    wildcards: Name | None = _optional("a folder with the files of the __wildcards__ in a comfy prompt")
    width: Side | None = _optional(f"{_SIDE} (pixels)")
    height: Side | None = _optional(f"{_SIDE} (pixels)")
    steps: int | None = _optional("a whole number from 1 to 1000", ge=1, le=1000)
    guidance_scale: Scale | Scales | None = _optional(
        "a number from 0 to 1000 (1: no guidance), or a list of 1 to 1000 such numbers, spread evenly "
        "over the steps and interpolated linearly"
    )
    guidance_method: str | None = _choice("cfg", "apg", "cfg_zero", "perp_neg")
    sampler: str | None = _optional(
        "a name from `mezzotint samplers`, or a solver function", min_length=1, max_length=100
    )
    spacing: str | None = _optional("a name from `mezzotint samplers`", min_length=1, max_length=100)
    sigmas: tuple[Sigma, ...] | None = _optional(
        "2 to 1001 falling noise levels from 0 to 1e6; the run stops at the last one", min_length=2, max_length=1001
    )
    timesteps: tuple[Timestep, ...] | None = _optional(
        "1 to 1000 falling timesteps of the model, each from 0", min_length=1, max_length=1000
    )
    discard_penultimate_sigma: bool | None = _optional(
        "true or false: whether one more noise level is computed and the last but one is dropped, as by A1111's option",
        strict=True,
    )
    seed: int | None = _optional("a whole number from 0 to 2**64 - 1", ge=0, le=MAX_SEED)
    count: int = Field(default=1, ge=1, le=MAX_COUNT, description="a whole number from 1 to 10,000 (pictures)")
    batch: int | None = _optional("a whole number from 1 to 10,000 (pictures at once)", ge=1, le=MAX_COUNT)
    clip_skip: int | None = _optional(
        "the number of text encoder layers to skip from the end, beyond the model's own, as in diffusers", ge=0, le=100
    )
    eta: float | None = _optional("a number from 0 (no fresh noise) to 1", ge=0.0, le=1.0)
    guidance_rescale: float | None = _optional("a number from 0 to 1 (Lin et al. 2023)", ge=0.0, le=1.0)
    guidance_interval: tuple[Sigma, Sigma] | None = _optional(
        "two noise levels (low, high) in sigma with 0 <= low < high <= 1e6; guidance is applied where "
        "low < sigma <= high (Kynkäänniemi et al. 2024)"
    )
    guidance_steps: tuple[Share, Share] | None = _optional(
        "two fractions (start, stop) of the steps with 0 <= start < stop <= 1; guidance is applied from "
        "start until before stop"
    )
    apg_eta: float | None = _optional("a number from 0 to 10 (1: as in classifier-free guidance)", ge=0.0, le=10.0)
    apg_momentum: float | None = _optional("a number above -1 and below 1 (0: none; usually negative)", gt=-1.0, lt=1.0)
    apg_norm_threshold: float | None = _optional("a norm in latent space from 0 (no limit) to 1e6", ge=0.0, le=1e6)
    cfg_zero_init_steps: int | None = _optional(
        "a whole number from 0 to 1000 (first steps whose output is zero)", ge=0, le=1000
    )
    perp_neg_scale: float | None = _optional(
        "a number from 0 to 1000 (weight of the negative prompt)", ge=0.0, le=1000.0
    )
    mimic_scale: float | None = _optional(
        "a guidance scale from 0 to 1000, whose range of values is not exceeded (dynamic thresholding)",
        ge=0.0,
        le=1000.0,
    )
    threshold_percentile: float | None = _optional(
        "a fraction from 0 to 1 of a channel's values; larger values are clipped", ge=0.0, le=1.0
    )
    pag_scale: Scale | None = _optional("a number from 0 (off) to 1000 (perturbed-attention guidance; usually 3)")
    pag_layers: tuple[Name, ...] | None = _optional(
        "a list of 1 to 100 parts of names of the UNet's self-attentions, such as mid or up_blocks.0.attentions.1",
        min_length=1,
        max_length=100,
    )
    pag_adaptive_scale: Scale | None = _optional(
        "a number from 0 to 1000, by which pag_scale falls with each timestep below 1000"
    )
    freeu: tuple[Factor, Factor, Factor, Factor] | None = _optional(
        "four numbers (b1, b2, s1, s2) above 0 and at most 10 (FreeU: factors of the UNet's features and skips)"
    )
    noise: str | None = _optional(
        "seeded (CPU generators, as in diffusers) or philox (the noise of a CUDA GPU, as in A1111)",
        pattern="^(seeded|philox)$",
    )
    original_size: tuple[Extent, Extent] | None = _optional(_EXTENT)
    crop: tuple[Offset, Offset] | None = _optional(
        "(top, left) in pixels, two whole numbers from 0 (SDXL's micro-conditioning)"
    )
    target_size: tuple[Extent, Extent] | None = _optional(_EXTENT)
    refiner: Name | None = _optional("a model, usually SDXL's refiner: a folder, a file or a hub id (owner/name)")
    refiner_at: Share | None = _optional(
        "a number from 0 to 1: the share of the timesteps after which the refiner takes over; usually 0.8"
    )
    aesthetic_score: Score | None = _optional(_SCORE)
    negative_aesthetic_score: Score | None = _optional(_SCORE)
    image: Picture | None = _optional(_PICTURE)
    mask: Picture | None = _optional(f"{_PICTURE}; white areas are inpainted")
    fix_steps: bool | None = _optional(
        "true or false: whether a run from a picture takes all of its steps (of a schedule longer by "
        "1/strength), or only the share `strength` of them",
        strict=True,
    )
    strength: Share | None = _optional(
        "a number from 0 to 1: the share of the steps that is run, hence how much may change"
    )
    resize_mode: str | None = _optional(
        "resize (stretch), crop or fill (how an image of another shape is fitted)", pattern="^(resize|crop|fill)$"
    )
    tile: int | None = _optional(
        f"a multiple of 8 from 64 to {MAX_SIDE}: the largest side of the tiles in which a picture is drawn from image",
        multiple_of=8,
        ge=64,
        le=MAX_SIDE,
    )
    mask_blur: float | None = _optional("a number of pixels from 0 to 1000", ge=0.0, le=1000.0)
    invert_mask: bool | None = _optional("true or false", strict=True)
    differential: bool | None = _optional(
        "true or false: whether the mask's grey is how much each place may change (differential diffusion)",
        strict=True,
    )
    masked_content: str | None = _optional(
        "original, fill (the surrounding colours) or noise (what the masked area starts from)",
        pattern="^(original|fill|noise)$",
    )
    only_masked: Padding | None = _optional(
        f"a whole number of pixels from 0 to {MAX_SIDE}: the padding around the masked area, which is "
        "inpainted alone at the full size"
    )
    outpaint: tuple[Extension, Extension, Extension, Extension] | None = _optional(
        f"(left, top, right, bottom), multiples of 8 from 0 to {MAX_SIDE}: the pixels to add on each side"
    )
    hires: float | None = _optional(
        "a number above 1 and at most 8, the factor by which the second pass is larger", gt=1.0, le=8.0
    )
    hires_upscale: str | None = _optional(
        "latent or pixels (what is enlarged for the second pass), or the .safetensors or .pth file of an upscaler",
        pattern=rf"^(latent|pixels|.+\.({'|'.join(UPSCALER_FILES)}))$",
        max_length=4096,
    )
    hires_steps: int | None = _optional("a whole number from 1 to 1000", ge=1, le=1000)
    hires_strength: float | None = _optional("a number above 0 and at most 1", gt=0.0, le=1.0)
    seamless: str | None = _optional("x, y or xy, the directions in which the picture tiles", pattern="^(x|y|xy)$")
    variation_seed: int | None = _optional("a whole number from 0 to 2**64 - 1", ge=0, le=MAX_SEED)
    variation_strength: Share | None = _optional(
        "a number from 0 to 1: how far the noise is interpolated to that of variation_seed"
    )
    seed_size: tuple[Side, Side] | None = _optional(
        f"(width, height), each {_SIDE}: the size whose noise is placed in the centre"
    )
    control: tuple[Control, ...] | None = _optional(
        "a list of at most 16 ControlNets or T2I-Adapters: each a file, or an object with file, image, scale, start, "
        "end, mode, resize_mode, type and more",
        max_length=16,
    )
    regions: tuple[Region, ...] | None = _optional(
        f"a list of at most {MAX_REGIONS} regional prompts, each with prompt, weight, and box or mask",
        max_length=MAX_REGIONS,
    )
    region_base: Scale | None = _optional(
        "a number from 0 (none) to 1000, the weight of the prompt within the regions (1: as a region's own)"
    )
    ip_adapter: tuple[IPAdapter, ...] | None = _optional(
        "a list of at most 16 IP-Adapters: each an object with file (a file, a folder or a hub id), image or embeds, "
        "encoder, scale, start, end and mask",
        max_length=16,
    )
    safety: str | None = _choice(
        "off", "flag", "blur", "black", meaning="what is done with a picture that the model's safety checker flags"
    )

    if not TYPE_CHECKING:

        def __init__(self, *prompt: str, **fields: Any) -> None:
            if len(prompt) > 1:
                raise TypeError(f"Request takes one positional argument, the prompt, and {len(prompt)} were given")
            if prompt and "prompt" in fields:
                raise TypeError("Request got the prompt twice: as the positional argument and by name")
            super().__init__(**({"prompt": prompt[0]} if prompt else {}), **fields)

        # as on pydantic's own __init__: validation sets the fields directly, without calling it
        __init__.__pydantic_base_init__ = True

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Yield the fields that differ from their defaults, without the bytes of pictures."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if field.is_required() or value != field.default:
                yield name, Bytes(value) if isinstance(value, bytes) else value

    def __str__(self) -> str:
        return repr(self)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name not in FLAGS:  # Python's True would pass as 1
            raise PydanticCustomError("boolean", "a boolean")
        return value

    @field_validator("embeddings", "wildcards", "hires_upscale", "pag_layers", "refiner", mode="before")
    @classmethod
    def _paths_are_names(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name in ("embeddings", "pag_layers") and isinstance(value, str | PathLike):
            value = [value]  # one alone
        if isinstance(value, list | tuple):
            return tuple(fspath(name) if isinstance(name, PathLike) else name for name in value)
        return fspath(value) if isinstance(value, PathLike) else value

    @field_validator("loras", mode="before")
    @classmethod
    def _loras_are_lists(cls, value: Any) -> Any:
        if isinstance(value, str | PathLike):
            value = [value]  # one alone
        return tuple(map(_lora, value)) if isinstance(value, list | tuple) else value

    @field_validator("control", "ip_adapter", "regions", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | PathLike | Mapping | Control | IPAdapter | Region) else value

    @field_validator("sampler", mode="before")
    @classmethod
    def _functions_have_names(cls, value: Any) -> Any:
        return samplers.name_of(value) if callable(value) else value

    @field_validator("image", "mask", mode="before")
    @classmethod
    def _pictures_are_files(cls, value: Any) -> Any:
        return picture_source(value)

    @field_serializer("image", "mask", when_used="json-unless-none")
    def _to_uri(self, value: str | bytes) -> str:
        return to_uri(value)

    @field_validator("sampler", "spacing")
    @classmethod
    def _canonical_name(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        return samplers.canonical_name(value) if info.field_name == "sampler" else samplers.canonical_spacing(value)

    @field_validator("sigmas", "timesteps")
    @classmethod
    def _list_falls(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and any(upper <= lower for upper, lower in pairwise(value)):
            raise PydanticCustomError("falling", "a list that does not fall")
        return value

    @field_validator("guidance_interval", "guidance_steps")
    @classmethod
    def _interval_is_not_empty(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] >= value[1]:
            raise PydanticCustomError("interval", "an empty interval")
        return value

    @model_validator(mode="after")
    def _last_seed_fits(self) -> Self:
        if self.seed is not None and self.seed + self.count - 1 > MAX_SEED:
            raise RequestError(
                f"seed is {self.seed} and count {self.count}; picture k has seed + k, which must be at most 2**64 - 1"
            )
        return self

    @model_validator(mode="after")
    def _one_list_of_levels(self) -> Self:
        given = [name for name in ("sigmas", "timesteps", "spacing") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RequestError(f"{' and '.join(given)} are given; each sets the noise levels, so give only one of them")
        steps = len(self.sigmas) - 1 if self.sigmas else len(self.timesteps or ())
        if steps and self.steps not in (None, steps):
            raise RequestError(f"steps is {self.steps} and {given[0]} has {steps} steps; leave steps out")
        return self

    @model_validator(mode="after")
    def _percentile_has_its_scale(self) -> Self:
        if self.threshold_percentile is not None and self.mimic_scale is None:
            raise RequestError(
                f"threshold_percentile is {self.threshold_percentile} without mimic_scale; give both, or neither"
            )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _speak(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise RequestError(_sentence(error, data)) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Create a Request from JSON text.

        Raises:
            RequestError: If the text is not JSON, or a field is not allowed.
        """
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise RequestError(f"the request is not valid JSON: {error.errors()[0]['msg']}") from None

    @property
    def sources(self) -> dict[str, str | bytes]:
        """Return the pictures that the run starts from, by field name."""
        return {name: source for name in ("image", "mask") if (source := getattr(self, name)) is not None}

    @property
    def upscaler(self) -> str | None:
        """The file of the upscaler of the second pass, or None."""
        return None if self.hires_upscale in ("latent", "pixels") else self.hires_upscale

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, validated again."""
        return type(self)(**{**self.model_dump(), **changes})


Job = tuple[Request, int]  # one picture: its request and its own seed


def _sentence(error: ValidationError, data: Any) -> str:
    """Return pydantic's errors as sentences: which field, what it is, what it must be."""
    given: Mapping[Any, Any] = data if isinstance(data, Mapping) else {}
    # one sentence a field, and at most five: pydantic reports both halves of a pair, and every item of a list
    findings: dict[Any, set[str]] = {}
    of_entries: dict[Any, str] = {}  # likewise one for each field of an entry
    for finding in error.errors():
        if finding["loc"][:1] in ENTRIES and len(finding["loc"]) > 1:
            of_entries.setdefault(finding["loc"][:3], _entry_sentence(finding))
        else:
            findings.setdefault(finding["loc"][0] if finding["loc"] else None, set()).add(finding["type"])
    sentences = [*of_entries.values()][:5]
    for name, kinds in list(findings.items())[:5]:
        field = Request.model_fields.get(str(name))
        if name is None:
            sentences.append(f"the request is {brief(data)}; it must be an object with the fields of a Request")
        elif field is None:
            hint = suggest(str(name), REQUEST_ALIASES, Request.model_fields)
            sentences.append(f"a request has no field {brief(name)}; {hint}")
        else:
            state = f"is {brief(given[name])}" if name in given else "is missing"
            state += ", which is not Unicode" if "string_unicode" in kinds else ""  # as a file's name need not be
            sentences.append(f"{name} {state}; it must be {field.description}")
    return ". ".join(sentences)


def _entry_sentence(finding: Mapping[str, Any]) -> str:
    """Return a finding in an entry of a list as a sentence that names the field and the entry."""
    name, index, *inner = finding["loc"]
    entry, fields = f"{name}[{index}]", ENTRIES[name,].model_fields
    if inner[:1] == ["more"] and len(inner) > 2:
        entry, fields, inner = f"{entry}.more[{inner[1]}]", ControlPicture.model_fields, inner[2:]
    if not inner:
        return f"{entry} is {brief(finding['input'])}; it must be an object with {', '.join(fields)}"
    if inner[0] not in fields:
        return f"{entry} has no field {brief(inner[0])}; {suggest(str(inner[0]), {}, fields)}"
    state = "is missing" if finding["type"] == "missing" else f"is {brief(finding['input'])}"
    return f"{entry}.{inner[0]} {state}; it must be {fields[inner[0]].description}"


def _lora(entry: Any) -> Any:
    """Return an entry of `loras` as a tuple: a path alone has the scale 1, and factors by block become pairs."""
    if isinstance(entry, str | PathLike):
        entry = (entry, 1.0)
    if not isinstance(entry, list | tuple):
        return entry
    parts = (fspath(part) if isinstance(part, PathLike) else part for part in entry)
    return tuple(tuple(part.items()) if isinstance(part, Mapping) else part for part in parts)


_quoter = reprlib.Repr()
_quoter.maxstring = _quoter.maxother = _quoter.maxlong = 60


def brief(value: Any) -> str:
    """Return a value as an error message quotes it, shortened."""
    if isinstance(value, str) and len(value) > 60:
        return f"{len(value):,} characters long"
    try:
        return _quoter.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number of thousands of digits"
