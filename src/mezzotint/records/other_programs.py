"""What ComfyUI and InvokeAI write into their pictures, as Requests, with what of it cannot be honoured.

    ComfyUI     text chunk `prompt`              the graph that ran; read is the standard one of text to image
    InvokeAI    text chunk `invokeai_metadata`   a list of settings

SD.Next writes A1111's text (infotext.py). What a file says is data: names of models and networks open nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mezzotint.errors import RequestError
from mezzotint.records.infotext import MAX_TEXT
from mezzotint.request import Request
from mezzotint.samplers.names import SOLVERS
from mezzotint.samplers.presets import PRESETS

Read = tuple[Request, list[str], str]  # the request; what is not honoured, a phrase each; the model's name
MOST_NODES = 10_000
INVOKE_NAMES = {"kdpm_2": "dpm2", "kdpm_2_a": "dpm2_a"}  # of their schedulers, where ours is another


def read(texts: Mapping[str, str]) -> Read | None:
    """The first of the two that is among a picture's texts. Raises RequestError for what cannot be read."""
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


def _comfyui(graph: Mapping[str, Any]) -> Read:
    """A graph of nodes {"class_type", "inputs"}, where an input that is a list [node, output] is a link."""
    nodes = {
        name: node for name, node in graph.items() if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }
    if len(nodes) > MOST_NODES:
        raise RequestError(f"its graph has {len(nodes):,} nodes; at most {MOST_NODES:,} are read")
    samplers = [node for node in nodes.values() if node.get("class_type") in ("KSampler", "KSamplerAdvanced")]
    if len(samplers) != 1:
        raise RequestError(f"its graph has {len(samplers)} KSampler nodes; read is the standard graph, which has one")

    def linked(inputs: Mapping[str, Any], name: str) -> dict[str, Any]:
        """The node that an input comes from; {} where it comes from none."""
        link = inputs.get(name)
        known = isinstance(link, list) and link and isinstance(link[0], str)
        node = nodes.get(link[0]) if known else None  # type: ignore[index]
        return node or {"class_type": "", "inputs": {}}

    def chain(inputs: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
        """The nodes one behind the other along an input of the same name; a ring ends."""
        for _ in range(100):
            node = linked(inputs, name)
            if not node["class_type"]:
                return
            yield node
            inputs = node["inputs"]

    own, notes = samplers[0]["inputs"], list[str]()
    words: dict[str, str] = {}
    skipped = 0
    for field, name in (("prompt", "positive"), ("negative_prompt", "negative")):
        node = linked(own, name)
        text = node["inputs"].get("text")
        if node["class_type"] != "CLIPTextEncode" or not isinstance(text, str):
            raise RequestError(f"its {name} prompt comes from another node than CLIPTextEncode with a text of its own")
        words[field] = text
        for behind in chain(node["inputs"], "clip"):
            layer = behind["inputs"].get("stop_at_clip_layer")
            skipped = max(-layer - 1, 0) if isinstance(layer, int) else skipped
    latents = linked(own, "latent_image")
    if latents["class_type"] != "EmptyLatentImage":
        raise RequestError("its graph does not start from EmptyLatentImage: only text to image is read")
    model = ""
    for node in chain(own, "model"):
        name = node["inputs"].get("ckpt_name")
        model = name if isinstance(name, str) else model
        if name is None:
            told = str(node["inputs"].get("lora_name", ""))[:100]
            notes.append(f"{str(node['class_type'])[:60]} {told}".strip())
    if own.get("denoise", 1.0) != 1.0 or own.get("start_at_step", 0) != 0:
        notes.append("denoise below 1 on an empty picture")
    if latents["inputs"].get("batch_size", 1) != 1:
        notes.append("only the first picture of its batch has noise of this seed")
    sampler = f"{own.get('sampler_name')} {own.get('scheduler')}"
    if sampler not in PRESETS:
        notes.append(f"the sampler {sampler[:100]}: not known here, drawn with the model's own")
    request = Request.model_validate(
        {
            **words,
            "prompt_syntax": "comfy",
            "choices": "keep",  # its own were drawn before the graph ran
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


def _invokeai(found: Mapping[str, Any]) -> Read:
    """Its settings; prompts in Compel's syntax, schedulers are diffusers' classes, `_k` with karras levels."""
    notes: list[str] = []
    mode = found.get("generation_mode", "txt2img")
    if mode not in ("txt2img", "sdxl_txt2img"):
        raise RequestError(f"it was made by {str(mode)[:60]!r}; of InvokeAI's pictures only text to image is read")
    name = str(found.get("scheduler", ""))
    base = name.removesuffix("_k")
    solver = INVOKE_NAMES.get(base, base)
    if solver not in SOLVERS:
        notes.append(f"the scheduler {name[:60]}: not known here, drawn with the model's own")
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


READERS: dict[str, Callable[[Mapping[str, Any]], Read]] = {"invokeai_metadata": _invokeai, "prompt": _comfyui}
