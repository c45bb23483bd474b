"""Made again, and proven: `mezzotint again`, in a process that knows nothing of the one that drew."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import mezzotint
from mezzotint import Pipeline, Request, RequestError, cli, samplers
from mezzotint.again import (
    DEPENDENT_FIELDS,
    FILE_FIELDS,
    again,
    check_work,
    find_inputs,
    judge,
    read_source,
    select_model,
)
from mezzotint.images.init_image import open_mask, open_picture
from mezzotint.images.io import read_metadata, read_picture, save, save_png
from mezzotint.records.record import read

LEMON = Request(prompt="a lemon on a blue background", seed=7, steps=2)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A folder with a picture to start from and a mask."""
    levels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "scene.png")
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[8:24, 4:20] = 255
    Image.fromarray(mask).save(tmp_path / "hole.png")
    return tmp_path


class Ran:
    def __init__(self, code: Any, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], scene: Path, sd1: Pipeline
) -> Callable[..., Ran]:
    """`mezzotint again` in this process, in the scene's folder, with the tiny model."""
    monkeypatch.chdir(scene)
    monkeypatch.delenv("MEZZOTINT_DEBUG", raising=False)
    monkeypatch.setattr(mezzotint, "load", lambda path=None, **_: sd1, raising=False)

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["mezzotint", "again", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return Ran(done.value.code or 0, *capsys.readouterr())

    return run


def edit(path: Path, **changes: Any) -> None:
    """Changes the record in a file and leaves its pixels, and the hash of them, as they are."""
    with Image.open(path) as image:
        image.load()
        picture = image.copy()
    record = json.loads(read_metadata(path)["mezzotint"])
    for name, value in changes.items():
        record[name] = record.get(name, {}) | value if isinstance(value, dict) else value
    picture.info = read_metadata(path) | {"mezzotint": json.dumps(record)}
    save(picture, path)


# ---- identical -------------------------------------------------------------------------------------------------------

ROWS = [name for name in samplers.NAMES if "adaptive" not in name]  # which takes as many steps as it likes


def random_requests(count: int, scene: Path) -> Iterator[Request]:
    """Of every mode, with any sampler, size, count, batch, guidance and noise; the tiny model's own size is 32x32."""
    chance = random.Random(6)
    start: dict[str, Any] = {"image": str(scene / "scene.png"), "strength": 0.6}
    hole: dict[str, Any] = start | {"mask": str(scene / "hole.png")}
    modes: list[dict[str, Any]] = [
        {},
        {"guidance_method": "apg", "negative_prompt": "blue"},
        {"noise": "philox"},
        {"clip_skip": 1, "guidance_rescale": 0.5},
        {"prompt": "[a lemon:blue:0.5] AND (background:1.3) :0.5"},
        {"prompt": "{a lemon|blue} on a background", "prompt_syntax": "comfy"},
        {"variation_seed": 5, "variation_strength": 0.3},
        {"seed_size": (48, 32)},
        {"seamless": "xy"},
        {"hires": 1.5, "hires_strength": 0.6},
        {"hires": 2.0, "hires_upscale": "pixels", "hires_strength": 0.5, "hires_steps": 2},
        start,
        start | {"noise": "philox", "resize_mode": "crop"},
        hole | {"mask_blur": 2.0},
        hole | {"masked_content": "noise", "strength": 1.0},
        hole | {"only_masked": 4, "masked_content": "fill"},
        {"image": str(scene / "scene.png"), "outpaint": (8, 0, 8, 16), "strength": 1.0},
    ]
    for k in range(count):
        sampler = chance.choice(ROWS)
        size = {"width": 8 * chance.randint(3, 5), "height": 8 * chance.randint(3, 5)}
        yield Request(
            **{
                "prompt": "a lemon on a blue background",
                "seed": chance.randrange(2**64 - 4),
                "steps": chance.randint(3, 4),
                "sampler": sampler,
                "count": chance.choice([1, 1, 2, 3] if count > 20 else [1, 1, 1, 2]),  # of each file all are drawn
                "batch": chance.randint(1, 3),
                "guidance_scale": chance.choice([1.0, 3.0, 7.5]),
                **({} if modes[k % len(modes)].keys() & {"image", "hires"} else size),
                **modes[k % len(modes)],
            }
        )


@pytest.mark.parametrize("count", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_random_requests_are_identical_in_a_fresh_process(
    count: int, sd1: Pipeline, sd1_folder: Path, scene: Path
) -> None:
    drawn, files = scene / "drawn", 0
    drawn.mkdir()
    for k, request in enumerate(random_requests(count, scene)):
        for n, image in enumerate(sd1.generate(request).images):
            save(image, drawn / f"{k:02}-{n}{('.png', '.webp', '.jpg')[k % 3]}")
            files += 1
    names = sorted(os.listdir(drawn))
    command = [sys.executable, "-m", "mezzotint", "again", *names, "--verify", "--json", "--model", str(sd1_folder)]
    ran = subprocess.run([*command, "--image", "..", "--mask", ".."], cwd=drawn, capture_output=True, text=True)
    told = json.loads(ran.stdout)["files"]
    assert [entry for entry in told if entry["code"]] == []
    assert len(told) == files > count and ran.returncode == 0 and ran.stderr == ""
    assert sorted(os.listdir(drawn)) == names, "nothing was written"


def test_a_file_made_again_is_the_same_file(run: Any, sd1: Pipeline, scene: Path) -> None:
    """Byte for byte, from whichever place in its batch."""
    for k, image in enumerate(sd1.generate(LEMON.replace(count=3, batch=3)).images):
        save_png(image, scene / f"{k}.png")
        edit(scene / f"{k}.png", model={"name": "emoji"})
        assert run(f"{k}.png").code == 0
        before, after = (read_metadata(name) for name in (f"{k}.png", f"mezzotint-{7 + k}.png"))
        assert json.loads(before["mezzotint"]) | {"model": None} == json.loads(after["mezzotint"]) | {"model": None}
        assert read(after).pixels == read(before).pixels  # type: ignore[union-attr]


# ---- told apart ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lemon_png(sd1: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lemon") / "lemon.png"
    save_png(sd1.generate(LEMON.replace(count=2, batch=2)).images[1], path)
    return path


@pytest.fixture
def lemon(lemon_png: Path, scene: Path) -> Path:
    return Path(shutil.copy(lemon_png, scene))


def test_one_flipped_pixel(run: Any, lemon: Path) -> None:
    assert run("lemon.png", "--verify", "--model", "tiny").out == "lemon.png: identical\n"
    with Image.open(lemon) as image:
        picture = image.copy()
    red, green, blue = picture.getpixel((3, 5))  # type: ignore[misc]
    picture.putpixel((3, 5), (red, green ^ 1, blue))
    picture.info = read_metadata(lemon)
    save_png(picture, lemon)
    ran = run("lemon.png", "--verify", "--model", "tiny")
    assert ran.code == 1
    said = "lemon.png: differs: max 1/255 in 0.10 % of pixels; the new picture matches the record's hash"
    assert ran.out.startswith(said)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 9, "group": [7, 9]},
        {"group": [8, 8], "place": 0},
        {"request": {"steps": 3}},
        {"request": {"prompt": "a lemon"}},
        {"request": {"guidance_scale": 3.5}},
    ],
    ids=str,
)
def test_an_edited_record_with_pixels_and_hash_untouched(run: Any, lemon: Path, changes: dict[str, Any]) -> None:
    """It draws; hashes alone would say that all is well."""
    before = Path(lemon).read_bytes()
    edit(lemon, **changes)
    assert Path(lemon).read_bytes() != before
    ran = run("lemon.png", "--verify", "--model", "tiny")
    if changes == {"group": [8, 8], "place": 0}:  # the same seed at another place: the same picture, up to rounding
        assert ran.code in (0, 1)
    else:
        assert (ran.code, ran.out.split(":")[1]) == (1, " differs")
        assert "the new picture matches" not in ran.out


def test_an_edited_hash(run: Any, lemon: Path) -> None:
    edit(lemon, pixels="ab" * 32)
    ran = run("lemon.png", "--verify", "--model", "tiny")
    assert ran.code == 1
    assert ran.out == "lemon.png: differs: the pixels are identical, but do not match the record's hash\n"


def test_what_changed_is_named(run: Any, lemon: Path) -> None:
    record = json.loads(read_metadata(lemon)["mezzotint"])
    files = record["model"]["files"] | {"unet/diffusion_pytorch_model.safetensors": "ab" * 32}
    edit(
        lemon,
        request={"steps": 1},
        versions={"torch": "1.2.3"},
        model={"files": files, "device": "cuda", "dtype": "float16"},
    )
    ran = run("lemon.png", "--verify", "--model", "tiny")
    assert ran.code == 1
    for said in (
        f"torch's version was 1.2.3 and is now {torch.__version__}",
        "the device was cuda and is now cpu",
        "the dtype was float16 and is now float32",
        "the model's unet/diffusion_pytorch_model.safetensors was ababababab... and is now ",
    ):
        assert said in ran.out
    assert "steps" not in ran.out


def test_another_size_is_a_difference(sd1: Pipeline, lemon: Path) -> None:
    source = read_source(lemon)
    verdict = judge(source, again(sd1, source, {"width": 40})[0])
    assert not verdict.identical and verdict.sentences[0] == "differs: one picture is 32x32, the other 40x32"


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_other_formats_are_told_apart_too(run: Any, sd1: Pipeline, scene: Path, suffix: str) -> None:
    image = sd1.generate(LEMON).images[0]
    save(image, scene / f"x{suffix}")
    assert run(f"x{suffix}", "--verify", "--model", "tiny").out == f"x{suffix}: identical\n"
    for x in range(12, 20):
        image.putpixel((x, 5), (255, 0, 255))
    save(image, scene / f"x{suffix}")
    assert run(f"x{suffix}", "--verify", "--model", "tiny").code == 1


# ---- cannot be judged ------------------------------------------------------------------------------------------------


def test_what_cannot_be_judged(run: Any, lemon: Path, scene: Path) -> None:
    save_png(Image.new("RGB", (8, 8)), scene / "bare.png")
    (scene / "text.png").write_text("hello")
    Image.new("RGB", (8, 8)).save(scene / "x.gif")
    edit_to = json.dumps({"request": 7})
    broken = Image.new("RGB", (8, 8))
    broken.info["mezzotint"] = edit_to
    save_png(broken, scene / "broken.png")
    for name, sentence in {
        "bare.png": "'bare.png': the file has no generation record",
        "text.png": "'text.png' is not a PNG, JPEG or WebP file",
        "x.gif": "'x.gif' is not a PNG, JPEG or WebP file",
        "missing.png": "'missing.png' cannot be read",
        "broken.png": "'broken.png': the record's request is invalid",
        "lemon.png": "it was generated with the model 'tiny' (SHA-256 ",
    }.items():
        ran = run(name, "--verify")
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith(f"{name}: cannot be judged: {sentence}") and ran.err.count("\n") == 1
    ran = run("lemon.png", "bare.png", "--verify", "--model", "tiny")
    assert (ran.code, ran.out) == (2, "lemon.png: identical\n"), "the others go on"


def test_given_latents_cannot_be_drawn_again(run: Any, sd1: Pipeline, scene: Path) -> None:
    save_png(sd1.generate(LEMON, torch.zeros(1, 4, 4, 4)).images[0], scene / "x.png")
    ran = run("x.png", "--verify", "--model", "tiny")
    assert ran.code == 2 and "generated from given latents" in ran.err


# ---- the pictures it was drawn from ----------------------------------------------------------------------------------


@pytest.fixture
def orange(sd1: Pipeline, scene: Path) -> Path:
    request = LEMON.replace(image=str(scene / "scene.png"), mask=str(scene / "hole.png"), strength=0.7)
    save_png(sd1.generate(request).images[0], scene / "orange.png")
    return scene / "orange.png"


def test_input_pictures_are_found_by_what_they_are(run: Any, orange: Path, scene: Path) -> None:
    verify = ("orange.png", "--verify", "--model", "tiny")
    assert run(*verify).out == "orange.png: identical\n"
    (scene / "elsewhere").mkdir()
    (scene / "scene.png").rename(scene / "renamed.PNG")
    assert run(*verify).out == "orange.png: identical\n", "under any name beside the file"
    (scene / "renamed.PNG").rename(scene / "elsewhere" / "deep.png")
    ran = run(*verify)
    assert ran.code == 2
    assert "was changed or is missing: no picture with the SHA-256" in ran.err
    assert "give the picture or its folder with --image" in ran.err
    assert run(*verify, "--image", "elsewhere").code == 0
    assert run(*verify, "--image", "elsewhere/deep.png").code == 0


def test_a_changed_input_picture_is_reported(run: Any, orange: Path, scene: Path) -> None:
    with Image.open(scene / "scene.png") as image:
        image.transpose(Image.Transpose.ROTATE_90).save(scene / "scene.png")
    ran = run("orange.png", "--verify", "--model", "tiny")
    assert ran.code == 2 and "was changed or is missing" in ran.err
    ran = run("orange.png", "--verify", "--model", "tiny", "--image", "scene.png")
    assert ran.code == 1
    assert "the input picture (image) was " in ran.out and "whose SHA-256 is not the one in the record" in ran.out


def test_bytes_and_pictures_in_memory_must_be_named(run: Any, sd1: Pipeline, scene: Path) -> None:
    with Image.open(scene / "scene.png") as image:
        save_png(sd1.generate(LEMON.replace(image=image, strength=0.7)).images[0], scene / "x.png")
    data = (scene / "scene.png").read_bytes()
    save_png(sd1.generate(LEMON.replace(image=data, strength=0.7)).images[0], scene / "y.png")
    assert run("y.png", "--verify", "--model", "tiny").code == 0, "these bytes are a file here"
    ran = run("x.png", "--verify", "--model", "tiny", "--image", "scene.png")
    assert ran.code == 0, "the same pixels in another file"


# ---- nothing is opened because a file says so ------------------------------------------------------------------------


def test_no_path_of_a_record_is_opened(run: Any, lemon: Path, scene: Path) -> None:
    trap = scene / "trap"
    trap.mkdir()
    Image.new("RGB", (32, 32)).save(trap / "picture.png")
    save_file({"<trap>": torch.zeros(1, 16)}, trap / "trap.safetensors")
    path = str(trap / "picture.png")
    seen: list[str] = []
    armed = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if armed and event in ("open", "os.listdir", "os.scandir") and str(trap) in str(args[0]):
            seen.append(event)

    sys.addaudithook(hook)
    for changes in (
        {"request": {"image": path, "strength": 0.5}},
        {"request": {"image": path}, "inputs": {"image": {"path": path, "sha256": "ab" * 32}}},
        {"request": {"embeddings": [str(trap)], "prompt": "trap"}},
        {"request": {"embeddings": [str(trap)], "prompt": "trap"}, "model": {"embeddings": {"trap": "ab" * 32}}},
        {"request": {"prompt_syntax": "comfy", "emphasis": None, "choices": None, "wildcards": str(trap)}},
        {"request": {"loras": [[str(trap / "trap.safetensors"), 1.0]]}},
        {"request": {"lora_folder": str(trap), "prompt": "<lora:trap:1>"}},
        {"request": {"hires": 1.5, "hires_upscale": str(trap / "trap.safetensors")}},
        {"model": {"name": str(trap), "lora": str(trap / "trap.safetensors")}},
    ):
        (scene / "attack.png").write_bytes(lemon.read_bytes())
        edit(scene / "attack.png", **changes)
        armed = True
        for options in ((), ("--verify",), ("--model", "tiny"), ("--model", "tiny", "--steps", "1")):
            run("attack.png", *options)
        armed = False
        assert not seen, changes


def test_every_field_that_names_a_file_is_known() -> None:
    """A new one must not be believed either."""
    words = ("a file", "(file,", "a folder", "the path", "files,", "hub id")
    named = {name for name, field in Request.model_fields.items() if any(w in (field.description or "") for w in words)}
    assert named == {*FILE_FIELDS}
    assert {*DEPENDENT_FIELDS} | {n for names in DEPENDENT_FIELDS.values() for n in names} <= {*Request.model_fields}


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_the_same_but(run: Any, sd1: Pipeline, lemon: Path) -> None:
    ran = run("lemon.png", "--model", "tiny", "--steps", "3", "--guidance", "2", "--out", "other.webp")
    assert (ran.code, ran.out) == (0, "lemon.png: Wrote other.webp\n")
    found = read(read_metadata("other.webp"))
    assert found and found.request == sd1.resolve(LEMON.replace(seed=8, steps=3, guidance_scale=2.0, batch=2))
    assert run("lemon.png", "--model", "tiny", "--sampler", "euler_a", "--size", "40x32", "--count", "2").code == 0
    assert {"mezzotint-8.png", "mezzotint-9.png"} < {*os.listdir()}
    found = read(read_metadata("mezzotint-9.png"))
    assert found and (found.request.sampler, found.request.spacing, found.request.eta) == ("euler_a", "linspace", 1.0)
    assert run("lemon.png", "--model", "tiny", "--prompt", "a lemon", "--seed", "3", "--out", "x.png").code == 0
    found = read(read_metadata("x.png"))
    assert found and (found.request.prompt, found.seed) == ("a lemon", 3)


def test_wrong_options_get_a_sentence(run: Any, lemon: Path) -> None:
    for options, sentence in {
        "lemon.png --verify --steps 3": "steps is given together with --verify",
        "lemon.png --verify --out x.png": "out is given together with --verify",
        "lemon.png lemon.png --out x.png": "it must be a folder, or a pattern",
        "lemon.png --model tiny --steps 0": "steps is 0; it must be",
        "lemon.png --model tiny --out missing/x.png": "cannot be written",
    }.items():
        ran = run(*options.split())
        assert ran.code == 2 and sentence in ran.err and ran.err.count("\n") == 1


# ---- A1111's pictures ------------------------------------------------------------------------------------------------


def test_a_picture_of_a1111(run: Any, sd1: Pipeline, scene: Path) -> None:
    image = Image.new("RGB", (32, 32))
    image.info["parameters"] = (
        "a lemon <lora:sour:0.8>\nNegative prompt: dark\nSteps: 3, Sampler: Euler a, Schedule type: Karras, "
        "CFG scale: 5, Seed: 41, Size: 32x40, Model hash: 0123456789, Model: sourMix_v2, Clip skip: 2, Version: v1.9.4"
    )
    save(image, scene / "theirs.jpg")
    ran = run("theirs.jpg", "--out", "ours.png")
    assert ran.code == 2 and "the model 'sourMix_v2' (SHA-256 0123456789...)" in ran.err
    ran = run("theirs.jpg", "--model", "tiny", "--out", "ours.png")
    assert ran.code == 0 and "ignored: <lora:sour:0.8>" in ran.out and "which this one does not have" in ran.out
    found = read(read_metadata("ours.png"))
    assert found is not None
    made = found.request
    assert (made.prompt, made.negative_prompt, made.steps) == ("a lemon <lora:sour:0.8>", "dark", 3)
    assert (made.sampler, made.guidance_scale, found.seed) == ("Euler a Karras", 5.0, 41)
    assert (made.width, made.height, made.clip_skip, made.noise) == (32, 40, 1, "philox")
    assert run("theirs.jpg", "--model", "tiny", "--verify").code == 1


def test_a_random_seed_in_a_text_names_the_file(run: Any, scene: Path) -> None:
    image = Image.new("RGB", (32, 32))
    image.info["parameters"] = "a lemon\nSteps: 2, Sampler: Euler, Seed: -1, Size: 32x32"
    save_png(image, scene / "random.png")
    ran = run("random.png", "--model", "tiny")
    (made,) = scene.glob("mezzotint-*.png")
    found = read(read_metadata(made))
    assert found is not None and made.name == f"mezzotint-{found.seed}.png"
    assert ran.out.startswith(f"random.png: Wrote {made.name}; seed {found.seed}; ignored: Seed: a negative seed")


def test_the_notices_of_the_new_picture_are_printed(run: Any, scene: Path) -> None:
    image = Image.new("RGB", (32, 32))
    image.info["parameters"] = "a lemon <lora:nothere:1>\nSteps: 2, Sampler: Euler, Seed: 3, Size: 32x32"
    save_png(image, scene / "theirs.png")
    assert "; <lora:nothere:1> is ignored: " in run("theirs.png", "--model", "tiny").out


def test_settings_that_cannot_be_read_are_quoted(run: Any, scene: Path) -> None:
    image = Image.new("RGB", (32, 32))
    for text, sentence in {
        "a lemon\nSteps: 25 | Sampler: Euler a | Seed: 7": "has the settings 'Steps: 25 | Sampler: Euler a | Seed: 7', "
        "which cannot be read; they must be its last line",
        "a lemon, steps: many": "the file has no generation record",
    }.items():
        image.info["parameters"] = text
        save_png(image, scene / "theirs.png")
        ran = run("theirs.png", "--model", "tiny")
        assert ran.code == 2 and sentence in ran.err


def test_ours_can_be_drawn_from_its_a1111_text_alone(run: Any, sd1: Pipeline, scene: Path) -> None:
    """As when a web site kept that text and not the record."""
    for k, request in enumerate([LEMON.replace(sampler="Euler a"), LEMON.replace(sampler="DPM++ 2M", noise="philox")]):
        image = sd1.generate(request.replace(guidance_scale=4.0)).images[0]
        del image.info["mezzotint"]
        save_png(image, scene / f"{k}.png")
        assert run(f"{k}.png", "--verify", "--model", "tiny").out == f"{k}.png: identical\n"


def test_select_model(lemon: Path) -> None:
    source = read_source(lemon)
    assert select_model(source, "x") == "x"
    with pytest.raises(RequestError, match=r"the model 'tiny' \(SHA-256 \w{10}\.\.\.\); give it with --model"):
        select_model(source, None)
    edit(lemon, model={"name": "emoji"})
    assert select_model(read_source(lemon), None) is None
    edit(lemon, model={"name": ""})
    with pytest.raises(RequestError, match="does not name its model"):
        select_model(read_source(lemon), None)


def test_a_folder_of_many_files_is_not_searched_without_end(orange: Path, scene: Path) -> None:
    source = read_source(orange)
    paths, warnings = find_inputs(source, {}, [scene / "missing", scene])
    assert paths == {"image": str(scene / "scene.png"), "mask": str(scene / "hole.png")} and not warnings
    os.mkfifo(scene / "a.png")  # it would never end
    assert find_inputs(source, {}, [scene])[0] == paths


# ---- strangers' pictures ---------------------------------------------------------------------------------------------


def test_the_folders_of_the_author_are_in_no_picture(run: Any, sd1: Pipeline, scene: Path) -> None:
    """Neither text of a shared picture names them, and `again` finds the files by their SHA-256 or by options."""
    save_lora(scene / "a" / "hat.safetensors", 1.0)
    save_lora(scene / "b" / "hat.safetensors", -1.0)
    save_file({"<cat>": torch.ones(1, 16)}, scene / "cat.safetensors")
    request = LEMON.replace(
        prompt="a <cat> lemon <lora:hat:0.5>",
        image=str(scene / "scene.png"),
        mask=str(scene / "hole.png"),
        strength=0.7,
        loras=((str(scene / "a" / "hat.safetensors"), 0.5), (str(scene / "b" / "hat.safetensors"), 0.25)),
        embeddings=(str(scene / "cat.safetensors"),),
        lora_folder=str(scene / "a"),
    )
    image = sd1.generate(request).images[0]
    assert str(scene) not in "".join(image.info.values()) and scene.name not in "".join(image.info.values())
    found = json.loads(image.info["mezzotint"])
    names = ("image", "mask", "loras", "embeddings", "lora_folder")
    assert [found["request"][name] for name in names] == [
        "scene.png",
        "hole.png",
        [["hat.safetensors", 0.5], ["hat.safetensors", 0.25]],
        ["cat.safetensors"],
        "a",
    ]
    assert {name: given["path"] for name, given in found["inputs"].items()} == {
        "image": "scene.png",
        "mask": "hole.png",
    }
    assert [*found["model"]["loras"]] == ["hat.safetensors", "hat.safetensors (2)"]
    assert found["model"]["loras"]["hat.safetensors"] != found["model"]["loras"]["hat.safetensors (2)"]
    save_png(image, scene / "shared.png")
    (scene / "scene.png").rename(scene / "other name.png")
    options = (
        "--verify --model tiny --lora a/hat.safetensors:0.5 --lora b/hat.safetensors:0.25 --embedding cat.safetensors"
    )
    assert run("shared.png", *options.split(), "--lora-folder", "a").code == 2, "it would be a change"
    request = request.replace(prompt="a <cat> lemon", lora_folder=None, image=str(scene / "other name.png"))
    save_png(sd1.generate(request).images[0], scene / "shared.png")
    assert run("shared.png", *options.split()).out == "shared.png: identical\n"


def save_lora(path: Path, value: float) -> None:
    path.parent.mkdir(exist_ok=True)
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{layer}.lora_A.weight": torch.full((1, 16), value), f"{layer}.lora_B.weight": torch.ones(16, 1)}, path)


@pytest.mark.parametrize(
    ("changes", "asks"),
    [
        ({"request": {"width": 4096, "height": 4096, "steps": 64}}, False),
        ({"request": {"width": 4096, "height": 4096, "steps": 65}}, True),
        ({"request": {"width": 4104, "height": 4096, "steps": 1}}, True),
        ({"group": [7, 8] + [9] * 9_998}, False),
        ({"group": [7, 8] + [9] * 9_998, "request": {"width": 40, "height": 40}}, False),
        ({"group": [7, 8] + [9] * 9_998, "request": {"width": 48, "height": 40}}, True),
        ({"group": [7, 8] + [9] * 9_998, "request": {"steps": 106}}, True),
        ({"request": {"width": 1024, "height": 1024, "hires": 4.0, "hires_steps": 63}}, False),
        ({"request": {"width": 1024, "height": 1024, "hires": 4.0, "hires_steps": 64}}, True),
        ({"request": {"width": 1024, "height": 1032, "hires": 4.0}}, True),
        ({"request": {"width": 1024, "height": 1024, "steps": 64, "prompt": "a AND " * 15 + "a"}}, False),
        ({"request": {"width": 1024, "height": 1024, "steps": 64, "prompt": "a AND " * 16 + "a"}}, True),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_a_file_may_ask_for(lemon: Path, changes: dict[str, Any], asks: bool) -> None:
    """At most 2**24 pixels at once, and 2**30 pixels x steps x pictures; counted by hand, on both sides of each."""
    edit(lemon, **{"group": [8], "place": 0, **changes} if "group" not in changes else changes)
    source = read_source(lemon)
    if asks:
        with pytest.raises(RequestError, match=r"above 16,777,216 and 1,073,741,824 it is drawn only with --yes"):
            check_work(source)
    else:
        check_work(source)


def test_a_long_prompt_needs_yes(lemon: Path) -> None:
    """Of any picture of the batch, and in the negative prompt too: the context grows with it."""
    for changes in (
        {"request": {"prompt": "a " * 5001}},
        {"request": {"negative_prompt": "a " * 5001}},
        {"others": [{"prompt": "a " * 5001}, {}]},
    ):
        edit(lemon, **{"request": {"prompt": "a", "negative_prompt": "b"}, "others": [], **changes})
        with pytest.raises(RequestError, match="has 10,002 characters; above 10,000 it is drawn only with --yes"):
            check_work(read_source(lemon))


def test_a_large_picture_needs_yes(run: Any, lemon: Path) -> None:
    """Before a model is loaded; an override counts as well, in both directions."""
    edit(lemon, request={"width": 8192, "height": 8192})
    ran = run("lemon.png", "--verify", "--model", "tiny")
    assert ran.code == 2 and "it asks for 134,217,728 pixels at once (2 x 8192x8192)" in ran.err
    assert run("lemon.png", "--model", "tiny", "--size", "32x32").code == 0
    ran = run("lemon.png", "--model", "tiny", "--size", "32x32", "--count", "9999", "--steps", "500")
    assert ran.code == 2 and "only with --yes" in ran.err
    edit(lemon, request={"width": 32, "height": 32}, group=[7, 8] * 5)
    check_work(read_source(lemon))


def test_yes_draws_what_a_file_asks_for(run: Any, lemon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mezzotint.again.MAX_PIXELS", 2047)  # the batch has two pictures of 32x32
    assert run("lemon.png", "--verify", "--model", "tiny").code == 2
    assert run("lemon.png", "--verify", "--model", "tiny", "--yes").out == "lemon.png: identical\n"


def test_one_bad_file_does_not_end_the_others(run: Any, lemon: Path, scene: Path) -> None:
    graph = Image.new("RGB", (8, 8))
    info = PngInfo()
    own = {"positive": ["2", 0], "negative": ["2", 0], "model": ["4", 0], "latent_image": ["5", 0]}
    info.add_text(
        "prompt", json.dumps({"1": {"class_type": "KSampler", "inputs": own}, "2": {"inputs": {"text": "a"}}})
    )
    graph.save(scene / "a-graph.png", pnginfo=info)
    (scene / "b-palette.png").write_bytes(palette_png())
    (scene / "c-text.png").write_text("hello")
    ran = run("a-graph.png", "b-palette.png", "c-text.png", "lemon.png", "--verify", "--model", "tiny")
    assert (ran.code, ran.out) == (2, "lemon.png: identical\n")
    lines = ran.err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["a-graph.png", "b-palette.png", "c-text.png"]
    assert "its positive prompt does not come from a CLIPTextEncode node" in lines[0]
    assert "bug" not in ran.err


def test_a_bug_with_one_file_does_not_end_the_others(
    run: Any, lemon: Path, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scene / "other.png").write_bytes(lemon.read_bytes())

    def fail(path: Path, chunks: Any = ()) -> Any:
        return 1 / 0 if Path(path).name == "other.png" else read_metadata(path, chunks)

    monkeypatch.setattr("mezzotint.again.read_metadata", fail)
    ran = run("other.png", "lemon.png", "--verify", "--model", "tiny")
    assert (ran.code, ran.out) == (2, "lemon.png: identical\n")
    assert ran.err.startswith("other.png: cannot be judged: this is a bug in mezzotint (ZeroDivisionError: ")


def palette_png() -> bytes:
    """A PNG of colour type 3 without the PLTE chunk that it must have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 3, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + bytes(range(32))) * 32))
    return b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("open", [read_picture, open_picture, open_mask])
def test_a_palette_picture_without_its_palette(scene: Path, open: Callable[[str], Any]) -> None:
    (scene / "palette.png").write_bytes(palette_png())
    with pytest.raises(RequestError, match=r"palette.png'.*its palette is missing"):
        open(str(scene / "palette.png"))


def test_a_picture_that_cannot_be_written_has_code_1(run: Any, lemon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes, overwrite: bool) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mezzotint.images.io.write_atomically", full)
    ran = run("lemon.png", "--model", "tiny")
    assert (ran.code, ran.out) == (1, "") and "No space left on device" in ran.err
