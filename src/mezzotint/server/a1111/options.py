"""The options: the model and the settings of later requests that do not give their own.

Clients read all options and post them back, so unknown ones are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from mezzotint.server.a1111.route import Route
from mezzotint.server.api import Core
from mezzotint.server.bodies import JSONResponse, body_schema
from mezzotint.server.dialects import LooseBody, read_body, validate
from mezzotint.server.errors import ConflictError, InvalidError
from mezzotint.server.models import Models
from mezzotint.server.service import Service

router = APIRouter(route_class=Route)
STORED = "a1111"  # the store's name of what clients have set
OWN_VAE = ("", "Automatic", "None")


class Options(LooseBody):
    """The options that are supported, with that program's defaults."""

    sd_vae: str = "Automatic"
    CLIP_stop_at_last_layers: Annotated[int, Field(ge=1, le=12)] = 1
    randn_source: Literal["GPU", "CPU", "NV"] = "GPU"
    emphasis: Literal["None", "Ignore", "Original", "No norm"] = "Original"
    eta_ddim: Annotated[float, Field(ge=0, le=1)] = 0.0
    eta_ancestral: Annotated[float, Field(ge=0, le=1)] = 1.0
    img2img_fix_steps: bool = False
    always_discard_next_to_last_sigma: bool = False


# what a reply to GET shows besides: clients look for some of these keys
FIXED = {"sd_checkpoint_hash": "", "samples_format": "png", "return_grid": False, "sd_backend": "original"}


def in_force(core: Service, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the options in force, with a request's changes; "sd_model_checkpoint" and "sd_vae" are listed names.

    Raises:
        InvalidError: If a change has a wrong value, or names what is not listed.
    """
    stored = core.store.option(STORED) or {}
    given = {name: value for name, value in (changes or {}).items() if value is not None}
    found = validate(Options, {**stored, **given}).model_dump()
    if found["sd_vae"] in OWN_VAE:
        found["sd_vae"] = None
    elif "sd_vae" in given:
        core.models.find("vaes", found["sd_vae"], "sd_vae")
    model = given.get("sd_model_checkpoint")
    found["sd_model_checkpoint"] = find_model(core.models, model) if model else core.default_model
    return found


def ignored(changes: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each option of a request that is not supported."""
    known = {*Options.model_fields, *FIXED, "sd_model_checkpoint"}
    return [f"override_settings: {str(name)[:100]}" for name in list(changes)[:100] if name not in known]


def find_refiner(models: Models, title: str, model: str) -> str | None:
    """Return the listed name of a refiner's title; None if there is none, or it is the model itself.

    Raises:
        InvalidError: If it is not listed.
    """
    if title in ("", "None", "none"):
        return None
    name = find_model(models, title, "refiner_checkpoint")
    return None if name == model else name


def find_model(models: Models, title: Any, param: str = "sd_model_checkpoint") -> str:
    """Return the listed name of a model's title, which may end in a hash and a suffix: "lemon.safetensors [0123abcd]".

    Raises:
        InvalidError: If it is not listed.
    """
    bare = re.sub(r" \[[0-9a-f]{6,64}\]$", "", str(title))
    names = {name.lower(): name for name in models.paths}
    for text in (str(title), bare, re.sub(r"\.(safetensors|ckpt)$", "", bare)):
        if text.lower() in names:
            return names[text.lower()]
    raise InvalidError(
        f"{param} is {str(title)[:100]!r}, which the server does not list; it has {', '.join([*models.paths][:50])}",
        param,
    )


@router.get("/options")
def get_options(core: Core) -> JSONResponse:
    """Return the options."""
    stored = validate(Options, core.store.option(STORED) or {}).model_dump()
    notice = {"mezzotint_notice": core.notice} if core.notice else {}
    return JSONResponse({"sd_model_checkpoint": core.default_model, **FIXED, **stored, **notice})


class Changes(LooseBody):
    """Options by name; unknown ones are ignored."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [{"CLIP_stop_at_last_layers": 2}]})


@router.post("/options", openapi_extra=body_schema(Changes))
async def set_options(request: Request, core: Core) -> JSONResponse:
    """Set options for later requests; queued jobs keep theirs."""
    body = await read_body(request, Changes)
    await run_in_threadpool(_set, core, body.model_extra or {})
    return JSONResponse(None)


def _set(core: Service, changes: Mapping[str, Any]) -> None:
    model = in_force(core, changes)["sd_model_checkpoint"]  # which checks all of them before one is set
    known = {name: value for name, value in changes.items() if name in Options.model_fields and value is not None}
    old = core.store.option(STORED) or {}
    new = validate(Options, {**old, **known}).model_dump(exclude_defaults=True)
    if core.settings.stateless and (new != old or model != core.default_model):
        raise ConflictError("this server keeps no options; each request may have its own, as override_settings")
    if new != old:
        core.store.set_option(STORED, new)
    if model != core.default_model:
        core.store.set_option("model", model)
