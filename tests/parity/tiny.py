"""Small random models of every shape that mezzotint runs, built by diffusers and transformers, for the parity tests.

Each builder is seeded, float32, in eval mode, and takes milliseconds. `FAMILIES` names the shapes: sd1, sd2 (linear
projections, heads per level; run it with v-prediction), sdxl (added text and time, depth per level), inpainting (9
channels). SDXL's refiner is in `UNETS` alone.
The UNet's conv_out weights are scaled by 5, so that any two samplers give visibly different pictures.
Also here: the scheduler_config.json of each family as the hub has it, the published configurations of the full-size
models, for key and shape lists on the meta device, and the one measure of how far apart two tensors are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

FAMILIES = ("sd1", "sd2", "sdxl", "inpainting")

TOKENS = 100  # vocabulary; 98 begins a prompt, 99 ends it
WIDTH = 32  # of each text encoder; SDXL's context is two of them side by side

_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": _UNET,
    "sd2": _UNET | {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True},
    "sdxl": _UNET
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "cross_attention_dim": 2 * WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    },
    "inpainting": _UNET | {"in_channels": 9},
    "refiner": _UNET
    | {
        "block_out_channels": (24, 48, 48),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 2,
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 5 * 8 + WIDTH,
    },
}

VAE: dict[str, Any] = {
    "block_out_channels": (16, 16, 32, 32),  # f = 8, as everywhere in this family
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
}

CLIP: dict[str, Any] = {
    "vocab_size": TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": WIDTH,
    "bos_token_id": 98,
    "eos_token_id": 99,
    "pad_token_id": 99,
}
CLIP_ACT = {"sd1": "quick_gelu", "sd2": "gelu", "sdxl": "quick_gelu", "inpainting": "quick_gelu"}

_PNDM: dict[str, Any] = {  # SD1's file has no timestep_spacing
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SCHEDULER_CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": _PNDM,
    "sd2": _PNDM | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "sdxl": _PNDM
    | {
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
}


def unet(family: str, seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A diffusers UNet of this family, `changes` to its configuration applied."""
    torch.manual_seed(seed)
    model = UNet2DConditionModel(**UNETS[family] | changes)
    with torch.no_grad():
        model.conv_out.weight.mul_(5)
    return model.eval()


def vae(seed: int = 1, **changes: Any) -> AutoencoderKL:
    """A diffusers AutoencoderKL, downscaling by 8."""
    torch.manual_seed(seed)
    return AutoencoderKL(**VAE | changes).eval()


def clip(family: str = "sd1", seed: int = 2, *, projection: bool = False, **changes: Any) -> CLIPTextModel:
    """A transformers CLIP text model; with `projection`, a CLIPTextModelWithProjection (SDXL's second, gelu)."""
    torch.manual_seed(seed)
    act = "gelu" if projection else CLIP_ACT[family]
    config = CLIPTextConfig(**CLIP | {"hidden_act": act} | changes)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def text_encoders(family: str) -> list[CLIPTextModel]:
    """The family's text encoders, in order."""
    return [clip(family)] + ([clip(family, seed=3, projection=True)] if family == "sdxl" else [])


def with_prefix(key: str) -> str:
    """A text encoder's key with the `text_model.` that transformers 5 drops where there is no projection."""
    return key if key.startswith("text_") else f"text_model.{key}"


def apart(a: Tensor, b: Tensor) -> float:
    """Greatest difference, relative to the greatest value. NaN is far from everything."""
    assert a.shape == b.shape
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.inf
    return float((a - b).abs().max() / b.abs().max())


_SD: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
FULL_UNETS: dict[str, dict[str, Any]] = {
    "sd1.5": _SD,
    "sd1.5-inpainting": _SD | {"in_channels": 9},
    "sd2.1": _SD
    | {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
FULL_UNETS["refiner"] = FULL_UNETS["sdxl"] | {
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
FULL_UNETS["ssd-1b"] = FULL_UNETS["sdxl"] | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
FULL_UNETS["vega"] = FULL_UNETS["sdxl"] | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": (1, 1, 2),
}
FULL_UNETS["tiny-sd"] = _SD | {
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "mid_block_type": None,
}
