"""Map the names in single-file checkpoints (CompVis, Stability, OpenCLIP) to module names.

For each network, this module derives config fields from the tensors' shapes, and `Sources`: for each parameter of the
module, the tensor in the file (or a third of it, or its transpose). A table maps dotted prefixes of the file to dotted
prefixes of the module; the longest prefix that matches a key renames it. Level and layer counts come from the shapes,
so small models of the same structure use the same tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from mezzotint.config import UNetConfig

Family = Literal["sd1", "sd2", "sdxl"]
Shapes = Mapping[str, tuple[int, ...]]
Table = dict[str, str]


class Source(NamedTuple):
    """The source of a parameter: the tensor `key`, a third of its rows (OpenCLIP's fused q, k, v), or its transpose.

    The tensor `scale` multiplies it, if it is quantized.
    """

    key: str
    third: int | None = None
    transpose: bool = False
    scale: str | None = None


Sources = dict[str, Source]

REFINER_TEXT = "conditioner.embedders.0.model."  # where the text encoder of SDXL's refiner begins in a single file

# Where each network's tensors begin in a single file.
PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "clip": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
    "open_clip": ("cond_stage_model.model.", "conditioner.embedders.1.model.", REFINER_TEXT),
}

# Keys inside a network that are no weights of ours: index buffers, CLIP's image-side scale, training leftovers.
IGNORED = re.compile(r"(^|\.)(position_ids|logit_scale|attn_mask)$|^(loss|model_ema)\.")

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.13
OPEN_CLIP_ENDS = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def strip_prefix(shapes: Shapes, prefix: str) -> Shapes:
    """Return the entries whose names start with `prefix`, without it."""
    return {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}


def find_prefix(shapes: Shapes, prefixes: tuple[str, ...]) -> str | None:
    """Return the first of the prefixes that a name starts with, or None."""
    return next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in shapes)), None)


def count_numbers(shapes: Shapes, pattern: str) -> int:
    """Return one more than the highest number that the pattern's group matches in the keys, or 0."""
    found = (re.match(pattern, key) for key in shapes)
    count = max((int(match[1]) + 1 for match in found if match), default=0)
    if count > len(shapes):  # before anything counts up to it
        raise ValueError(f"a key is numbered {count - 1} in a table of {len(shapes)}")
    return count


def rename_keys(names: Iterable[str], table: Table) -> tuple[Sources, list[str]]:
    """Rename keys by their longest prefix in `table`. Return the sources, and the keys without a prefix in it."""
    sources: Sources = {}
    unknown: list[str] = []
    for key in names:
        stem = key
        while stem not in table and "." in stem:
            stem = stem.rpartition(".")[0]
        if stem in table:
            sources[table[stem] + key[len(stem) :]] = Source(key)
        else:
            unknown.append(key)
    return sources, unknown


# UNet


class Levels(NamedTuple):
    """The structure of an LDM UNet.

    Attributes:
        channels: Channels of each level.
        down: For each level, the transformer depth of each of its layers on the way down; 0 without attention.
        up: The same on the way up, the lowest level first.
        middle: The same of the middle block: 0 if it is one residual block, None if there is none.
    """

    channels: tuple[int, ...]
    down: tuple[tuple[int, ...], ...]
    up: tuple[tuple[int, ...], ...]
    middle: int | None

    @classmethod
    def of_config(cls, config: UNetConfig) -> Levels:
        """Derive it from a config."""
        return cls(config.block_out_channels, config.down_depths, config.up_depths, config.mid_depth)

    @classmethod
    def of(cls, shapes: Shapes) -> Levels:
        """Derive it from the shapes in a file."""
        depths = _transformer_depths(shapes)
        inputs = count_numbers(shapes, r"input_blocks\.(\d+)\.")
        ends = [i for i in range(inputs) if f"input_blocks.{i}.0.op.weight" in shapes]  # the downsampler of each level
        starts = [1, *(end + 1 for end in ends)]
        down = [range(start, end) for start, end in zip(starts, (*ends, inputs), strict=True)]
        outputs = iter(range(sum(len(level) + 1 for level in down)))
        up = [[next(outputs) for _ in range(len(level) + 1)] for level in reversed(down)]
        middle = depths.get("middle_block", 0) if any(key.startswith("middle_block.") for key in shapes) else None
        return cls(
            tuple(shapes.get(f"input_blocks.{start}.0.out_layers.3.weight", (0,))[0] for start in starts),
            tuple(tuple(depths.get(f"input_blocks.{i}", 0) for i in level) for level in down),
            tuple(tuple(depths.get(f"output_blocks.{i}", 0) for i in level) for level in up),
            middle,
        )

    def blocks(self) -> Iterator[tuple[str, str]]:
        """Yield (original name, module name) for each resnet, transformer, downsampler and upsampler."""
        last = len(self.down) - 1
        i = 1
        for level, depths in enumerate(self.down):
            for layer, depth in enumerate(depths):
                yield f"input_blocks.{i}.0", f"down_blocks.{level}.resnets.{layer}"
                if depth:
                    yield f"input_blocks.{i}.1", f"down_blocks.{level}.attentions.{layer}"
                i += 1
            if level < last:
                yield f"input_blocks.{i}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
                i += 1
        yield "middle_block.0", "mid_block.resnets.0"
        yield "middle_block.1", "mid_block.attentions.0"
        yield "middle_block.2", "mid_block.resnets.1"
        i = 0
        for level, depths in enumerate(self.up):
            for layer, depth in enumerate(depths):
                yield f"output_blocks.{i}.0", f"up_blocks.{level}.resnets.{layer}"
                if depth:
                    yield f"output_blocks.{i}.1", f"up_blocks.{level}.attentions.{layer}"
                if level < last and layer == len(depths) - 1:
                    yield f"output_blocks.{i}.{2 if depth else 1}.conv", f"up_blocks.{level}.upsamplers.0.conv"
                i += 1


def _transformer_depths(shapes: Shapes) -> dict[str, int]:
    """Return the depth of the transformer in each block that has one, by the block's name."""
    depths: dict[str, int] = {}
    for key in shapes:
        if found := re.match(
            r"(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.1\.transformer_blocks\.(\d+)\.", key
        ):
            depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
    if max(depths.values(), default=0) > len(shapes):  # before anything counts up to it
        raise ValueError(f"a key is numbered {max(depths.values()) - 1} in a table of {len(shapes)}")
    return depths


def unet_sources(shapes: Shapes, _: Family) -> tuple[Sources, list[str]]:
    """Return the sources of an LDM UNet (keys without `model.diffusion_model.`), and the unknown keys."""
    return rename_keys(shapes, unet_table(Levels.of(shapes)))


def unet_table(levels: Levels) -> Table:
    """Return the table from original to module names for an LDM UNet."""
    table = dict(UNET_ENDS)
    for block, module in levels.blocks():
        table[block] = module
        if ".resnets." in module:
            table |= {f"{block}.{old}": f"{module}.{new}" for old, new in RESNET.items()}
    return table


def unet_config(shapes: Shapes, family: Family) -> dict[str, Any]:
    """Return UNetConfig fields from an LDM UNet's shapes. SD1 has 8 heads; in the others, a head has 64 channels."""
    levels = Levels.of(shapes)
    down, up = ([_level_depth(depths) for depths in part] for part in (levels.down, levels.up))
    context = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), 0)
    proj_in = next((shape for key, shape in shapes.items() if key.endswith(".proj_in.weight")), ())
    layers = [len(depths) for depths in levels.down]
    depths = [depth or 1 for depth in down]
    if down[-1] == 0 and levels.middle:  # in a config, the middle block has the depth of the lowest level
        depths[-1] = levels.middle
    config: dict[str, Any] = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": levels.channels,
        "layers_per_block": layers[0] if len({*layers}) == 1 else layers,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in down],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in up],
        "transformer_layers_per_block": depths,
        "cross_attention_dim": context,
        "use_linear_projection": len(proj_in) == 2,
        "attention_head_dim": 8 if family == "sd1" else [max(width // 64, 1) for width in levels.channels],
    }
    if any(depth and depth != below for depth, below in zip(up, reversed(depths), strict=True)):
        config["reverse_transformer_layers_per_block"] = [depth or 1 for depth in up]
    if not levels.middle:
        config["mid_block_type"] = None if levels.middle is None else "UNetMidBlock2D"
    if "time_embed.cond_proj.weight" in shapes:
        config["time_cond_proj_dim"] = shapes["time_embed.cond_proj.weight"][1]
    if "label_emb.0.0.weight" in shapes:
        config["addition_embed_type"] = "text_time"
        config["projection_class_embeddings_input_dim"] = shapes["label_emb.0.0.weight"][1]
    return config


def _level_depth(depths: tuple[int, ...]) -> int | tuple[int, ...]:
    """Return the depth of a level's layers: one number if it is that of all of them."""
    if len({*depths}) != 1 and 0 in depths:
        raise ValueError(f"a level has attention in some of its layers only ({list(depths)})")
    return depths[0] if len({*depths}) == 1 else depths


# VAE


SCALING_FACTORS: dict[Family, float] = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
DIFFUSERS_VAE = "encoder.down_blocks.0.resnets.0.norm1.weight"  # in a file whose VAE has diffusers' names


def vae_sources(shapes: Shapes, _: Family) -> tuple[Sources, list[str]]:
    """Return the sources of an autoencoder (keys without `first_stage_model.`), and the unknown keys."""
    if DIFFUSERS_VAE in shapes:
        return folder_sources(shapes, "vae"), []
    return rename_keys(shapes, vae_table(*_vae_levels(shapes)))


def vae_table(levels: int, layers: int) -> Table:
    """Return the table from original to module names for an LDM autoencoder."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half, way, resnets in (("encoder", "down", layers), ("decoder", "up", layers + 1)):
        table |= {f"{half}.{end}": f"{half}.{end}" for end in ("conv_in", "conv_out")}
        table[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        for i in (0, 1):
            _vae_resnet(table, f"{half}.mid.block_{i + 1}", f"{half}.mid_block.resnets.{i}")
        module = f"{half}.mid_block.attentions.0"
        # some programs save the attention's names as diffusers has them; a file is written with the original ones
        for old, new in (*((new, new) for new in VAE_ATTENTION.values()), *OLD_VAE_ATTENTION.items()):
            table[f"{half}.mid.attn_1.{old}"] = f"{module}.{new}"
        for old, new in VAE_ATTENTION.items():
            table[f"{half}.mid.attn_1.{old}"] = f"{half}.mid_block.attentions.0.{new}"
        for level in range(levels):
            block = f"{half}.{way}.{level}"
            # the file counts the decoder's levels from the top as well, the module in the order that they run
            module = f"{half}.{way}_blocks.{level if way == 'down' else levels - 1 - level}"
            table[f"{block}.{way}sample.conv"] = f"{module}.{way}samplers.0.conv"
            for layer in range(resnets):
                _vae_resnet(table, f"{block}.block.{layer}", f"{module}.resnets.{layer}")
    return table


def _vae_resnet(table: Table, block: str, module: str) -> None:
    table[block] = module
    table[f"{block}.nin_shortcut"] = f"{module}.conv_shortcut"


def _vae_levels(shapes: Shapes, down: str = "encoder.down", layer: str = "block") -> tuple[int, int]:
    start = re.escape(down)
    return count_numbers(shapes, rf"{start}\.(\d+)\."), count_numbers(shapes, rf"{start}\.0\.{layer}\.(\d+)\.")


def vae_config(shapes: Shapes, family: Family) -> dict[str, Any]:
    """Return VAEConfig fields from an autoencoder's shapes; the scaling factor is the family's."""
    down, layer, attention = "encoder.down", "block", "encoder.mid.attn_1."
    if DIFFUSERS_VAE in shapes:
        down, layer, attention = "encoder.down_blocks", "resnets", "encoder.mid_block.attentions."
    levels, layers = _vae_levels(shapes, down, layer)
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": [shapes[f"{down}.{i}.{layer}.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": layers,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "scaling_factor": SCALING_FACTORS[family],
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any(key.startswith(attention) for key in shapes),
    }


# Text encoders


def clip_sources(shapes: Shapes, _: Family) -> tuple[Sources, list[str]]:
    """Return the sources of a transformers CLIP text model in a single file, without the projection of some files."""
    sources = folder_sources(shapes, "text_encoder")
    sources.pop("text_projection.weight", None)
    return sources, []


def clip_config(shapes: Shapes, _: Family) -> dict[str, Any]:
    """Return CLIPConfig fields from an OpenAI CLIP text model's shapes; a head has 64 channels."""
    shapes = {target: shapes[source.key] for target, source in folder_sources(shapes, "text_encoder").items()}
    vocab, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count_numbers(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
        "eos_token_id": 2,  # as in the published configs: the pooled vector is taken at the highest id
    }


def open_clip_layers(shapes: Shapes, family: Family) -> int:
    """Return the number of layers used: all in SDXL, 23 of ViT-H's 24 in SD2 (some files lack the last one)."""
    layers = count_numbers(shapes, r"transformer\.resblocks\.(\d+)\.")
    return layers if family == "sdxl" or layers == 23 else layers - 1


def open_clip_sources(shapes: Shapes, family: Family) -> tuple[Sources, list[str]]:
    """Return the sources of an OpenCLIP text tower: in_proj in thirds, text_projection transposed."""
    sources: Sources = {}
    layers = open_clip_layers(shapes, family)
    used = {}
    for key, shape in shapes.items():
        layer = re.match(r"transformer\.resblocks\.(\d+)\.", key)
        if layer is None or int(layer[1]) < layers:
            used[key] = shape
    for i in range(layers):
        block, module = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        for kind in ("weight", "bias"):
            fused = f"{block}.attn.in_proj_{kind}"
            if used.pop(fused, None):
                for third, name in enumerate("qkv"):
                    sources[f"{module}.self_attn.{name}_proj.{kind}"] = Source(fused, third=third)
    if used.pop("text_projection", None) and family == "sdxl":  # SD2 takes no pooled vector
        sources["text_projection.weight"] = Source("text_projection", transpose=True)
    others, unknown = rename_keys(used, open_clip_table(layers))
    return sources | others, unknown


def open_clip_table(layers: int) -> Table:
    """Return the table from original to module names for an OpenCLIP tower, without q, k, v and the projection."""
    table = dict(OPEN_CLIP_ENDS)
    for i in range(layers):
        block, module = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        table |= {f"{block}.{old}": f"{module}.{new}" for old, new in OPEN_CLIP_LAYER.items()}
    return table


def open_clip_config(shapes: Shapes, family: Family) -> dict[str, Any]:
    """Return CLIPConfig fields from an OpenCLIP text tower's shapes; a head has 64 channels."""
    vocab, width = shapes["token_embedding.weight"]
    with_projection = family == "sdxl" and "text_projection" in shapes
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": open_clip_layers(shapes, family),
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": shapes["positional_embedding"][0],
        "hidden_act": "gelu",
        "projection_dim": shapes["text_projection"][1] if with_projection else width,
        "eos_token_id": 2,
        "architectures": ["CLIPTextModelWithProjection" if with_projection else "CLIPTextModel"],
    }


CONFIGS = {"unet": unet_config, "vae": vae_config, "clip": clip_config, "open_clip": open_clip_config}
SOURCES = {"unet": unet_sources, "vae": vae_sources, "clip": clip_sources, "open_clip": open_clip_sources}


# Folders


def folder_sources(names: Iterable[str], part: str) -> Sources:
    """Return the sources of one network of a diffusers folder: the module's own names, except for three variants.

    Text encoders may lack the leading `text_model.` and safety checkers one of their two `vision_model.` (transformers
    5), and VAEs may use query, key, value, proj_attn.
    """
    sources: Sources = {}
    for name in names:
        if IGNORED.search(name):
            continue
        target = name
        if part.startswith("text_encoder"):
            if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
                target = f"text_model.{name}"
        elif part == "safety_checker" and name.startswith("vision_model."):
            target = name if name.startswith("vision_model.vision_model.") else f"vision_model.{name}"
        elif part == "vae" and ".attentions." in name:
            block, leaf, kind = name.rsplit(".", 2)
            target = f"{block}.{OLD_VAE_ATTENTION.get(leaf, leaf)}.{kind}"
        sources[target] = Source(name)
    return sources
