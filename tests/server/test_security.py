"""Who may ask: Host, Origin and token on every route, bodies that are too large, names that look like paths."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from starlette.responses import Response

import asgi
import mezzotint
from mezzotint.errors import RequestError
from mezzotint.server import Limits, Settings
from mezzotint.server.middleware import Guard
from mezzotint.server.settings import FOLDERS
from stub_server import submit, wait_for

TOKEN = "a-token-of-32-characters-for-test"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
HOSTS = {
    "127.0.0.1:7860": True,
    "localhost": True,
    "[::1]:7860": True,
    "Proxy.Example": True,  # --allow-host
    "evil.example": False,
    "127.0.0.1.evil.example": False,
    "proxy.example.evil": False,
    "localhost:7860:1": False,
    "192.168.0.1": False,
    "": False,
}
NAMED = "https://page.example"  # --cors
FOREIGN = ("null", "http://evil.example", "http://127.0.0.1:7860.evil.example", "https://localhost", "file://", "x")
# what is answered without the token: the page, which holds no data, and paths that are secrets themselves
OPEN = {
    *(("GET", path) for path in ("/", "/static/main.js", "/healthz", f"/v1/images/files/{'0' * 32}")),
    ("POST", "/api/login"),
}
PATHS = (
    *("../x", "%2e%2e/", "..\\x", "/etc/passwd", "C:\\x", "\\\\host\\x", "//host/x", "a\0b", "~/x", "..", "", "$(id)"),
    *(
        "file:///etc/passwd",
        "http://127.0.0.1/x",
        "x" * 5000,
        "../" * 1000,
        "\uff0e\uff0e\uff0fx",
        "\u2025\u2215x\u202e",
    ),
)


def picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PICTURE = picture()


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_route_answers_a_foreign_host_or_origin(every: bool, make_stub, monkeypatch) -> None:
    """Every host and method over every route, with every origin or one of them in turn.

    What is refused never reaches the application.
    """
    app = make_stub(allow_hosts=("proxy.example",), cors=(NAMED,)).app
    reached: list[str] = []

    async def reach(self, scope, receive, send, headers) -> None:
        reached.append(scope["path"])
        await Response("data")(scope, receive, send)

    monkeypatch.setattr(Guard, "_pass_on", reach)

    async def ask_all() -> int:
        count, paths = 0, {path for _, path in asgi.table(app)} | {"/nosuch", "/api/events"}
        assert len(paths) > 60
        for k, (path, method, host) in enumerate(product(sorted(paths), METHODS, HOSTS)):
            own = f"http://{host}" if HOSTS[host] else "http://127.0.0.1:7860"
            origins = ("", own, NAMED, *FOREIGN)
            for origin in origins if every else origins[k % len(origins) :][:1]:
                if HOSTS[host] and origin == f"https://{host}":
                    continue  # behind a proxy
                headers = [("Host", host)] + [("Origin", origin)] * bool(origin)
                reached.clear()
                reply = await asgi.call(app, method, path, headers)
                case, count = (method, path, host, origin, reply.status), count + 1
                shared = reply.headers.get("access-control-allow-origin")
                assert shared == (NAMED if origin == NAMED else None), case
                assert "access-control-allow-credentials" not in reply.headers, case
                assert reply.headers["x-content-type-options"] == "nosniff", case
                if not HOSTS[host]:
                    assert (reply.status, reached) == (421, []), case
                elif origin in FOREIGN:
                    assert (reply.status, reached) == (403, []), case
                    assert b"data" not in reply.body, case
                elif origin == NAMED and method == "OPTIONS":
                    assert (reply.status, reached) == (204, []), case
                else:
                    assert (reply.status, reached) == (200, [path]), case
        return count

    assert asyncio.run(ask_all()) > (30_000 if every else 4_000)


def test_requests_of_other_pages_without_an_origin_are_refused(stub: TestClient) -> None:
    """A browser sends no Origin for a picture or a script, but says that another page asks."""
    for path in ("/api/events", "/api/pictures", f"/api/pictures/{'0' * 32}/file", "/", "/metrics"):
        for site in ("cross-site", "same-site"):
            headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
            assert stub.get(path, headers=headers).status_code == 403
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert stub.get("/healthz", headers=followed).status_code == 200
    framed = followed | {"Sec-Fetch-Dest": "iframe"}
    assert stub.get("/", headers=framed).status_code == 403
    two = [("Host", "127.0.0.1:7860"), ("Host", "evil.example")]
    assert asyncio.run(asgi.call(stub.app, "GET", "/healthz", two)).status == 421
    assert asyncio.run(asgi.call(stub.app, "GET", "/healthz", [])).status == 421


def test_every_route_wants_the_token(make_stub) -> None:
    client = make_stub(token=TOKEN)
    host = ("Host", "127.0.0.1:7860")

    async def ask_all() -> set[tuple[str, str]]:
        answered = set()
        every = [*asgi.table(client.app)]
        assert len(every) > 65
        for method, path in every:
            for value in ("", "Bearer wrong", f"Bearer {TOKEN}x", "Basic !", f"Token {TOKEN}", "Bearer"):
                reply = await asgi.call(client.app, method, path, [host, ("Authorization", value)])
                if reply.status != 401:
                    answered.add((method, path))
        for path in (
            "/static/../api/queue",
            "/v1/images/files/../../../api/queue",
            "/healthz/../api/queue",
            "//api/queue",
        ):
            assert (await asgi.call(client.app, "GET", path, [host])).status in (401, 404), path
        return answered

    assert asyncio.run(ask_all()) == OPEN
    basic = base64.b64encode(f"anyone:{TOKEN}".encode()).decode()
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


@pytest.fixture(scope="module")
def opened() -> Iterator[list[str]]:
    """The paths that this process has opened or listed since the test began; the hook stays, as hooks do."""
    paths: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event in ("open", "os.listdir", "os.scandir", "socket.connect", "socket.getaddrinfo"):
            paths.append(f"{event} {arguments[1] if event == 'socket.connect' else arguments[0]}")

    sys.addaudithook(watch)
    yield paths
    watching = False


def bodies_with(text: str) -> Iterator[tuple[str, dict[str, object], bool]]:
    """Yield a route and a body with this text in each field of a name, and whether it has to be refused."""
    for field in (
        {"loras": [[text, 1.0]]},
        {"embeddings": [text]},
        {"image": text},
        {"mask": text},
        {"sampler": text},
        {"control": [text]},
        {"control": [{"file": text, "image": PICTURE}]},
        {"control": [{"file": "lemon", "image": text}]},
        {"regions": [{"prompt": "a", "mask": text}]},
        {"ip_adapter": [text]},
        *({"ip_adapter": [{"file": text, name: PICTURE}]} for name in ("image", "mask")),
        *({"ip_adapter": [{"file": "lemon", "image": PICTURE, name: text}]} for name in ("image", "mask", "encoder")),
        {"ip_adapter": [{"file": "lemon", "embeds": text}]},
        {"control": [{"file": "lemon", "image": PICTURE, "more": [{"image": text, "type": 1}]}]},
    ):
        yield "/api/jobs", {"request": {"prompt": "a", "seed": 1, **field}}, True
    for field in ("lora_folder", "wildcards"):
        yield "/api/jobs", {"request": {"prompt": "a", field: text}}, True
    for path, field in product(("/api/jobs", "/api/plan"), ("model", "vae")):
        yield path, {"request": {"prompt": "a", "seed": 1}, field: text}, True
    yield "/api/tokens", {"prompt": "a", "model": text}, True
    names = f"<lora:{text}:1> <hypernet:{text}:1> __{text}__ embedding:{text}"
    for syntax in ("a1111", "comfy"):
        yield "/api/jobs", {"request": {"prompt": names, "seed": 1, "prompt_syntax": syntax}}, False
        yield "/api/tokens", {"prompt": names, "syntax": syntax}, False
    small = {"prompt": "a", "width": 8, "height": 8}
    for field in ("sampler_name", "scheduler", "script_name", "refiner_checkpoint"):
        yield "/sdapi/v1/txt2img", {**small, field: text}, text != ""
    loose = ("hr_checkpoint_name", "hr_upscaler", "url", "auth", "infotext", "firstpass_image")
    loose_body = {**small, "prompt": names, "enable_hr": True, "styles": [text], **dict.fromkeys(loose, text)}
    yield "/sdapi/v1/txt2img", loose_body, False
    for field in ("sd_model_checkpoint", "sd_vae"):
        yield "/sdapi/v1/txt2img", {**small, "override_settings": {field: text}}, text != ""
        yield "/sdapi/v1/options", {field: text}, text != ""
    yield "/sdapi/v1/options", {"outdir_samples": text, text: text}, False
    yield "/sdapi/v1/img2img", {**small, "init_images": [text]}, True
    yield "/sdapi/v1/img2img", {**small, "init_images": [PICTURE], "mask": text}, text != ""
    for field in ("model", "module", "image"):
        unit = {"model": "lemon", "image": PICTURE, field: text}
        yield "/sdapi/v1/txt2img", {**small, "alwayson_scripts": {"controlnet": {"args": [unit]}}}, True
    yield "/controlnet/detect", {"controlnet_module": "canny", "controlnet_input_images": [text]}, True
    yield "/sdapi/v1/png-info", {"image": text}, True
    for field in ("image", "upscaler_1"):
        yield "/sdapi/v1/extra-single-image", {"image": PICTURE, field: text}, True
    for field in ("size", "response_format", "output_format"):
        yield "/v1/images/generations", {"prompt": "a", "size": "8x8", field: text}, True
    loose_body = {"prompt": names, "size": "8x8", **dict.fromkeys(("model", "style", "user", "quality"), text)}
    yield "/v1/images/generations", loose_body, False


def test_names_are_never_paths(make_stub, tmp_path: Path, opened: list[str]) -> None:
    folders = {name: tmp_path / name for name in FOLDERS}
    for folder in folders.values():
        folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    (tmp_path / "secret.txt").write_text("secret")
    client = make_stub(**folders, limits=Limits(queue=100_000))
    client.post("/api/tokens", json={"prompt": "a"})  # the bundled model's files are read once
    inside = (str(tmp_path / "data"), *map(str, folders.values()))
    opened.clear()
    headers = [("Host", "127.0.0.1:7860"), ("Content-Type", "application/json")]

    async def ask_all() -> int:
        asked = 0
        for text in (*PATHS, "../secret", str(tmp_path / "secret.safetensors")):
            for path, body, refused in bodies_with(text):
                reply = await asgi.call(client.app, "POST", path, headers, json.dumps(body).encode())
                assert reply.status in (range(400, 500) if refused else range(200, 500)), (
                    path,
                    str(body)[:200],
                    reply.body,
                )
                asked += 1
            for place in ("api/pictures", "api/uploads", "api/jobs", "v1/models", "v1/images/files", "static"):
                for end in ("", "/file", "/thumbnail") if place.startswith("api") else ("",):
                    reply = await asgi.call(client.app, "GET", f"/{place}/{text}{end}", headers)
                    lists = not text and not end  # the list itself
                    redirects = f"/{text}{end}".endswith("/")  # to the same without the slash
                    expected = {404, 405, *[200] * lists, *[307] * redirects}
                    assert reply.status in expected, (place, text, reply.body)
                    asked += 1
        return asked

    assert asyncio.run(ask_all()) > 900
    package = (str(Path(mezzotint.__file__).parent), sys.prefix, sys.base_prefix)
    strange = [one for one in opened if not one.split(" ", 1)[1].startswith((*inside, *package))]
    # descriptors, and what the first import of a module opens
    strange = [
        one for one in strange if not re.search(r"open \d+$|/site-packages/|\.pyc?$|/dev/|/proc/self|None$", one)
    ]
    strange = [one for one in strange if one not in {f"os.listdir {place}" for place in (*sys.path, Path.cwd())}]
    assert not strange, strange[:5]
    assert not any("secret" in one for one in opened)
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
