"""Our API: what each route answers, and the bits of what is drawn."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import mezzotint
from mezzotint.images.io import read_metadata
from mezzotint.prompt import expand
from mezzotint.request import Request
from stub_server import HOST, submit, wait_for


def png(color: str = "red", side: int = 32) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), color).save(file, "PNG")
    return file.getvalue()


def test_a_picture_has_the_bits_of_generate(tiny: TestClient, sd1: mezzotint.Pipeline, tmp_path: Path) -> None:
    fields = {"prompt": "a lemon", "seed": 7, "count": 2, "sampler": "euler"}
    job = wait_for(tiny, submit(tiny, **fields))
    assert job["state"] == "done", job
    expected = sd1.generate(Request(**fields)).images
    for picture, image in zip(job["pictures"], expected, strict=True):
        data = (tmp_path / "data" / "pictures" / f"{picture['id']}.png").read_bytes()
        with Image.open(io.BytesIO(data)) as found:
            assert found.tobytes() == image.tobytes()
            assert found.info["mezzotint"] == image.info["mezzotint"]

    one = job["pictures"][1]["id"]
    verified = wait_for(tiny, tiny.post(f"/api/pictures/{one}/verify").json()["id"])
    assert verified["result"]["identical"], verified
    assert tiny.get(f"/api/pictures/{one}").json()["verified"]["identical"]
    assert tiny.get(f"/api/pictures/{one}/maps").status_code == 404
    mapped = wait_for(tiny, tiny.post(f"/api/pictures/{one}/maps").json()["id"])
    assert mapped["state"] == "done", mapped
    words = tiny.get(f"/api/pictures/{one}/maps").json()["words"]
    assert [word["text"] for word in words] == ["a", "lemon"]
    assert base64.b64decode(words[1]["png"]).startswith(b"\x89PNG")

    path = tmp_path / "data" / "pictures" / f"{one}.png"
    with Image.open(path) as picture:  # as a fraud would do it: the record stays, a pixel changes
        info, edited = dict(picture.info), picture.copy()
    edited.putpixel((0, 0), (1, 2, 3) if edited.getpixel((0, 0)) != (1, 2, 3) else (3, 2, 1))
    edited.info = info
    mezzotint.images.io.save_png(edited, path)
    verified = wait_for(tiny, tiny.post(f"/api/pictures/{one}/verify").json()["id"])
    assert not verified["result"]["identical"]


def test_masks_of_regions_are_pictures_by_value_or_upload(
    tiny: TestClient, sd1: mezzotint.Pipeline, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"prompt": "a lemon", "seed": 3, "steps": 2, "width": 32, "height": 32}
    mask, box = png("white"), {"prompt": "a whale", "box": (0.0, 0.0, 0.5, 1.0)}
    upload = tiny.post("/api/uploads", files={"file": ("a.png", mask)}).json()
    (expected,) = sd1.generate(Request(**fields, regions=[box, {"prompt": "a lemon", "mask": mask}])).images
    for given in (upload["id"], base64.b64encode(mask).decode()):
        job = wait_for(tiny, submit(tiny, **fields, regions=[box, {"prompt": "a lemon", "mask": given}]))
        assert job["state"] == "done", job
        with Image.open(tmp_path / "data" / "pictures" / f"{job['pictures'][0]['id']}.png") as found:
            assert found.tobytes() == expected.tobytes()
    for path in ("/etc/passwd", "mask.png"):
        reply = tiny.post("/api/jobs", json={"request": {**fields, "regions": [{"prompt": "a", "mask": path}]}})
        assert reply.status_code == 422 and "regions[0].mask" in reply.text


def test_image_to_image_with_a_mask(tiny: TestClient, sd1: mezzotint.Pipeline, tmp_path: Path) -> None:
    image, mask = png(), png("white")
    fields = {"prompt": "a lemon", "seed": 3, "strength": 0.5}
    upload = tiny.post("/api/uploads", files={"file": ("../../x.png", image)}).json()
    assert (upload["format"], upload["width"], upload["height"]) == ("PNG", 32, 32)
    given = {**fields, "image": upload["id"], "mask": f"data:image/png;base64,{base64.b64encode(mask).decode()}"}
    job = wait_for(tiny, submit(tiny, **given))
    assert job["state"] == "done", job
    (expected,) = sd1.generate(Request(**fields, image=image, mask=mask)).images
    found = tiny.get(f"/api/pictures/{job['pictures'][0]['id']}/file").content
    assert Image.open(io.BytesIO(found)).tobytes() == expected.tobytes()
    assert tiny.get(f"/api/uploads/{upload['id']}").content == image
    assert job["request"]["image"] == upload["id"]
    again = wait_for(tiny, tiny.post(f"/api/pictures/{job['pictures'][0]['id']}/verify").json()["id"])
    assert again["result"]["identical"], again


def test_history(stub: TestClient) -> None:
    ids = [wait_for(stub, submit(stub, prompt=p, seed=1))["pictures"][0]["id"] for p in ("a red_fox", "a red fox", "%")]

    def found(**query: object) -> list[str]:
        return [picture["id"] for picture in stub.get("/api/pictures", params=query).json()["pictures"]]

    assert found() == ids[::-1]
    assert found(search="red_") == ids[:1]
    assert found(search="fox A") == ids[1::-1]
    assert found(search="%") == ids[2:]
    assert found(before=ids[2], limit=1) == [ids[1]]
    assert stub.patch(f"/api/pictures/{ids[0]}", json={"rating": 5, "tags": ["x", "x"]}).json()["tags"] == ["x"]
    assert found(rating=4) == found(tag="x") == ids[:1]
    assert stub.patch(f"/api/pictures/{ids[0]}", json={"rating": 6}).status_code == 422
    assert stub.delete(f"/api/pictures/{ids[0]}").status_code == 200
    assert stub.get(f"/api/pictures/{ids[0]}").status_code == 404
    assert found() == ids[:0:-1]
    assert stub.post(f"/api/pictures/{ids[0]}/restore").json()["rating"] == 5
    assert found() == ids[::-1]


def test_files(stub: TestClient) -> None:
    picture = wait_for(stub, submit(stub, prompt="a lemon", seed=1))["pictures"][0]
    reply = stub.get(f"/api/pictures/{picture['id']}/file")
    assert reply.headers["content-type"] == "image/png"
    assert len(reply.content) == picture["bytes"]
    assert reply.headers["etag"] == f'"{picture["sha256"]}"'
    part = stub.get(f"/api/pictures/{picture['id']}/file", headers={"Range": "bytes=0-7"})
    assert (part.status_code, part.content) == (206, b"\x89PNG\r\n\x1a\n")
    for name in ("file", "thumbnail"):
        path = f"/api/pictures/{picture['id']}/{name}"
        etag = stub.get(path).headers["etag"]
        assert stub.get(path, headers={"If-None-Match": etag}).status_code == 304
    assert stub.get(f"/api/pictures/{picture['id']}/thumbnail").content[8:12] == b"WEBP"
    record = stub.get(f"/api/pictures/{picture['id']}/record").json()
    assert (record["seed"], record["request"]["prompt"]) == (1, "a lemon")
    info = stub.post("/api/info", content=reply.content, headers={"Content-Type": "image/png"}).json()
    assert info["request"] == record["request"]
    reply = stub.post("/api/info", content=b"<svg>")
    assert (reply.status_code, reply.json()["error"]["message"]) == (422, "the file is not a PNG, JPEG or WebP file")


def test_a_files_loras_are_those_of_the_listing(make_stub, tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "fast.safetensors").write_bytes(b"")
    stub = make_stub(loras=tmp_path / "loras")
    texts = PngInfo()
    texts.add_text("parameters", "a lemon <lora:fast:0.5> <lora:slow:1>\nSteps: 4, Sampler: Euler, Seed: 1, Token: 2")
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=texts)
    info = stub.post("/api/info", content=file.getvalue()).json()
    assert info["request"]["prompt"] == "a lemon <lora:fast:0.5> <lora:slow:1>"
    assert info["not_supported"] == ["Token: 2", "<lora:slow:1>: the server lists no such LoRA"]


def test_the_queue(make_stub) -> None:
    stub = make_stub(delay=0.02)
    stub.post("/api/queue/pause")
    ids = [submit(stub, prompt=str(k), seed=k) for k in range(4)]
    reply = stub.post("/api/jobs", json={"requests": [{"prompt": "x"}, {"prompt": "y"}], "priority": "bulk"})
    bulk = [job["id"] for job in reply.json()["jobs"]]
    assert stub.get("/api/queue").json()["order"] == [*ids, *bulk]
    assert stub.post(f"/api/jobs/{ids[2]}/move", json={"before": ids[1]}).json()["order"][1] == ids[2]
    stub.post(f"/api/jobs/{bulk[1]}/move", json={"before": "first"})
    stub.post(f"/api/jobs/{ids[0]}/move", json={"before": "last"})
    order = [bulk[1], ids[2], ids[1], ids[3], bulk[0], ids[0]]
    assert stub.get("/api/queue").json()["order"] == order
    assert [job["id"] for job in stub.get("/api/jobs?state=queued").json()["jobs"]] == order
    assert stub.delete(f"/api/jobs/{ids[3]}").json()["state"] == "cancelled"
    stub.post("/api/queue/resume")
    jobs = [wait_for(stub, id) for id in order]
    assert [job["state"] for job in jobs] == ["done"] * 3 + ["cancelled"] + ["done"] * 2
    started = [job["started"] for job in jobs if job["started"]]
    assert started == sorted(started)
    assert stub.post(f"/api/jobs/{ids[0]}/move", json={"before": "first"}).status_code == 409
    assert stub.post(f"/api/jobs/{'0' * 32}/move", json={"before": "first"}).status_code == 404


def test_a_running_job_is_cancelled_within_a_step(make_stub) -> None:
    stub = make_stub(delay=0.05)
    id = submit(stub, prompt="a", steps=100)
    while not (stub.get("/api/queue").json()["running"] or {}).get("step"):
        pass
    assert stub.delete(f"/api/jobs/{id}").json()["state"] == "cancelled"
    next = wait_for(stub, submit(stub, prompt="b", steps=1))
    assert next["state"] == "done"
    worker = stub.app.state.service
    assert worker.steps_done < 99
    assert stub.get(f"/api/jobs/{id}").json()["pictures"] == []


def test_errors_name_the_field(stub: TestClient) -> None:
    wrong = {
        "steps": 0,
        "width": 33,
        "seed": -1,
        "prompt": 3,
        "image": "no base64!",
        "mask": "0" * 64,
        "loras": [["../../secret", 1.0]],
        "embeddings": ["/etc/passwd"],
        "refiner": "../../secret",
        "count": 101,
        "sampler": "nosuch",
        "guidance_scale": "7",
        "lora_folder": "/etc",
        "wildcards": "/etc",
        "nosuch": 1,
    }
    for name, value in wrong.items():
        reply = stub.post("/api/jobs", json={"request": {"prompt": "a", name: value}})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (422, name), (name, reply.text)
        assert set(error) == {"type", "message", "param", "code"}
        assert "/etc/" not in error["message"] or name == "embeddings"
    assert stub.post("/api/jobs", json={}).status_code == 422
    assert stub.post("/api/jobs", content=b"{", headers={"Content-Type": "application/json"}).status_code == 422
    assert stub.post("/api/jobs", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert stub.get("/api/nosuch").json()["error"]["code"] == "not_found"
    assert stub.put("/api/jobs").json()["error"]["code"] == "method_not_allowed"
    assert stub.get("/api/queue").json()["order"] == []


def test_a_refiner_is_a_listed_model(make_stub, tmp_path: Path) -> None:
    path = tmp_path / "xl refiner.safetensors"
    path.touch()
    client = make_stub(models=("emoji", str(path)))
    job = wait_for(client, submit(client, prompt="a", width=64, height=64, refiner="XL Refiner"))
    assert job["state"] == "done" and job["request"]["refiner"] == "XL Refiner"
    service = client.app.state.service
    assert service.translator.request(job["request"]).refiner == str(path)
    (picture,) = job["pictures"]
    texts = read_metadata(service.folder.file("pictures", picture["id"] if isinstance(picture, dict) else picture))
    assert json.loads(texts["mezzotint"])["request"]["refiner"] == path.name


def test_limits_are_checked_before_work(stub: TestClient) -> None:
    for fields in (
        {"width": 8192, "height": 8192},
        {"width": 1024, "height": 1024, "hires": 8.0},
        {"steps": 151},
        {"prompt": "x" * 32_001},
        {"sigmas": [float(k) for k in range(200, 0, -1)]},
    ):
        assert stub.post("/api/jobs", json={"request": {"prompt": "a", **fields}}).status_code == 422, fields
    assert stub.get("/api/jobs").json()["jobs"] == []


def test_words_and_listings(tiny: TestClient) -> None:
    reply = tiny.post("/api/tokens", json={"prompt": "a (lemon:1.3) [", "model": "tiny"}).json()
    (chunk,) = reply["parts"][0]["variants"][0]["clauses"][0]["encoders"][0]
    assert [(row["token"], row["weight"]) for row in chunk][:2] == [("a</w>", 1.0), ("lemon</w>", 1.3)]
    assert "never closed" in reply["lint"][0]["message"]
    (model,) = tiny.get("/api/models").json()["models"]
    assert (model["name"], model["default"], model["loaded"]) == ("tiny", True, False)
    names = [field["name"] for field in tiny.get("/api/schema").json()["fields"]]
    assert "prompt" in names
    assert "lora_folder" not in names
    assert "euler" in [row["name"] for row in tiny.get("/api/samplers").json()["samplers"]]
    plan = tiny.post("/api/plan", json={"request": {"prompt": "a"}}).json()
    assert plan["fits"]
    assert plan["sentence"].startswith("needs ")
    assert tiny.post("/api/tokens", json={"prompt": "a", "model": "../x"}).status_code == 422


def test_health(stub: TestClient) -> None:
    wait_for(stub, submit(stub, prompt="a"))
    assert stub.get("/healthz").json() == {"status": "ok"}
    assert stub.get("/readyz").json() == {"status": "ready"}
    metrics = stub.get("/metrics").text
    assert 'mezzotint_jobs{state="done"} 1.0' in metrics
    document = stub.get("/openapi.json").json()
    assert "JobBody" in document["components"]["schemas"]
    assert document["paths"]["/api/jobs"]["post"]["requestBody"]


@pytest.mark.parametrize("last", ["", "00000000-1"])
def test_events(make_stub, last: str) -> None:
    """Over a real socket in test_live; here what a subscriber hears, and that it catches up."""
    import asyncio

    stub = make_stub()
    core = stub.app.state.service
    wait_for(stub, submit(stub, prompt="a", seed=1))

    async def collect() -> list[str]:
        names = []
        first = core.events._kept[0].id
        async for event in core.events.subscribe(last or first, beat=0.01):
            if event is None:
                return names
            names.append(event.name)
        return names

    names = asyncio.run(collect())
    assert ("picture" in names) == (not last)
    assert HOST.startswith("http://127.0.0.1")


def test_models_say_what_they_draw_with(tiny: TestClient) -> None:
    (model,) = tiny.get("/api/models").json()["models"]
    id = submit(tiny, prompt="a", seed=1)
    wait_for(tiny, id)
    (picture,) = tiny.get("/api/pictures").json()["pictures"]
    record = tiny.get(f"/api/pictures/{picture['id']}/record").json()["request"]
    assert model["settings"] == {name: record[name] for name in model["settings"]}
    assert {"width", "height", "steps", "guidance_scale", "sampler", "spacing"} <= set(model["settings"])


def test_tokens_are_those_of_the_choice_that_a_seed_draws(tiny: TestClient) -> None:
    for seed in range(4):
        prompt = "a {red|blue} cat"
        reply = tiny.post("/api/tokens", json={"prompt": prompt, "syntax": "comfy", "seed": seed}).json()
        assert reply["choice"] == expand(prompt, seed, None)
        assert reply["parts"][0]["variants"][0]["text"] == reply["choice"]
    assert tiny.post("/api/tokens", json={"prompt": "a cat", "syntax": "comfy"}).json()["choice"] is None


def test_embeddings_that_a_prompt_names_are_those_of_its_request(
    make_stub: Callable[..., TestClient], tmp_path: Path
) -> None:
    (tmp_path / "embeddings" / "styles").mkdir(parents=True)
    for name in ("dotted", "styles/inky", "unused"):
        (tmp_path / "embeddings" / f"{name}.safetensors").write_bytes(b"")
    client = make_stub(embeddings=tmp_path / "embeddings")
    for fields, expected in (
        ({"prompt": "a Dotted cat", "negative_prompt": "(inky:1.2)"}, ["dotted", "styles/inky"]),
        ({"prompt": "a dottedly cat"}, None),
        ({"prompt": "dotted", "embeddings": []}, []),
    ):
        job = client.get(f"/api/jobs/{submit(client, **fields)}").json()
        found = job["request"].get("embeddings")
        assert (sorted(found) if found else found) == expected
