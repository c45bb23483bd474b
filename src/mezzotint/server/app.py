"""The application: the routes of all APIs, behind one middleware, and the process that serves them."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from mezzotint import __version__
from mezzotint.errors import MezzotintError, WriteError
from mezzotint.memory import system
from mezzotint.request import brief
from mezzotint.server import a1111, api, health, history_api, openai, words_api
from mezzotint.server.bodies import error_reply, reply_to
from mezzotint.server.errors import ServerError
from mezzotint.server.middleware import Guard
from mezzotint.server.openapi import describe
from mezzotint.server.sentences import demand
from mezzotint.server.service import Service
from mezzotint.server.settings import Settings
from mezzotint.server.static import add_page

log = logging.getLogger("mezzotint.server")
MAX_HEAD = 64 * 1024  # bytes of a request's line and headers
ROUTERS = [health.router, *a1111.routers, openai.router]
ROUTERS_WITH_STATE = [api.router, history_api.router, words_api.router]
# what a stateless server does not have: another replica may get the next request
ABSENT = ("/metrics", "/v1/images/files/{token}", *(f"/sdapi/v1/{name}" for name in ("progress", "interrupt", "skip")))


def create_app(settings: Settings, service: Service | None = None) -> FastAPI:
    """Create the application. Its worker starts and stops with the application's lifespan.

    Args:
        settings: The settings of the server.
        service: The service, or None to make one of the settings.

    Raises:
        MezzotintError: If the data folder or a model's name cannot be used.
    """
    core = service or Service(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        core.start()
        try:
            yield
        finally:
            await run_in_threadpool(core.stop)

    app = FastAPI(title="mezzotint", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = core
    app.state.absent = ABSENT if settings.stateless else ()
    for path in app.state.absent:
        app.router.routes.append(Route(path, _absent))  # before the one that would answer
    for router in ROUTERS if settings.stateless else (*ROUTERS_WITH_STATE, *ROUTERS):  # tried in this order
        app.include_router(router)
    if not settings.stateless:
        add_page(app)
    app.add_exception_handler(ServerError, _on_server_error)
    app.add_exception_handler(MezzotintError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    app.add_middleware(Guard, settings=settings)
    return app


async def _absent(request: Request) -> Response:
    return error_reply("a server without state has no such route", 404, code="not_found")


def _on_server_error(request: Request, error: Any) -> Response:
    return reply_to(error)


def _on_error(request: Request, error: Any) -> Response:
    core: Service = request.app.state.service
    if isinstance(error, WriteError):
        return error_reply(
            "the disk of the data folder is full or broken", 503, type="server_error", code="unavailable"
        )
    return error_reply(core.translator.message(error), 422, code="invalid_value")


def _on_invalid(request: Request, error: Any) -> Response:
    finding = error.errors()[0]
    place = [str(part) for part in finding["loc"]]
    missing = place[:1] == ["path"]  # an id of another form: the same answer as for one that is not there
    if missing:
        return error_reply("the server has no such route", 404, code="not_found")
    sentence = f"{'.'.join(place[1:])} is {brief(finding.get('input'))}; {demand(finding)}"
    return error_reply(sentence, 422, code="invalid_value", param=place[-1])


def _on_http_error(request: Request, error: Any) -> Response:
    codes = {404: "not_found", 405: "method_not_allowed"}
    return error_reply(
        str(error.detail),
        error.status_code,
        code=codes.get(error.status_code, "invalid_request"),
        headers=error.headers,
    )


def _on_bug(request: Request, error: Any) -> Response:
    return error_reply(
        f"this is a bug in mezzotint ({type(error).__name__})", 500, type="server_error", code="internal"
    )


class _Server(uvicorn.Server):
    """uvicorn's server, which on SIGTERM refuses new work and keeps answering until the running picture is finished."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self._draining = service, False

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop after the running picture; at a second signal after the current step."""
        if self._draining:
            self._service.hurry()
            super().handle_exit(sig, frame)
        else:
            self._draining = True
            threading.Thread(target=self._drain, daemon=True).start()  # a handler must not wait for a lock

    def _drain(self) -> None:
        self._service.drain()
        self.should_exit = True


def serve(settings: Settings, on_ready: Callable[[str], None] = lambda url: None) -> None:
    """Listen until SIGTERM or Ctrl-C.

    Args:
        settings: The settings of the server.
        on_ready: Called with the URL when the server listens.

    Raises:
        MezzotintError: If the data folder or the address cannot be used.
    """
    system.keep_freed()
    service = Service(settings)
    listener = _listen(settings)
    app = create_app(settings, service)
    port = listener.getsockname()[1]
    host = "localhost" if settings.host == "localhost" else settings.host
    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        app,
        http="h11",  # httptools has no limit for headers, and loses the body of a request with Upgrade: h2c
        h11_max_incomplete_event_size=MAX_HEAD,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
        timeout_keep_alive=30,
        lifespan="on",
    )
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    on_ready(f"http://{shown}:{port}/")
    _Server(config, service).run(sockets=[listener])
    if service.working:
        sys.stderr.flush()
        os._exit(0)  # a thread inside torch would abort the process when the interpreter shuts down


def _listen(settings: Settings) -> socket.socket:
    """Return a listening socket. Raises WriteError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise WriteError(
            f"the server cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; choose another "
            "--port"
        ) from None
    return listener
