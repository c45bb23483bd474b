"""Generations and edits: whole replies, streams of partial images, and links to pictures.

If the reader of a stream disconnects, the job is cancelled.
"""

from __future__ import annotations

import base64
import io
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from anyio import CancelScope
from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.responses import Response, StreamingResponse

from mezzotint.errors import MezzotintError, RequestError, WriteError
from mezzotint.server.api import Core
from mezzotint.server.bodies import JSONResponse, UnsupportedError, body_schema, error_reply, open_form
from mezzotint.server.dialects import failure, media_type, read_body, validate
from mezzotint.server.errors import InvalidError, NotFoundError, ServerError, UnavailableError
from mezzotint.server.events import BEAT, Subscription
from mezzotint.server.openai.body import Edit, Generation, edit_fields, find_model, rename
from mezzotint.server.service import Service
from mezzotint.server.store import CANCELLED, FAILED, QUEUED, RUNNING, Job, Picture

LINKED = 3600.0  # seconds for which a link serves its picture
MAX_LINKS = 10_000  # the oldest are dropped
FILES = "/v1/images/files/"
IMAGES = ("image", "image[]")  # the names of the form's field
WAITING = (QUEUED, RUNNING)

_FILE = {"type": "string", "format": "binary"}
_FIELDS = {"image": _FILE, "mask": _FILE, "prompt": {"type": "string"}, "size": {"type": "string"}}
_SCHEMA = {"type": "object", "properties": _FIELDS, "required": ["image", "prompt"]}
FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _SCHEMA}}}}


class Route(APIRoute):
    """A route whose errors have that API's status: 400 where a field is wrong."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, with its errors turned into replies."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except WriteError:
                raise  # the application says that the disk is full
            except MezzotintError as error:
                status = error.status if isinstance(error, ServerError) else 400
                retry = error.retry_after if isinstance(error, ServerError) else None
                headers = {"Retry-After": str(retry)} if retry else None
                facts = _describe_error(request.app.state.service, error)
                return error_reply(**facts, status=400 if status == 422 else status, headers=headers)

        return answer


router = APIRouter(route_class=Route)


@dataclass(frozen=True)
class Link:
    """What a link serves, and until when."""

    picture: str
    format: str
    compression: int
    until: float


@router.post("/images/generations", openapi_extra=body_schema(Generation))
async def generate(request: Request, core: Core) -> Response:
    """Generate pictures from a prompt."""
    body = await read_body(request, Generation)
    return await _answer(request, core, body, body.fields(), "image_generation")


@router.post("/images/edits", openapi_extra=FORM)
async def edit(request: Request, core: Core) -> Response:
    """Repaint a picture, or the part of it where the mask is transparent."""
    if media_type(request) != "multipart/form-data":
        raise UnsupportedError("the body must be a form, with the Content-Type multipart/form-data")
    async with open_form(request, files=20, fields=100) as form:
        files = [value for name, value in form.multi_items() if name in IMAGES and isinstance(value, UploadFile)]
        if len(files) != 1:
            raise InvalidError(f"image is {len(files)} files; it must be one picture", "image")
        image, given = await files[0].read(), form.get("mask")
        mask = await given.read() if isinstance(given, UploadFile) else None
        body = validate(Edit, {name: value for name, value in form.items() if isinstance(value, str)})
    fields = await run_in_threadpool(edit_fields, body, image, mask, core.settings.limits)
    return await _answer(request, core, body, fields, "image_edit")


async def _answer(request: Request, core: Service, body: Generation, fields: dict[str, Any], kind: str) -> Response:
    if core.settings.stateless and body.response_format == "url":
        sentence = "response_format is 'url', but this server keeps no pictures; it must be b64_json"
        raise InvalidError(sentence, "response_format")
    if body.stream:
        return await _stream(core, body, fields, kind)
    job = await run_in_threadpool(_submit, core, body, fields)
    try:
        [job] = await core.wait([job.id])
        if job.state in (FAILED, CANCELLED):
            raise failure(job)
        data = [await run_in_threadpool(_describe_picture, request, core, body, picture) for picture in job.pictures]
    finally:
        core.forget([job.id])
    return JSONResponse({"created": int(time.time()), "data": data, "model": job.model, **_facts(body, job)})


def _submit(core: Service, body: Generation, fields: Mapping[str, Any]) -> Job:
    try:
        return core.submit([fields], model=find_model(core, body.model), dialect="openai")[0]
    except InvalidError as error:
        raise rename(error) from None


def _facts(body: Generation, job: Job) -> dict[str, Any]:
    """Return the facts about the pictures that a reply and each event contain."""
    first = job.pictures[0] if job.pictures else None
    size = f"{first.width}x{first.height}" if first else body.size
    return {"size": size, "quality": "auto", "background": "opaque", "output_format": body.output_format}


def _describe_picture(request: Request, core: Service, body: Generation, picture: Picture) -> dict[str, str]:
    if not body.links or core.settings.stateless:
        data = _encode(core, picture.id, body.output_format, body.output_compression)
        return {"b64_json": base64.b64encode(data).decode()}
    links, token = _links(request), secrets.token_hex(16)
    links[token] = Link(picture.id, body.output_format, body.output_compression, time.monotonic() + LINKED)
    while len(links) > MAX_LINKS:
        links.pop(next(iter(links)))
    return {"url": f"{str(request.base_url).rstrip('/')}{FILES}{token}"}


def _encode(core: Service, id: str, format: str, compression: int) -> bytes:
    """Return a picture with its record: the file as it is, or a JPEG or WebP file of that quality."""
    path = core.folder.file("pictures", id)
    if format == "png":
        return path.read_bytes()
    from mezzotint.images.io import Picture as Recorded
    from mezzotint.images.io import open_file

    file = io.BytesIO()
    with open_file(path) as image:
        Recorded.from_image(image).save(file, format.upper(), quality=compression)
    return file.getvalue()


def _describe_error(core: Service, error: MezzotintError) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "message": core.translator.message(error),
        "type": "invalid_request_error",
        "code": "invalid_value",
    }
    if isinstance(error, ServerError):
        facts |= {"type": error.type, "code": error.code, "param": error.param}
    return facts


# ---- streams ---------------------------------------------------------------------------------------------------------


async def _stream(core: Service, body: Generation, fields: dict[str, Any], kind: str) -> Response:
    job_id = ""
    events = core.events.subscribe(wanted=lambda event: job_id in ("", event.job), beat=BEAT)
    try:  # subscribed before, it misses nothing of the job
        job = await run_in_threadpool(_submit, core, body, fields)
    except BaseException:
        await events.aclose()
        raise
    job_id = job.id
    stream = _follow(core, body, job, kind, events)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream, media_type="text/event-stream", headers=headers)


async def _follow(
    core: Service,
    body: Generation,
    job: Job,
    kind: str,
    events: Subscription,
) -> AsyncIterator[bytes]:
    """Yield partial images while a job runs, and then its pictures."""
    sent, due = 0, False
    try:
        async for event in events:
            if event is None:
                yield b": beat\n\n"
                if (await run_in_threadpool(core.store.get, job.id)).ended:
                    break
            elif event.job != job.id:
                continue
            elif event.name == "step":
                facts = event.read()
                due = facts["step"] >= _partial_step(sent, body.partial_images, facts["steps"])
            elif event.name == "preview" and due and sent < body.partial_images:
                facts = _facts(body, job) | {"output_format": "jpeg", "partial_image_index": sent}
                preview = await run_in_threadpool(event.read)
                yield _event(f"{kind}.partial_image", preview["jpeg"], facts)
                sent, due = sent + 1, False
            elif event.name == "job" and event.read()["state"] not in WAITING:
                break
        else:  # the reader was slow, and gets no more partial images; or the server stops
            with suppress(UnavailableError):
                await core.wait([job.id])
    finally:
        with CancelScope(shield=True):  # whose reader goes away is cancelled at each await
            await events.aclose()
            job = await run_in_threadpool(core.store.get, job.id)
            if not job.ended and not core.stopping:
                await run_in_threadpool(core.cancel, job.id)
    try:
        if job.pictures and job.state not in (FAILED, CANCELLED):
            for picture in job.pictures:
                data = await run_in_threadpool(_encode, core, picture.id, body.output_format, body.output_compression)
                usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}  # nothing is billed
                usage_of = usage | {"input_tokens_details": {"text_tokens": 0, "image_tokens": 0}}
                yield _event(
                    f"{kind}.completed", base64.b64encode(data).decode(), _facts(body, job) | {"usage": usage_of}
                )
        else:
            error = {"param": None, **_describe_error(core, failure(job))}
            yield f"event: error\ndata: {json.dumps({'type': 'error', 'error': error})}\n\n".encode()
    finally:
        core.forget([job.id])


def _partial_step(index: int, count: int, steps: int) -> int:
    """Return the step after which a partial image is due: `count` of them divide the steps evenly."""
    return math.ceil(steps * (index + 1) / (count + 1))


def _event(name: str, picture: str, facts: Mapping[str, Any]) -> bytes:
    data = {"type": name, "b64_json": picture, "created_at": int(time.time()), **facts}
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


# ---- links -----------------------------------------------------------------------------------------------------------


def _links(request: Request) -> dict[str, Link]:
    """Return the links of this application by token, the oldest first."""
    state = request.app.state
    if not hasattr(state, "links"):
        state.links = {}
    found: dict[str, Link] = state.links
    for token in [token for token, link in list(found.items()) if link.until < time.monotonic()]:
        found.pop(token, None)
    return found


@router.get("/images/files/{token}")
def linked_file(request: Request, core: Core, token: str) -> Response:
    """Return the picture of a link. Who has the link needs no token: it is 128 random bits, and ends in an hour."""
    link = _links(request).get(token)
    if link is None:
        raise NotFoundError("this link is wrong or has ended")
    core.history.get(link.picture)  # which has not been deleted
    try:
        data = _encode(core, link.picture, link.format, link.compression)
    except (OSError, RequestError):
        raise NotFoundError("this picture has been deleted") from None
    return Response(data, media_type=f"image/{link.format}", headers={"Cache-Control": "private, max-age=3600"})
