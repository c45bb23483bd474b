"""Ray Serve: two replicas draw the bits of pipe.generate through both dialects, behind the same guard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from mezzotint.server import Settings, create_app
from mezzotint.server.service import Service
from stub_server import HOST, StubModels

CODE = """
import base64, concurrent.futures, io, json, logging, os, socket, sys
import httpx, ray, torch
from PIL import Image
from ray import serve
import mezzotint
from mezzotint.server.ray import app

TOKEN = "a token of the test".replace(" ", "-")
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
with open("token", "w") as file:
    file.write(TOKEN)
serve.run(app({"token_file": "token", "replicas": "2"}), name="pictures")
url, found = f"http://127.0.0.1:{port}", {}
client = httpx.Client(base_url=url, timeout=300, headers={"Authorization": f"Bearer {TOKEN}"})
found["healthz"] = httpx.get(f"{url}/healthz").status_code
found["refused"] = [
    httpx.get(f"{url}/v1/models").status_code,
    client.get("/v1/models", headers={"Authorization": "Bearer " + "x" * 20}).status_code,
    client.get("/v1/models", headers={"Host": "example.org"}).status_code,
    client.get("/v1/models", headers={"Origin": "https://example.org"}).status_code,
]
found["listings"] = [
    client.get(path).status_code
    for path in ("/readyz", "/v1/models", "/sdapi/v1/sd-models", "/sdapi/v1/samplers", "/sdapi/v1/options")
]
found["bad"] = [
    client.post("/sdapi/v1/txt2img", json={"prompt": "x", "steps": "many"}).status_code,
    client.post("/v1/images/generations", json={"n": 1}).status_code,
    client.post("/v1/images/generations", content=b"{", headers={"Content-Type": "application/json"}).status_code,
    client.post("/v1/images/generations", json={"prompt": "x", "response_format": "url"}).status_code,
    client.post("/v1/images/generations", content=b"x" * (64 * 2**20 + 1)).status_code,
]
found["absent"] = [client.get(path).status_code for path in ("/api/pictures", "/sdapi/v1/progress", "/metrics")]

def pixels(text):
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB").tobytes()

def a1111(seed):
    body = {"prompt": "a lemon", "seed": seed, "steps": 4, "width": 128, "height": 128, "cfg_scale": 5}
    return client.post("/sdapi/v1/txt2img", json=body).raise_for_status().json()["images"][0]

def openai(seed):
    body = {"prompt": "a whale", "seed": seed, "steps": 4, "size": "128x128"}
    return client.post("/v1/images/generations", json=body).raise_for_status().json()["data"][0]["b64_json"]

with concurrent.futures.ThreadPoolExecutor(6) as pool:
    drawn = [*pool.map(a1111, range(6))], [*pool.map(openai, range(6))]
start = base64.b64decode(drawn[1][0])
form = {"prompt": "a cat", "seed": "3", "steps": "4", "size": "128x128", "strength": "0.8"}
edited = client.post("/v1/images/edits", data=form, files={"image": start}).raise_for_status().json()
with client.stream("POST", "/v1/images/generations", json={
    "prompt": "a whale", "seed": 0, "steps": 4, "size": "128x128", "stream": True, "partial_images": 2
}) as reply:
    events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: ")]
found["events"] = [event["type"] for event in events]
info = json.loads(client.post("/sdapi/v1/txt2img", json={"prompt": "a cat", "steps": 1}).json()["info"])
found["stateless"] = info["infotexts"][0] != ""
serve.shutdown()
ray.shutdown()

torch.set_num_threads(1)
pipe = mezzotint.load(device="cpu")
same = []
for seed in range(6):
    for texts, fields in (
        (drawn[0], {"prompt": "a lemon", "seed": seed, "sampler": "a1111:Euler", "guidance_scale": 5}),
        (drawn[1], {"prompt": "a whale", "seed": seed}),
    ):
        picture = Image.open(io.BytesIO(base64.b64decode(texts[seed])))
        if texts is drawn[0]:  # A1111's defaults are those of its record
            from mezzotint.records.record import read
            [(request, own)] = read(picture.info).jobs({})
            assert request.prompt == fields["prompt"] and request.steps == 4 and own == seed
            wanted = pipe.draw([(request, own)])[0]
        else:
            wanted = pipe(**fields, steps=4, width=128, height=128)
        same.append(wanted.convert("RGB").tobytes() == pixels(texts[seed]))
edit = pipe("a cat", seed=3, steps=4, width=128, height=128, strength=0.8, image=start, resize_mode="crop")
same.append(edit.convert("RGB").tobytes() == pixels(edited["data"][0]["b64_json"]))
same.append(pixels(events[-1]["b64_json"]) == pixels(drawn[1][0]))
found["same"] = same
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_replicas_draw_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", reason="ray is of the extra scale: pip install 'mezzotint[scale]'")
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=tmp_path, timeout=1100)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["healthz"] == 200
    assert found["refused"] == [401, 401, 421, 403]
    assert found["listings"] == [200] * 5
    assert found["bad"] == [422, 400, 400, 400, 413]
    assert found["absent"] == [404] * 3
    assert found["events"] == [*["image_generation.partial_image"] * 2, "image_generation.completed"]
    assert found["same"] == [True] * 14


def test_a_server_without_state_keeps_nothing(tmp_path: Path) -> None:
    """As each replica runs it: after a reply there is no job and no picture, and nothing can be set."""
    settings = Settings(data=tmp_path / "data", stateless=True)
    service = Service(settings, StubModels(settings))
    with TestClient(create_app(settings, service), base_url=HOST) as client:
        body = {"prompt": "a lemon", "seed": 7, "steps": 2}
        drawn = client.post("/sdapi/v1/txt2img", json=body | {"n_iter": 2, "width": 64, "height": 64}).json()
        assert len(drawn["images"]) == 2
        assert len(client.post("/v1/images/generations", json=body | {"n": 2}).json()["data"]) == 2
        named = client.post("/v1/images/generations", json=body | {"model": "dall-e-3"}).json()
        assert [*named["data"][0]] == ["b64_json"]  # that model's replies have links elsewhere
        streamed = client.post("/v1/images/generations", json=body | {"stream": True}).text
        assert "image_generation.completed" in streamed
        failed = client.post("/v1/images/generations", json=body | {"response_format": "url"})
        assert (failed.status_code, failed.json()["error"]["param"]) == (400, "response_format")
        options = client.get("/sdapi/v1/options").json()
        assert (
            client.post("/sdapi/v1/options", json=options).status_code == 200
        )  # some clients send back what they read
        assert client.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 2}).status_code == 409
        for path in ("/", "/metrics", "/api/jobs", "/sdapi/v1/progress", "/v1/images/files/0123"):
            assert client.get(path).status_code == 404
        assert client.get("/openapi.json").json()["paths"].keys().isdisjoint({"/metrics", "/api/jobs"})
        assert sum(service.store.counts().values()) == 0
        assert not [*(tmp_path / "data" / "pictures").iterdir()]
        assert not (tmp_path / "data" / "mezzotint.db").exists()
