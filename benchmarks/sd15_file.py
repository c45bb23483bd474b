"""Write a single file of SD 1.5's shape in the original layout, fp16, 2.13 GB: `sd15_file.py FILE [FOLDER]`.

The weights are those of FOLDER (random_model.py), or one block of random numbers over and over: for measuring how a
model is read, not for drawing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mezzotint.config import CLIPConfig, UNetConfig, VAEConfig
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.unet import UNet
from mezzotint.models.vae import VAE

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "parity"))
from test_single_file import ldm_unet, ldm_vae, prefixed

BLOCK = 1 << 22  # numbers


def networks() -> dict[str, nn.Module]:
    """Return UNet, VAE and text encoder of SD 1.5 on the meta device."""
    clip = CLIPConfig(
        hidden_size=768, intermediate_size=3072, projection_dim=768, num_hidden_layers=12, num_attention_heads=12
    )
    with torch.device("meta"):
        vae = VAE(VAEConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2))
        return {"unet": UNet(UNetConfig(cross_attention_dim=768)), "vae": vae, "text_encoder": CLIPTextModel(clip)}


def layout(weights: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the weights of a folder's networks under their names in the original layout."""
    tensors: dict[str, torch.Tensor] = ldm_unet(weights["unet"], layers=2, levels=4)
    tensors |= ldm_vae(weights["vae"], levels=4)
    return tensors | prefixed(weights["text_encoder"], "cond_stage_model.transformer.")


def main() -> None:
    if len(sys.argv) > 2:
        files = sorted(Path(sys.argv[2]).glob("*/*.safetensors"))
        weights = {file.parent.name: load_file(file) for file in files}
        save_file({key: value.contiguous() for key, value in layout(weights).items()}, sys.argv[1])
        return
    tensors = layout({name: network.state_dict() for name, network in networks().items()})
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
