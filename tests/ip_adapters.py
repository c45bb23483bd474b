"""IP-Adapters of random weights and their encoder, as their files have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from mezzotint.config import CLIPVisionConfig, UNetConfig
from mezzotint.models.clip_vision import CLIPVisionModel
from mezzotint.models.ip_adapter import cross_layers
from mezzotint.weights.save_tensors import write_tensors

EMBED, HIDDEN = 12, 16
VISION = {
    "hidden_size": HIDDEN, "intermediate_size": 32, "projection_dim": EMBED, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 14, "patch_size": 7, "hidden_act": "gelu",
}  # fmt: skip


def face(seed: int = 0, size: tuple[int, int] = (20, 20)) -> Image.Image:
    """A picture."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def tensors(unet: UNetConfig, kind: str = "plain") -> dict[str, torch.Tensor]:
    """An adapter's tensors for a UNet, random."""
    context = unet.cross_attention_dim
    shapes: dict[str, tuple[int, ...]] = {"proj.weight": (4 * context, EMBED), "proj.bias": (4 * context,)}
    shapes |= {"norm.weight": (context,), "norm.bias": (context,)}
    if kind == "full":
        shapes = {"proj.0.weight": (HIDDEN, HIDDEN), "proj.0.bias": (HIDDEN,), "proj.2.weight": (context, HIDDEN)}
        shapes |= dict.fromkeys(("proj.2.bias", "proj.3.weight", "proj.3.bias"), (context,))
    if kind == "face id":
        shapes = {"proj.0.weight": (24, 12), "proj.2.weight": (4 * context, 24), "norm.weight": (context,)}
    shapes = {f"image_proj.{name}": shape for name, shape in shapes.items()}
    layers = sorted(cross_layers(unet), key=lambda layer: layer.name.startswith("mid_block"))
    for number, layer in enumerate(layers):
        shapes |= {f"ip_adapter.{2 * number + 1}.to_{kv}_ip.weight": (layer.dim, context) for kv in "kv"}
    draw = torch.Generator().manual_seed(5)
    return {name: 0.5 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def write_encoder(folder: Path, **fields: Any) -> Path:
    """Write an encoder as a folder."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        network = CLIPVisionModel(CLIPVisionConfig.model_validate({**VISION, **fields}))
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
    folder.mkdir(parents=True)
    named = {"architectures": ["CLIPVisionModelWithProjection"], **VISION, **fields}
    (folder / "config.json").write_text(json.dumps(named))
    write_tensors(folder / "model.safetensors", network.state_dict())
    return folder


def write_adapters(place: Path, unet: UNetConfig, *kinds: str) -> None:
    """Write adapters and their encoder in the layout of h94/IP-Adapter."""
    write_encoder(place / "models" / "image_encoder")
    for kind in kinds:
        write_tensors(place / "models" / f"{kind}.safetensors", tensors(unet, kind))
