"""The names of layers and tensors in LoRA files, as each training program writes them.

`layer_names` maps from the model's layers to all names that they may have in a file. The other direction is ambiguous:
`lora_unet_down_blocks_0_...` does not tell which underscores were dots.

    kohya                lora_unet_, lora_te_ (SDXL: lora_te1_, lora_te2_) and diffusers' path with underscores, or for
                         SDXL's UNet the original path (input_blocks_4_1_...)
    LyCORIS              lycoris_ and the same paths
    diffusers, peft      unet., text_encoder., text_encoder_2., base_model.model. or no prefix
    ComfyUI              text_encoders.clip_l.transformer., text_encoders.clip_g.transformer., clip_l., clip_g.
    diffusers, old       ...attn1.processor.to_q_lora; in the text encoder ...self_attn.to_q_lora
    others               diffusion_model., model.diffusion_model. and the original path
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

from torch import nn

from mezzotint.config import UNetConfig
from mezzotint.models.adapters import LAYERS
from mezzotint.weights.keys import Levels, unet_table

SCALE = ".weight"  # of an (IA)^3, which also has .on_input; without it, a layer's own weight

# ending of a key -> role of the tensor
ENDINGS = {
    **{f".{down}{end}": "down" for down in ("lora_down", "lora_A") for end in (".weight", "")},
    **{f".{up}{end}": "up" for up in ("lora_up", "lora_B") for end in (".weight", "")},
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".down.weight": "down",  # of ..._lora
    ".up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_B.bias": "up_bias",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".diff": "diff",
    ".w_norm": "diff",
    ".diff_b": "diff_b",
    ".b_norm": "diff_b",
    **{f".hada_{part}": part for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": f"k_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".{part}.weight": part for part in ("a1", "a2", "b1", "b2", "bm")},  # GLoRA
    ".oft_blocks": "oft_blocks",  # OFT and BOFT
    ".rescale": "rescale",
    ".on_input": "on_input",  # (IA)^3
    SCALE: "scale",
}
_ORDER = sorted(ENDINGS, key=len, reverse=True)
_ADAPTER = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)[^.]+(\.weight|\.bias)?$")  # peft's name


def _comfyui(encoder: str) -> tuple[str, ...]:
    """Return ComfyUI's prefixes of a text encoder: clip_l and clip_g, and clip_h of SD 2."""
    names = (f"{encoder}.", f"{encoder}.transformer.")
    return *names, *(f"text_encoders.{name}" for name in names)


# prefixes of a path in a file
DOTTED = {
    "unet": ("unet.", "", "base_model.model.", "base_model.model.unet.", "diffusion_model.", "model.diffusion_model."),
    "text_encoder": ("text_encoder.", "", "base_model.model.", *_comfyui("clip_l"), *_comfyui("clip_h")),
    "text_encoder_2": ("text_encoder_2.", *_comfyui("clip_g")),
}
UNDERSCORED = {
    "unet": ("lora_unet_", "lycoris_", "lycoris_unet_"),
    "text_encoder": ("lora_te_", "lora_te1_", "lycoris_te_", "lycoris_te1_"),
    "text_encoder_2": ("lora_te2_", "lycoris_te2_"),
}

# names that only some model families have
SIGNS = {
    "Flux": re.compile(r"double_blocks|single_blocks|single_transformer_blocks"),
    "SD3": re.compile(r"joint_blocks|attn\.add_[qkv]_proj|attn_add_[qkv]_proj"),
    "SDXL": re.compile(r"lora_te2_|text_encoder_2\.|add_embedding|label_emb|transformer_blocks[._][2-9]"),
}
WIDTHS = {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}  # of the context that a UNet attends to
VERSIONS = {"sdxl": "SDXL", "sd_v1": "SD 1", "sd_v2": "SD 2", "flux": "Flux", "sd3": "SD3"}  # ss_base_model_version
_CONTEXT = re.compile(r"attn2[._](processor\.)?to_[kv](_lora)?[._].*(down|lora_A|w1_b|w2_b)")


# keys of kinds that are not supported -> what they are
OTHERS = {
    "oft_R": "OFT of peft",
    "boft_R": "BOFT of peft",
    "boft_s": "BOFT of peft",
    "ia3_l": "(IA)^3 of peft",
    "vera_lambda_b": "VeRA",
    "vera_lambda_d": "VeRA",
    "lora_embedding_A": "LoRA of an embedding",
    "lora_embedding_B": "LoRA of an embedding",
    "lambda_layer": "T-LoRA",
}
_OTHERS = re.compile(rf"(?:^|\.)({'|'.join(OTHERS)})(?:\.|$)")


def other_kind(key: str) -> str | None:
    """Return the kind of a tensor that no supported kind of change has, or None."""
    found = _OTHERS.search(key)
    return OTHERS[found[1]] if found else None


def split_key(key: str) -> tuple[str, str] | None:
    """Split "lora_unet_conv_in.lora_down.weight" into ("lora_unet_conv_in", "down"); return None for other keys."""
    key = _ADAPTER.sub(r".\1\2", key)
    for ending in _ORDER:
        if key.endswith(ending):
            return key.removesuffix(ending), ENDINGS[ending]
    return None


def layer_names(networks: Mapping[str, nn.Module]) -> dict[str, str]:
    """Map all names that the layers of networks ("unet", "text_encoder", ...) may have to "network.layer"."""
    table: dict[str, str] = {}
    for network, module in networks.items():
        names = [name for name, layer in module.named_modules() if isinstance(layer, LAYERS)]
        spelled = (
            _unet_spellings(names, cast(UNetConfig, module.config)) if network == "unet" else _text_spellings(names)
        )
        for name, spellings in spelled:
            for spelling in spellings:
                flat = spelling.replace(".", "_")
                for stem in (
                    *(prefix + spelling for prefix in DOTTED[network]),
                    *(prefix + flat for prefix in UNDERSCORED[network]),
                ):
                    table.setdefault(stem, f"{network}.{name}")
    return table


def _unet_spellings(names: Iterable[str], config: UNetConfig) -> Iterator[tuple[str, list[str]]]:
    """Yield each layer's paths: diffusers', the original one, and that of diffusers' old attention processors."""
    original = {module: block for block, module in unet_table(Levels.of_config(config)).items()}
    for name in names:
        stem = name
        while stem not in original and "." in stem:
            stem = stem.rpartition(".")[0]
        spellings = [name]
        if stem in original:
            spellings.append(original[stem] + name[len(stem) :])
        if found := re.fullmatch(r"(.*\.attn[12])\.(to_[qkv]|to_out)(\.0)?", name):
            spellings.append(f"{found[1]}.processor.{found[2]}_lora")
        yield name, spellings


def _text_spellings(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each layer's paths: with and without `text_model.`, and that of diffusers' old attention processors."""
    for name in names:
        spellings = [name, name.removeprefix("text_model.")]
        if found := re.fullmatch(r"(.*\.self_attn)\.(q|k|v|out)_proj", name):
            spellings += [f"{path}.to_{found[2]}_lora" for path in (found[1], found[1].removeprefix("text_model."))]
        yield name, spellings


def detect_family(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> str | None:
    """Return the model family that a LoRA file is for, or None if it does not show it."""
    version = metadata.get("ss_base_model_version", "").lower()
    for mark, found in VERSIONS.items():
        if version.startswith(mark):
            return found
    for key, shape in shapes.items():
        if _CONTEXT.search(key) and len(shape) > 1 and shape[1] in WIDTHS:
            return WIDTHS[shape[1]]
    for found, sign in SIGNS.items():
        if any(sign.search(key) for key in shapes):
            return found
    return None
