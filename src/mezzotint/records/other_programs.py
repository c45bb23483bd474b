"""Read the metadata of ComfyUI and InvokeAI as Requests, with notes on settings that are not supported.

    ComfyUI     text chunk `prompt`              the graph; only the standard text-to-image graph is supported
    InvokeAI    text chunk `invokeai_metadata`   a list of settings

SD.Next writes A1111's text (infotext.py). Metadata is untrusted: names of models and networks open no file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mezzotint.errors import RequestError
from mezzotint.records.infotext import MAX_TEXT
from mezzotint.request import Request
from mezzotint.samplers import SOLVERS
from mezzotint.samplers.presets import PRESETS

ReadResult = tuple[Request, list[str], str]  # the request, notes on what is not supported, the model's name
MAX_NODES = 10_000
INVOKE_NAMES = {"kdpm_2": "dpm2", "kdpm_2_a": "dpm2_a"}  # InvokeAI's scheduler names that differ from ours


def read(texts: Mapping[str, str]) -> ReadResult | None:
    """Read the metadata of InvokeAI or ComfyUI from a picture's texts.

    Returns:
        The request, notes on what is not supported, and the model's name; None if the texts have neither.

    Raises:
        RequestError: If the metadata is damaged or not of text-to-image.
    """
    for chunk, reader in READERS.items():
        if chunk in texts:
            return reader(_object(texts[chunk], chunk))
    return None


def _object(text: str, chunk: str) -> dict[str, Any]:
    if len(text) > MAX_TEXT:
        raise RequestError(f"its text {chunk} has {len(text):,} characters; at most {MAX_TEXT:,} are read")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"its text {chunk} is not JSON: {str(error)[:100]}") from None
    if not isinstance(found, dict):
        raise RequestError(f"its text {chunk} must be a JSON object")
    return found


def _comfyui(graph: Mapping[str, Any]) -> ReadResult:
    """Hold nodes {"class_type", "inputs"}, in which an input that is a list [node, output] is a link."""
    nodes = {
        name: node
        for name, node in graph.items()
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict) and isinstance(node.get("class_type"), str)
    }
    if len(nodes) > MAX_NODES:
        raise RequestError(f"its graph has {len(nodes):,} nodes; at most {MAX_NODES:,} are read")
    samplers = [node for node in nodes.values() if node.get("class_type") in ("KSampler", "KSamplerAdvanced")]
    if len(samplers) != 1:
        raise RequestError(
            f"its graph has {len(samplers)} KSampler nodes; only the standard graph, with one, is supported"
        )

    def source_node(inputs: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Return the node that an input is source_node to, or an empty node."""
        link = inputs.get(name)
        known = isinstance(link, list) and link and isinstance(link[0], str)
        node = nodes.get(link[0]) if known else None  # type: ignore[index]
        return node or {"class_type": "", "inputs": {}}

    def chain(inputs: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
        """Follow links of the same name, for at most 100 nodes, since a graph may have a cycle."""
        for _ in range(100):
            node = source_node(inputs, name)
            if not node["class_type"]:
                return
            yield node
            inputs = node["inputs"]

    own, notes = samplers[0]["inputs"], list[str]()
    words: dict[str, str] = {}
    skipped = 0
    for field, name in (("prompt", "positive"), ("negative_prompt", "negative")):
        node = source_node(own, name)
        text = node["inputs"].get("text")
        if node["class_type"] != "CLIPTextEncode" or not isinstance(text, str):
            raise RequestError(f"its {name} prompt does not come from a CLIPTextEncode node with its own text")
        words[field] = text
        for behind in chain(node["inputs"], "clip"):
            layer = behind["inputs"].get("stop_at_clip_layer")
            skipped = max(-layer - 1, 0) if isinstance(layer, int) else skipped
    latents = source_node(own, "latent_image")
    if latents["class_type"] != "EmptyLatentImage":
        raise RequestError("its graph does not start from EmptyLatentImage; only text-to-image is supported")
    model = ""
    for node in chain(own, "model"):
        name = node["inputs"].get("ckpt_name")
        model = name if isinstance(name, str) else model
        if name is None:
            lora = str(node["inputs"].get("lora_name", ""))[:100]
            notes.append(f"{node['class_type'][:60]} {lora}".strip())
    if own.get("denoise", 1.0) != 1.0 or own.get("start_at_step", 0) != 0:
        notes.append("denoise below 1 on an empty latent image")
    if latents["inputs"].get("batch_size", 1) != 1:
        notes.append("only the first picture of its batch has this seed's noise")
    sampler = f"{own.get('sampler_name')} {own.get('scheduler')}"
    if sampler not in PRESETS:
        notes.append(f"the sampler {sampler[:100]} is unknown; the model's default is used")
    request = Request.model_validate(
        {
            **words,
            "prompt_syntax": "comfy",
            "choices": "keep",  # ComfyUI resolves choices before the graph runs
            "seed": own.get("seed", own.get("noise_seed")),
            "steps": own.get("steps"),
            "guidance_scale": own.get("cfg"),
            "sampler": sampler if sampler in PRESETS else None,
            "width": latents["inputs"].get("width"),
            "height": latents["inputs"].get("height"),
            "clip_skip": skipped,
        }
    )
    return request, notes, model


def _invokeai(found: Mapping[str, Any]) -> ReadResult:
    """Read InvokeAI's settings: Compel's prompt syntax, and diffusers' schedulers (suffix `_k`: Karras sigmas)."""
    notes: list[str] = []
    mode = found.get("generation_mode", "txt2img")
    if mode not in ("txt2img", "sdxl_txt2img"):
        raise RequestError(
            f"its generation_mode is {str(mode)[:60]!r}; of InvokeAI's pictures only text-to-image is supported"
        )
    name = str(found.get("scheduler", ""))
    base = name.removesuffix("_k")
    solver = INVOKE_NAMES.get(base, base)
    if solver not in SOLVERS:
        notes.append(f"the scheduler {name[:60]} is unknown; the model's default is used")
    for field in ("loras", "controlnets", "ipAdapters", "t2iAdapters", "refiner_model", "vae", "positive_style_prompt"):
        if found.get(field):
            notes.append(f"{field}: {json.dumps(found[field])[:100]}")
    tiles = "".join(axis for axis in "xy" if found.get(f"seamless_{axis}") is True)
    model = found.get("model")
    request = Request.model_validate(
        {
            "prompt": found.get("positive_prompt", ""),
            "negative_prompt": found.get("negative_prompt", ""),
            "prompt_syntax": "compel",
            "seed": found.get("seed"),
            "steps": found.get("steps"),
            "guidance_scale": found.get("cfg_scale"),
            "guidance_rescale": found.get("cfg_rescale_multiplier"),
            "sampler": solver if solver in SOLVERS else None,
            "spacing": "karras" if solver in SOLVERS and base != name else None,
            "width": found.get("width"),
            "height": found.get("height"),
            "clip_skip": found.get("clip_skip"),
            "seamless": tiles or None,
            "noise": "philox" if found.get("rand_device") == "cuda" else "seeded",
        }
    )
    return request, notes, str(model.get("name", ""))[:4096] if isinstance(model, dict) else ""


READERS: dict[str, Callable[[Mapping[str, Any]], ReadResult]] = {"invokeai_metadata": _invokeai, "prompt": _comfyui}
