"""IP-Adapters and ControlNet Unions of jobs: files by listed name, pictures by value or upload id."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from ip_adapters import face, write_adapters

import mezzotint
from controls import WEIGHTS, write_t2i, write_union
from mezzotint.images.init_image import to_source
from mezzotint.request import Request
from mezzotint.server import Settings, create_app
from mezzotint.server.entries import pictures_of
from mezzotint.weights.ip_adapter_files import save_embeds
from stub_server import HOST, submit, wait_for
from test_control import BODY, FIELDS, drawn, picture, text, units


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sd1: mezzotint.Pipeline) -> Path:
    """For the tiny model: IP-Adapters, their encoder and embeddings, a Union and a T2I-Adapter."""
    root = tmp_path_factory.mktemp("adapters")
    write_union(root / "union" / WEIGHTS, sd1.unet.config)
    write_t2i(root / "t2i" / WEIGHTS, sd1.unet.config)
    write_adapters(root, sd1.unet.config, "plain", "full")
    embeds = mezzotint.embed_images(root / "models" / "full.safetensors", [face(2)], device="cpu")
    save_embeds(root / "faces" / "one.safetensors", embeds)
    (root / "broken.safetensors").write_bytes(b"{}")
    return root


@pytest.fixture
def client(tmp_path: Path, sd1_folder: Path, folder: Path) -> Iterator[TestClient]:
    settings = Settings(
        data=tmp_path / "data", models=(str(sd1_folder),), devices=("cpu",), ip_adapters=folder, controls=folder
    )
    with TestClient(create_app(settings), base_url=HOST, raise_server_exceptions=False) as client:
        yield client


def png(seed: int = 0) -> bytes:
    return to_source(face(seed))  # type: ignore[return-value]


def test_a_job_draws_what_the_pipeline_draws_and_again(
    client: TestClient, sd1: mezzotint.Pipeline, tmp_path: Path, folder: Path
) -> None:
    """Several pictures with masks, scales by block, an encoder by name, and saved embeddings."""
    for kind, names in (
        ("ip_adapters", ["models/full", "models/plain"]),
        ("encoders", ["models/image_encoder"]),
        ("image_embeds", ["faces/one"]),
    ):
        assert client.get(f"/api/{kind}").json() == {kind: names}
    models, scale, mask = folder / "models", {"mid": 0.5, "down": {"block_0": [0.7]}}, png(3)
    entries: list[dict[str, Any]] = [
        {"file": "plain", "image": [png(0), png(1)], "scale": scale, "mask": [mask], "encoder": "image_encoder"},
        {"file": "models/full", "embeds": "one", "start": 0.5, "scale": 0.4},
    ]
    files = [
        {"file": str(models / "plain.safetensors"), "encoder": str(models / "image_encoder")},
        {"file": str(models / "full.safetensors"), "embeds": str(folder / "faces" / "one.safetensors")},
    ]
    expected = sd1.generate(Request(**FIELDS, ip_adapter=[a | b for a, b in zip(entries, files, strict=True)]))
    upload = client.post("/api/uploads", files={"file": ("a.png", png(0))}).json()["id"]
    sent = {"image": [upload, text(png(1))], "mask": f"data:image/png;base64,{text(mask)}"}
    job, pixels = drawn(client, tmp_path, **FIELDS, ip_adapter=[entries[0] | sent, entries[1]])
    assert pixels == expected.images[0].tobytes()
    stored = job["request"]["ip_adapter"]
    kept = [*stored[0]["image"], *stored[0]["mask"]]
    assert kept[0] == upload and [*pictures_of(job["request"])] == kept and stored[1]["embeds"] == "one"
    drawn_again = wait_for(client, client.post(f"/api/pictures/{job['pictures'][0]['id']}/verify").json()["id"])
    assert drawn_again["result"]["identical"], drawn_again
    submit(client, **job["request"])  # as the page does with "Use settings"
    record = client.get(f"/api/pictures/{job['pictures'][0]['id']}/record").text
    assert "plain.safetensors" in record and str(folder) not in record


def test_a_union_reads_several_pictures_and_a_t2i_adapter_one(
    client: TestClient, sd1: mezzotint.Pipeline, tmp_path: Path, folder: Path
) -> None:
    edges, depth = mezzotint.control.canny(picture(0)), picture(1)
    union: dict[str, Any] = {"file": "union", "image": picture(2), "type": "pose", "scale": 0.9}
    more = [{"type": "canny", "scale": 0.5}, {"type": 1}]
    t2i: dict[str, Any] = {"file": "t2i", "image": picture(3), "end": 0.6}
    given = union | {"more": [more[0] | {"image": edges}, more[1] | {"image": depth}]}
    files = [entry | {"file": str(folder / entry["file"])} for entry in (given, t2i)]
    expected = sd1.generate(Request(**FIELDS, control=files)).images[0].tobytes()
    upload = client.post("/api/uploads", files={"file": ("a.png", depth)}).json()["id"]
    pictures = [{"image": text(picture(0)), "preprocessor": "canny"}, {"image": upload}]
    sent = [union | {"image": text(union["image"]), "more": [a | b for a, b in zip(more, pictures, strict=True)]}]
    job, pixels = drawn(client, tmp_path, **FIELDS, control=[*sent, t2i | {"image": text(t2i["image"])}])
    assert pixels == expected
    assert len([*pictures_of(job["request"])]) == 4 and upload in pictures_of(job["request"])


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"file": "../broken"}, "ip_adapter[0].file names '../broken', which the server does not list"),
        ({"file": "broken"}, "which the server does not list"),
        ({"file": "image_encoder"}, "which the server does not list"),
        ({"encoder": "plain"}, "ip_adapter[0].encoder names 'plain', which the server does not list"),
        ({"image": None, "embeds": "plain"}, "ip_adapter[0].embeds names 'plain'"),
        ({"image": None}, "ip_adapter[0].image and ip_adapter[0].embeds are both missing"),
        ({"image": ["0" * 64]}, "ip_adapter[0].image[0] is the upload"),
        ({"mask": "/etc/passwd"}, "ip_adapter[0].mask[0] must be the id of an upload"),
        ({"image": text(b"GIF89a")}, "ip_adapter[0].image[0] is not a PNG"),
        ({"image": []}, "image is []"),
        ({"image": [text(png())] * 17}, "image is "),
        ({"scale": {"up": {"first": 1}}}, "scale is "),
        ({"scale": True}, "scale is True"),
        ({"start": 0.6, "end": 0.5}, "end"),
        ({"weight": 1}, "weight"),
    ],
)
def test_wrong_entries_get_a_sentence(client: TestClient, folder: Path, entry: dict[str, Any], word: str) -> None:
    adapter = {"file": "plain", "image": text(png()), **entry}
    reply = client.post("/api/jobs", json={"request": {**FIELDS, "ip_adapter": [adapter]}})
    assert reply.status_code == 422 and word in reply.json()["error"]["message"], reply.text
    assert str(folder.parent) not in reply.text


# ---- sd-webui-controlnet ---------------------------------------------------------------------------------------------


def test_units_of_the_extension_are_ip_adapters(client: TestClient) -> None:
    """By the module; the unit's region is the mask, and img2img's picture that of a unit without one."""
    unit = {
        "module": "ip-adapter_clip_sd15",
        "model": "plain [0123abcd]",
        "image": text(png(0)),
        "weight": 0.6,
        "guidance_end": 0.8,
        "control_mode": "ControlNet is more important",
        "effective_region_mask": text(png(1)),
    }
    args = [unit, {"module": "ip-adapter-auto", "model": "models/plain"}, {"model": "t2i", "image": text(picture())}]
    body = {"init_images": [text(png(2))], "alwayson_scripts": {"ControlNet": {"args": args}}, **BODY}
    reply = client.post("/sdapi/v1/img2img", json=body)
    assert reply.status_code == 200 and not json.loads(reply.json()["info"])["unsupported"], reply.text
    (job,) = client.app.state.service.store.jobs()  # type: ignore[attr-defined]
    first, second = job.request["ip_adapter"]
    sources = [client.get(f"/api/uploads/{first.pop(name)}").content for name in ("image", "mask")]
    assert sources == [png(0), png(1)] and second.pop("image") == job.request["image"]
    assert first == {"file": "plain", "scale": 0.6, "start": 0.0, "end": 0.8}
    assert second == {"file": "models/plain", "scale": 1.0, "start": 0.0, "end": 1.0}
    assert [entry["file"] for entry in job.request["control"]] == ["t2i"]
    wrong = units({**unit, "module": "ip-adapter_face_id"})
    reply = client.post("/sdapi/v1/txt2img", json=BODY | wrong)
    assert reply.status_code == 422 and "adapters of faces need insightface" in reply.json()["detail"]


def test_what_the_extension_lists(client: TestClient) -> None:
    names = client.get("/controlnet/model_list").json()["model_list"]
    assert {"t2i", "union", "models/plain", "models/full"} <= {*names}
    assert "ip-adapter_clip_h" in client.get("/controlnet/module_list").json()["module_list"]
    found = client.get("/controlnet/control_types").json()["control_types"]["IP-Adapter"]
    assert found["model_list"] == ["None", "models/full", "models/plain"]
    assert (found["default_option"], found["default_model"]) == ("ip-adapter-auto", "models/full")
