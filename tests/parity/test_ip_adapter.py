"""IP-Adapter against diffusers: the UNet under a picture, in float32 on random weights in the layout of the files."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPVisionConfig as TheirConfig
from transformers import CLIPVisionModelWithProjection

import tiny
from mezzotint.config import CLIPVisionConfig, UNetConfig
from mezzotint.models.blocks import ImageAttention
from mezzotint.models.clip_vision import CLIPVisionModel
from mezzotint.models.ip_adapter import IPAdapterModel, cross_layers
from mezzotint.weights.vision_files import KNOWN, KnownEncoder
from test_unet import inputs, ours

EMBED, HIDDEN, PATCHES = 24, 40, 17


def adapter_weights(unet: Any, kind: str, seed: int = 11, width: int = 0) -> dict[str, Tensor]:
    """Random weights of an adapter, under the names of the published files."""
    context, width = unet.config.cross_attention_dim, width or (EMBED if kind == "plain" else HIDDEN)
    shapes: dict[str, tuple[int, ...]] = {}
    if kind == "plain":
        shapes = {"proj.weight": (4 * context, width), "proj.bias": (4 * context,)}
        shapes |= {"norm.weight": (context,), "norm.bias": (context,)}
    elif kind == "full":
        shapes = {"proj.0.weight": (width, width), "proj.0.bias": (width,)}
        shapes |= {"proj.2.weight": (context, width), "proj.2.bias": (context,)}
        shapes |= {"proj.3.weight": (context,), "proj.3.bias": (context,)}
    else:
        dim, inner = 48, 128
        shapes = {"latents": (1, 5, dim), "proj_in.weight": (dim, width), "proj_in.bias": (dim,)}
        shapes |= {"proj_out.weight": (context, dim), "proj_out.bias": (context,)}
        shapes |= {"norm_out.weight": (context,), "norm_out.bias": (context,)}
        for layer in range(4):
            for norm in ("0.norm1", "0.norm2", "1.0"):
                shapes |= {f"layers.{layer}.{norm}.weight": (dim,), f"layers.{layer}.{norm}.bias": (dim,)}
            shapes |= {
                f"layers.{layer}.0.to_q.weight": (inner, dim),
                f"layers.{layer}.0.to_kv.weight": (2 * inner, dim),
                f"layers.{layer}.0.to_out.weight": (dim, inner),
                f"layers.{layer}.1.1.weight": (4 * dim, dim),
                f"layers.{layer}.1.3.weight": (dim, 4 * dim),
            }
    shapes = {f"image_proj.{name}": shape for name, shape in shapes.items()}
    crosses = [name for name in unet.attn_processors if "attn2" in name]
    for number, name in enumerate(crosses):
        dim = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        shapes |= {f"ip_adapter.{2 * number + 1}.to_{kv}_ip.weight": (dim, context) for kv in "kv"}
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def give_diffusers(unet: Any, *adapters: dict[str, Tensor], scales: list[Any]) -> None:
    """Put adapters into a UNet of diffusers, as load_ip_adapter does."""
    nested = [
        {
            part: {name.removeprefix(f"{part}."): t for name, t in weights.items() if name.startswith(f"{part}.")}
            for part in ("image_proj", "ip_adapter")
        }
        for weights in adapters
    ]
    unet._load_ip_adapter_weights(nested, low_cpu_mem_usage=False)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = list(scales)


def load(unet: Any, weights: dict[str, Tensor]) -> IPAdapterModel:
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    adapter = IPAdapterModel(shapes, cross_layers(unet.config), unet.config.cross_attention_dim)
    adapter.load_state_dict(weights, strict=True)
    return adapter.eval()


@pytest.mark.parametrize("kind", ["plain", "full", "plus"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@torch.no_grad()
def test_the_unet_under_pictures_is_diffusers(family: str, kind: str) -> None:
    theirs = tiny.unet(family, mid_block_type="UNetMidBlock2DCrossAttn")
    unet = ours(theirs)
    sample, condition = inputs(theirs)
    weights = adapter_weights(theirs, kind), adapter_weights(theirs, "plain")
    generator = torch.Generator().manual_seed(3)
    shape = (2, 2, EMBED) if kind == "plain" else (2, 2, PATCHES, HIDDEN)  # two pictures
    images = torch.randn(shape, generator=generator), torch.randn(2, 1, EMBED, generator=generator)
    give_diffusers(theirs, *weights, scales=[0.8, 0.5])
    added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids, "image_embeds": list(images)}
    wanted = theirs(sample, 500, condition.context, added_cond_kwargs=added, return_dict=False)[0]
    terms: list[list[ImageAttention]] = []
    for given, picture, scale in zip(weights, images, (0.8, 0.5), strict=True):
        adapter = load(unet, given)
        tokens = adapter.image_proj(picture.flatten(0, 1)).unflatten(0, (2, -1)).flatten(1, 2)
        terms.append([ImageAttention(k, v, scale) for k, v in adapter.keys_values(tokens)])
    layers = zip(unet.keys_values(condition), zip(*terms, strict=True), strict=True)
    output = unet(sample, 500, condition, keys_values=[(k, v, own) for (k, v), own in layers])
    assert tiny.apart(output, wanted) < 1e-5
    assert tiny.apart(unet(sample, 500, condition), wanted) > 1e-2  # the pictures matter


# ---- the public files ------------------------------------------------------------------------------------------------


def resampler(dim: int, context: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the projection of a Plus adapter: 16 queries that read ViT-H/14's hidden states, four layers."""
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, 16, dim),
        "proj_in.weight": (dim, 1280),
        "proj_in.bias": (dim,),
    }
    shapes |= {"proj_out.weight": (context, dim), "proj_out.bias": (context,)}
    shapes |= {"norm_out.weight": (context,), "norm_out.bias": (context,)}
    for layer in range(4):
        own = {"0.to_q": (dim, dim), "0.to_kv": (2 * dim, dim), "0.to_out": (dim, dim)}
        own |= {"1.1": (4 * dim, dim), "1.3": (dim, 4 * dim)}
        own |= dict.fromkeys(("0.norm1", "0.norm2", "1.0"), (dim,))
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in own.items()}
        shapes |= {f"layers.{layer}.{name}.bias": (dim,) for name in ("0.norm1", "0.norm2", "1.0")}
    return shapes


def linear(width: int, context: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the projection of a plain adapter: four tokens."""
    shapes: dict[str, tuple[int, ...]] = {"proj.weight": (4 * context, width), "proj.bias": (4 * context,)}
    return shapes | {"norm.weight": (context,), "norm.bias": (context,)}


SD1_WIDTHS = [320] * 2 + [640] * 2 + [1280] * 5 + [640] * 3 + [320] * 3 + [1280]  # down, up, middle
SDXL_WIDTHS = [640] * 4 + [1280] * 50 + [640] * 6 + [1280] * 10
# the UNet, the projection, and the megabytes of the file in float16
PUBLIC = {
    "ip-adapter_sd15": ("sd1.5", linear(1024, 768), 44.6),
    "ip-adapter-plus_sd15": ("sd1.5", resampler(768, 768), 98.2),
    "ip-adapter-plus-face_sd15": ("sd1.5", resampler(768, 768), 98.2),
    "ip-adapter_sdxl": ("sdxl", linear(1280, 2048), 702.6),
    "ip-adapter_sdxl_vit-h": ("sdxl", linear(1024, 2048), 698.4),
    "ip-adapter-plus_sdxl_vit-h": ("sdxl", resampler(1280, 2048), 847.5),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_files_have_these_keys_and_shapes(name: str) -> None:
    family, projection, megabytes = PUBLIC[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**tiny.FULL_UNETS[family])
    context = unet.config.cross_attention_dim
    shapes = {f"image_proj.{key}": shape for key, shape in projection.items()}
    widths = SDXL_WIDTHS if family == "sdxl" else SD1_WIDTHS
    crosses = [key.removesuffix(".processor") for key in unet.attn_processors if "attn2" in key]
    assert widths == [unet.get_submodule(key).to_q.out_features for key in crosses]  # in the order of diffusers
    for number, width in enumerate(widths):
        shapes |= {f"ip_adapter.{2 * number + 1}.to_{kv}_ip.weight": (width, context) for kv in "kv"}
    config = UNetConfig.model_validate(dict(unet.config))
    with torch.device("meta"):
        adapter = IPAdapterModel(shapes, cross_layers(config), context)
    assert {key: tuple(tensor.shape) for key, tensor in adapter.state_dict().items()} == shapes
    assert sum(2 * math.prod(shape) for shape in shapes.values()) == pytest.approx(megabytes * 1e6, abs=0.05e6)


@pytest.mark.parametrize(("encoder", "millions"), [(KNOWN[0], 632.1), (KNOWN[1], 1844.9), (KNOWN[2], 304.0)])
def test_the_encoders_have_the_keys_of_transformers(encoder: KnownEncoder, millions: float) -> None:
    with torch.device("meta"):
        ours = CLIPVisionModel(CLIPVisionConfig.model_validate(encoder.fields))
        theirs = CLIPVisionModelWithProjection(TheirConfig(**encoder.fields))
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert sum(map(torch.Size.numel, shapes.values())) == pytest.approx(millions * 1e6, abs=0.05e6)
