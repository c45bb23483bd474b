"""Pictures of ComfyUI and InvokeAI: their settings as Requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mezzotint.again import read_source
from mezzotint.errors import RequestError
from mezzotint.records.other_programs import read

GRAPH: dict[str, Any] = {  # the default workflow, as its API form
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 156680208700286, "steps": 20, "cfg": 8, "sampler_name": "euler", "scheduler": "normal",
            "denoise": 1, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5-pruned-emaonly.ckpt"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a (bottle:1.2)", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
}  # fmt: skip
INVOKE: dict[str, Any] = {
    "app_version": "4.2.4", "generation_mode": "txt2img", "positive_prompt": "a bottle++", "negative_prompt": "dark",
    "width": 512, "height": 640, "seed": 77, "rand_device": "cpu", "cfg_scale": 7.5, "cfg_rescale_multiplier": 0,
    "steps": 30, "scheduler": "dpmpp_2m_k", "clip_skip": 0, "seamless_x": False, "seamless_y": True,
    "model": {"key": "x", "hash": "blake3:00", "name": "stable-diffusion-v1-5", "base": "sd-1"},
    "loras": [{"model": {"name": "ink"}, "weight": 0.75}],
}  # fmt: skip


def changed(node: str, **inputs: Any) -> dict[str, Any]:
    return GRAPH | {node: GRAPH[node] | {"inputs": GRAPH[node]["inputs"] | inputs}}


def graph(changes: dict[str, Any]) -> Any:
    return read({"prompt": json.dumps(GRAPH | changes)})


def test_comfyuis_standard_graph(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("prompt", json.dumps(GRAPH))
    info.add_text("workflow", "{}")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    source = read_source(tmp_path / "x.png")
    request = source.request
    assert (request.prompt, request.negative_prompt, request.prompt_syntax) == (
        "a (bottle:1.2)",
        "text, watermark",
        "comfy",
    )
    assert (request.seed, request.steps, request.guidance_scale) == (156680208700286, 20, 8.0)
    assert (request.sampler, request.width, request.height, request.clip_skip) == ("euler normal", 512, 768, 0)
    assert source.notes == [] and source.model_name == "v1-5-pruned-emaonly.ckpt"


def test_loras_layers_and_batches_of_a_graph() -> None:
    more = {
        "10": {"class_type": "LoraLoader", "inputs": {"lora_name": "ink", "model": ["4", 0], "clip": ["4", 1]}},
        "11": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["10", 1]}},
        "3": changed("3", model=["10", 0], denoise=0.5, sampler_name="dpmpp_9m", scheduler="karras")["3"],
        "5": changed("5", batch_size=4)["5"],
        "6": changed("6", clip=["11", 0])["6"],
        "7": changed("7", clip=["11", 0])["7"],
    }
    request, notes, model = graph(more)
    assert (request.clip_skip, request.sampler, model) == (1, None, "v1-5-pruned-emaonly.ckpt")
    assert [note.split(":")[0] for note in notes] == [
        "LoraLoader ink",
        "denoise below 1 on an empty latent image",
        "only the first picture of its batch has this seed's noise",
        "the sampler dpmpp_9m karras is unknown; the model's default is used",
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"3": {"class_type": "Other", "inputs": {}}}, "has 0 KSampler nodes"),
        ({"30": GRAPH["3"]}, "has 2 KSampler nodes"),
        (changed("3", latent_image=["4", 0]), "only text-to-image is supported"),
        (changed("3", positive=["99", 0]), "its positive prompt does not come from a CLIPTextEncode node"),
        (changed("3", positive=[]), "its positive prompt does not come from a CLIPTextEncode node"),
        (changed("3", negative=[["7"], 0]), "its negative prompt does not come from a CLIPTextEncode node"),
        (changed("6", text=["12", 0]), "its positive prompt does not come from a CLIPTextEncode node"),
        (changed("3", seed="x"), "seed is 'x'"),
        (changed("3", steps=10**6), "steps is 1000000"),
        (changed("5", width=513), "width is 513"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_graphs_get_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        graph(changes)


def test_a_ring_ends() -> None:
    ring = {"4": {"class_type": "LoraLoader", "inputs": {"model": ["4", 0], "clip": ["4", 1], "lora_name": "x"}}}
    assert len(graph(ring)[1]) == 100


def test_invokeais_settings() -> None:
    found = read({"invokeai_metadata": json.dumps(INVOKE)})
    assert found is not None
    request, notes, model = found
    assert (request.prompt, request.negative_prompt, request.prompt_syntax) == ("a bottle++", "dark", "compel")
    assert (request.sampler, request.spacing, request.seed, request.noise) == ("dpmpp_2m", "karras", 77, "seeded")
    assert (request.width, request.height, request.steps, request.seamless) == (512, 640, 30, "y")
    assert model == "stable-diffusion-v1-5" and [note[:6] for note in notes] == ["loras:"]


@pytest.mark.parametrize("chunk", ["prompt", "invokeai_metadata"])
@pytest.mark.parametrize("text", ["", "7", "[]", "{", "[" * 100_000, '{"a":' * 100_000, "x" * 17_000_000, "9" * 9999])
def test_what_is_no_settings_gets_a_sentence(chunk: str, text: str) -> None:
    with pytest.raises(RequestError, match=f"its text {chunk}"):
        read({chunk: text})


def test_pictures_without_either() -> None:
    assert read({"parameters": "x"}) is None
