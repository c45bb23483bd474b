"""Bodies that are wrong: a sentence in Request's style that names the field, before any work."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from mezzotint.server import Limits
from stub_server import submit, wait_for

JSON = {"Content-Type": "application/json"}
POSTS = ("/api/jobs", "/api/tokens", "/api/plan", "/api/login", "/sdapi/v1/txt2img", "/sdapi/v1/options")
POSTS += ("/sdapi/v1/img2img", "/sdapi/v1/png-info", "/v1/images/generations")
NOT_JSON = {
    b"": "not valid JSON",
    b"{": "not valid JSON",
    b'{"prompt": "a", "prompt": "b"}': "the key 'prompt' appears twice",
    b'{"request": {"prompt": "a", "steps": 1, "steps": 2}}': "the key 'steps' appears twice",
    b'{"seed": NaN}': "NaN is not a JSON number",
    b'{"seed": -Infinity}': "-Infinity is not a JSON number",
    b'{"seed": 1e999}': "1e999 is too large",
    b'{"seed": ' + b"9" * 5000 + b"}": "more than 400 digits",
    b"[" * 100_000: "nested too deeply",
    b'{"a":' * 100_000: "nested too deeply",
    b'{"prompt": "\xff"}': "not UTF-8",
    '{"prompt": "a"}'.encode("utf-16"): "not UTF-8",
    b"\xef\xbb\xbf{}": "BOM",
    b"[]": "must be an object",
    b"null": "must be an object",
    b'"text"': "must be an object",
    b"7": "must be an object",
}


def png(width: int = 32, height: int = 32) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def sentence(reply: Any) -> str:
    body = reply.json()
    return str(body["detail"] if "detail" in body else body["error"]["message"])


@pytest.mark.parametrize("path", POSTS)
def test_what_is_not_json_is_refused_with_the_reason(stub: TestClient, path: str) -> None:
    for content, reason in NOT_JSON.items():
        if not content and path.startswith(("/sdapi", "/v1")):
            continue  # an empty body is an empty object there
        reply = stub.post(path, content=content, headers=JSON)
        assert reply.status_code in (400, 422), (content[:40], reply.text)
        assert reason in sentence(reply), (content[:40], reply.text)
    assert stub.post(path, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert stub.get("/api/queue").json()["order"] == []


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("/api/jobs", {"request": {"prompt": "a", "steps": 0}}, "steps", "steps is 0; it must be a whole number"),
        ("/api/jobs", {"request": {"prompt": 3}}, "prompt", "prompt is 3; it must be "),
        ("/api/jobs", {"request": {}}, "prompt", "prompt is missing; it must be "),
        ("/api/jobs", {"request": []}, "request", "request is []; "),
        (
            "/api/jobs",
            {"requests": [{"prompt": "a"}, {"prompt": "a", "seed": "7"}]},
            "seed",
            "requests.1.seed is '7'; ",
        ),
        ("/api/jobs", {"request": {"prompt": "a", "cfg": 7}}, "cfg", "has no field 'cfg'; use guidance_scale"),
        ("/api/jobs", {"request": {"prompt": "a"}, "priorty": 1}, "priorty", "'priorty'; the nearest is priority"),
        ("/api/jobs", {"request": {"prompt": "\ud800"}}, "prompt", "prompt is '\\ud800', which is not Unicode"),
        ("/api/jobs", {"request": {"prompt": "a", "seed": 2**64}}, "seed", "seed is 18446744073709551616; it must be "),
        (
            "/api/jobs",
            {"request": {"prompt": "a", "loras": [["x", "y"]]}},
            "loras",
            "loras is [['x', 'y']]; it must be",
        ),
        ("/api/jobs", {"request": {"prompt": "a", "mask": png()[:60]}}, "mask", "mask is "),
        ("/api/jobs", {"request": {"prompt": "a", "mask": "AAAA"}}, "mask", "mask is not a PNG"),
        ("/api/tokens", {"prompt": "a", "steps": 0}, "steps", "steps is 0; it must be greater than or equal to 1"),
        ("/sdapi/v1/txt2img", {"width": 7}, "", "width is 7; it must be greater than or equal to 8"),
        ("/sdapi/v1/txt2img", {"prompt": "\ud800"}, "", ", which is not Unicode; "),
        ("/sdapi/v1/txt2img", {"steps": "many"}, "", "steps is 'many'; it must be a valid integer"),
        ("/sdapi/v1/txt2img", {"override_settings": {"emphasis": 1}}, "", "emphasis is 1; it must be 'None', "),
        ("/v1/images/generations", {"prompt": "a", "n": 11}, "n", "n is 11; it must be less than or equal to 10"),
        ("/v1/images/generations", {}, "prompt", "prompt is missing"),
    ],
)
def test_errors_are_sentences_of_requests_style(
    stub: TestClient, path: str, body: dict[str, Any], param: str, said: str
) -> None:
    reply = stub.post(path, content=json.dumps(body), headers=JSON)
    assert reply.status_code in (400, 422), reply.text
    assert said in sentence(reply)
    if param:
        assert reply.json()["error"]["param"] == param


def test_a_query_that_is_wrong_is_named(stub: TestClient) -> None:
    error = stub.get("/api/jobs?limit=0").json()["error"]
    assert (error["param"], error["message"]) == ("limit", "limit is '0'; it must be greater than or equal to 1")


def test_forms_of_any_charset_are_refused_or_read(stub: TestClient) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff+2AA-\r\n--x--\r\n'
    for charset in ("undefined", "utf-7", "idna", "punycode", "zip", "utf-16", "nosuch", "x" * 500):
        for path in ("/v1/images/edits", "/api/uploads", "/api/info"):
            kind = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
            assert 400 <= stub.post(path, content=form, headers=kind).status_code < 500, (charset, path)


def test_the_size_of_the_picture_is_limited_too(make_stub) -> None:
    """The limits hold where width and height are left out: then the picture's size, or the model's, is drawn."""
    stub = make_stub(limits=Limits(pixels=128 * 128, batch_pixels=2 * 128 * 128))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image": png(136, 128)}, "width"),
        ({"image": png(128, 128), "hires": 2.0}, "width"),
        ({"image": png(128, 128), "outpaint": [8, 0, 0, 0]}, "width"),
        ({"image": png(128, 128), "width": 136}, "width"),
        ({"image": png(128, 128), "batch": 3, "count": 3}, "batch"),
        ({"image": png(256, 256), "mask": png(256, 256), "only_masked": 4, "width": 64, "height": 64}, "image"),
        ({"hires": 8.0}, "width"),
        ({"count": 100, "batch": 100}, "batch"),
    ]
    for fields, param in cases:
        reply = stub.post("/api/jobs", json={"request": {"prompt": "a", **fields}})
        assert (reply.status_code, reply.json()["error"]["param"]) == (422, param), (fields, reply.text)
    assert "the image's size" in sentence(stub.post("/api/jobs", json={"request": {"prompt": "a", **cases[0][0]}}))
    big = {"init_images": [png(72, 64)], "prompt": "a", "width": 64, "height": 64, "n_iter": 51, "batch_size": 2}
    assert "n_iter" in sentence(stub.post("/sdapi/v1/img2img", json=big))
    assert stub.get("/api/jobs").json()["jobs"] == []
    assert wait_for(stub, submit(stub, prompt="a", image=png(128, 128)))["state"] == "done"


def test_a_chosen_model_that_is_gone_is_replaced_with_a_notice(stub: TestClient) -> None:
    stub.app.state.service.store.set_option("model", "gone")
    job = wait_for(stub, submit(stub, prompt="a", seed=1))
    assert (job["state"], job["model"]) == ("done", "emoji")
    said = "the chosen model 'gone' is not listed any more; emoji is used in its place"
    assert stub.get("/api/models").json()["notice"] == said
    options = stub.get("/sdapi/v1/options").json()
    assert (options["sd_model_checkpoint"], options["mezzotint_notice"]) == ("emoji", said)
    small = {"prompt": "a", "width": 64, "height": 64}
    assert stub.post("/sdapi/v1/txt2img", json=small).status_code == 200
    assert stub.post("/v1/images/generations", json={"prompt": "a", "size": "64x64"}).json()["model"] == "emoji"
    assert stub.post("/api/tokens", json={"prompt": "a"}).status_code == 200
    assert stub.post("/sdapi/v1/options", json=options).status_code == 200  # as Open WebUI posts it back
    stub.app.state.service.store.set_option("model", "emoji")
    assert "mezzotint_notice" not in stub.get("/sdapi/v1/options").json()


def test_keys_that_mean_nothing_are_named_without_their_values(stub: TestClient) -> None:
    body = {"prompt": "a", "width": 64, "height": 64, "auth": "user:secret", "clip_skip": 2, "save_images": True}
    info = stub.post("/sdapi/v1/txt2img", json=body | {"image_cfg_scale": 3, "s_churn": 10**300}).json()["info"]
    assert json.loads(info)["unknown"] == ["auth", "clip_skip"]
    assert [note[:15] for note in json.loads(info)["unsupported"]] == ["s_churn: 100000", "image_cfg_scale"]
    assert "secret" not in info


def test_uploads_name_their_own_field(stub: TestClient, tmp_path: Path) -> None:
    assert stub.post("/api/uploads", content=b"GIF89a").json()["error"]["param"] == "file"
    assert not any((tmp_path / "data" / "uploads").iterdir())
