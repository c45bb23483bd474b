"""Who may ask: Host, Origin and token on every route, bodies that are too large, names that look like paths."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from mezzotint.errors import RequestError
from mezzotint.server import Limits, Settings
from stub_server import submit, wait_for

TOKEN = "a-token-of-32-characters-for-test"
HOSTS = {
    "127.0.0.1:7860": True,
    "localhost": True,
    "[::1]:7860": True,
    "evil.example": False,
    "127.0.0.1.evil.example": False,
    "localhost:7860:1": False,
    "192.168.0.1": False,
    "": False,
}
FOREIGN = ("null", "http://evil.example", "http://127.0.0.1:7860.evil.example", "https://localhost", "file://", "x")
PATHS = (
    "../../etc/passwd",
    "%2e%2e%2f",
    "..\\..\\x",
    "/etc/passwd",
    "C:\\x",
    "\\\\host\\x",
    "a\0b",
    "~/x",
    "./x",
    "..",
)


def routes(client: TestClient) -> list[tuple[str, str]]:
    found = []
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        found += [(method.upper(), path.replace("{id}", "0" * 32)) for method in methods]
    return [*found, ("GET", "/openapi.json"), ("GET", "/"), ("GET", "/static/main.js"), ("GET", "/nosuch")]


def test_no_route_answers_a_foreign_host_or_origin(stub: TestClient) -> None:
    every = routes(stub)
    assert len(every) > 30
    assert all(isinstance(route, APIRoute) or route for route in stub.app.routes)
    for method, path in every:
        for host, known in HOSTS.items():
            if not known:
                reply = stub.request(method, path, headers={"Host": host})
                assert reply.status_code == 421, (method, path, host)
        for origin in FOREIGN:
            reply = stub.request(method, path, headers={"Origin": origin})
            assert reply.status_code == 403, (method, path, origin)
            assert "access-control-allow-origin" not in reply.headers
            assert reply.headers["x-content-type-options"] == "nosniff"
    for host, known in HOSTS.items():
        assert (stub.get("/healthz", headers={"Host": host}).status_code == 200) == known, host
    assert stub.get("/healthz", headers={"Origin": "http://127.0.0.1:7860"}).status_code == 200
    assert stub.get("/api/queue").json()["order"] == []


def test_every_route_wants_the_token(make_stub) -> None:
    client = make_stub(token=TOKEN)
    basic = base64.b64encode(f"anyone:{TOKEN}".encode()).decode()
    document = client.get("/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"})
    for path, methods in document.json()["paths"].items():
        if path in ("/healthz", "/api/login") or path.startswith("/v1/images/files/"):  # whose path is the secret
            continue
        for method in methods:
            for value in ("", "Bearer wrong", f"Bearer {TOKEN}x", "Basic !", f"Token {TOKEN}"):
                reply = client.request(method, path.replace("{id}", "0" * 32), headers={"Authorization": value})
                assert reply.status_code == 401, (method, path, value)
    for value in (f"Bearer {TOKEN}", f"Basic {basic}"):
        assert client.get("/api/queue", headers={"Authorization": value}).status_code == 200
    assert client.get(f"/api/queue?token={TOKEN}").status_code == 401
    assert client.post("/api/login", json={"token": "wrong"}).status_code == 401
    reply = client.post("/api/login", json={"token": TOKEN})
    cookie = reply.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert TOKEN not in cookie
    assert client.get("/api/queue").status_code == 200  # the client keeps the cookie


def test_settings_of_the_address() -> None:
    with pytest.raises(RequestError, match="other machines can reach"):
        Settings(data=Path("x"), host="0.0.0.0")
    with pytest.raises(RequestError, match="at least 16"):
        Settings(data=Path("x"), token="short")
    assert TOKEN not in repr(Settings(data=Path("x"), host="0.0.0.0", token=TOKEN))


def test_bodies_are_counted(make_stub) -> None:
    client = make_stub(limits=Limits(body=1000))
    for path in ("/api/jobs", "/api/uploads", "/api/info"):
        assert client.post(path, content=b"x" * 1001).status_code == 413
        chunks = (b"x" * 100 for _ in range(20))  # without a Content-Length
        assert client.post(path, content=chunks, headers={"Content-Type": "application/json"}).status_code == 413
        assert client.post(path, headers={"Content-Length": "9" * 30}).status_code in (400, 413)


def test_names_are_never_paths(make_stub, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("loras", "embeddings", "vaes", "wildcards")}
    for folder in folders.values():
        folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    client = make_stub(**folders)
    for text in (*PATHS, "../secret", str(tmp_path / "secret.safetensors"), "../secret.safetensors"):
        for fields in ({"loras": [[text, 1.0]]}, {"embeddings": [text]}, {"image": text}, {"mask": text}):
            reply = client.post("/api/jobs", json={"request": {"prompt": "a", **fields}})
            assert reply.status_code == 422, (text, fields)
        for field in ("model", "vae"):
            reply = client.post("/api/jobs", json={"request": {"prompt": "a"}, field: text})
            assert reply.status_code == 422, (text, field)
        for folder in ("pictures", "uploads", "jobs"):
            quoted = text.replace("%", "%25").replace("\0", "%00").replace("/", "%2f")
            for end in ("", "/file", "/thumbnail"):
                assert client.get(f"/api/{folder}/{quoted}{end}").status_code in (404, 405), (folder, text)
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


def test_a_full_queue_is_refused(make_stub) -> None:
    client = make_stub(limits=Limits(queue=3))
    client.post("/api/queue/pause")
    for _ in range(3):
        submit(client, prompt="a")
    reply = client.post("/api/jobs", json={"request": {"prompt": "a"}})
    assert reply.status_code == 429
    assert int(reply.headers["retry-after"]) > 0
    client.post("/api/queue/resume")
    assert wait_for(client, client.get("/api/jobs").json()["jobs"][0]["id"])["state"] == "done"
