"""Write a single file of SD 1.5's shape in the original layout, fp16, 2.13 GB: `python benchmarks/sd15_file.py FILE`.

The weights are one block of random numbers over and over: for measuring how a model is read, not for drawing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from mezzotint.config import CLIPConfig, UNetConfig, VAEConfig
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.unet import UNet
from mezzotint.models.vae import VAE

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "parity"))
from test_single_file import ldm_unet, ldm_vae, prefixed

BLOCK = 1 << 22  # numbers


def networks() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return UNet, VAE and text encoder of SD 1.5 on the meta device."""
    clip = CLIPConfig(
        hidden_size=768, intermediate_size=3072, projection_dim=768, num_hidden_layers=12, num_attention_heads=12
    )
    with torch.device("meta"):
        vae = VAE(VAEConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2))
        return UNet(UNetConfig(cross_attention_dim=768)), vae, CLIPTextModel(clip)


def main() -> None:
    unet, vae, clip = networks()
    tensors = ldm_unet(unet.state_dict(), layers=2, levels=4) | ldm_vae(vae.state_dict(), levels=4)
    tensors |= prefixed(clip.state_dict(), "cond_stage_model.transformer.")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.endswith("position_ids")}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    table = json.dumps(header).encode()
    block = memoryview((0.02 * torch.randn(BLOCK)).half().numpy()).cast("B")
    with open(sys.argv[1], "wb") as file:
        file.write(len(table).to_bytes(8, "little") + table)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])


if __name__ == "__main__":
    main()
