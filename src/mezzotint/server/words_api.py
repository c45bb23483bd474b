"""Our API, continued: names, the fields of a request, the tokens of words, plans, the records of files, the login."""

from __future__ import annotations

import hmac
import re
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from mezzotint.errors import BudgetError, CheckpointError, MezzotintError, RequestError
from mezzotint.placement import format_size
from mezzotint.prompt import lint
from mezzotint.records.infotext import NOT_LOADED
from mezzotint.request import Request as Drawing
from mezzotint.samplers import SPACINGS, TABLE
from mezzotint.server.api import Core, facts
from mezzotint.server.bodies import JSONResponse, body_schema, error_reply, read_json, read_upload, upload_schema
from mezzotint.server.errors import InvalidError
from mezzotint.server.middleware import COOKIE, cookie_value
from mezzotint.server.schema import JobBody, describe_fields
from mezzotint.server.service import Service

router = APIRouter(prefix="/api", tags=["words"])
WAIT = 0.5  # seconds that a wrong token takes to be refused
MONTH = 30 * 24 * 3600


class Words(BaseModel):
    """A prompt, and how to parse it."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"prompt": "a (lemon:1.3)"}]})

    prompt: str = Field(max_length=32_000)
    model: str | None = Field(default=None, max_length=4096)
    syntax: Literal["a1111", "comfy", "compel", "plain"] | None = None
    negative: bool = False
    steps: int | None = Field(default=None, ge=1, le=150)
    seed: int | None = Field(default=None, ge=0, lt=2**64, description="draws the choices of the comfy syntax")


class Planned(BaseModel):
    """A request to plan the memory for."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"request": {"prompt": "", "width": 512, "height": 512}}]}
    )

    request: JobBody  # type: ignore[valid-type]
    model: str | None = Field(default=None, max_length=4096)
    vae: str | None = Field(default=None, max_length=4096)


class Login(BaseModel):
    """The token, to be exchanged for a cookie."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"token": "a token of the server"}]})

    token: str = Field(max_length=1000)


@router.get("/models")
def models(core: Core) -> JSONResponse:
    """List the models and VAEs."""
    return JSONResponse({"models": core.models.describe(), "vaes": sorted(core.models.names("vaes")), **facts(core)})


@router.get("/samplers")
def samplers() -> JSONResponse:
    """List the samplers, with what they are, and the spacings."""
    return JSONResponse({"samplers": [row._asdict() for row in TABLE], "spacings": [*SPACINGS]})


@router.get("/loras")
def loras(core: Core) -> JSONResponse:
    """List the LoRAs."""
    return JSONResponse({"loras": sorted(core.models.names("loras"))})


@router.get("/embeddings")
def embeddings(core: Core) -> JSONResponse:
    """List the textual inversions."""
    return JSONResponse({"embeddings": sorted(core.models.names("embeddings"))})


@router.get("/controls")
def controls(core: Core) -> JSONResponse:
    """List the ControlNets and T2I-Adapters."""
    return JSONResponse({"controls": sorted(core.models.names("controls"))})


@router.get("/ip_adapters")
def ip_adapters(core: Core) -> JSONResponse:
    """List the IP-Adapters."""
    return JSONResponse({"ip_adapters": sorted(core.models.names("ip_adapters"))})


@router.get("/encoders")
def encoders(core: Core) -> JSONResponse:
    """List the image encoders of IP-Adapters."""
    return JSONResponse({"encoders": sorted(core.models.names("encoders"))})


@router.get("/image_embeds")
def image_embeds(core: Core) -> JSONResponse:
    """List the saved embeddings of pictures, for IP-Adapters."""
    return JSONResponse({"image_embeds": sorted(core.models.names("image_embeds"))})


@router.get("/wildcards")
def wildcards(core: Core) -> JSONResponse:
    """List the wildcards of prompts in the comfy syntax."""
    return JSONResponse({"wildcards": sorted(core.models.names("wildcards"))})


@router.get("/schema")
def schema() -> JSONResponse:
    """Describe the fields of a request, for a form."""
    return JSONResponse({"fields": describe_fields()})


@router.post("/tokens", openapi_extra=body_schema(Words))
async def tokens(request: Request, core: Core) -> JSONResponse:
    """Return how a prompt is parsed: tokens, weights and chunks, unknown words, and likely mistakes."""
    body = await read_json(request, Words)
    return JSONResponse(await run_in_threadpool(_tokens, core, body))


def _tokens(core: Service, body: Words) -> dict[str, Any]:
    from mezzotint.run.resolve import STEPS, expand_choices
    from mezzotint.run.tokens import describe_tokens
    from mezzotint.weights.embeddings import Library

    tokenizers, widths, settings = _tokenizers(core.models.paths[core.find_model(body.model)])
    syntax = body.syntax or "a1111"
    steps = body.steps or min(int(settings.get("steps", STEPS)), 150)
    try:
        folder = core.settings.wildcards if syntax == "comfy" else None
        wildcards = str(folder) if folder else None
        asked = Drawing(prompt=body.prompt, prompt_syntax=body.syntax, seed=body.seed, wildcards=wildcards)
        asked = expand_choices(asked)
        listed = core.models.names("embeddings")
        library = Library([str(listed[name]) for name in core.models.embeddings_in(asked.prompt)], widths)
        found = describe_tokens(asked, tokenizers, library, steps, negative=body.negative)
    except (CheckpointError, RequestError) as error:
        raise InvalidError(core.translator.message(error), "prompt") from None
    remarks = lint(body.prompt, syntax, negative=body.negative, embeddings=library)
    words = dict.fromkeys(re.findall(r"[^\W\d_]{3,}", body.prompt))
    triggers = {name.lower() for name in library}
    unknown = [  # what is spelled letter by letter
        word for word in words if word.lower() not in triggers and len(tokenizers[0].encode(word)) >= len(word)
    ]
    drawn = asked.prompt if asked.prompt != body.prompt else None
    entries = [{"start": one.start, "end": one.end, "message": one.sentence} for one in remarks]
    return {**found, "choice": drawn, "lint": entries, "unknown": unknown}


@lru_cache(maxsize=8)
def _tokenizers(model: str | None) -> Any:
    from mezzotint.weights.checkpoint import read_tokenizers
    from mezzotint.weights.hub import BUNDLED

    return read_tokenizers(model or BUNDLED)


@router.post("/plan", openapi_extra=body_schema(Planned))
async def plan(request: Request, core: Core) -> Response:
    """Predict the memory of a request, and the placement with which it fits the budget."""
    body = await read_json(request, Planned)
    given: BaseModel = body.request
    return await run_in_threadpool(_plan, core, given.model_dump(exclude_unset=True), body.model, body.vae)


def _plan(core: Service, fields: dict[str, Any], model: str | None, vae: str | None) -> Response:
    name = core.find_model(model)
    stored = core.translator.store(fields, name)
    try:
        made = core.models.plan(name, vae, core.translator.request(stored))
    except BudgetError as error:
        return JSONResponse({"fits": False, "sentence": str(error)})
    except MezzotintError as error:
        raise InvalidError(core.translator.message(error)) from None
    sentence = f"needs {format_size(made.estimate.peak)} of {format_size(made.limit)}"
    if made.costs:
        sentence += f", with measures that take {made.slowdown:+.0%} time"
    return JSONResponse({"fits": True, "sentence": sentence, **made.to_dict()})


@router.post("/info", openapi_extra=upload_schema())
async def info(request: Request, core: Core) -> JSONResponse:
    """Read the settings in a picture's file: ours, AUTOMATIC1111's, ComfyUI's or InvokeAI's."""
    data = await read_upload(request)
    return JSONResponse(await run_in_threadpool(_info, core, data))


def _info(core: Service, data: bytes) -> dict[str, Any]:
    from mezzotint.again import describe_file

    with tempfile.NamedTemporaryFile(dir=core.settings.data, prefix=".mezzotint-", suffix=".part") as file:
        file.write(data)
        file.flush()
        try:
            found = describe_file(Path(file.name))
        except RequestError as error:
            sentence = core.translator.message(error).replace(f"'{Path(file.name).name}'", "the file")
            raise InvalidError(sentence.removeprefix("the file: ")) from None
    remarks = [_remark(core, remark) for remark in found["not_supported"]]
    return found | {"not_supported": [remark for remark in remarks if remark]}


def _remark(core: Service, remark: str) -> str:
    """Return a remark on what is not supported; "" on a LoRA that a job of this server loads."""
    tag, _, rest = remark.partition(": ")
    if rest != NOT_LOADED or not tag.startswith("<lora:"):
        return remark
    listed = tag[1:-1].split(":")[1] in core.models.names("loras")
    return "" if listed else f"{tag}: the server lists no such LoRA"


@router.post("/login", openapi_extra=body_schema(Login), tags=["login"])
async def login(request: Request, core: Core) -> Response:
    """Exchange the token for a cookie, for the page, whose pictures and events cannot send a header."""
    body = await read_json(request, Login)
    token = core.settings.token
    if token is not None and not hmac.compare_digest(body.token.encode("utf-8", "replace"), token.encode()):
        await run_in_threadpool(time.sleep, WAIT)
        return error_reply("the token is wrong", 401, type="authentication_error", code="invalid_api_key")
    reply = Response(status_code=204)
    if token is not None:
        secure = request.url.scheme == "https"
        value = cookie_value(token)
        reply.set_cookie(COOKIE, value, max_age=MONTH, httponly=True, samesite="strict", secure=secure)
    return reply
