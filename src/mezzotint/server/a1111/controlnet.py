"""The extension sd-webui-controlnet, also built into Forge: the units of a body, and its routes.

Of its preprocessors, only canny is supported; edges are detected at the picture's own size. A unit whose module begins
with "ip-adapter" is an IP-Adapter; its encoder is determined by its file, not by the module.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from mezzotint.request import brief
from mezzotint.server.a1111.route import Route
from mezzotint.server.api import Core
from mezzotint.server.bodies import JSONResponse, body_schema
from mezzotint.server.dialects import LooseBody, decode_picture, read_body, validate
from mezzotint.server.entries import HIGH, LOW, edges
from mezzotint.server.errors import InvalidError

router = APIRouter(prefix="/controlnet", route_class=Route, tags=["AUTOMATIC1111"])
NAME = "controlnet"  # of the script
UNITS = 16
MODULES = ("none", "canny")
IP_ADAPTER = "ip-adapter"  # how its modules begin
IP_MODULES = (
    "ip-adapter-auto",
    "ip-adapter_clip_h",
    "ip-adapter_clip_g",
    "ip-adapter_clip_sd15",
    "ip-adapter_clip_sdxl",
    "ip-adapter_clip_sdxl_plus_vith",
)
CONTROL_MODES = {
    "Balanced": "balanced",
    "My prompt is more important": "prompt",
    "ControlNet is more important": "control",
}
RESIZE_MODES = {"Just Resize": "resize", "Crop and Resize": "crop", "Resize and Fill": "fill"}
OLD_RESIZE_MODES = {"Scale to Fit (Inner Fit)": "crop", "Envelope (Outer Fit)": "fill"}
# the extension's types, and what the name of a model for one contains
TYPES = {
    "Canny": "canny",
    "Depth": "depth",
    "NormalMap": "normal",
    "OpenPose": "openpose",
    "MLSD": "mlsd",
    "Lineart": "lineart",
    "SoftEdge": "softedge",
    "Scribble": "scribble",
    "Segmentation": "seg",
    "Shuffle": "shuffle",
    "Tile": "tile",
    "Inpaint": "inpaint",
    "IP-Adapter": IP_ADAPTER,
}
# keys of a unit that ask for something that is not supported, unless their value is one of these
IDLE: dict[str, tuple[Any, ...]] = {
    "mask": ("",),
    "mask_image": ("",),
    "advanced_weighting": ([],),
    "ipadapter_input": ([],),
    "batch_images": ("", []),
    "loopback": (False,),
    "hr_option": ("Both", "HiResFixOption.BOTH"),
    "union_control_type": ("Unknown", "ControlNetUnionControlType.UNKNOWN"),
}
_SLIDERS = [
    {"name": "Resolution", "value": 512, "min": 64, "max": 2048},
    {"name": "Canny Low Threshold", "value": LOW, "min": 1, "max": 255},
    {"name": "Canny High Threshold", "value": HIGH, "min": 1, "max": 255},
]


class Unit(LooseBody):
    """A ControlNet of a body."""

    model_config = ConfigDict(extra="allow")

    enabled: bool = True
    module: str = "none"
    model: str = "None"
    weight: float = 1.0
    image: Any = None
    input_image: Any = None
    resize_mode: int | str = "Crop and Resize"
    control_mode: int | str = "Balanced"
    guessmode: bool = False
    threshold_a: float = -1.0
    threshold_b: float = -1.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    effective_region_mask: Any = None


class DetectBody(LooseBody):
    """Pictures to preprocess."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"controlnet_module": "canny", "controlnet_input_images": ["iVBORw0KGgo="]}],
        }
    )

    controlnet_module: str = "none"
    controlnet_input_images: list[str] = Field(default=[], max_length=100)
    controlnet_threshold_a: float = -1.0
    controlnet_threshold_b: float = -1.0


def units(scripts: Any, notes: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the entries of a request's `control` and `ip_adapter` that a body's alwayson_scripts ask for.

    Args:
        scripts: The value of alwayson_scripts.
        notes: Receives a phrase for each key that is not supported and asks for something.

    Raises:
        InvalidError: If a unit is wrong, or needs a preprocessor that is not there.
    """
    script = (
        next((value for name, value in scripts.items() if is_ours(name)), None) if isinstance(scripts, dict) else None
    )
    if script is None:
        return {}
    given = script.get("args") if isinstance(script, dict) else script
    if not isinstance(given, list) or len(given) > UNITS:
        raise InvalidError(
            f"{NAME}.args is {brief(given)}; it must be a list of at most {UNITS} units", "alwayson_scripts"
        )
    found: dict[str, list[dict[str, Any]]] = {}
    for k, value in enumerate(given):
        place = f"{NAME}.args[{k}]"
        if not isinstance(value, dict):
            raise InvalidError(f"{place} is {brief(value)}; it must be an object", "alwayson_scripts")
        unit = validate(Unit, value)
        if unit.enabled:
            name, entry = _entry(unit, place, notes)
            found.setdefault(name, []).append(entry)
    return found


def is_ours(script: str) -> bool:
    """Return whether a script's name is the extension's, in any case."""
    return script.lower() == NAME


def with_pictures(entries: Mapping[str, list[dict[str, Any]]], image: bytes | None) -> dict[str, list[dict[str, Any]]]:
    """Return entries whose missing pictures are the one that the run starts from, as in the extension.

    A ControlNet for inpainting takes that picture by itself, with the masked part marked.
    """
    start = {"image": image} if image is not None else {}
    return {
        name: [one if name == "control" and "inpaint" in one["file"].lower() else start | one for one in found]
        for name, found in entries.items()
    }


def _entry(unit: Unit, place: str, notes: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the field that a unit becomes an entry of, and the entry."""
    module = _module(unit.module, place)
    if unit.model in ("", "None"):
        raise InvalidError(
            f"{place}.model is missing; it must be a name from /controlnet/model_list", "alwayson_scripts"
        )
    extra = unit.model_extra or {}
    notes += [
        f"{place}.{name}" for name, idle in IDLE.items() if extra.get(name) is not None and extra[name] not in idle
    ]
    picture = unit.image if unit.image is not None else unit.input_image
    if isinstance(picture, list):
        picture = picture[0] if picture else None
    if isinstance(picture, Mapping):
        if picture.get("mask"):
            notes.append(f"{place}.image.mask")
        picture = picture.get("image")
    entry: dict[str, Any] = {
        "file": re.sub(r" \[[0-9a-f]{8}\]$", "", unit.model),
        "scale": unit.weight,
        "start": unit.guidance_start,
        "end": unit.guidance_end,
    }
    if picture:
        entry["image"] = _decode(picture, f"{place}.image")
    if module in IP_MODULES:
        if unit.effective_region_mask:
            entry["mask"] = _decode(unit.effective_region_mask, f"{place}.effective_region_mask")
        return "ip_adapter", entry
    if unit.effective_region_mask:
        notes.append(f"{place}.effective_region_mask")
    entry |= {
        "mode": "guess" if unit.guessmode else _choice(unit.control_mode, CONTROL_MODES, f"{place}.control_mode"),
        "resize_mode": _choice(unit.resize_mode, RESIZE_MODES | OLD_RESIZE_MODES, f"{place}.resize_mode"),
    }
    if module == "canny":
        entry |= {"preprocessor": "canny", "low": _level(unit.threshold_a, LOW), "high": _level(unit.threshold_b, HIGH)}
    return "control", entry


def _decode(picture: Any, place: str) -> bytes:
    if not isinstance(picture, str):
        raise InvalidError(f"{place} is {brief(picture)}; it must be a picture in base64", "alwayson_scripts")
    return decode_picture(picture, place)


def _module(name: str, place: str) -> str:
    """Return the name of a preprocessor. Raises InvalidError if there is no such one here."""
    module = name.lower()
    if module.startswith(IP_ADAPTER) and module not in IP_MODULES:
        sentence = f"it must be one of {', '.join(IP_MODULES)}: adapters of faces need insightface"
    elif module not in (*MODULES, *IP_MODULES):
        sentence = (
            "it must be none or canny, or an IP-Adapter's: others need networks, so send the picture that one has "
            "made, with none"
        )
    else:
        return module
    raise InvalidError(f"{place}.module is {name[:60]!r}; {sentence}", "alwayson_scripts")


def _choice(value: int | str, names: Mapping[str, str], place: str) -> str:
    """Return our name of a choice that is given by its place or its name there."""
    if isinstance(value, int):
        value = [*names][value] if 0 <= value < 3 else str(value)
    found = names.get(value) or next((ours for ours in names.values() if ours == value.lower()), None)
    if found is None:
        raise InvalidError(f"{place} is {brief(value)}; it must be {', '.join([*names][:3])}", "alwayson_scripts")
    return found


def _level(value: float, usual: float) -> float:
    """Return a threshold; -1 is the usual one."""
    return usual if value < 0 else value


# ---- what there is ---------------------------------------------------------------------------------------------------


@router.get("/version")
def version() -> JSONResponse:
    """Return the version of the API."""
    return JSONResponse({"version": 3})


@router.get("/settings")
def settings() -> JSONResponse:
    """Return how many units a body may have."""
    return JSONResponse({"control_net_unit_count": UNITS})


@router.get("/model_list")
def model_list(core: Core) -> JSONResponse:
    """List the ControlNets and IP-Adapters."""
    return JSONResponse({"model_list": _names(core)})


@router.get("/module_list")
def module_list(core: Core) -> JSONResponse:
    """List the preprocessors and their sliders; the resolution has no effect."""
    modules = _modules(core)
    detail = {name: {"model_free": False, "sliders": _SLIDERS if name == "canny" else []} for name in modules}
    return JSONResponse({"module_list": modules, "module_detail": detail})


@router.get("/control_types")
def control_types(core: Core) -> JSONResponse:
    """List the kinds of control, each with its preprocessors and models."""
    names = _names(core)
    adapters = sorted(core.models.names("ip_adapters"))
    found = {"All": _control_type(_modules(core), names) | {"default_option": "none", "default_model": "None"}}
    for kind, word in TYPES.items():
        modules = {"Canny": [*MODULES], "IP-Adapter": ["none", *IP_MODULES]}.get(kind, ["none"])
        models = [name for name in names if word in name.lower() and name not in adapters]
        found[kind] = _control_type(modules, adapters if kind == "IP-Adapter" else models)
    return JSONResponse({"control_types": found})


def _modules(core: Core) -> list[str]:
    return [*MODULES, *(IP_MODULES if core.settings.ip_adapters else ())]


def _names(core: Core) -> list[str]:
    """Return the names of ControlNets and IP-Adapters, which may be in one folder."""
    adapters = core.models.names("ip_adapters")
    controls = core.models.names("controls")
    return sorted({*controls, *adapters})


def _control_type(modules: list[str], models: list[str]) -> dict[str, Any]:
    chosen = models[0] if models else "None"
    return {
        "module_list": modules,
        "model_list": ["None", *models],
        "default_option": modules[min(1, len(modules) - 1)],
        "default_model": chosen,
    }


@router.post("/detect", openapi_extra=body_schema(DetectBody))
async def detect(request: Request, core: Core) -> JSONResponse:
    """Return the edges of pictures."""
    body = await read_body(request, DetectBody)
    images = await run_in_threadpool(lambda: [*_detect(body, core.settings.limits.batch_pixels)])
    return JSONResponse({"images": images, "info": "Success"})


def _detect(body: DetectBody, most: int) -> Iterator[str]:
    name = "controlnet_input_images"
    if body.controlnet_module.lower() not in MODULES:
        raise InvalidError(
            f"controlnet_module is {body.controlnet_module[:60]!r}; it must be none or canny", "controlnet_module"
        )
    if not body.controlnet_input_images:
        raise InvalidError(f"{name} is empty; it must have a picture in base64", name)
    low, high = _level(body.controlnet_threshold_a, LOW), _level(body.controlnet_threshold_b, HIGH)
    for text in body.controlnet_input_images:
        data = decode_picture(text, name)
        made = edges(data, low, high, name, most) if body.controlnet_module.lower() == "canny" else data
        yield base64.b64encode(made).decode()
