"""`mezzotint info`: what the records of four programs hold, readable or not, without drawing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import mezzotint
from mezzotint.records.record import describe
from mezzotint.request import Request

Run = Callable[..., Any]
COMFYUI = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 8, "steps": 20, "cfg": 8, "sampler_name": "euler", "scheduler": "normal", "denoise": 1,
            "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "dream.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a lemon", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "dark", "clip": ["4", 1]}},
}  # fmt: skip
A1111 = (
    "a lemon\nNegative prompt: dark\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 9, "
    "Size: 512x768, Model hash: 0123456789, Model: dream, Refiner: other, Hires prompt: x, Version: v1.10.1"
)
INVOKEAI = {"positive_prompt": "a lemon", "seed": 3, "scheduler": "euler_k", "steps": 9, "model": {"name": "dream"}}


@pytest.fixture(autouse=True)
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(mezzotint, "load", load, raising=False)


def write(texts: dict[str, str]) -> str:
    """Write a picture with these texts into the current folder."""
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    Image.new("RGB", (16, 8)).save("lemon.png", pnginfo=chunks)
    return "lemon.png"


@pytest.mark.parametrize(
    ("texts", "program", "lines"),
    [
        (
            describe(
                Request(prompt="a lemon\x1b[2J", steps=3, sampler="Euler a", seed=6, count=2),
                7,
                {"name": "emoji", "files": {"unet.safetensors": "ab" * 32}, "threads": 2},
                flagged=True,
            ),
            f"mezzotint {mezzotint.__version__}",
            ["prompt: a lemon\\x1b[2J", "steps: 3", "sampler: Euler a", "seed: 7", "model: emoji",
             "number of threads: 2", "model's unet.safetensors: ababababab...", "flagged by the safety checker: yes"],
        ),
        (
            {"parameters": A1111},
            "AUTOMATIC1111 v1.10.1",
            ["prompt: a lemon", "negative_prompt: dark", "sampler: DPM++ 2M Karras", "seed: 9", "width: 512",
             "model: dream", "model_hash: 0123456789", "refiner: other", "not supported: Hires prompt: x"],
        ),
        (
            {"prompt": json.dumps(COMFYUI), "workflow": "{}"},
            "ComfyUI",
            ["prompt: a lemon", "sampler: euler normal", "height: 768", "model: dream.safetensors", "seed: 8"],
        ),
        (
            {"invokeai_metadata": json.dumps(INVOKEAI)},
            "InvokeAI",
            ["prompt: a lemon", "prompt_syntax: compel", "sampler: euler", "spacing: karras", "model: dream"],
        ),
    ],
    ids=["ours", "A1111", "ComfyUI", "InvokeAI"],
)  # fmt: skip
def test_what_a_record_holds(run: Run, texts: dict[str, str], program: str, lines: list[str]) -> None:
    ran = run("info", write(texts))
    assert (ran.code, ran.err) == (0, "")
    first, *rest = ran.out.splitlines()
    assert first == f"lemon.png: PNG, 16x8, record of {program}"
    assert not set(lines) - set(rest)
    found = json.loads(run("info", "lemon.png", "--json").out)
    assert (found["program"], found["width"], found["unreadable"]) == (program, 16, None)
    assert found["request"]["prompt"].startswith("a lemon")
    assert found["texts"] == {name: text for name, text in texts.items() if name != "workflow"}


def test_a_record_that_cannot_be_drawn_is_shown(run: Run) -> None:
    graph = {**COMFYUI, "5": {"class_type": "VAEEncode", "inputs": {}}}
    ran = run("info", write({"prompt": json.dumps(graph)}))
    assert ran.code == 0 and "not read as a request: 'lemon.png': its graph does not start from" in ran.out
    assert '"text": "a lemon"' in ran.out
    found = json.loads(run("info", "lemon.png", "--json").out)
    assert found["request"] is None and "only text-to-image" in found["unreadable"]
    assert json.loads(found["texts"]["prompt"]) == graph
    assert run("info", write({"mezzotint": "{" * 9000})).out.endswith(" ...\n")


def test_a_picture_without_a_record_is_a_sentence(run: Run) -> None:
    ran = run("info", write({}))
    assert (ran.code, ran.out) == (2, "") and "the file has no generation record" in ran.err
    Path("text.png").write_text("no picture")
    assert run("info", "text.png").code == run("info", "none.png").code == 2


def test_inspect_points_to_info(run: Run) -> None:
    ran = run("inspect", write(describe(Request(prompt="x"), 7, {"name": "emoji"})))
    assert (ran.code, ran.err) == (2, "Error: lemon.png is a picture, no model; see: mezzotint info lemon.png\n")
