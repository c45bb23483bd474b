"""Our API, continued: the history, its files, and uploads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from mezzotint.server.api import Core, Id
from mezzotint.server.bodies import JSONResponse, body_schema, read_json, read_upload, upload_schema
from mezzotint.server.entries import HIGH, LOW, edges
from mezzotint.server.errors import NotFoundError
from mezzotint.server.worker import make_thumbnail

router = APIRouter(prefix="/api", tags=["history"])
UploadId = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Tag = Annotated[str, Field(min_length=1, max_length=100)]
MAX_AGE = "private, max-age=31536000, immutable"  # the content of an id never changes
AT_ONCE = 2**20  # bytes of a file that is read whole
PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}}}


class Change(BaseModel):
    """The rating and the tags of a picture; what is left out stays."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"rating": 5, "tags": ["lemons"]}]})

    rating: int | None = Field(default=None, ge=0, le=5)
    tags: list[Tag] | None = Field(default=None, max_length=50)


@router.get("/pictures")
def pictures(
    core: Core,
    search: Annotated[str | None, Query(max_length=1000)] = None,
    rating: Annotated[int | None, Query(ge=0, le=5)] = None,
    tag: Annotated[str | None, Query(max_length=100)] = None,
    before: Id | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> JSONResponse:
    """List pictures, the newest first: those whose prompt has all words of `search`, and at least this rating."""
    found = core.history.search(search, rating=rating, tag=tag, before=before, limit=limit)
    return JSONResponse({"pictures": [picture.to_dict() for picture in found]})


@router.get("/pictures/{id}")
def picture(core: Core, id: Id) -> JSONResponse:
    """Return a picture's facts, and whether its word maps are recorded."""
    found = core.history.get(id).to_dict()
    return JSONResponse({**found, "maps": core.folder.file("maps", id).is_file()})


@router.patch("/pictures/{id}", openapi_extra=body_schema(Change))
async def change(request: Request, core: Core, id: Id) -> JSONResponse:
    """Rate or tag a picture."""
    body = await read_json(request, Change)
    changed = await run_in_threadpool(core.history.change, id, rating=body.rating, tags=body.tags)
    core.events.publish("picture", changed.to_dict(), changed.job)
    return JSONResponse(changed.to_dict())


@router.delete("/pictures/{id}")
def delete(core: Core, id: Id) -> JSONResponse:
    """Delete a picture; it can be restored for an hour."""
    core.history.delete(id)
    deleted = core.history.get(id, deleted=True).to_dict()
    core.events.publish("picture", deleted, deleted["job"])
    return JSONResponse(deleted)


@router.post("/pictures/{id}/restore")
def restore(core: Core, id: Id) -> JSONResponse:
    """Restore a deleted picture."""
    restored = core.history.restore(id).to_dict()
    core.events.publish("picture", restored, restored["job"])
    return JSONResponse(restored)


@router.get("/pictures/{id}/file", response_class=FileResponse, responses=PNG)
def file(request: Request, core: Core, id: Id, if_none_match: Annotated[str, Header()] = "") -> Response:
    """Return the PNG file, with its record."""
    found = core.history.get(id, deleted=True)
    return _file(request, core.folder.file("pictures", id), "image/png", f'"{found.sha256}"', if_none_match)


@router.get("/pictures/{id}/thumbnail", responses={200: {"content": {"image/webp": {}}}})
def thumbnail(core: Core, id: Id, if_none_match: Annotated[str, Header()] = "") -> Response:
    """Return a small WebP file of the picture."""
    core.history.get(id, deleted=True)
    headers = {"ETag": f'"{id}-thumbnail"', "Cache-Control": MAX_AGE}
    if headers["ETag"] in if_none_match:
        return Response(status_code=304, headers=headers)
    try:
        return Response(make_thumbnail(core.folder, id), media_type="image/webp", headers=headers)
    except OSError:
        raise NotFoundError("the file of this picture is missing") from None


@router.get("/pictures/{id}/record")
def record(core: Core, id: Id) -> JSONResponse:
    """Return what the picture's file says of how it was drawn."""
    from mezzotint.again import describe_file

    core.history.get(id, deleted=True)
    path = core.folder.file("pictures", id)
    if not path.is_file():
        raise NotFoundError("the file of this picture is missing")
    return JSONResponse(describe_file(path))


@router.get("/pictures/{id}/maps")
def maps(core: Core, id: Id) -> JSONResponse:
    """Return where the network attended to each word; POST records it first."""
    core.history.get(id)
    try:
        return JSONResponse(json.loads(core.folder.file("maps", id).read_text()))
    except FileNotFoundError:
        raise NotFoundError("the word maps of this picture are not recorded yet; POST here to record them") from None


@router.post("/pictures/{id}/maps", status_code=202)
def record_maps(core: Core, id: Id) -> JSONResponse:
    """Queue a job that draws the picture again and records its word maps."""
    return JSONResponse(core.draw_again(id, "maps").to_dict(), 202)


@router.post("/pictures/{id}/verify", status_code=202)
def verify(core: Core, id: Id) -> JSONResponse:
    """Queue a job that draws the picture again, behind other jobs, and compares the bits."""
    return JSONResponse(core.draw_again(id, "verify").to_dict(), 202)


@router.post("/uploads", openapi_extra=upload_schema())
async def upload(request: Request, core: Core) -> JSONResponse:
    """Keep a PNG, JPEG or WebP file, named by its content. The body is the file, or a form with one file."""
    data = await read_upload(request)
    return JSONResponse(await run_in_threadpool(core.history.upload, data))


@router.get("/uploads/{id}", response_class=FileResponse, responses=PNG)
def uploaded(request: Request, core: Core, id: UploadId, if_none_match: Annotated[str, Header()] = "") -> Response:
    """Return an uploaded file."""
    found: dict[str, Any] = core.history.find_upload(id)
    kind = f"image/{found['format'].lower()}"
    return _file(request, core.folder.file("uploads", id), kind, f'"{id}"', if_none_match)


@router.get("/uploads/{id}/canny", responses=PNG)
def canny(
    core: Core,
    id: UploadId,
    low: Annotated[float, Query(ge=0, le=10_000)] = LOW,
    high: Annotated[float, Query(ge=0, le=10_000)] = HIGH,
) -> Response:
    """Return the edges of an uploaded picture, as a ControlNet with the preprocessor canny gets them."""
    core.history.find_upload(id)
    data = core.folder.file("uploads", id).read_bytes()
    made = edges(data, low, high, "file", core.settings.limits.batch_pixels)
    return Response(made, media_type="image/png", headers={"Cache-Control": MAX_AGE})


def _file(request: Request, path: Path, kind: str, etag: str, if_none_match: str) -> Response:
    """Return a file of a picture, or 304 where the client has it."""
    headers = {"ETag": etag, "Cache-Control": MAX_AGE, "Content-Disposition": "inline"}
    if etag in if_none_match:
        return Response(status_code=304, headers=headers)
    try:
        status = path.stat()
        reply = FileResponse(path, media_type=kind, headers=headers, stat_result=status)
        if status.st_size > AT_ONCE or "range" in request.headers:
            return reply
        return Response(path.read_bytes(), headers=reply.headers)  # a FileResponse asks a thread for each part
    except FileNotFoundError:
        raise NotFoundError("the file of this picture is missing") from None
