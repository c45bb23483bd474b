"""Map the names of ControlNet files to module names, and derive the configuration from the shapes.

Files have diffusers' names, which are the module's; the original ones (`input_hint_block`, `zero_convs`), with or
without `control_model.`; or, of a Control-LoRA, the original ones with factors `.up` and `.down` in place of weights.
"""

from __future__ import annotations

import re
from typing import Any

from mezzotint.config import UNetConfig
from mezzotint.weights.keys import Family, Levels, Shapes, Sources, Table, count_numbers, rename_keys, unet_table

PREFIX = "control_model."
MARKERS = ("lora_controlnet", "difference")  # tensors that only say what kind of file it is
EMBEDDING = "controlnet_cond_embedding"
TASKS = "task_embedding"  # a tensor that only a ControlNet Union has
OF_UNION = (TASKS, "transformer_layes", "spatial_ch_projs", "control_add_embedding")
FACTORS = (".up", ".down")  # of a change of a weight, up @ down
OF_EMBEDDING = rf"{EMBEDDING}\.blocks\.(\d+)\."


def sources_of(shapes: Shapes, unet: UNetConfig) -> tuple[Sources, list[str]]:
    """Return the source of each tensor by its module name, and the keys without one; `.up` and `.down` stay.

    Args:
        shapes: The shapes in the file.
        unet: The UNet's configuration, whose structure a Control-LoRA has.

    Raises:
        ValueError: If the names contradict each other.
    """
    if any(key.startswith(f"{EMBEDDING}.") for key in shapes):
        return rename_keys(shapes, {key: key for key in shapes if key not in MARKERS})
    prefix = PREFIX if any(key.startswith(PREFIX) for key in shapes) else ""
    own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    own = {key: shape for key, shape in own.items() if key not in MARKERS}
    levels = Levels.of_config(unet) if "lora_controlnet" in shapes else Levels.of(own)
    sources, unknown = rename_keys(own, _table(own, levels))
    sources = {target: source._replace(key=prefix + source.key) for target, source in sources.items()}
    return sources, [prefix + key for key in unknown]


def _table(shapes: Shapes, levels: Levels) -> Table:
    """Return the table from original to module names."""
    last = count_numbers(shapes, r"input_hint_block\.(\d+)\.") - 1
    table = unet_table(levels) | {"middle_block_out.0": "controlnet_mid_block"} | {name: name for name in OF_UNION}
    table |= {f"input_hint_block.{i}": f"{EMBEDDING}.blocks.{i // 2 - 1}" for i in range(2, last, 2)}
    table |= {"input_hint_block.0": f"{EMBEDDING}.conv_in", f"input_hint_block.{last}": f"{EMBEDDING}.conv_out"}
    zeros = count_numbers(shapes, r"zero_convs\.(\d+)\.")
    return table | {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(zeros)}


def family_of(shapes: Shapes) -> Family:
    """Return the family of a ControlNet from its shapes by module name."""
    if "add_embedding.linear_1.weight" in shapes:
        return "sdxl"
    return "sd2" if _context(shapes) == 1024 or _is_linear(shapes) else "sd1"


def config_fields(shapes: Shapes, unet: UNetConfig) -> dict[str, Any]:
    """Return ControlNetConfig fields from the shapes by module name; see `unet_config` of keys.py.

    Args:
        shapes: The shapes.
        unet: The UNet's configuration, for what shapes do not show.

    Raises:
        KeyError: If a tensor is missing.
    """
    levels = count_numbers(shapes, r"down_blocks\.(\d+)\.")
    blocks = [f"down_blocks.{level}" for level in range(levels)]
    depths = [_depth(shapes, f"{block}.attentions.0") for block in blocks]
    middle = _depth(shapes, "mid_block.attentions.0")
    channels = [shapes[f"{block}.resnets.0.conv1.weight"][0] for block in blocks]
    layers = [count_numbers(shapes, rf"{re.escape(block)}\.resnets\.(\d+)\.") for block in blocks]
    family = family_of(shapes)
    fields = embedding_fields(shapes) | {
        "in_channels": shapes["conv_in.weight"][1],
        "block_out_channels": channels,
        "layers_per_block": layers[0] if len({*layers}) == 1 else layers,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        "transformer_layers_per_block": [*(depth or 1 for depth in depths[:-1]), depths[-1] or middle or 1],
        "cross_attention_dim": _context(shapes) or unet.cross_attention_dim,
        "attention_head_dim": 8 if family == "sd1" else [max(width // 64, 1) for width in channels],
        "use_linear_projection": _is_linear(shapes),
        "upcast_attention": family == "sd2",
    }
    if family == "sdxl":
        fields |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": unet.addition_time_embed_dim or 256,
            "projection_class_embeddings_input_dim": shapes["add_embedding.linear_1.weight"][1],
        }
    return fields


def embedding_fields(shapes: Shapes) -> dict[str, Any]:
    """Return the fields of the part that reads the picture, which no UNet has."""
    first = shapes[f"{EMBEDDING}.conv_in.weight"]
    wider = range(1, count_numbers(shapes, OF_EMBEDDING), 2)
    return {
        "conditioning_channels": first[1],
        "conditioning_embedding_out_channels": [
            first[0],
            *(shapes[f"{EMBEDDING}.blocks.{i}.weight"][0] for i in wider),
        ],
    }


def union_fields(shapes: Shapes) -> dict[str, Any]:
    """Return the fields that only a ControlNet Union has. Raises KeyError if a tensor is missing."""
    types, width = shapes[TASKS]
    return {
        "num_control_type": types,
        "num_trans_channel": width,
        "num_trans_layer": count_numbers(shapes, r"transformer_layes\.(\d+)\."),
        "num_proj_channel": shapes["spatial_ch_projs.weight"][0],
        "addition_time_embed_dim": shapes["control_add_embedding.linear_1.weight"][1] // types,
    }


def _depth(shapes: Shapes, transformer: str) -> int:
    return count_numbers(shapes, rf"{re.escape(transformer)}\.transformer_blocks\.(\d+)\.")


def _context(shapes: Shapes) -> int:
    """Return the width of the context, or 0 without attention."""
    return next((shape[-1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight") and shape), 0)


def _is_linear(shapes: Shapes) -> bool:
    return any(key.endswith(".proj_in.weight") and len(shape) == 2 for key, shape in shapes.items())
