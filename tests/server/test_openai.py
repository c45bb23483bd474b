"""OpenAI's dialect, by its own SDK."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image

import mezzotint
from live import listening
from mezzotint.images.io import read_metadata
from mezzotint.records.record import pixels_digest
from mezzotint.request import Request
from mezzotint.server import Settings, create_app
from mezzotint.server.openai import images

PROMPT = "a lemon on a blue background"
TOKEN = "0123456789abcdef-token"
EXTRA = {"seed": 7, "steps": 3}


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path) -> Iterator[int]:
    data = tmp_path_factory.mktemp("openai") / "data"
    with listening(create_app(Settings(data=data, models=(str(sd1_folder),), devices=("cpu",), token=TOKEN))) as port:
        yield port


@pytest.fixture(scope="module")
def client(port: int) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN, max_retries=0) as client:
        yield client


def decode(text: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text or "")))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def source(size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.radial_gradient("L").resize(size).convert("RGB")


def with_hole() -> Image.Image:
    """A picture that is transparent in a rectangle."""
    image = source().convert("RGBA")
    image.paste((0, 0, 0, 0), (8, 8, 24, 32))
    return image


# ---- the SDK ---------------------------------------------------------------------------------------------------------


def test_the_sdk_draws_the_bits_of_generate(client: openai.OpenAI, sd1: mezzotint.Pipeline) -> None:
    reply = client.images.generate(
        model="gpt-image-1", prompt=PROMPT, n=2, size="auto", quality="low", extra_body=EXTRA
    )
    expected = sd1.generate(Request(prompt=PROMPT, seed=7, steps=3, count=2)).images
    assert [pixels_digest(decode(one.b64_json)) for one in reply.data or []] == [pixels_digest(one) for one in expected]
    assert reply.size == "32x32" and reply.background == "opaque" and reply.output_format == "png"
    assert reply.model_extra == {"model": "tiny"}


def test_other_servers_names_of_fields_are_known(client: openai.OpenAI, sd1: mezzotint.Pipeline) -> None:
    extra = {"num_inference_steps": 2, "seed": 4, "negative_prompt": "blurry", "guidance_scale": 2}
    reply = client.images.generate(prompt=PROMPT, model="tiny", size="40x32", extra_body=extra)
    request = Request(prompt=PROMPT, negative_prompt="blurry", seed=4, steps=2, guidance_scale=2.0, width=40, height=32)
    assert pixels_digest(decode(reply.data[0].b64_json)) == pixels_digest(sd1.generate(request).images[0])


def test_a_link_serves_its_picture_without_the_token_for_an_hour(
    client: openai.OpenAI, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = client.images.generate(model="dall-e-2", prompt=PROMPT, extra_body=EXTRA)
    url = (reply.data or [])[0].url or ""
    assert re.fullmatch(rf"http://127\.0\.0\.1:{port}/v1/images/files/[0-9a-f]{{32}}", url)
    found = httpx.get(url)
    assert found.status_code == 200 and found.headers["content-type"] == "image/png"
    assert decode(base64.b64encode(found.content).decode()).size == (32, 32)
    assert found.headers["x-content-type-options"] == "nosniff"
    assert httpx.get(url[:-1] + "x").status_code == 404
    assert httpx.get(url.replace("/files/", "/other/")).status_code == 401
    assert images.LINKED == 3600.0
    monkeypatch.setattr(images, "LINKED", -0.001)  # the hour is over
    ended = client.images.generate(model="dall-e-2", prompt=PROMPT, extra_body=EXTRA)
    assert httpx.get((ended.data or [])[0].url or "").status_code == 404


def test_formats_keep_the_record(client: openai.OpenAI) -> None:
    for format, compression in (("jpeg", 50), ("webp", 80)):
        reply = client.images.generate(
            model="gpt-image-1",
            prompt=PROMPT,
            output_format=format,
            output_compression=compression,
            extra_body=EXTRA,
        )
        data = base64.b64decode((reply.data or [])[0].b64_json or "")
        assert Image.open(io.BytesIO(data)).format == format.upper()
        assert "Seed: 7" in read_metadata(data)["parameters"]


def test_the_sdk_edits_where_the_mask_is_transparent(client: openai.OpenAI, sd1: mezzotint.Pipeline) -> None:
    hole = Image.new("L", (32, 32))
    hole.paste(255, (8, 8, 24, 32))
    request = Request(prompt=PROMPT, seed=7, steps=3, image=png(source()), mask=png(hole), resize_mode="crop")
    expected = pixels_digest(sd1.generate(request).images[0])
    given: dict[str, Any] = {"prompt": PROMPT, "model": "gpt-image-1", "extra_body": EXTRA}
    masked = client.images.edit(image=("a.png", png(source())), mask=("m.png", png(with_hole())), **given)
    assert pixels_digest(decode(masked.data[0].b64_json)) == expected
    listed = client.images.edit(image=[("a.png", png(source()))], mask=("m.png", png(with_hole())), **given)
    assert pixels_digest(decode(listed.data[0].b64_json)) == expected
    whole = client.images.edit(image=("a.png", png(source((48, 40)))), **given)  # no mask: all of it is drawn anew
    assert decode(whole.data[0].b64_json).size == (48, 40)


def test_the_sdk_streams_partial_images(client: openai.OpenAI, sd1: mezzotint.Pipeline) -> None:
    stream = client.images.generate(
        model="gpt-image-1", prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 7, "steps": 12}
    )
    events = list(stream)
    assert [event.type for event in events] == [*["image_generation.partial_image"] * 3, "image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert all(decode(event.b64_json).format == "JPEG" and event.output_format == "jpeg" for event in events[:3])
    expected = sd1.generate(Request(prompt=PROMPT, seed=7, steps=12)).images[0]
    assert pixels_digest(decode(events[3].b64_json)) == pixels_digest(expected)
    assert events[3].size == "32x32"
    given: dict[str, Any] = {"image": ("a.png", png(source())), "prompt": PROMPT, "extra_body": EXTRA}
    edits = list(client.images.edit(model="gpt-image-1", stream=True, partial_images=0, **given))
    assert [event.type for event in edits] == ["image_edit.completed"]


def test_a_stream_that_is_left_cancels_its_job(client: openai.OpenAI, port: int) -> None:
    stream = client.images.generate(
        model="gpt-image-1", prompt=PROMPT, stream=True, partial_images=1, extra_body={"steps": 100}
    )
    with stream:
        next(iter(stream))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}/api", headers={"Authorization": f"Bearer {TOKEN}"}) as api:
        for _ in range(500):
            newest = api.get("/jobs", params={"limit": 1}).json()["jobs"][0]
            if newest["state"] == "cancelled":
                return
    raise AssertionError(newest["state"])


def test_the_sdk_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "mezzotint"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("../tiny")
    assert error.value.code == "model_not_found"


def test_the_sdk_understands_errors(client: openai.OpenAI, port: int) -> None:
    with pytest.raises(openai.BadRequestError, match="size") as error:
        client.images.generate(prompt=PROMPT, size="513x512")
    assert (error.value.param, error.value.type) == ("size", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="no transparent parts") as failed:
        client.images.edit(image=("a.png", png(source())), mask=("m.png", png(source())), prompt=PROMPT)
    assert failed.value.param == "mask"
    stranger = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.images.generate(prompt=PROMPT)


# ---- hostile values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a" * 40_000}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"size": "0x0"}, "size"),
        ({"size": "99999x99999"}, "size"),
        ({"size": "8192x8192"}, "size"),
        ({"size": "large"}, "size"),
        ({"size": "٣x٣"}, "size"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": 2**63}, "n"),
        ({"seed": -1}, "seed"),
        ({"steps": 10**9}, "steps"),
        ({"guidance_scale": "nan"}, "guidance_scale"),
        ({"guidance_scale": -3}, "guidance_scale"),
        ({"background": "transparent"}, "background"),
        ({"response_format": "../x"}, "response_format"),
        ({"output_format": "svg"}, "output_format"),
        ({"output_compression": 101}, "output_compression"),
        ({"partial_images": 4}, "partial_images"),
    ],
)
def test_wrong_values_are_refused_with_a_sentence(refusing: TestClient, body: dict[str, Any], param: str) -> None:
    content = json.dumps({"prompt": "a", **body} if body else {})
    for stream in ("", ', "stream": true}'):
        text = content[:-1] + stream if stream and body else content
        reply = refusing.post("/v1/images/generations", content=text, headers={"Content-Type": "application/json"})
        error = reply.json()["error"]
        assert reply.status_code == 400, reply.text
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert param in error["message"] and error["code"]


def test_wrong_forms_are_refused_with_a_sentence(refusing: TestClient) -> None:
    good = {"image": ("../../a.png", png(source()))}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"prompt": "a"}, {"mask": ("m", b"")}, "image"),
        ({"prompt": "a"}, {"image": ("a", b"<svg></svg>")}, "image"),
        ({"prompt": "a"}, good | {"image[]": ("b", png(source()))}, "image"),
        ({"prompt": "a"}, good | {"mask": ("m", b"GIF89a")}, "mask"),
        ({"prompt": "a", "n": "x"}, good, "n"),
        ({"prompt": "a", "strength": "2"}, good, "strength"),
        ({}, good, "prompt"),
    ]
    for data, files, param in cases:
        reply = refusing.post("/v1/images/edits", data=data, files=files)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
    assert refusing.post("/v1/images/edits", json={"prompt": "a"}).status_code == 415
    broken = refusing.post(
        "/v1/images/edits", content=b"--x\r\nbad", headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert 400 <= broken.status_code < 500


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"prompt": "a", "seed": NaN}', "[" * 100_000])
def test_bodies_that_are_not_json_are_refused(refusing: TestClient, content: str) -> None:
    reply = refusing.post("/v1/images/generations", content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and reply.json()["error"]["message"]
    wrong = refusing.post("/v1/images/generations", content="{}", headers={"Content-Type": "text/plain"})
    assert wrong.status_code == 415


def test_any_name_of_a_model_draws(refusing: TestClient) -> None:
    for name in ("auto", "gpt-image-1", "../../etc/passwd", "", None):
        body = {"prompt": "a", "model": name, "quality": "auto", "background": "auto", "size": "64x64", "user": "x"}
        reply = refusing.post("/v1/images/generations", json=body)
        assert reply.status_code == 200 and reply.json()["model"] == "emoji", reply.text
