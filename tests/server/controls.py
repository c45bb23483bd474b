"""ControlNets of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mezzotint.config import ControlNetConfig, UNetConfig
from mezzotint.models.controlnet import ControlNet


def write_control(path: Path, unet: UNetConfig, **changes: Any) -> None:
    """Write a ControlNet for a UNet, with its config.json beside it."""
    fields = unet.model_dump(mode="json") | {"conditioning_embedding_out_channels": [8, 8, 16, 16]} | changes
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = ControlNet(ControlNetConfig.model_validate(fields))
        for name, parameter in network.named_parameters():
            if name.startswith("controlnet_"):
                torch.nn.init.normal_(parameter, std=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), path)
    (path.parent / "config.json").write_text(json.dumps(fields | {"_class_name": "ControlNetModel"}))
