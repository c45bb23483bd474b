"""A picture's record: what it holds, that it reads back, and what an attacker's record is answered with."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mezzotint import Pipeline
from mezzotint.errors import MezzotintError, RequestError
from mezzotint.images.io import read_metadata, save
from mezzotint.records.record import Record, changes, describe, difference, pixels_digest, read
from mezzotint.request import MAX_PROMPT, Request

REQUEST = Request(
    prompt="a lemon", negative_prompt="dark", width=16, height=8, steps=20, guidance_scale=7.5, seed=7, count=4, batch=2
)
MODEL = {"name": "emoji", "device": "cpu", "dtype": "float32", "threads": 2, "files": {"unet/a.safetensors": "ab" * 32}}
PAIR = [(REQUEST, 9), (REQUEST, 10)]


def texts(**more: Any) -> dict[str, str]:
    return describe(REQUEST, 9, MODEL, PAIR, 0, image=Image.new("RGB", (16, 8), "yellow"), **more)


def record(**changes: Any) -> dict[str, str]:
    """A record of which some fields were edited."""
    return {"mezzotint": json.dumps(json.loads(texts()["mezzotint"]) | changes)}


# ---- what it holds ---------------------------------------------------------------------------------------------------


OPTIONAL = (
    "family",
    "vae",
    "safety_checker",
    "options",
    "lora",
    "loras",
    "controls",
    "ip_adapters",
    "image_encoders",
    "upscaler",
    "refiner",
    "merged",
    "embeddings",
    "placement",
)
OPTIONAL += ("edited", "solver", "kernels")


def test_the_record_makes_the_request_again() -> None:
    found = read(texts())
    assert found is not None and found.request == REQUEST
    assert (found.seed, found.group, found.place) == (9, (9, 10), 0)
    assert found.model.model_dump(exclude={*OPTIONAL}) == MODEL
    assert set(found.versions) == {"mezzotint", "torch"}
    assert found.pixels == hashlib.sha256(bytes([255, 255, 0]) * 16 * 8).hexdigest()
    assert found.jobs() == PAIR
    assert texts() == texts(), "no clock, no chance"


def test_a_file_name_that_is_not_utf8() -> None:
    """Such as b"\\xff.safetensors", which Python reads as half of a surrogate pair: the picture can be saved."""
    named = {**MODEL, "name": "\udcff.ckpt", "files": {"\udcff.ckpt": "ab" * 32}}
    found = describe(REQUEST, 9, named, PAIR, 0)
    assert found["parameters"].encode() and list(read(found).model.files) == ["?.ckpt"]  # type: ignore[union-attr]


def test_it_has_no_clock_no_host_and_no_folder(sd1: Pipeline) -> None:
    request = Request(prompt="a lemon", seed=7, steps=2)
    first, second = (sd1.generate(request).images[0].info["mezzotint"] for _ in range(2))
    assert first == second
    import getpass
    import socket

    for word in (socket.gethostname(), str(sd1.parts.source.parent), str(Path.home()) + "/", time.strftime("%Y-")):
        assert word not in first
    assert getpass.getuser() not in json.dumps({k: v for k, v in json.loads(first).items() if k != "model"})


def test_the_model_is_named_by_its_files(sd1: Pipeline, sd1_folder: Path) -> None:
    found = read(sd1.generate(Request(prompt="a lemon", steps=1)).images[0].info)
    assert found is not None
    on_disk = {
        path.relative_to(sd1_folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sd1_folder.rglob("*")
        if path.is_file()
    }
    assert {"unet/config.json", "model_index.json"} < {*found.model.files}
    assert found.model.files.items() <= on_disk.items()
    assert (found.model.device, found.model.dtype, found.model.threads) == ("cpu", "float32", torch.get_num_threads())


def test_every_picture_of_a_run_has_its_own_seed_place_and_hash(sd1: Pipeline) -> None:
    request = Request(prompt="a lemon", seed=7, steps=2, count=3, batch=2)
    result = sd1.generate(request)
    found = [read(image.info) for image in result.images]
    assert [(r.seed, r.group, r.place) for r in found if r] == [(7, (7, 8), 0), (8, (7, 8), 1), (9, (9,), 0)]
    assert [r.pixels for r in found if r] == [pixels_digest(image) for image in result.images]
    assert all(r and r.request == result.request for r in found)


def test_neighbours_with_other_words_are_part_of_it(sd1: Pipeline) -> None:
    asked = [
        Request(prompt=word, negative_prompt="x", seed=7, steps=2, batch=3) for word in ("a lemon", "a", "a lemon")
    ]
    found = [read(r.images[0].info) for r in sd1.generate(asked)]
    for place, r in enumerate(found):
        assert r is not None and r.place == place
        assert [(job.prompt, seed) for job, seed in r.jobs()] == [("a lemon", 7), ("a", 7), ("a lemon", 7)]


def test_given_latents_are_recorded(sd1: Pipeline) -> None:
    noise = torch.randn(1, 4, 4, 4)
    found = read(sd1.generate(Request(prompt="a lemon", steps=1), noise).images[0].info)
    assert found and found.latents == hashlib.sha256(noise[0].numpy().tobytes()).hexdigest()


def test_input_pictures_are_there_without_their_bytes() -> None:
    request = REQUEST.replace(image=Image.new("RGB", (8, 8)), mask="mask.png")
    given = {"image": {"path": None, "sha256": "cd" * 32}, "mask": {"path": "mask.png", "sha256": "ef" * 32}}
    text = describe(request, 9, MODEL, inputs=given)["mezzotint"]
    found = read({"mezzotint": text})
    assert found and (found.request.image, found.request.mask) == (None, "mask.png")
    assert {name: i.model_dump() for name, i in found.inputs.items()} == given and "base64" not in text


def test_it_survives_every_format(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), "yellow")
    image.info.update(texts())
    for suffix in (".png", ".jpg", ".webp"):
        save(image, tmp_path / f"x{suffix}")
        assert read(read_metadata(tmp_path / f"x{suffix}")) == read(texts())


# ---- comparing -------------------------------------------------------------------------------------------------------


def test_changes_are_listed() -> None:
    now = describe(
        REQUEST, 9, MODEL | {"device": "cuda", "files": {"unet/a.safetensors": "cd" * 32, "vae/b": "12" * 32}}, PAIR
    )
    before = record(versions={"mezzotint": "0.0.1", "torch": torch.__version__})
    old, new = read(before), read(now)
    assert old and new
    said = list(changes(old, new))
    assert said == [
        f"mezzotint's version was 0.0.1 and is now {new.versions['mezzotint']}",
        "the device was cpu and is now cuda",
        "the model's unet/a.safetensors was ababababab... and is now cdcdcdcdcd...",
        "the model's vae/b was none and is now 1212121212...",
    ]
    assert not list(changes(new, new))


def test_the_difference_of_two_pictures() -> None:
    a, b = Image.new("RGB", (10, 10), (10, 20, 30)), Image.new("RGB", (10, 10), (10, 20, 30))
    assert difference(a, b) == (0, 0.0)
    b.putpixel((3, 4), (10, 27, 29))
    assert difference(a, b) == (7, pytest.approx(0.01))
    b.putpixel((0, 0), (255, 20, 30))
    assert difference(a, b) == (245, pytest.approx(0.02))
    with pytest.raises(MezzotintError, match="10x10, the other 10x11"):
        difference(a, Image.new("RGB", (10, 11)))


# ---- records that somebody made up -----------------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "not JSON": "hello",
    "nothing": "",
    "a number": "7",
    "a list": "[]",
    "NaN": '{"seed": NaN}',
    "Infinity": '{"seed": -Infinity}',
    "a number of 10,000 digits": '{"seed": ' + "9" * 10_000 + "}",
    "nested a million times": "[" * 1_000_000,
    "nested in objects": '{"a":' * 100_000,
    "nested and closed": '{"others": ' + "[" * 500 + "]" * 500 + "}",
    "17 million characters": "x" * 17_000_000,
    "a lone surrogate": '{"request": {"prompt": "\\ud800"}}',
    "no request": {"request": None},
    "a request of numbers": {"request": [1, 2]},
    "a prompt that is a list": {"request": {"prompt": ["a"]}},
    "a prompt without end": {"request": {"prompt": "x" * (MAX_PROMPT + 1)}},
    "an unknown field": {"request": {"prompt": "x", "__class__": "os.system"}},
    "a million steps": {"request": {"prompt": "x", "steps": 10**6}},
    "a size of terapixels": {"request": {"prompt": "x", "width": 8 * 10**6}},
    "a seed that is text": {"seed": "seven"},
    "a negative seed": {"seed": -1},
    "a seed of 65 bits": {"seed": 2**64, "group": [2**64]},
    "no group": {"group": []},
    "a group of a million": {"group": [9] * 10**6},
    "a place outside": {"place": 2},
    "a negative place": {"place": -1},
    "another's seed": {"seed": 10},
    "company of another size": {"others": [{}]},
    "company with a path": {"others": [{}, {"image": "/etc/passwd"}]},
    "company with wrong words": {"others": [{}, {"prompt": 7}]},
    "company without a prompt": {"others": [{}, {"prompt": None}]},
    "a model that is a path": {"model": "/etc/passwd"},
    "hashes that are none": {"model": {"files": {"unet": "deadbeef"}}},
    "threads without end": {"model": {"threads": 10**9}},
    "no threads": {"model": {"threads": 0}},
    "inputs without a hash": {"inputs": {"image": {"path": "/etc/passwd"}}},
    "pixels that are no hash": {"pixels": "0"},
    "versions that are numbers": {"versions": {"torch": 2}},
}


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_a_made_up_record_gets_a_sentence(case: str) -> None:
    wrong = WRONG[case]
    with pytest.raises(RequestError, match=r"^the record") as caught:
        read({"mezzotint": wrong} if isinstance(wrong, str) else record(**wrong))
    assert len(str(caught.value)) < 2000 and "\n" not in str(caught.value)


def test_reading_opens_nothing(tmp_path: Path) -> None:
    """Paths in every field that could hold one; no file, socket, process or import comes of it."""
    trap = str(tmp_path / "trap.png")
    Path(trap).write_text("canary")
    edited = record(
        request=REQUEST.model_dump(mode="json")
        | {
            "image": trap,
            "mask": trap,
            "embeddings": [trap],
            "wildcards": trap,
            "loras": [[trap, 1.0]],
            "lora_folder": trap,
        },
        inputs={"image": {"path": trap, "sha256": "ab" * 32}},
        model=MODEL
        | {"name": trap, "lora": trap, "embeddings": {trap: "ab" * 32}, "loras": {trap: "ab" * 32}, "source": trap},
        extra=trap,
    )
    read(edited)  # what is imported is imported now
    seen: list[str] = []
    armed = True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if armed and event.split(".")[0] in ("open", "os", "socket", "subprocess", "exec", "import", "compile"):
            seen.append(event)

    sys.addaudithook(hook)
    try:
        found = read(edited)
    finally:
        armed = False
    assert isinstance(found, Record) and not seen
