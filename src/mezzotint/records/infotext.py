"""Write and read the generation parameters that AUTOMATIC1111's web UI stores in pictures ("infotext").

    prompt lines
    Negative prompt: its lines
    Steps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7.5, Seed: 9, Size: 512x768, ...

The last line is a comma-separated list of `name: value`, recognized if it has at least three. A value with a comma, a
colon or a newline is a JSON string (A1111 1.10.1, modules/infotext_utils.py). Missing fields have A1111's defaults. The
text is untrusted: nothing that it names is opened.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import PureWindowsPath
from typing import Any

from mezzotint.entries.control import Control
from mezzotint.errors import RequestError
from mezzotint.request import Request
from mezzotint.samplers import SOLVERS, TABLE, Spellings
from mezzotint.samplers.presets import A1111_SAMPLERS, A1111_SCHEDULES, A1111_WITHOUT_SCHEDULE, PRESETS

MAX_FIELDS = 1000  # of the last line; the rest is ignored
MAX_TEXT = 16_000_000  # characters
NEGATIVE = "Negative prompt:"
A1111_NAMES: dict[str | None, str] = {row.name: row.a1111.split(", ")[0] for row in TABLE if row.a1111}
# the text of A1111 and of programs that write another's names into it; A1111's win
_SPELLINGS = Spellings(
    (name.casefold(), name) for name in (*A1111_SAMPLERS, *A1111_WITHOUT_SCHEDULE, *PRESETS, *SOLVERS)
)
NAME = re.compile(r"[\w \-/]*")  # matched backwards from the colon
QUOTED = re.compile(r'"(?:\\.|[^\\"])+"')
TEMPLATE = re.compile(r"\n(?:Negative )?Template: ")  # appended by sd-dynamic-prompts


def write(
    request: Request,
    seed: int,
    model: str,
    version: str,
    model_hash: str | None = None,
    refiner_hash: str | None = None,
) -> str:
    """Return the text for one picture.

    Args:
        request: The resolved request.
        seed: The seed of this picture.
        model: The model's name.
        version: The version of mezzotint.
        model_hash: The first 10 digits of the SHA-256 of a single-file model, as A1111 shows it.
        refiner_hash: Those of a single-file refiner.
    """
    sampler, schedule = _sampler_names(request)
    scale = request.guidance_scale
    if request.sampler == "euler_cfg_pp" and scale is not None:  # A1111's DDIM CFG++, which divides its scale
        divisor = A1111_WITHOUT_SCHEDULE["DDIM CFG++"].guidance_divisor
        scale = tuple(divisor * w for w in scale) if isinstance(scale, tuple) else divisor * scale
    fields = {
        "Steps": request.steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": scale,
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": model_hash,
        "Model": model,
        "Refiner": _refiner(request.refiner, refiner_hash) if request.refiner else None,
        "Refiner switch at": request.refiner_at,
        "Clip skip": request.clip_skip + 1 if request.clip_skip else None,  # in A1111 1 is the last layer
        "Emphasis": {"no_norm": "No norm", "ignore": "Ignore"}.get(request.emphasis or ""),
        "Eta": request.eta,
        "CFG rescale": request.guidance_rescale or None,
        "Denoising strength": request.hires_strength if request.hires else request.strength,
        "Mask blur": request.mask_blur,
        "Hires upscale": request.hires,
        "Hires steps": request.hires_steps if request.hires else None,
        "Hires upscaler": PureWindowsPath(request.upscaler).stem
        if request.upscaler
        else {"latent": "Latent", "pixels": "Lanczos"}.get(request.hires_upscale or ""),
        "Variation seed": request.variation_seed,
        "Variation seed strength": request.variation_strength,
        "Seed resize from": request.seed_size and "{}x{}".format(*request.seed_size),
        "Discard penultimate sigma": request.discard_penultimate_sigma or None,
        **{f"ControlNet {k}": _control(entry) for k, entry in enumerate(request.control or ())},
        "Tiling": True if request.seamless == "xy" else None,
        "RNG": "NV" if request.noise == "philox" else "CPU",  # A1111's default is the GPU's
        "Version": f"mezzotint {version}",
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"{NEGATIVE} {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quote(value)}" for name, value in fields.items() if value is not None))
    return "\n".join(lines).replace("\0", "\ufffd")  # a PNG text chunk ends at NUL


def _refiner(source: str, hash: str | None) -> str:
    """Return a refiner as A1111 writes it: its name, and the beginning of its hash."""
    name = PureWindowsPath(source).name
    name = name.removesuffix(".safetensors").removesuffix(".ckpt")
    return f"{name} [{hash}]" if hash else name


def _control(entry: Control) -> str:
    """Return a ControlNet as A1111's extension writes it."""
    resize = {"resize": "Just Resize", "crop": "Crop and Resize", "fill": "Resize and Fill"}
    modes = {"prompt": "My prompt is more important", "control": "ControlNet is more important"}
    fields = {
        "Module": "none",
        "Model": PureWindowsPath(entry.file).stem,
        "Weight": entry.scale,
        "Resize Mode": resize[entry.resize_mode],
        "Guidance Start": entry.start,
        "Guidance End": entry.end,
        "Control Mode": modes.get(entry.mode, "Balanced"),
    }
    return ", ".join(f"{name}: {value}" for name, value in fields.items())


def _sampler_names(request: Request) -> tuple[str | None, str | None]:
    """Return A1111's names of the sampler and the schedule, None where A1111 needs or has none."""
    name = request.sampler
    bases = sorted({*A1111_SAMPLERS, *A1111_WITHOUT_SCHEDULE}, key=len, reverse=True)
    base = next((b for b in bases if name == b or (name or "").startswith(f"{b} ")), None)
    if base is None:
        solver = PRESETS[name].solver if name in PRESETS else name
        base = A1111_NAMES.get(solver, solver)
    if base in A1111_WITHOUT_SCHEDULE:
        return base, None
    schedule = (name or "").removeprefix(f"{base} ")
    if schedule in A1111_SCHEDULES and PRESETS[name or ""].spacing == request.spacing:
        return base, schedule
    by_spacing = {spacing: label for label, (spacing, _) in reversed(A1111_SCHEDULES.items())}
    return base, by_spacing.get(request.spacing or "")


def _quote(value: object) -> str:
    """Format a value as A1111 does: as a JSON string if it has a comma, a colon or a newline."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


@dataclass(frozen=True)
class Infotext:
    """The parts of a text: the prompts, and the unquoted fields of the last line."""

    prompt: str
    negative_prompt: str
    fields: Mapping[str, str]

    @property
    def ours(self) -> bool:
        """Whether mezzotint wrote it."""
        return self.fields.get("Version", "").startswith("mezzotint ")


def parse(text: str) -> Infotext:
    """Split a text by A1111's rules. Without a recognized last line, all of it is prompt.

    Raises:
        RequestError: If the text is longer than MAX_TEXT.
    """
    if len(text) > MAX_TEXT:
        raise RequestError(f"the picture's text has {len(text):,} characters; at most {MAX_TEXT:,} are read")
    text = text.strip().replace("\r\n", "\n")
    template = TEMPLATE.search(text)
    if template and "Steps: " in text[: template.start()].rpartition("\n")[2]:
        text = text[: template.start()]
    *lines, last = text.split("\n")
    fields = dict(islice(_fields(last), MAX_FIELDS))
    if len(fields) < 3:
        lines, fields = [*lines, last], {}
    texts: dict[bool, list[str]] = {False: [], True: []}
    negative = False
    for line in map(str.strip, lines):
        if line.startswith(NEGATIVE):
            negative, line = True, line.removeprefix(NEGATIVE).strip()
        if line or texts[negative]:  # skip empty lines at the beginning
            texts[negative].append(line)
    given = {name: value for name, value in fields.items() if value}  # A1111 skips those without a value
    return Infotext("\n".join(texts[False]), "\n".join(texts[True]), given)


def check_settings(text: str) -> None:
    """Check that a text from which `parse` read no fields has no line of settings.

    Raises:
        RequestError: If it has one, in another form than A1111's.
    """
    line = next((line.strip() for line in text.split("\n") if re.match(r"\s*Steps: *\d", line)), None)
    if line is not None:
        raise RequestError(
            f"the picture's text has the settings {line[:60]!r}, which cannot be read; they must be its last line, at "
            "least three values separated by commas, as in 'Steps: 20, Sampler: Euler a, Seed: 7'"
        )


def _fields(line: str) -> Iterator[tuple[str, str]]:
    """Yield the fields of a last line. A value may be a JSON list or object (Civitai's hashes and resources)."""
    at = 0
    while (colon := line.find(":", at)) >= 0:
        tail = NAME.match(line[at:colon][::-1])  # searched backwards, to stay linear
        name = tail[0][::-1].lstrip(" -/") if tail else ""
        at = colon + 1
        if len(name) < 2:
            continue
        while line[at : at + 1].isspace():
            at += 1
        quoted = QUOTED.match(line, at)
        if quoted and line[quoted.end() : quoted.end() + 1] in ("", ","):
            value, at = quoted[0], quoted.end()
            with suppress(ValueError):  # keep quotes that are not valid JSON
                value = str(json.loads(value))
        elif line[at : at + 1] in ("{", "[") and (end := _json_end(line, at)):
            value, at = line[at:end], end
        else:
            end = line.find(",", at)
            end = len(line) if end < 0 else end
            value, at = line[at:end], end
        at += 1
        yield name, value


def _json_end(line: str, at: int) -> int | None:
    try:
        return json.JSONDecoder().raw_decode(line, at)[1]
    except (ValueError, RecursionError):
        return None


# Fields of A1111 with a counterpart in Request: its name, and the conversion of the value.
_PLAIN: dict[str, tuple[str, Callable[[str], Any]]] = {
    "Steps": ("steps", int),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Clip skip": ("clip_skip", lambda text: max(int(text) - 1, 0)),
    "CFG rescale": ("guidance_rescale", float),
    "Emphasis": (
        "emphasis",
        lambda text: {"original": "original", "no norm": "no_norm", "ignore": "ignore", "none": "ignore"}[text.lower()],
    ),
    "Refiner": ("refiner", lambda text: None if text == "None" else re.sub(r" \[[0-9a-f]{8,64}\]$", "", text)),
    "Refiner switch at": ("refiner_at", float),
    "Mask blur": ("mask_blur", float),
    "Hires upscale": ("hires", float),
    "Hires steps": ("hires_steps", lambda text: int(text) or None),  # 0: as many as the first pass
    "Variation seed": ("variation_seed", int),
    "Variation seed strength": ("variation_strength", float),
    "Masked content": (
        "masked_content",
        lambda text: {"original": "original", "fill": "fill", "latent noise": "noise"}[text.lower()],
    ),
    "Masked area padding": ("only_masked", int),
    "Discard penultimate sigma": ("discard_penultimate_sigma", lambda text: {"True": True, "False": None}[text]),
    "Tiling": ("seamless", lambda text: {"True": "xy", "False": None}[text]),
    "RNG": ("noise", lambda text: {"GPU": "philox", "NV": "philox", "CPU": "seeded"}[text]),
}
# fields that do not change the picture or are handled separately: no note
NOT_LOADED = "networks named in a prompt of another program are not loaded"
_SILENT = {
    "Denoising strength", "Hires upscaler", "Hires resize", "Seed resize from", "First pass size", "Inpaint area",
    "Sampler", "Schedule type", "Size", "Eta", "Model", "Model hash", "Version", "Batch size", "Batch pos", "User",
    "Eta DDIM", "Civitai resources", "Civitai metadata", "Created Date", "Hashes", "TI",
}  # fmt: skip


def to_request(text: Infotext) -> tuple[Request, list[str]]:
    """Convert a text to a Request.

    Missing fields have A1111's defaults, such as the GPU's noise (philox) and Clip skip 1.

    Returns:
        The request, and a note for each setting that is not supported.

    Raises:
        RequestError: If a supported field has an invalid value.
    """
    fields, notes = dict(text.fields), []
    found: dict[str, Any] = {"noise": "seeded" if text.ours else "philox"}
    for name, (ours, read) in _PLAIN.items():
        if name in fields:
            try:
                found[ours] = read(fields[name])
            except (ValueError, KeyError):
                raise RequestError(
                    f"the picture's text has {name}: {fields[name][:60]!r}, which cannot be read"
                ) from None
    if not found.get("refiner"):
        found.pop("refiner_at", None)
    if size := _size(fields.get("Size")):
        found["width"], found["height"] = (side - side % 8 for side in size)  # rounded down, as in A1111
    if found.get("seed", 0) < 0:
        del found["seed"]
        notes.append("Seed: a negative seed means a random one")
    found["sampler"] = _sampler(fields, notes)
    found |= _passes(fields, found, notes)
    if resized := _size(fields.get("Seed resize from")):
        found["seed_size"] = resized if min(resized) > 0 else None
    if fields.get("Inpaint area", "").lower() != "only masked":
        found.pop("only_masked", None)
    eta = _number(fields, "Eta" if "Eta" in fields else "Eta DDIM")
    if eta is not None and not 0.0 <= eta <= 1.0:
        notes.append(f"Eta: {eta:g} is ignored; only 0 to 1 is supported")
    elif eta is not None:
        found["eta"] = eta
    for name, value in fields.items():
        if name not in _PLAIN and name not in _SILENT:
            notes.append(f"{name}: {value[:100]}")
    for network in re.findall(r"<(?:lora|hypernet|lyco):[^>]{1,200}>", text.prompt):
        notes.append(f"{network}: {NOT_LOADED}")
    prompt = text.prompt
    negative = text.negative_prompt
    if not text.ours and re.search(r"\bv?1\.[0-5]\.", fields.get("Version", "")) and "[" in prompt:
        notes.append("prompt editing counts steps as in version 1.6 and later")
    return Request(prompt=prompt, negative_prompt=negative, prompt_syntax="a1111", **found), notes


def _size(text: str | None) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text or "")
    return (int(found[1]), int(found[2])) if found else None


def _passes(fields: Mapping[str, str], found: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the fields of hires fix, in A1111's three spellings, or of image-to-image."""
    size, more = (found.get("width", 512), found.get("height", 512)), dict[str, Any]()
    if 0 in size:
        return more  # which Request rejects
    first = _size(fields.get("First pass size"))  # up to version 1.0, where Size is the final size
    target = size if first else _size(fields.get("Hires resize"))
    if first and 0 in first:  # about 512 x 512, in multiples of 64
        share = (512 * 512 / (size[0] * size[1])) ** 0.5
        first = tuple(math.ceil(share * side / 64) * 64 for side in size)
    if first:
        more["width"], more["height"] = first
        size = first
    if target and 0 not in target:
        factors = [end / side for end, side in zip(target, size, strict=True)]
        if factors[0] == factors[1]:
            more["hires"] = factors[0]
        else:
            notes.append(
                f"Hires resize: {target[0]}x{target[1]}: ignored, since its aspect ratio is not that of the first pass"
            )
    second = more.get("hires", found.get("hires"))
    if second == 1.0:
        notes.append("Hires upscale: 1: ignored; the second pass would have the same size")
        more["hires"] = second = None
    strength = _number(fields, "Denoising strength")
    if second:
        upscaler = fields.get("Hires upscaler", "Latent")
        more |= {"hires_strength": strength, "hires_upscale": "latent" if "Latent" in upscaler else "pixels"}
        if upscaler not in ("Latent", "Lanczos"):
            notes.append(f"Hires upscaler: {upscaler[:100]}: replaced by hires_upscale {more['hires_upscale']}")
    else:
        more |= {"hires_steps": None, "strength": strength}
    return more


def _number(fields: Mapping[str, str], name: str) -> float | None:
    try:
        return None if name not in fields else float(fields[name])
    except ValueError:
        raise RequestError(f"the picture's text has {name}: {fields[name][:60]!r}, which cannot be read") from None


def _sampler(fields: Mapping[str, str], notes: list[str]) -> str | None:
    """Return our name for Sampler and Schedule type; in older texts the schedule is part of the sampler's name."""
    name, schedule = fields.get("Sampler"), fields.get("Schedule type", "Automatic")
    if name is None:
        notes.append("Sampler is missing; the model's default is used")
        return None
    base = _SPELLINGS.find(name.casefold())
    if base is None:
        notes.append(f"Sampler: {name[:100]} is unknown; the model's default is used")
        return None
    if schedule.lower() == "automatic":
        return base
    full = _SPELLINGS.find(f"{base} {schedule}".casefold())
    if full is None and base not in A1111_WITHOUT_SCHEDULE:
        notes.append(f"Schedule type: {schedule[:100]} is unknown for {base}; the sampler's default is used")
    return full or base
