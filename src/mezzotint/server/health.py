"""Routes for monitoring: liveness, readiness and metrics."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from mezzotint.server.api import Core
from mezzotint.server.bodies import JSONResponse, error_reply
from mezzotint.server.metrics import render

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> JSONResponse:
    """Return 200 as long as the process answers."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz")
def readyz(core: Core) -> Response:
    """Return 200 if new jobs are accepted, or 503 while the server stops, its disk is full or a worker has died."""
    if core.stopping or core.waits_for_disk or not core.alive:
        reason = "the server is stopping" if core.stopping else core.waits_for_disk or "a worker has ended"
        return error_reply(reason, 503, type="server_error", code="unavailable", headers={"Retry-After": "10"})
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
def metrics(core: Core) -> Response:
    """Return metrics in Prometheus' format."""
    data, kind = render(core)
    return Response(data, media_type=kind)
