"""ControlNets and T2I-Adapters of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mezzotint.config import ControlNetConfig, ControlNetUnionConfig, T2IAdapterConfig, UNetConfig
from mezzotint.models.controlnet import ControlNet
from mezzotint.models.controlnet_union import ControlNetUnion
from mezzotint.models.t2i_adapter import T2IAdapter

WEIGHTS = "diffusion_pytorch_model.safetensors"  # as a folder of diffusers has them


def write_control(path: Path, unet: UNetConfig, **changes: Any) -> None:
    """Write a ControlNet for a UNet, with its config.json beside it."""
    fields = unet.model_dump(mode="json") | {"conditioning_embedding_out_channels": [8, 8, 16, 16]} | changes
    _write(path, ControlNet, ControlNetConfig.model_validate(fields), fields | {"_class_name": "ControlNetModel"})


def write_union(path: Path, unet: UNetConfig) -> None:
    """Write a ControlNet Union of six types, as `write_control`."""
    width = unet.block_out_channels[0]
    fields = unet.model_dump(mode="json") | {"conditioning_embedding_out_channels": [4, 4, 8, 8]}
    fields |= {"addition_time_embed_dim": 8, "num_trans_channel": width, "num_proj_channel": width}
    config = ControlNetUnionConfig.model_validate(fields)
    _write(path, ControlNetUnion, config, fields | {"_class_name": "ControlNetUnionModel"})


def write_t2i(path: Path, unet: UNetConfig) -> None:
    """Write a full T2I-Adapter, as `write_control`."""
    fields: dict[str, Any] = {"channels": unet.block_out_channels, "downscale_factor": 8}
    _write(path, T2IAdapter, T2IAdapterConfig.model_validate(fields), fields | {"_class_name": "T2IAdapter"})


def _write(path: Path, network: Any, config: Any, fields: dict[str, Any]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = network(config)
        for name, parameter in made.named_parameters():
            if name.startswith("controlnet_"):
                torch.nn.init.normal_(parameter, std=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(made.state_dict(), path)
    (path.parent / "config.json").write_text(json.dumps(fields))
