"""Names of other programs are answered with ours, and what almost works in Python works or is a sentence."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image

import mezzotint
from mezzotint import Pipeline, Request, RequestError
from mezzotint.errors import LOAD_ALIASES, REQUEST_ALIASES
from mezzotint.image import save_png
from mezzotint.model_options import ModelOptions
from mezzotint.weights.lora import coverage
from mezzotint.weights.save_lora import save_lora


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("num_inference_steps", "use steps"),
        ("guidance", "use guidance_scale"),
        ("cfg", "use guidance_scale"),
        ("cfg_scale", "use guidance_scale"),
        ("generator", "use seed, a whole number"),
        ("num_images_per_prompt", "use count"),
        ("callback_on_step_end", r"use `pipe.generate\(request, on_step=...\)`"),
        ("scheduler", "use sampler"),
        ("output_type", "whose Result has images and latents"),
        ("torch_dtype", "use an argument of `mezzotint.load`"),
        ("stepz", "the nearest is steps"),
    ],
)
def test_a_field_of_another_program(sd1: Pipeline, name: str, ours: str) -> None:
    sentence = f"a request has no field '{name}'; .*{ours}"
    with pytest.raises(RequestError, match=sentence):
        sd1("a lemon", **{name: 3})
    with pytest.raises(RequestError, match=sentence):
        Request.model_validate({"prompt": "a lemon", name: 3})


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("torch_dtype", "use dtype"),
        ("device_map", "use device, and memory or placement"),
        ("use_safetensors", "safetensors are preferred"),
        ("scheduler", "use sampler of a Request"),
        ("num_inference_steps", "use a Request's steps"),
        ("guidance", "use a Request's guidance_scale"),
        ("cfg", "use a Request's guidance_scale"),
        ("generator", "use a Request's seed, a whole number"),
        ("predition", "the nearest is prediction"),
    ],
)
def test_an_argument_of_another_programs_load(sd1_folder: Path, name: str, ours: str) -> None:
    for function in (mezzotint.load, mezzotint.plan):
        with pytest.raises(RequestError, match=f"load has no argument '{name}'; .*{ours}"):
            function(sd1_folder, **({"memory": "4GiB"} if function is mezzotint.plan else {}), **{name: True})


def test_no_alias_is_a_name_of_ours_and_each_says_one() -> None:
    assert not REQUEST_ALIASES.keys() & Request.model_fields.keys()
    assert not LOAD_ALIASES.keys() & {*vars(ModelOptions()), "device", "dtype", "memory", "placement"}
    for alias, ours in REQUEST_ALIASES.items():
        named = ours.startswith(("`pipe.", "an argument of")) or ours.split(",")[0].split()[0] in Request.model_fields
        assert named, alias


def test_a_call_that_asks_for_several_pictures_says_how(sd1: Pipeline) -> None:
    with pytest.raises(RequestError, match=r"count is 3, but pipe\(...\) returns one .*pipe.generate\(.*count=3\)\)"):
        sd1("a lemon", count=3)
    assert sd1("a lemon", count=1, steps=1).size == (32, 32)


def test_a_scheduler_is_neither_read_nor_assigned(sd1: Pipeline) -> None:
    assert not hasattr(sd1, "scheduler")
    with pytest.raises(AttributeError, match="give `sampler` and `spacing` in a request"):
        sd1.scheduler = "ddim"


def test_a_png_is_not_written_under_the_name_of_a_jpeg(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    for name in ("x.jpg", "x.JPEG", "x.webp"):
        with pytest.raises(RequestError, match="would be a PNG file under the name of"):
            save_png(image, tmp_path / name)
    for name in ("x.png", "x", "x.part"):
        save_png(image, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.part", "x.png"]


def test_a_picture_to_encode_may_be_a_file(sd1: Pipeline, tmp_path: Path) -> None:
    image, path = Image.effect_noise((32, 16), 90).convert("RGB"), tmp_path / "x.png"
    image.save(path)
    expected = sd1.encode_image(image)
    for given in (path, str(path), path.read_bytes()):
        assert torch.equal(sd1.encode_image(given), expected)
    with pytest.raises(RequestError, match=r"image is 'nothing\.png', which is not there"):
        sd1.encode_image("nothing.png")


@pytest.mark.parametrize("shape", [(4, 4, 4), (1, 3, 4, 4)])
def test_latents_of_another_shape_are_a_sentence(sd1: Pipeline, shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"it must be \(B, 4, h, w\)"):
        sd1.decode(torch.zeros(shape))


def test_the_coverage_of_a_file_by_its_name(sd1: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_lora(path, {"unet": {"conv_in": (torch.ones(1, 4, 3, 3), torch.ones(16, 1, 1, 1))}})
    networks = {"unet": sd1.unet}
    assert coverage(str(path), networks) == coverage(path, networks)
    assert coverage(str(path), networks).matched == ("unet.conv_in",)


def test_a_deep_copy_draws_the_same_and_is_a_model_of_its_own(sd1_folder: Path, tmp_path: Path) -> None:
    pipe = mezzotint.load(sd1_folder, device="cpu")
    pipe.scheduler_config = {**pipe.scheduler_config, "_class_name": "EulerDiscreteScheduler"}
    other = copy.deepcopy(pipe)
    request = Request(prompt="a lemon", seed=7, steps=2)
    expected = pipe.generate(request)
    assert other.generate(request).images[0].info == expected.images[0].info
    with torch.no_grad():
        other.unet.conv_in.weight.mul_(2)
    assert torch.equal(pipe.generate(request).latents, expected.latents)
    assert not torch.equal(other.generate(request).latents, expected.latents)
    path = tmp_path / "lora.safetensors"
    save_lora(path, {"unet": {"conv_in": (torch.ones(1, 4, 3, 3), torch.ones(16, 1, 1, 1))}})
    pipe.merge([(str(path), 1.0)])
    with pytest.raises(RequestError, match="merged LoRA files cannot be copied; call unmerge"):
        copy.deepcopy(pipe)
