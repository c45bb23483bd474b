"""Requests as bytes, over a connection: what is no body has a limit."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from fastapi.testclient import TestClient

from live import listening
from mezzotint.server.app import MAX_HEAD

HOST = b"Host: 127.0.0.1\r\n"
MANY = 4 * MAX_HEAD


@pytest.fixture(scope="module")
def port(refusing: TestClient) -> Iterator[int]:
    """The port of a server."""
    with listening(refusing.app) as found:  # type: ignore[arg-type]
        yield found


def exchange(port: int, data: bytes) -> bytes:
    """Send bytes and return all that comes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        with suppress(OSError):  # it is closed before everything is sent
            for start in range(0, len(data), 8192):
                connection.sendall(data[start : start + 8192])
        reply = b""
        with suppress(ConnectionError):
            while part := connection.recv(65536):
                reply += part
        return reply


def test_headers_within_the_limit_are_read(port: int) -> None:
    line = b"X-Long: " + b"a" * (MAX_HEAD - 200) + b"\r\n"
    reply = exchange(port, b"GET /healthz HTTP/1.1\r\nConnection: close\r\n" + HOST + line + b"\r\n")
    assert reply.startswith(b"HTTP/1.1 200 ")
    assert reply.endswith(b'{"status":"ok"}')


POST = b"POST /api/uploads HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + HOST


@pytest.mark.parametrize(
    "data",
    [
        b"GET /" + b"a" * MANY,
        b"G" + b"E" * MANY,
        b"GET /healthz HTTP/1.1\r\n" + HOST + b"X: " + b"a" * MANY,
        b"GET /healthz HTTP/1.1\r\n" + HOST + b"a" * MANY,
        b"GET /healthz HTTP/1.1\r\n" + HOST + b"X: a\r\n" * (MANY // 6),
        POST + b"\r\n3\r\nabc\r\n0\r\nX: " + b"a" * MANY,
        POST + b"\r\n3\r\nabc\r\n0\r\n" + b"X: a\r\n" * (MANY // 6),
        POST + b"\r\n3;" + b"a" * MANY,
    ],
    ids=["path", "method", "value", "name", "headers", "trailer", "trailers", "extension"],
)
def test_what_never_ends_is_cut_off(port: int, data: bytes) -> None:
    reply = exchange(port, data)
    assert reply == b"" or reply.startswith(b"HTTP/1.1 400 ")  # "" where the rest made the system reset the connection


@pytest.mark.parametrize("length", [b"Content-Length: %d\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_a_body_may_be_longer(port: int, length: bytes) -> None:
    body = bytes(4 * MAX_HEAD)
    framed = body if b"%d" in length else b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    head = b"POST /api/uploads HTTP/1.1\r\nConnection: close\r\n" + HOST + length.replace(b"%d", b"%d" % len(body))
    assert b"file is not a PNG, JPEG or WebP file" in exchange(port, head + b"\r\n" + framed)


def test_two_lengths_are_refused(port: int) -> None:
    head = b"POST /api/uploads HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n"
    assert exchange(port, head + HOST + b"\r\nabcd").startswith(b"HTTP/1.1 400 ")


def test_an_offer_of_http2_is_ignored(port: int) -> None:
    head = b"POST /api/jobs HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
    head += HOST + b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head + b"{}")
        assert b"either request or requests must be given" in connection.recv(65536)
