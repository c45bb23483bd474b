"""Original single files against the folder of the same model, and against diffusers' module names at full size.

The files are made here from diffusers' weights by the published correspondence (CompVis' UNetModel and Autoencoder,
OpenCLIP's text tower), written independently of mezzotint.weights.keys. The full-size tables of names and shapes are
generated the way the original constructors build their modules.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tiny
from mezzotint.config import UNetConfig
from mezzotint.weights import inspect_model, open_model
from mezzotint.weights.keys import Levels, rename_keys, unet_table
from mezzotint.weights.single import plan_file

Weights = dict[str, Tensor]
VOCAB = 49408


# From diffusers' names to the original ones


def ldm_unet(weights: Weights, layers: int, levels: int) -> Weights:
    """diffusers' UNet names -> UNetModel's, as its block lists number them."""

    def block(match: re.Match[str]) -> str:
        way, level, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        if way == "down":
            number = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else layer)
            place = {"resnets": "0.", "attentions": "1.", "downsamplers": "0.op."}[kind]
            return f"input_blocks.{number}.{place}"
        number = level * (layers + 1) + (layers if kind == "upsamplers" else layer)
        attends = any(key.startswith(f"up_blocks.{level}.attentions.") for key in weights)
        place = {"resnets": "0.", "attentions": "1.", "upsamplers": f"{2 if attends else 1}.conv."}[kind]
        return f"output_blocks.{number}.{place}"

    renamed = {}
    for key, tensor in weights.items():
        new = key
        if ".resnets." in key:
            for ours, theirs in (
                ("norm1", "in_layers.0"),
                ("conv1", "in_layers.2"),
                ("time_emb_proj", "emb_layers.1"),
                ("norm2", "out_layers.0"),
                ("conv2", "out_layers.3"),
                ("conv_shortcut", "skip_connection"),
            ):
                new = new.replace(f".{ours}.", f".{theirs}.")
        new = re.sub(
            r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(conv\.)?", block, new
        )
        for ours, theirs in (
            ("mid_block.resnets.0", "middle_block.0"),
            ("mid_block.attentions.0", "middle_block.1"),
            ("mid_block.resnets.1", "middle_block.2"),
            ("conv_in", "input_blocks.0.0"),
            ("conv_norm_out", "out.0"),
            ("conv_out", "out.2"),
            ("time_embedding.linear_1", "time_embed.0"),
            ("time_embedding.linear_2", "time_embed.2"),
            ("time_embedding.cond_proj", "time_embed.cond_proj"),
            ("add_embedding.linear_1", "label_emb.0.0"),
            ("add_embedding.linear_2", "label_emb.0.2"),
        ):
            if new.startswith(f"{ours}."):
                new = theirs + new[len(ours) :]
        renamed[f"model.diffusion_model.{new}"] = tensor
    return renamed


def ldm_vae(weights: Weights, levels: int) -> Weights:
    """diffusers' AutoencoderKL names -> CompVis' Autoencoder's; attention layers become 1x1 convolutions."""
    renamed = {}
    for key, tensor in weights.items():
        new = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", new)
        new = new.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        if "mid_block.attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("to_out.0", "proj_out")
            new = re.sub(r"\.to_([qkv])\.", r".\1.", new).replace("group_norm", "norm")
            if new.endswith("weight") and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        renamed[f"first_stage_model.{new}"] = tensor
    return renamed


def prefixed(weights: Weights, prefix: str) -> Weights:
    """transformers' CLIP names below `prefix`, with the index buffer that old files carry."""
    out = {prefix + ("" if key.startswith("text_") else "text_model.") + key: value for key, value in weights.items()}
    return out | {f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


def open_clip(weights: Weights, prefix: str, extra_layer: bool) -> Weights:
    """transformers' CLIP names -> OpenCLIP's text tower: q, k, v fused, the projection transposed, positions bare."""
    weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
    renamed: Weights = {}
    layers = 1 + max(int(m[1]) for key in weights if (m := re.match(r"encoder\.layers\.(\d+)", key)))
    for i in range(layers + extra_layer):
        ours, theirs = f"encoder.layers.{min(i, layers - 1)}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            qkv = [weights[f"{ours}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            renamed[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(qkv)
            renamed[f"{theirs}.attn.out_proj.{kind}"] = weights[f"{ours}.self_attn.out_proj.{kind}"]
            renamed[f"{theirs}.ln_1.{kind}"] = weights[f"{ours}.layer_norm1.{kind}"]
            renamed[f"{theirs}.ln_2.{kind}"] = weights[f"{ours}.layer_norm2.{kind}"]
            renamed[f"{theirs}.mlp.c_fc.{kind}"] = weights[f"{ours}.mlp.fc1.{kind}"]
            renamed[f"{theirs}.mlp.c_proj.{kind}"] = weights[f"{ours}.mlp.fc2.{kind}"]
    for kind in ("weight", "bias"):
        renamed[f"ln_final.{kind}"] = weights[f"final_layer_norm.{kind}"]
    renamed["positional_embedding"] = weights["embeddings.position_embedding.weight"]
    renamed["token_embedding.weight"] = weights["embeddings.token_embedding.weight"]
    width = renamed["positional_embedding"].shape[1]
    renamed["text_projection"] = (
        weights["text_projection.weight"].T if "text_projection.weight" in weights else torch.eye(width)
    )
    renamed["logit_scale"] = torch.tensor(4.6)
    return {prefix + key: value.contiguous() for key, value in renamed.items()}


class Model:
    """A tiny model of a family, as diffusers holds it and as an original file holds it."""

    def __init__(self, family: str, **changes: object):
        self.family = family
        self.unet, self.vae = tiny.unet(family, **changes), tiny.vae()
        published = {"vocab_size": VOCAB, "eos_token_id": 2}
        self.encoders = [] if family == "refiner" else [tiny.clip(family, **published)]
        if family in ("sdxl", "refiner"):
            self.encoders.append(tiny.clip(family, seed=3, projection=True, **published))

    def single(self) -> Weights:
        states = [encoder.state_dict() for encoder in self.encoders]
        weights = ldm_unet(self.unet.state_dict(), self.unet.config.layers_per_block, 2) | ldm_vae(
            self.vae.state_dict(), 4
        )
        if self.family == "sd2":
            weights |= open_clip(states[0], "cond_stage_model.model.", extra_layer=True)
        elif self.family == "refiner":
            weights |= open_clip(states[0], "conditioner.embedders.0.model.", extra_layer=False)
        elif self.family == "sdxl":
            weights |= prefixed(states[0], "conditioner.embedders.0.transformer.")
            weights |= open_clip(states[1], "conditioner.embedders.1.model.", extra_layer=False)
        else:
            weights |= prefixed(states[0], "cond_stage_model.transformer.")
        weights["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(4)
        weights["betas"] = torch.linspace(0, 1, 10)
        return {key: value.clone(memory_format=torch.contiguous_format) for key, value in weights.items()}

    @property
    def unet_names(self) -> set[str]:
        """The UNet's names in the file."""
        return {name for name in self.single() if name.startswith("model.diffusion_model.")}

    @property
    def config(self) -> dict[str, dict[str, object]]:
        """What shapes do not show, since these models are not of the published widths."""
        heads = {"num_attention_heads": 4}
        unet = {name: self.unet.config[name] for name in ("attention_head_dim", "norm_num_groups")}
        return {"unet": unet, "vae": {"norm_num_groups": 8}, "text_encoder": heads, "text_encoder_2": heads}


def same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    expected = theirs.state_dict()
    if any(key.startswith("embeddings.") for key in expected):  # transformers 5 drops the prefix
        expected = {f"text_model.{key}": value for key, value in expected.items()}
    actual = ours.state_dict()
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "refiner"])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_holds_the_same_weights(family: str, suffix: str, tmp_path: Path) -> None:
    model = Model(family)
    path = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": model.single(), "global_step": 470000}, path)
    else:
        save_file(model.single(), path)
    parts = open_model(path, config=model.config)
    assert parts.family == {"inpainting": "sd1", "refiner": "sdxl"}.get(family, family)
    same_weights(parts.unet, model.unet)
    same_weights(parts.vae, model.vae)
    for ours, theirs in zip(parts.text_encoders, model.encoders, strict=True):
        same_weights(ours, theirs)
    for name in ("in_channels", "block_out_channels", "down_block_types", "up_block_types", "cross_attention_dim"):
        theirs = model.unet.config[name]
        assert getattr(parts.unet.config, name) == (tuple(theirs) if isinstance(theirs, list) else theirs)
    if family in ("sdxl", "refiner"):
        assert parts.unet.config.addition_time_embed_dim == 8
        assert parts.text_encoders[-1].config.has_projection
        assert parts.tokenizers[-1].pad == 0
        assert parts.vae.config.scaling_factor == 0.13025
    assert parts.model_index.get("requires_aesthetics_score", False) is (family == "refiner")
    assert parts.text_encoders[0].config.hidden_act == model.encoders[0].config.hidden_act
    assert parts.scheduler_config["prediction_type"] == "epsilon"


def test_outputs_equal_those_of_diffusers(tmp_path: Path) -> None:
    model = Model("sdxl")
    save_file(model.single(), tmp_path / "model.safetensors")
    parts = open_model(tmp_path / "model.safetensors", config=model.config)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 4, 8, 8, generator=generator)
    ids = torch.tensor([[49406, 320, 1125, 49407] + [0] * 73])
    with torch.no_grad():
        torch.testing.assert_close(parts.vae.decode(z), model.vae.decode(z).sample, rtol=1e-4, atol=1e-4)
        hidden, pooled = parts.text_encoders[1](ids, skip=1, final_norm=False)
        theirs = model.encoders[1](ids, output_hidden_states=True)
        torch.testing.assert_close(hidden, theirs.hidden_states[-2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pooled, theirs.text_embeds, rtol=1e-4, atol=1e-4)


SMALLER: dict[str, tuple[str, dict[str, object]]] = {
    "ssd-1b": (
        "sdxl",
        {
            "layers_per_block": 2,
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, [2, 2]],
            "reverse_transformer_layers_per_block": [[2, 2, 3], 1],
        },
    ),
    "vega": ("sdxl", {"mid_block_type": "UNetMidBlock2D"}),
    "tiny-sd": (
        "sd1",
        {
            "mid_block_type": None,
            "down_block_types": ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        },
    ),
    "lcm": ("sd1", {"time_cond_proj_dim": 8}),
}


@pytest.mark.parametrize("name", SMALLER)
def test_a_single_file_with_a_unet_of_another_structure(name: str, tmp_path: Path) -> None:
    family, changes = SMALLER[name]
    model = Model(family, **changes)
    save_file(model.single(), tmp_path / "model.safetensors")
    parts = open_model(tmp_path / "model.safetensors", config=model.config)
    same_weights(parts.unet, model.unet)
    assert parts.family == family and parts.notices == []
    published = UNetConfig.model_validate(dict(model.unet.config))
    for field in ("down_depths", "up_depths", "mid_depth", "mid_block_type", "time_cond_proj_dim"):
        assert getattr(parts.unet.config, field) == getattr(published, field), field
    assert (parts.scheduler_config["_class_name"] == "LCMScheduler") == (name == "lcm")
    table = {module: block for block, module in unet_table(Levels.of_config(parts.unet.config)).items()}
    renamed, unknown = rename_keys(parts.unet.state_dict(), table)  # as a file is saved, and a LoRA is read
    assert unknown == []
    assert {f"model.diffusion_model.{name}" for name in renamed} == model.unet_names


# Full size: names and shapes, built as the original constructors build


Rows = Iterator[tuple[str, tuple[int, ...]]]


def layer(name: str, *shape: int) -> Rows:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def resblock(name: str, inputs: int, outputs: int, emb: int) -> Rows:
    yield from layer(f"{name}.in_layers.0", inputs)
    yield from layer(f"{name}.in_layers.2", outputs, inputs, 3, 3)
    yield from layer(f"{name}.emb_layers.1", outputs, emb)
    yield from layer(f"{name}.out_layers.0", outputs)
    yield from layer(f"{name}.out_layers.3", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from layer(f"{name}.skip_connection", outputs, inputs, 1, 1)


def spatial_transformer(name: str, width: int, depth: int, context: int, linear: bool) -> Rows:
    kernel = () if linear else (1, 1)
    yield from layer(f"{name}.norm", width)
    yield from layer(f"{name}.proj_in", width, width, *kernel)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attn, source in (("attn1", width), ("attn2", context)):
            yield f"{block}.{attn}.to_q.weight", (width, width)
            yield f"{block}.{attn}.to_k.weight", (width, source)
            yield f"{block}.{attn}.to_v.weight", (width, source)
            yield from layer(f"{block}.{attn}.to_out.0", width, width)
        yield from layer(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from layer(f"{block}.ff.net.2", width, 4 * width)
        for i in (1, 2, 3):
            yield from layer(f"{block}.norm{i}", width)
    yield from layer(f"{name}.proj_out", width, width, *kernel)


def unet_model(mult: tuple[int, ...], depths: tuple[int, ...], middle: int | None, context: int, linear: bool,
               inputs: int = 4, adm: int | None = None, res_blocks: int = 2,
               up_depths: tuple[int, ...] | None = None, channels: int = 320) -> Rows:  # fmt: skip
    """openaimodel.UNetModel(model_channels=channels); `up_depths` is by layer, from the lowest.

    A middle of None has no block, one of 0 one residual block.
    """
    emb = 4 * channels
    yield from layer("time_embed.0", emb, channels)
    yield from layer("time_embed.2", emb, emb)
    if adm:
        yield from layer("label_emb.0.0", emb, adm)
        yield from layer("label_emb.0.2", emb, emb)
    yield from layer("input_blocks.0.0", channels, inputs, 3, 3)
    width, skips, n = channels, [channels], 0
    for level, m in enumerate(mult):
        for _ in range(res_blocks):
            n += 1
            yield from resblock(f"input_blocks.{n}.0", width, channels * m, emb)
            width = channels * m
            if depths[level]:
                yield from spatial_transformer(f"input_blocks.{n}.1", width, depths[level], context, linear)
            skips.append(width)
        if level != len(mult) - 1:
            n += 1
            yield from layer(f"input_blocks.{n}.0.op", width, width, 3, 3)
            skips.append(width)
    if middle is not None:
        yield from resblock("middle_block.0", width, width, emb)
    if middle:
        yield from spatial_transformer("middle_block.1", width, middle, context, linear)
        yield from resblock("middle_block.2", width, width, emb)
    n = -1
    for level, m in reversed(list(enumerate(mult))):
        for i in range(res_blocks + 1):
            n += 1
            yield from resblock(f"output_blocks.{n}.0", width + skips.pop(), channels * m, emb)
            width, place = channels * m, 1
            depth = up_depths[n] if up_depths else depths[level]
            if depth:
                yield from spatial_transformer(f"output_blocks.{n}.1", width, depth, context, linear)
                place = 2
            if level and i == res_blocks:
                yield from layer(f"output_blocks.{n}.{place}.conv", width, width, 3, 3)
    yield from layer("out.0", channels)
    yield from layer("out.2", 4, channels, 3, 3)


def vae_resnet(name: str, inputs: int, outputs: int) -> Rows:
    yield from layer(f"{name}.norm1", inputs)
    yield from layer(f"{name}.conv1", outputs, inputs, 3, 3)
    yield from layer(f"{name}.norm2", outputs)
    yield from layer(f"{name}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from layer(f"{name}.nin_shortcut", outputs, inputs, 1, 1)


def vae_middle(name: str) -> Rows:
    yield from vae_resnet(f"{name}.block_1", 512, 512)
    yield from layer(f"{name}.attn_1.norm", 512)
    for leaf in ("q", "k", "v", "proj_out"):
        yield from layer(f"{name}.attn_1.{leaf}", 512, 512, 1, 1)
    yield from vae_resnet(f"{name}.block_2", 512, 512)


def autoencoder() -> Rows:
    """AutoencoderKL(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4)."""
    widths = (128, 256, 512, 512)
    yield from layer("encoder.conv_in", 128, 3, 3, 3)
    width = 128
    for level, out in enumerate(widths):
        for i in range(2):
            yield from vae_resnet(f"encoder.down.{level}.block.{i}", width, out)
            width = out
        if level < 3:
            yield from layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    yield from vae_middle("encoder.mid")
    yield from layer("encoder.norm_out", 512)
    yield from layer("encoder.conv_out", 8, 512, 3, 3)
    yield from layer("decoder.conv_in", 512, 4, 3, 3)
    yield from vae_middle("decoder.mid")
    for level in (3, 2, 1, 0):
        for i in range(3):
            yield from vae_resnet(f"decoder.up.{level}.block.{i}", width, widths[level])
            width = widths[level]
        if level:
            yield from layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    yield from layer("decoder.norm_out", 128)
    yield from layer("decoder.conv_out", 3, 128, 3, 3)
    yield from layer("quant_conv", 8, 8, 1, 1)
    yield from layer("post_quant_conv", 4, 4, 1, 1)


def clip_l() -> Rows:
    yield "text_model.embeddings.token_embedding.weight", (VOCAB, 768)
    yield "text_model.embeddings.position_embedding.weight", (77, 768)
    for i in range(12):
        block = f"text_model.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from layer(f"{block}.self_attn.{name}", 768, 768)
        yield from layer(f"{block}.layer_norm1", 768)
        yield from layer(f"{block}.layer_norm2", 768)
        yield from layer(f"{block}.mlp.fc1", 3072, 768)
        yield from layer(f"{block}.mlp.fc2", 768, 3072)
    yield from layer("text_model.final_layer_norm", 768)


def open_clip_tower(width: int, layers: int) -> Rows:
    yield "positional_embedding", (77, width)
    yield "text_projection", (width, width)
    yield "logit_scale", ()
    yield from layer("ln_final", width)
    yield "token_embedding.weight", (VOCAB, width)
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        yield f"{block}.attn.in_proj_weight", (3 * width, width)
        yield f"{block}.attn.in_proj_bias", (3 * width,)
        yield from layer(f"{block}.attn.out_proj", width, width)
        yield from layer(f"{block}.ln_1", width)
        yield from layer(f"{block}.ln_2", width)
        yield from layer(f"{block}.mlp.c_fc", 4 * width, width)
        yield from layer(f"{block}.mlp.c_proj", width, 4 * width)


XL: dict[str, tuple[tuple[int, ...], int, tuple[int, ...] | None]] = {  # depths down, in the middle and up
    "sdxl": ((0, 2, 10), 10, None),
    "ssd-1b": ((0, 2, 4), 0, (4, 4, 10, 2, 1, 1, 0, 0, 0)),
    "vega": ((0, 1, 2), 0, None),
}


def full_size(name: str) -> dict[str, tuple[int, ...]]:
    sd = {"mult": (1, 2, 4, 4), "depths": (1, 1, 1, 0), "middle": 1}
    inputs = 9 if name.endswith("inpainting") else 4
    if name in XL:
        depths, middle, up_depths = XL[name]
        networks = {
            "model.diffusion_model.": unet_model(
                (1, 2, 4), depths, middle, 2048, linear=True, adm=2816, up_depths=up_depths
            ),
            "conditioner.embedders.0.transformer.": clip_l(),
            "conditioner.embedders.1.model.": open_clip_tower(1280, 32),
        }
    elif name == "refiner":
        networks = {
            "model.diffusion_model.": unet_model(
                (1, 2, 4, 4), (0, 4, 4, 0), 4, 1280, linear=True, adm=2560, channels=384
            ),
            "conditioner.embedders.0.model.": open_clip_tower(1280, 32),
        }
    elif name == "sd2.1":
        networks = {
            "model.diffusion_model.": unet_model(**sd, context=1024, linear=True),
            "cond_stage_model.model.": open_clip_tower(1024, 24),
        }
    else:
        if name == "tiny-sd":
            sd = {"mult": (1, 2, 4), "depths": (1, 1, 1), "middle": None, "res_blocks": 1}
        networks = {
            "model.diffusion_model.": unet_model(**sd, context=768, linear=False, inputs=inputs),
            "cond_stage_model.transformer.": clip_l(),
        }
    networks["first_stage_model."] = autoencoder()
    return {prefix + key: shape for prefix, rows in networks.items() for key, shape in rows}


V_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


def hollow_file(path: Path, shapes: dict[str, tuple[int, ...]], name: str) -> Path:
    """A safetensors file of fp16 zeros that takes no room on the disk (a hole); SD 2.1 has its sign of v-prediction."""
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        if name == "sd2.1":
            file.seek(8 + len(text) + header[V_BIAS]["data_offsets"][0])  # type: ignore[index]
            file.write(torch.tensor([0.1, -0.1], dtype=torch.float16).repeat(160).numpy().tobytes())
    return path


PARAMETERS = {
    "sd1.5": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd1.5-inpainting": {"unet": 859_535_364, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2.1": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
PARAMETERS["refiner"] = {"unet": 2_259_526_660, "vae": 83_653_863, "text_encoder_2": 694_659_840}
PARAMETERS["ssd-1b"] = PARAMETERS["sdxl"] | {"unet": 1_331_334_404}
PARAMETERS["vega"] = PARAMETERS["sdxl"] | {"unet": 745_225_604}
PARAMETERS["tiny-sd"] = PARAMETERS["sd1.5"] | {"unet": 323_384_964}


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_size_names_map_one_to_one(name: str, tmp_path: Path) -> None:
    report = inspect_model(hollow_file(tmp_path / "model.safetensors", full_size(name), name))
    assert report.problems == []
    assert report.passed_over == []
    assert ("refiner" in report.kind) is (name == "refiner")
    assert report.family == ("sdxl" if name in (*XL, "refiner") else "sd2" if name == "sd2.1" else "sd1")
    assert report.prediction == ("v_prediction" if name == "sd2.1" else "epsilon")
    samplers = {"sd2": "DDIMScheduler", "sdxl": "EulerDiscreteScheduler"}
    assert report.sampler == samplers.get(str(report.family), "PNDMScheduler")
    assert {part.name: part.parameters for part in report.parts} == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_size_config_is_the_published_one(name: str, tmp_path: Path) -> None:
    found = plan_file(hollow_file(tmp_path / "model.safetensors", full_size(name), name))
    ours, published = found.config("unet"), UNetConfig.model_validate(tiny.FULL_UNETS[name])
    assert isinstance(ours, UNetConfig)
    for field in UNetConfig.model_fields:
        if field in ("layers_per_block", "attention_head_dim"):
            assert ours.per_level(getattr(ours, field)) == published.per_level(getattr(published, field)), field
        elif not field.endswith("transformer_layers_per_block"):
            assert getattr(ours, field) == getattr(published, field), field
    depths = [(c.down_depths, c.up_depths, c.mid_depth) for c in (ours, published)]
    assert depths[0] == depths[1]
