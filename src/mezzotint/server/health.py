"""Routes for those who watch over the server: whether it lives, whether it takes work, and numbers."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from mezzotint.server.api import Core
from mezzotint.server.bodies import JSONResponse, error_reply
from mezzotint.server.metrics import render

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> JSONResponse:
    """Say that the process answers."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz")
def readyz(core: Core) -> Response:
    """Say whether new work is taken: 503 while the server stops, its disk is full or a worker has ended."""
    if core.stopping or core.waits_for_disk or not core.alive:
        reason = "the server is stopping" if core.stopping else core.waits_for_disk or "a worker has ended"
        return error_reply(reason, 503, type="server_error", code="unavailable", headers={"Retry-After": "10"})
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
def metrics(core: Core) -> Response:
    """Return numbers in Prometheus' format."""
    data, kind = render(core)
    return Response(data, media_type=kind)
