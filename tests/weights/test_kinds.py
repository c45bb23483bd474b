"""Files that are no whole Stable Diffusion model are named for what they are, by the keys that published files have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mezzotint.errors import CheckpointError
from mezzotint.weights import inspect_model, open_model
from mezzotint.weights.kinds import describe_kind

# A few keys of each, as the published files have them.
FAMILIES = [
    ("a Flux model", ["double_blocks.0.img_attn.norm.key_norm.scale", "single_blocks.0.linear1.weight"]),
    ("a Flux model", ["transformer_blocks.0.attn.add_q_proj.weight", "single_transformer_blocks.0.attn.to_q.weight"]),
    ("a Chroma model", ["distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight"]),
    ("a HunyuanVideo model", ["double_blocks.0.img_attn.qkv.weight", "txt_in.individual_token_refiner.blocks.0.x"]),
    ("a Stable Diffusion 3 model", ["joint_blocks.0.context_block.attn.qkv.weight"]),
    ("a Stable Diffusion 3 model", ["transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"]),
    ("a Qwen-Image model", ["transformer_blocks.0.attn.add_q_proj.weight", "txt_norm.weight"]),
    ("an AuraFlow model", ["double_layers.0.attn.w1q.weight"]),
    ("a Lumina 2 or Z-Image model", ["cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight"]),
    ("an LTX-Video model", ["patchify_proj.weight", "adaln_single.linear.weight", "scale_shift_table"]),
    ("a PixArt model", ["t_block.1.weight", "blocks.0.cross_attn.kv_linear.weight"]),
    ("a PixArt model", ["adaln_single.linear.weight", "caption_projection.linear_1.weight"]),
    ("a Hunyuan-DiT model", ["mlp_t5.0.weight"]),
    ("a Wan model", ["head.modulation", "blocks.0.cross_attn.k.weight"]),
    ("a Wan model", ["condition_embedder.time_embedder.linear_1.weight", "blocks.0.scale_shift_table"]),
    ("a Stable Cascade model", ["clip_txt_mapper.weight"]),
    ("a Stable Video Diffusion model", ["input_blocks.1.0.time_stack.in_layers.0.weight"]),
    ("an AnimateDiff motion module", ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"]),
    ("a GLIGEN model", ["position_net.linears.0.weight", "input_blocks.1.1.transformer_blocks.0.fuser.alpha_attn"]),
    ("a DeepFloyd IF model", ["encoder_hid_proj.weight", "add_embedding.pool.q_proj.weight"]),
    ("the unCLIP form of Stable Diffusion 2", ["noise_augmentor.data_mean"]),
]
PARTS = [
    ("a LoRA", ["lora_unet_down_blocks_0.lora_up.weight"]),
    ("a LoRA", ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"]),
    (
        "a LoRA for a Flux model",
        [
            "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
            "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight",
        ],
    ),
    ("an IP-Adapter", ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"]),
    ("a ControlNet", ["control_model.input_hint_block.0.weight"]),
    ("a ControlNet", ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"]),
    ("a T2I-Adapter", ["adapter.body.0.resnets.0.block1.weight"]),
    (
        "a TAESD autoencoder (AutoencoderTiny, a small VAE for previews)",
        ["encoder.layers.0.weight", "encoder.layers.1.conv.0.weight", "decoder.layers.1.weight"],
    ),
    ("a TAESD autoencoder (AutoencoderTiny, a small VAE for previews)", ["1.weight", "3.conv.0.weight"]),
    ("only a CLIP image encoder", ["vision_model.encoder.layers.0.mlp.fc1.weight"]),
    ("only a T5 text encoder", ["encoder.block.0.layer.0.SelfAttention.k.weight"]),
    ("a textual-inversion embedding", ["emb_params"]),
    ("an upscaler (ESRGAN or a relative)", ["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"]),
]


def file(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize(("kind", "names"), FAMILIES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_other_families_are_named(kind: str, names: list[str], prefix: str, tmp_path: Path) -> None:
    path = file(tmp_path / "a.safetensors", {prefix + name: (2, 3) for name in names})
    with pytest.raises(CheckpointError, match=f"contains {kind}; it must contain a whole Stable Diffusion model"):
        open_model(path)
    assert inspect_model(path).kind == kind


@pytest.mark.parametrize(("kind", "names"), PARTS)
def test_parts_and_adapters_are_named(kind: str, names: list[str]) -> None:
    assert describe_kind(dict.fromkeys(names, (2, 3))) == kind


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("SDXL's refiner", {"label_emb.0.0.weight": (8, 2560), "x.attn2.to_k.weight": (8, 1280)}),
        ("the unCLIP form", {"label_emb.0.0.weight": (8, 2048), "x.attn2.to_k.weight": (8, 1024)}),
        ("the depth-to-image form", {"input_blocks.0.0.weight": (8, 5, 3, 3)}),
        ("the x4 upscaler", {"input_blocks.0.0.weight": (8, 7, 3, 3)}),
        ("a Stable Diffusion model that edits a picture", {"input_blocks.0.0.weight": (8, 8, 3, 3)}),
    ],
)
def test_relatives_are_told_by_their_shapes(kind: str, shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    path = file(tmp_path / "a.safetensors", {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()})
    with pytest.raises(CheckpointError, match=f"contains {kind}"):
        open_model(path)
    assert inspect_model(path).kind.startswith(kind)


def test_a_vae_of_another_latent_space_says_so() -> None:
    shapes = {"encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3), "decoder.conv_in.weight": (8, 16, 3, 3)}
    assert describe_kind(shapes) == "only a VAE, with 16 latent channels"
