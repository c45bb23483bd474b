"""Errors in the form of AUTOMATIC1111's API."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.responses import Response

from mezzotint.errors import MezzotintError, WriteError
from mezzotint.request import brief
from mezzotint.server.bodies import JSONResponse
from mezzotint.server.errors import ServerError
from mezzotint.server.sentences import demand
from mezzotint.server.service import Service


class Route(APIRoute):
    """A route whose errors have that program's form: {"error", "detail", "body", "errors"}."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, with its errors turned into replies."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            core: Service = request.app.state.service
            try:
                return await handle(request)
            except ServerError as error:
                retry = {"Retry-After": str(error.retry_after)} if error.retry_after else None
                return _error(type(error).__name__, str(error), error.status, retry)
            except RequestValidationError as error:
                finding = error.errors()[0]
                sentence = f"{finding['loc'][-1]} is {brief(finding.get('input'))}; {demand(finding)}"
                return _error("InvalidError", sentence, 422)
            except WriteError:
                return _error("WriteError", "the disk of the data folder is full or broken", 503)
            except MezzotintError as error:
                return _error(type(error).__name__, core.translator.message(error), 422)

        return answer


def _error(kind: str, sentence: str, status: int, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": kind, "detail": sentence, "body": "", "errors": sentence}, status, headers=headers)
