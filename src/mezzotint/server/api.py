"""Our API: jobs, the queue and events. The other routes are in history_api.py and words_api.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from mezzotint.server.bodies import JSONResponse, body_schema, read_json
from mezzotint.server.errors import InvalidError, UnavailableError
from mezzotint.server.events import BEAT, PAUSE, Event, encode_all
from mezzotint.server.schema import JobBody
from mezzotint.server.service import Service

router = APIRouter(prefix="/api", tags=["jobs"])
Id = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
State = Literal["queued", "running", "done", "failed", "cancelled"]
EXAMPLE: dict[str, Any] = {"request": {"prompt": "a lemon on a blue background", "seed": 7, "steps": 20}}
CONTROLLED: dict[str, Any] = {
    "request": {
        "prompt": "a house",
        "control": [{"file": "canny", "image": "iVBORw0KGgo=", "preprocessor": "canny", "scale": 0.8, "end": 0.6}],
    }
}


class Submission(BaseModel):
    """One request or several, each of which becomes a job."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE, CONTROLLED]})

    request: JobBody | None = None  # type: ignore[valid-type]
    requests: list[JobBody] | None = Field(default=None, min_length=1, max_length=100)  # type: ignore[valid-type]
    model: str | None = Field(default=None, max_length=4096, description="a name from /api/models")
    vae: str | None = Field(default=None, max_length=4096, description="a name from /api/models")
    priority: Literal["interactive", "bulk"] = "interactive"


class Move(BaseModel):
    """The place of a job: before another one, or first or last."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"before": "first"}]})

    before: str = Field(pattern="^([0-9a-f]{32}|first|last)$")


async def service(request: Request) -> Service:  # FastAPI would call a plain function in a thread
    """Return the service of the app."""
    found: Service = request.app.state.service
    return found


Core = Annotated[Service, Depends(service)]


@router.post("/jobs", status_code=202, openapi_extra=body_schema(Submission))
async def submit(request: Request, core: Core) -> JSONResponse:
    """Queue one or several requests, all or none. They are on the disk before the reply is sent."""
    body = await read_json(request, Submission)
    if (body.request is None) == (body.requests is None):
        raise InvalidError("either request or requests must be given", "request")
    given: list[BaseModel] = [body.request] if body.request is not None else body.requests or []
    fields = [one.model_dump(exclude_unset=True) for one in given]
    jobs = await run_in_threadpool(
        core.submit, fields, model=body.model, vae=body.vae, priority=body.priority, dialect="api"
    )
    return JSONResponse({"jobs": [job.to_dict() for job in jobs]}, 202)


@router.get("/jobs")
def jobs(
    core: Core,
    state: State | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[float | None, Query(ge=0, allow_inf_nan=False)] = None,
) -> JSONResponse:
    """List jobs: queued ones in the order in which they will run, others newest first."""
    return JSONResponse({"jobs": [job.to_dict() for job in core.store.jobs(state, limit=limit, before=before)]})


@router.get("/jobs/{id}")
def job(core: Core, id: Id) -> JSONResponse:
    """Return a job."""
    return JSONResponse(core.store.get(id).to_dict())


@router.delete("/jobs/{id}")
def cancel(core: Core, id: Id) -> JSONResponse:
    """Cancel a queued job immediately, or a running one after its current step. A finished job does not change."""
    return JSONResponse(core.cancel(id).to_dict())


@router.post("/jobs/{id}/move", openapi_extra=body_schema(Move))
async def move(request: Request, core: Core, id: Id) -> JSONResponse:
    """Move a queued job."""
    body = await read_json(request, Move)
    await run_in_threadpool(core.move, id, body.before)
    return JSONResponse(await run_in_threadpool(core.queue))


@router.get("/queue")
def queue(core: Core) -> JSONResponse:
    """Return the state of the queue: the order of the queued jobs, and the running ones."""
    return JSONResponse(core.queue())


@router.post("/queue/pause")
def pause(core: Core) -> JSONResponse:
    """Pause the queue after the running job."""
    core.pause(True)
    return JSONResponse(core.queue())


@router.post("/queue/resume")
def resume(core: Core) -> JSONResponse:
    """Resume the queue."""
    core.pause(False)
    return JSONResponse(core.queue())


@router.get("/events", response_class=StreamingResponse)
async def events(core: Core, last_event_id: Annotated[str, Header()] = "") -> StreamingResponse:
    """Stream server-sent events: queue, job, step, preview and picture."""
    if len(core.events) >= core.settings.limits.streams:
        raise UnavailableError(f"{core.settings.limits.streams} streams of events are open already", retry_after=10)

    async def stream() -> AsyncIterator[bytes]:
        async with aclosing(core.events.subscribe(last_event_id, beat=BEAT, pause=PAUSE)) as found:
            yield await run_in_threadpool(Event("queue", core.queue).encode)
            async for event in found:
                if event is None:
                    yield b": beat\n\n"
                    continue
                events = [event, *found.take()]
                if any(callable(each.data) for each in events):
                    yield await run_in_threadpool(encode_all, events)
                else:  # a thread costs more than to encode what is there
                    yield encode_all(events)

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream(), media_type="text/event-stream", headers=headers)


def facts(core: Service) -> dict[str, Any]:
    """Return facts about the server, for the page."""
    from mezzotint import __version__

    limits = vars(core.settings.limits)
    return {"version": __version__, "model": core.default_model, "notice": core.notice, "limits": limits}
