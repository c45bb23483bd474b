"""Write a folder with random weights: `random_model.py sd15|sdxl|half|controlnet FOLDER [DTYPE] [--sparse]`.

sd15 and sdxl have the published configurations (2.1 and 7.0 GB in float16), half is SD 1.5 with half its channels, and
controlnet is a ControlNet of SD 1.5 (0.7 GB), alone in its folder. A
matrix has the variance 1 / inputs, so that what is drawn stays in range: for measuring memory and time. With --sparse
the files have their headers and no data, which is enough to predict memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mezzotint.config import CLIPConfig, ControlNetConfig, UNetConfig, VAEConfig
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.controlnet import ControlNet
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import UNet
from mezzotint.models.vae import VAE

BLOCK = 1 << 22  # random numbers that all weights are taken from
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


def _clip(width: int, layers: int, heads: int, act: str = "quick_gelu") -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": act,
    }


SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "unet": {"cross_attention_dim": 768, "sample_size": 64, "down_block_types": DOWN, "up_block_types": UP},
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        "text_encoder": _clip(768, 12, 12),
    },
    "half": {
        "unet": {
            "cross_attention_dim": 384,
            "sample_size": 64,
            "block_out_channels": (160, 320, 640, 640),
            "down_block_types": DOWN,
            "up_block_types": UP,
        },
        "vae": {"block_out_channels": (64, 128, 256, 256), "layers_per_block": 2},
        "text_encoder": _clip(384, 12, 6),
    },
    "sdxl": {
        "unet": {
            "cross_attention_dim": 2048,
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "scaling_factor": 0.13025},
        "text_encoder": _clip(768, 12, 12),
        "text_encoder_2": _clip(1280, 32, 20, "gelu") | {"architectures": ("CLIPTextModelWithProjection",)},
    },
}
CLASSES = {
    "unet": ("UNet2DConditionModel", UNetConfig, UNet),
    "vae": ("AutoencoderKL", VAEConfig, VAE),
    "text_encoder": ("CLIPTextModel", CLIPConfig, CLIPTextModel),
    "text_encoder_2": ("CLIPTextModelWithProjection", CLIPConfig, CLIPTextModel),
}


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--sparse"]
    create(arguments[0], Path(arguments[1]), (arguments[2:] or ["float16"])[0], sparse="--sparse" in sys.argv)


def create(shape: str, folder: Path, dtype_name: str = "float16", sparse: bool = False) -> None:
    """Write the folder of a model or a ControlNet; `sparse` files have headers and no data."""
    dtype = getattr(torch, dtype_name)
    if shape == "controlnet":
        create_controlnet(folder, dtype, sparse)
        return
    index: dict[str, Any] = {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    torch.manual_seed(0)
    block = torch.randn(BLOCK)
    for name, fields in SHAPES[shape].items():
        kind, config, network = CLASSES[name]
        with torch.device("meta"):
            module = network(config(**fields))
        (folder / name).mkdir(parents=True, exist_ok=True)
        if name == "vae":  # required by diffusers
            levels = len(fields["block_out_channels"])
            fields = {**fields, "down_block_types": ["DownEncoderBlock2D"] * levels}
            fields["up_block_types"] = ["UpDecoderBlock2D"] * levels
        (folder / name / "config.json").write_text(json.dumps(fields))
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        write(folder / name / f"{stem}.safetensors", module, block, dtype, sparse)
        index[name] = ["diffusers" if name in ("unet", "vae") else "transformers", kind]
        if name.startswith("text"):
            tokenizer = name.replace("text_encoder", "tokenizer")
            Tokenizer.clip("!" if name.endswith("2") else "<|endoftext|>").save(folder / tokenizer)
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    family = "StableDiffusionXLPipeline" if shape == "sdxl" else "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": family, **index}))


def create_controlnet(folder: Path, dtype: torch.dtype, sparse: bool) -> None:
    """Write the folder of a ControlNet for sd15."""
    fields = {"_class_name": "ControlNetModel", "cross_attention_dim": 768, "down_block_types": DOWN}
    with torch.device("meta"):
        module = ControlNet(ControlNetConfig(cross_attention_dim=768, down_block_types=DOWN))
    torch.manual_seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    write(folder / "diffusion_pytorch_model.safetensors", module, torch.randn(BLOCK), dtype, sparse)


def write(path: Path, module: nn.Module, block: torch.Tensor, dtype: torch.dtype, sparse: bool = False) -> None:
    """Write a safetensors file with the module's shapes, one tensor at a time."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    header, end = {}, 0
    word = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": word, "shape": shape, "data_offsets": [start, end]}
    table = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(table).to_bytes(8, "little") + table)
        if sparse:
            file.truncate(8 + len(table) + end)
            return
        for number, (name, shape) in enumerate(shapes.items()):
            count = torch.Size(shape).numel()
            if len(shape) < 2:
                values = torch.full((count,), 0.0 if name.endswith("bias") else 1.0)
            else:
                inputs = 1 if "embedding" in name else count // shape[0]
                # rolled, or else OpenVINO would hold matrices of the same shape once
                values = (block.roll(997 * number) * inputs**-0.5).repeat(count // BLOCK + 1)[:count]
            file.write(values.to(dtype).view(torch.uint8).numpy())


if __name__ == "__main__":
    main()
