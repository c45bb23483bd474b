"""ControlNets of jobs: files by listed name, pictures by value or upload id, edges, the extension's dialect."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

import mezzotint
from controls import write_control
from mezzotint.request import Request
from mezzotint.server import Settings, create_app
from mezzotint.server.entries import LEFT_OUT, pictures_of
from stub_server import HOST, submit, wait_for

NAMES = ["folder", "inpaint/tiny_inpaint", "other/wrong", "sd15/tiny_canny"]
FIELDS: dict[str, Any] = {"prompt": "a lemon", "seed": 3, "steps": 2, "width": 32, "height": 32}


def picture(seed: int = 0) -> bytes:
    """A PNG file of 32x32 pixels: a square on noise."""
    levels = np.random.default_rng(seed).integers(0, 60, (32, 32, 3), dtype=np.uint8)
    levels[8:24, 10:20] = 240
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sd1: mezzotint.Pipeline) -> Path:
    """A folder of ControlNets: for the tiny model, one in a folder of diffusers, and one for another model."""
    root, unet = tmp_path_factory.mktemp("controls"), sd1.unet.config
    for name in ("sd15/tiny_canny", "inpaint/tiny_inpaint", "folder/diffusion_pytorch_model"):
        write_control(root / f"{name}.safetensors", unet)
    write_control(root / "other" / "wrong.safetensors", unet, cross_attention_dim=40)
    return root


@pytest.fixture
def client(tmp_path: Path, sd1_folder: Path, folder: Path) -> Iterator[TestClient]:
    """An application over the tiny model and the ControlNets."""
    settings = Settings(data=tmp_path / "data", models=(str(sd1_folder),), devices=("cpu",), controls=folder)
    with TestClient(create_app(settings), base_url=HOST, raise_server_exceptions=False) as client:
        yield client


def drawn(client: TestClient, tmp_path: Path, **fields: Any) -> tuple[dict[str, Any], bytes]:
    """Return a job and the pixels of its picture."""
    job = wait_for(client, submit(client, **fields))
    assert job["state"] == "done", job
    with Image.open(tmp_path / "data" / "pictures" / f"{job['pictures'][0]['id']}.png") as image:
        return job, image.tobytes()


def test_a_job_draws_what_the_pipeline_draws_and_again(
    client: TestClient, sd1: mezzotint.Pipeline, tmp_path: Path, folder: Path
) -> None:
    assert client.get("/api/controls").json() == {"controls": NAMES}
    given = picture()
    edges = mezzotint.control.canny(given, 50, 150)
    settings = {"scale": 0.8, "end": 0.9, "mode": "control"}
    path = str(folder / "sd15" / "tiny_canny.safetensors")
    expected = sd1.generate(Request(**FIELDS, control=[{"file": path, "image": edges, **settings}])).images[0].tobytes()
    upload = client.post("/api/uploads", files={"file": ("a.png", given)}).json()["id"]
    canny = {"preprocessor": "canny", "low": 50, "high": 150}
    for image in (upload, text(given), f"data:image/png;base64,{text(given)}"):
        entry = {"file": "tiny_canny", "image": image, **settings, **canny}
        job, pixels = drawn(client, tmp_path, **FIELDS, control=[entry])
        assert pixels == expected
    (stored,) = job["request"]["control"]
    assert set(stored) == {"file", "image", *settings} and list(pictures_of(job["request"])) == [stored["image"]]
    reply = client.get(f"/api/uploads/{upload}/canny", params={"low": 50, "high": 150})
    with (
        Image.open(io.BytesIO(reply.content)) as shown,
        Image.open(io.BytesIO(client.get(f"/api/uploads/{stored['image']}").content)) as kept,
    ):
        assert shown.tobytes() == kept.tobytes() == edges.tobytes()
    assert client.get(f"/api/uploads/{'0' * 64}/canny").status_code == 404
    again = wait_for(client, client.post(f"/api/pictures/{job['pictures'][0]['id']}/verify").json()["id"])
    assert again["result"]["identical"], again
    record = client.get(f"/api/pictures/{job['pictures'][0]['id']}/record").text
    assert "tiny_canny.safetensors" in record and str(folder) not in record


def test_without_a_picture_it_is_the_one_that_the_run_starts_from(
    client: TestClient, sd1: mezzotint.Pipeline, tmp_path: Path, folder: Path
) -> None:
    fields = {**FIELDS, "strength": 0.5}
    control = {"file": str(folder / "inpaint" / "tiny_inpaint.safetensors")}
    mask = io.BytesIO()
    Image.new("L", (32, 32), 255).save(mask, "PNG")
    request = Request(**fields, image=picture(), mask=mask.getvalue(), control=[control])
    sent = {"image": text(picture()), "mask": text(mask.getvalue()), "control": [{"file": "tiny_inpaint"}]}
    assert drawn(client, tmp_path, **fields, **sent)[1] == sd1.generate(request).images[0].tobytes()


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"file": "../wrong"}, "control[0].file names '../wrong', which the server does not list"),
        ({"file": "/etc/passwd"}, "which the server does not list"),
        ({"file": "wrong"}, "control[0].file: other/wrong.safetensors is a ControlNet for another model"),
        ({"image": "/etc/passwd"}, "control[0].image must be the id of an upload"),
        ({"image": "0" * 64}, "control[0].image is the upload"),
        ({"image": text(b"GIF89a")}, "control[0].image is not a PNG"),
        ({"image": 5}, "image"),
        ({"start": 0.6, "end": 0.5}, "end"),
        ({"scale": True}, "scale is True"),
        ({"mode": "hard"}, "mode is 'hard'; it must be balanced, prompt, control or guess"),
        ({"preprocessor": "depth"}, "preprocessor is 'depth'"),
        ({"preprocessor": "canny", "low": 300}, "low is 300 and high 200"),
        ({"weight": 1}, "weight"),
        ({"more": [{"image": "/etc/passwd", "type": 1}]}, "control[0].more[0].image must be the id of an upload"),
        ({"more": [{"type": 1, "preprocessor": "canny"}]}, "control[0].more[0].image is missing; canny needs"),
        ({"more": [{"image": text(picture()), "type": "lemon"}]}, "type"),
        ({"more": ["a"]}, "more"),
    ],
)
def test_wrong_entries_get_a_sentence(client: TestClient, folder: Path, entry: dict[str, Any], word: str) -> None:
    control = [{"file": "tiny_canny", "image": text(picture()), **entry}]
    reply = client.post("/api/jobs", json={"request": {**FIELDS, "control": control}})
    assert reply.status_code == 422 and word in reply.json()["error"]["message"], reply.text
    assert str(folder.parent) not in reply.text


def test_what_is_refused_before_work(client: TestClient, tmp_path: Path, sd1_folder: Path, folder: Path) -> None:
    one = {"file": "tiny_canny", "image": text(picture())}
    for control, word in (
        ("tiny_canny", "control is 'tiny_canny'"),
        ([one] * 17, "control"),
        ([{"image": one["image"]}], "file is missing"),
        ([{"file": "tiny_canny", "preprocessor": "canny"}], "control[0].image is missing"),
    ):
        reply = client.post("/api/jobs", json={"request": {**FIELDS, "control": control}})
        assert reply.status_code == 422 and word in reply.json()["error"]["message"], reply.text
    plan = client.post("/api/plan", json={"request": {**FIELDS, "control": [one]}}).json()
    assert plan["fits"] and plan["sentence"].startswith("needs ")
    settings = Settings(
        data=tmp_path / "small", models=(str(sd1_folder),), devices=("cpu",), controls=folder, memory="64MiB"
    )
    with TestClient(create_app(settings), base_url=HOST) as small:
        reply = small.post("/api/jobs", json={"request": {**FIELDS, "control": [one]}})
        assert reply.status_code == 422 and "64.00 MiB" in reply.json()["error"]["message"], reply.text
    assert tuple(name for name in LEFT_OUT if name not in ("control", "regions")) == LEFT_OUT


# ---- sd-webui-controlnet ---------------------------------------------------------------------------------------------

BODY: dict[str, Any] = {"prompt": "a lemon", "seed": 3, "steps": 2, "width": 32, "height": 32, "sampler_name": "Euler"}


def units(*args: dict[str, Any]) -> dict[str, Any]:
    return {"alwayson_scripts": {"ControlNet": {"args": [*args]}}}


def post(client: TestClient, route: str, body: dict[str, Any]) -> Any:
    return client.post(f"/sdapi/v1/{route}", json=body)


def test_the_units_of_the_extension(client: TestClient, tmp_path: Path) -> None:
    given = text(picture())
    unit = {
        "enabled": True,
        "image": {"image": given, "mask": None},
        "module": "canny",
        "model": "tiny_canny [d14c016b]",
        "weight": 0.8,
        "threshold_a": 50,
        "threshold_b": 150,
        "guidance_start": 0.1,
        "guidance_end": 0.9,
        "control_mode": 2,
        "resize_mode": "Just Resize",
        "pixel_perfect": True,
        "processor_res": 512,
        "low_vram": False,
        "save_detected_map": False,
        "hr_option": "Both",
    }
    plain = {"input_image": given, "model": "folder", "control_mode": "My prompt is more important"}
    reply = post(client, "txt2img", BODY | units(unit, {"enabled": False}, plain | {"mask_image": given})).json()
    info = json.loads(reply["info"])
    assert (info["unsupported"], info["unknown"]) == (["controlnet.args[2].mask_image"], [])
    (job,) = client.app.state.service.store.jobs()
    edges, own = (entry.pop("image") for entry in job.request["control"])
    assert job.request["control"] == [
        {"file": "tiny_canny", "scale": 0.8, "start": 0.1, "end": 0.9, "mode": "control", "resize_mode": "resize"},
        {"file": "folder", "scale": 1.0, "start": 0.0, "end": 1.0, "mode": "prompt", "resize_mode": "crop"},
    ]
    found = (client.get(f"/api/uploads/{id}").content for id in (edges, own))
    with Image.open(io.BytesIO(next(found))) as image:
        assert image.tobytes() == mezzotint.control.canny(picture(), 50, 150).tobytes()
    assert next(found) == picture()


def test_img2img_gives_its_picture_to_units_without_one(client: TestClient) -> None:
    body = BODY | {"init_images": [text(picture(1))]} | units({"model": "tiny_canny"}, {"model": "tiny_inpaint"})
    assert post(client, "img2img", body).status_code == 200
    (job,) = client.app.state.service.store.jobs()
    assert [entry.get("image") for entry in job.request["control"]] == [job.request["image"], None]


@pytest.mark.parametrize(
    ("unit", "word"),
    [
        ({"module": "depth_midas"}, "controlnet.args[0].module is 'depth_midas'; it must be none or canny"),
        ({"model": "None"}, "controlnet.args[0].model is missing"),
        ({"model": "/etc/passwd"}, "which the server does not list"),
        ({"model": "wrong"}, "control[0].file: other/wrong.safetensors is a ControlNet for another model"),
        ({"control_mode": 3}, "control_mode is '3'; it must be Balanced"),
        ({"image": "/etc/passwd"}, "controlnet.args[0].image must be a PNG"),
        ({"image": None}, "control[0].image is missing"),
        ({"weight": "heavy"}, "weight is 'heavy'"),
    ],
)
def test_units_that_are_refused(client: TestClient, folder: Path, unit: dict[str, Any], word: str) -> None:
    reply = post(client, "txt2img", BODY | units({"model": "tiny_canny", "image": text(picture()), **unit}))
    assert reply.status_code == 422 and word in reply.json()["detail"], reply.text
    assert str(folder.parent) not in reply.text


def test_what_the_extension_lists(client: TestClient) -> None:
    assert client.get("/controlnet/version").json() == {"version": 3}
    assert client.get("/controlnet/model_list").json() == {"model_list": NAMES}
    modules = client.get("/controlnet/module_list", params={"alias_names": "false"}).json()
    assert modules["module_list"] == ["none", "canny"]
    assert next(slider["name"] for slider in modules["module_detail"]["canny"]["sliders"]) == "Resolution"
    types = client.get("/controlnet/control_types").json()["control_types"]
    assert types["All"]["model_list"] == ["None", *NAMES]
    assert types["Canny"] == {
        "module_list": ["none", "canny"],
        "model_list": ["None", "sd15/tiny_canny"],
        "default_option": "canny",
        "default_model": "sd15/tiny_canny",
    }
    assert types["Depth"]["model_list"] == ["None"]
    assert client.get("/sdapi/v1/scripts").json()["txt2img"] == ["controlnet"]
    body = {"controlnet_module": "canny", "controlnet_input_images": [text(picture())]}
    (edges,) = client.post("/controlnet/detect", json=body).json()["images"]
    with Image.open(io.BytesIO(base64.b64decode(edges))) as image:
        assert image.tobytes() == mezzotint.control.canny(picture()).tobytes()
    assert client.post("/controlnet/detect", json=body | {"controlnet_module": "hed"}).status_code == 422
    assert client.post("/controlnet/detect", json={"controlnet_module": "canny"}).status_code == 422
