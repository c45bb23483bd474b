"""Pictures with IP-Adapters against diffusers' pipelines, live.

    python tests/parity/test_ip_adapter_pictures.py

prints how far apart they are, in every case with every family.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import mezzotint
import pictures
from mezzotint.weights.save_tensors import write_tensors
from pictures import Drawn, Pair, different, draw, same
from test_controlled_pictures import SIZE, blot, drawing
from test_controlnet import theirs as control_network
from test_ip_adapter import EMBED, HIDDEN, adapter_weights
from test_t2i_adapter import write_lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The aspect ratio of the mask:UserWarning"),
]

PIPELINES = {
    (False, "text"): diffusers.StableDiffusionPipeline,
    (False, "picture"): diffusers.StableDiffusionImg2ImgPipeline,
    (False, "mask"): diffusers.StableDiffusionInpaintPipeline,
    (False, "control"): diffusers.StableDiffusionControlNetPipeline,
    (False, "pag"): diffusers.StableDiffusionPAGPipeline,
    (True, "text"): diffusers.StableDiffusionXLPipeline,
    (True, "picture"): diffusers.StableDiffusionXLImg2ImgPipeline,
    (True, "mask"): diffusers.StableDiffusionXLInpaintPipeline,
    (True, "control"): diffusers.StableDiffusionXLControlNetPipeline,
    (True, "pag"): diffusers.StableDiffusionXLPAGPipeline,
}

ONE: dict[str, Any] = {"kind": "plain", "image": [drawing(1)], "scale": 0.8}
PLUS: dict[str, Any] = {"kind": "plus", "image": [drawing(2, (50, 90))], "scale": 0.6}
SEVERAL = {"image": [drawing(1), drawing(2), drawing(3)]}
LEFT, RIGHT = Image.new("L", SIZE), Image.new("L", SIZE)
LEFT.paste(255, (0, 0, 22, 56))
RIGHT.paste(200, (17, 11, 40, 56))
# what is drawn: the entries, and other fields of the request
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "plain": ([ONE], {"sampler": "euler", "count": 2}),
    "Plus": ([PLUS], {"sampler": "dpmpp_2m"}),
    "full face": ([PLUS | {"kind": "full"}], {"sampler": "ddim"}),
    "two adapters": ([ONE, PLUS], {"sampler": "ddim"}),
    "several pictures": ([ONE | SEVERAL, PLUS | SEVERAL], {"sampler": "euler"}),
    "scales by block": ([ONE | {"scale": "blocks"}, PLUS], {"sampler": "euler"}),
    "masks": (
        [ONE | {"image": SEVERAL["image"][:2], "mask": [LEFT, RIGHT], "scale": (0.7, 0.4)}, PLUS | {"mask": [RIGHT]}],
        {"sampler": "euler"},
    ),
    "image to image": ([ONE], {"sampler": "euler", "image": drawing(5), "strength": 0.6, "steps": 5}),
    "inpainting": ([PLUS], {"sampler": "ddim", "image": drawing(5), "mask": blot(), "strength": 1.0}),
    "ControlNet": ([PLUS], {"sampler": "euler", "control": drawing(4)}),
    "perturbed attention": ([ONE, PLUS], {"sampler": "euler", "pag_scale": 2.5}),
    "LoRA": ([ONE], {"sampler": "euler", "loras": 0.6}),
    "without guidance": ([PLUS], {"sampler": "euler", "guidance_scale": 1.0}),
}
BLOCKS = {  # as diffusers' set_ip_adapter_scale takes them
    "sd1": {"down": {"block_0": [0.7]}, "up": {"block_1": [0.0, 1.2]}},
    "sdxl": {"mid": 0.6, "up": {"block_0": [0.3, 0.9]}},
}


def encoder(act: str = "gelu") -> CLIPVisionModelWithProjection:
    torch.manual_seed(8)
    config = CLIPVisionConfig(
        hidden_size=HIDDEN, intermediate_size=80, projection_dim=EMBED, num_hidden_layers=3, num_attention_heads=4,
        image_size=28, patch_size=7, hidden_act=act,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def write_files(place: Path, pair: Pair) -> Path:
    """Write adapters of each kind and their encoder, in the layout of h94/IP-Adapter."""
    place = place / "models"
    if not place.exists():
        encoder().save_pretrained(place / "image_encoder")
        for k, kind in enumerate(("plain", "plus", "full")):
            write_tensors(place / f"{kind}.safetensors", adapter_weights(pair.theirs.unet, kind, seed=30 + k))
    return place


def both(pair: Pair, family: str, case: str, place: Path) -> tuple[Drawn, Drawn]:
    """The picture of a case, ours and theirs."""
    entries, changes = CASES[case]
    folder = write_files(place, pair)
    request = pictures.fields(guidance_scale=6.0, steps=3) | changes
    xl, image = family == "sdxl", pictures.kind_of(request)
    kind = "control" if "control" in changes else "pag" if "pag_scale" in changes else image
    request = pictures.unsized(request) if kind == "picture" else request
    scales = [BLOCKS[family] if entry["scale"] == "blocks" else entry["scale"] for entry in entries]
    adapters = [
        {
            "file": folder / f"{entry['kind']}.safetensors",
            "image": entry["image"],
            "mask": entry.get("mask"),
            "scale": s,
        }
        for entry, s in zip(entries, scales, strict=True)
    ]
    components = {**pair.theirs.components, "unet": copy.deepcopy(pair.theirs.unet)}
    if kind == "control":
        components["controlnet"] = network = control_network(family, seed=10)
        network.save_pretrained(place / "net")
    control = [{"file": place / "net", "image": changes["control"]}] if kind == "control" else None
    scale = request.pop("loras", None)
    own = {"loras": [(str(write_lora(place / "lora.safetensors", pair)), scale)]} if scale else {}
    mine = pictures.ours(pair, {**request, "control": control, "ip_adapter": adapters} | own)

    pipe = PIPELINES[xl, kind](**components, **({} if xl else {"requires_safety_checker": False}))
    names = [f"{entry['kind']}.safetensors" for entry in entries]
    pipe.load_ip_adapter(str(place), subfolder="models", weight_name=names, low_cpu_mem_usage=False)
    if scale:
        pipe.load_lora_weights(place / "lora.safetensors", adapter_name="one")
        pipe.set_adapters("one", scale)
    pipe.set_ip_adapter_scale([[*s] if isinstance(s, tuple) else s for s in scales])
    options: dict[str, Any] = {}
    if "control" in request:
        options["image"] = request.pop("control")
    if any("mask" in entry for entry in entries):
        processor = IPAdapterMaskProcessor()
        masks = [
            processor.preprocess(entry["mask"], height=SIZE[1], width=SIZE[0]).transpose(0, 1) for entry in entries
        ]
        options["cross_attention_kwargs"] = {"ip_adapter_masks": masks}
    shown = [entry["image"] for entry in entries]
    expected = draw(pipe, pair.scheduler, request, ip_adapter_image=shown, **options)
    if kind == "mask":
        pictures.only_inside(blot(), mine, expected)
    return mine, expected


SHORT = {"sd1": set(CASES) - {"plain", "Plus", "several pictures"}, "sdxl": {"scales by block", "masks"}}
TESTED = [
    pytest.param(family, case, marks=() if case in SHORT[family] else pytest.mark.slow)
    for family in SHORT
    for case in CASES
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize(("family", "case"), TESTED)
def test_pictures_are_those_of_diffusers(pairs: dict[str, Pair], family: str, case: str, files: Path) -> None:
    mine, expected = both(pairs[family], family, case, files / family)
    same(mine, expected)
    if case == "two adapters":
        different(mine, pictures.ours(pairs[family], pictures.fields(guidance_scale=6.0, steps=3, sampler="ddim")))


def test_their_embeddings_are_ours_and_draw_the_same(pairs: dict[str, Pair], files: Path) -> None:
    """`prepare_ip_adapter_image_embeds`, given to `ip_adapter_image_embeds` and to `embeds`."""
    pair, names = pairs["sd1"], ("plain.safetensors", "plus.safetensors")
    folder = write_files(files / "sd1", pair)
    pipe = diffusers.StableDiffusionPipeline(
        **{**pair.theirs.components, "unet": copy.deepcopy(pair.theirs.unet)}, requires_safety_checker=False
    )
    pipe.load_ip_adapter(str(folder.parent), subfolder="models", weight_name=[*names], low_cpu_mem_usage=False)
    shown = [SEVERAL["image"], PLUS["image"]]
    embeds = pipe.prepare_ip_adapter_image_embeds(shown, None, torch.device("cpu"), 1, True)
    for name, images, found in zip(names, shown, embeds, strict=True):
        torch.testing.assert_close(mezzotint.embed_images(folder / name, images, device="cpu"), found)
    request = pictures.fields(steps=2, sampler="euler")
    adapters = [{"file": folder / name, "embeds": found} for name, found in zip(names, embeds, strict=True)]
    mine = pictures.ours(pair, request | {"ip_adapter": adapters})
    same(mine, draw(pipe, pair.scheduler, request, ip_adapter_image_embeds=embeds))


if __name__ == "__main__":
    pictures.print_table("IP-Adapter", ("sd1", "sdxl"), CASES, lambda pairs, *rest: both(pairs[rest[0]], *rest))
