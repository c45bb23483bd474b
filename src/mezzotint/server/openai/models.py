"""The list of models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from mezzotint.server.api import Core
from mezzotint.server.bodies import JSONResponse
from mezzotint.server.errors import NotFoundError
from mezzotint.server.service import Service

router = APIRouter()


class ModelNotFoundError(NotFoundError):
    """There is no such model."""

    code = "model_not_found"


@router.get("/models")
def models(core: Core) -> JSONResponse:
    """List the models."""
    return JSONResponse({"object": "list", "data": [_describe(core, name) for name in core.models.paths]})


@router.get("/models/{model:path}")
def model(core: Core, model: str) -> JSONResponse:
    """Describe a model."""
    name = next((known for known in core.models.paths if known.lower() == model.lower()), None)
    if name is None:
        raise ModelNotFoundError(f"the model {model[:100]!r} does not exist; GET /v1/models lists those that do")
    return JSONResponse(_describe(core, name))


def _describe(core: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(core.started), "owned_by": "mezzotint"}
