"""Requests to an application without a client between: as fast as a matrix of thousands of them needs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import FastAPI

Headers = Iterable[tuple[str, str]]


class Reply:
    """A status, the headers in lower case, and the body."""

    def __init__(self) -> None:
        self.status, self.headers, self.body = 0, dict[str, str](), b""


async def call(app: FastAPI, method: str, path: str, headers: Headers, body: bytes = b"") -> Reply:
    """Send one request and return the reply."""
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": raw,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 7860),
    }
    reply, sent = Reply(), False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.sleep(3600)
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode().lower(): value.decode("latin-1") for name, value in message["headers"]}
        else:
            reply.body += message.get("body", b"")

    await app(scope, receive, send)
    return reply


def table(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Yield the method and the path of every route, with ids that are not there in the place of parameters."""
    for path, methods in app.openapi()["paths"].items():
        place = path.replace("{id}", "0" * 32).replace("{token}", "0" * 32).replace("{model}", "nosuch")
        yield from ((method.upper(), place) for method in methods)
    yield from (("GET", path) for path in ("/openapi.json", "/", "/static/main.js"))
