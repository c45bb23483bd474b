"""Name what a tensor file contains, by its keys and shapes: a model of another family, a part of a model, an adapter.

Each kind is recognized by keys that only it has, in the layout of its authors or of diffusers. Some programs save a
network's keys behind a prefix such as `model.diffusion_model.`, so patterns are searched in the keys with and without
it; "^" is the beginning of a key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from mezzotint.weights.keys import REFINER_TEXT

Shapes = Mapping[str, tuple[int, ...]]

PREFIX = re.compile(r"model\.diffusion_model\.|diffusion_model\.|net\.|transformer\.|unet\.|model\.(?!\d)")
MAX_KEYS, MAX_KEY_LENGTH = 20_000, 200  # how many keys of a file are searched, and how much of each


class Kind(NamedTuple):
    """A kind of file: its name, and patterns that each match one of its keys."""

    name: str
    patterns: tuple[str, ...]


CONTROLNET = "a ControlNet"
IP_ADAPTER = "an IP-Adapter"
T2I_ADAPTER = "a T2I-Adapter"
ADAPTERS = [
    Kind(IP_ADAPTER, (r"^image_proj\.", r"^ip_adapter\.")),
    Kind("a ControlNet-LLLite", (r"^lllite_",)),
    Kind(CONTROLNET, (r"^lora_controlnet$",)),
    Kind(
        "a LoRA",
        (r"^(lora|lycoris)_|\.lora_?\w*\.|\.lora_[AB]$|_lora\.|\.(hada_w|lokr_w|oft_blocks|oft_diag|dora_scale)",),
    ),
    Kind(
        CONTROLNET,
        (r"^(control_model|control_add_embedding)\.|^controlnet_|^(control_model\.)?(input_hint_block|zero_convs)\.",),
    ),
    Kind(T2I_ADAPTER, (r"^(adapter\.)?body\.\d+\.(resnets\.\d+\.)?(block1|in_conv)\.",)),
]

# Other families of models; the first that matches. None of them has a key of Stable Diffusion.
OTHER_FAMILIES = [
    Kind("a Chroma model", (r"^distilled_guidance_layer\.", r"^double_blocks\.")),
    Kind("a HunyuanVideo model", (r"^(txt_in\.individual_token_refiner|context_embedder\.token_refiner)\.",)),
    Kind("a FLUX.2 model", (r"^double_stream_modulation_img\.",)),
    Kind("a Flux model", (r"^double_blocks\.\d",)),
    Kind("a Flux model", (r"^single_transformer_blocks\.", r"^transformer_blocks\.\d+\.attn\.add_q_proj\.")),
    Kind("a Stable Diffusion 3 model", (r"^joint_blocks\.",)),
    Kind("a Stable Diffusion 3 model", (r"^transformer_blocks\.\d+\.attn\.add_q_proj\.", r"^pos_embed\.proj\.")),
    Kind("a Qwen-Image model", (r"^transformer_blocks\.\d+\.attn\.add_q_proj\.", r"^txt_norm\.")),
    Kind("an AuraFlow model", (r"^double_layers\.\d+\.attn\.w1q\.",)),
    Kind("an AuraFlow model", (r"^joint_transformer_blocks\.", r"^pos_embed\.")),
    Kind("a HiDream model", (r"^double_stream_blocks\.",)),
    Kind("a Lumina 2 or Z-Image model", (r"^(cap_embedder|time_caption_embed)\.", r"^noise_refiner\.")),
    Kind("an LTX-Video model", (r"^patchify_proj\.|^proj_in\.", r"^adaln_single\.", r"^scale_shift_table$")),
    Kind("a Sana model", (r"^(caption_norm|attention_y_norm)\.", r"\.(conv_inverted|inverted_conv)\.")),
    Kind("a PixArt model", (r"^t_block\.1\.", r"^blocks\.\d+\.cross_attn\.kv_linear\.")),
    Kind("a PixArt model", (r"^adaln_single\.", r"^caption_projection\.")),
    Kind("a Hunyuan-DiT model", (r"^mlp_t5\.",)),
    Kind("a Wan model", (r"^head\.modulation$",)),
    Kind("a Wan model", (r"^condition_embedder\.", r"^blocks\.\d+\.scale_shift_table$")),
    Kind("a Mochi model", (r"^t5_yproj\.",)),
    Kind("a CogVideoX model", (r"^patch_embed\.text_proj\.",)),
    Kind("a Cosmos model", (r"^blocks\.block0\.|^x_embedder\.proj\.1\.",)),
    Kind("a Stable Cascade model", (r"^clip_(txt_mapper|mapper|txt_pooled_mapper)\.",)),
    Kind("a Stable Audio model", (r"^to_timestep_embed\.", r"^to_cond_embed\.")),
    Kind("a Stable Video Diffusion model", (r"\.(time_stack|time_mixer|temporal_transformer_blocks)\b",)),
    Kind("a ModelScope text-to-video model", (r"\.(temp_convs|temopral_conv)\.",)),
    Kind("an AnimateDiff motion module", (r"(^|\.)motion_modules\.",)),
    Kind("a GLIGEN model", (r"^position_net\.", r"\.fuser\.")),
    Kind("a Kandinsky 2 model", (r"^encoder_hid_proj\.", r"^add_embedding\.image_")),
    Kind("a Kolors model", (r"^encoder_hid_proj\.", r"^(add_embedding\.linear_1|label_emb\.0)\.")),
    Kind("a DeepFloyd IF model", (r"^encoder_hid_proj\.", r"^add_embedding\.")),
    Kind("the unCLIP form of Stable Diffusion 2", (r"^(noise_augmentor|embedder\.model\.visual)\.",)),
    Kind("the depth-to-image form of Stable Diffusion 2", (r"^depth_model\.",)),
    Kind("the x4 upscaler of Stable Diffusion 2", (r"^low_scale_model\.|^label_emb\.weight$",)),
    Kind("a Zero123 model", (r"^cc_projection\.",)),
    Kind(
        "a latent diffusion model of 2021, with a BERT text encoder", (r"^cond_stage_model\.transformer\.token_emb\.",)
    ),
]
REFINER = "SDXL's refiner, which takes the last steps of another model's run"
UNCLIP = "the unCLIP form of Stable Diffusion 2"
OTHER_INPUTS = {  # by the number of the UNet's input channels
    5: "the depth-to-image form of Stable Diffusion 2",
    7: "the x4 upscaler of Stable Diffusion 2",
    8: "a Stable Diffusion model that edits a picture (InstructPix2Pix)",
}

PARTS = [
    Kind("a textual-inversion embedding", (r"^string_to_param|^emb_params$|^clip_[lg]$|^<[^>]*>$",)),
    Kind("a Stable Diffusion safety checker", (r"^(special_care_embeds|concept_embeds)",)),
    Kind("only a Wan VAE", (r"^(decoder|encoder)\.middle\.0\.residual\.0\.gamma$",)),
    Kind(
        "a TAESD autoencoder (AutoencoderTiny, a small VAE for previews)",
        (r"^((taesd_)?(encoder|decoder)\.)?(layers\.)?[01]\.weight$", r"\d\.conv\.0\.weight$"),
    ),
    Kind("only a VAE", (r"^(first_stage_model\.|vae\.)?encoder\.(down|down_blocks)\.\d",)),
    Kind("only the decoder of a VAE", (r"^(first_stage_model\.|vae\.)?decoder\.(up|up_blocks)\.\d",)),
    Kind("only a UNet", (r"^(down_blocks|input_blocks)\.\d",)),
    Kind("only a T5 text encoder", (r"^(encoder\.)?block\.\d+\.layer\.0\.SelfAttention\.",)),
    Kind("a whole CLIP model", (r"^text_model\.|^transformer\.resblocks\.", r"^(vision_model|visual)\.")),
    Kind("only a CLIP image encoder", (r"^(vision_model|visual)\.",)),
    Kind("only a text encoder", (r"^text_model\.|^encoder\.layers\.0\.self_attn\.|transformer\.resblocks\.",)),
    Kind("an upscaler (ESRGAN or a relative)", (r"^model\.1\.sub\.\d|^body\.\d+\.rdb1\.|RDB1\.conv1|^conv_first\.",)),
]


def describe_kind(shapes: Shapes) -> str:
    """Return what a file that is not a whole Stable Diffusion model contains, with its article."""
    if not shapes:
        return "no tensors"
    text = _searchable(shapes)
    family = find_other_family(shapes)
    if adapter := _first(ADAPTERS, text):
        return f"{adapter} for {family}" if family else adapter
    if found := family or _first(PARTS, text):
        channels = next((s[1] for key, s in shapes.items() if key.endswith("decoder.conv_in.weight") and len(s) > 1), 4)
        return found if channels == 4 else f"{found}, with {channels} latent channels"
    names = ", ".join(islice(shapes, 2)) + (f" and {len(shapes) - 2} more" if len(shapes) > 2 else "")
    return f"{len(shapes)} tensors of an unknown kind (such as {names})"


def find_other_family(shapes: Shapes) -> str | None:
    """Return which model other than Stable Diffusion 1, 2 and XL a file contains, with its article, or None."""
    if name := _first(OTHER_FAMILIES, _searchable(shapes)):
        return name
    unet = {key[found.end() :]: shape for key, shape in shapes.items() if (found := PREFIX.match(key))}
    first, added = (unet.get(name, ()) for name in ("input_blocks.0.0.weight", "label_emb.0.0.weight"))
    context = next((s[1] for key, s in unet.items() if key.endswith("attn2.to_k.weight") and len(s) > 1), 0)
    if any(key.startswith(REFINER_TEXT) for key in shapes) or (*added[1:], context) == (2560, 1280):
        return REFINER
    if added and context == 1024:
        return UNCLIP
    return OTHER_INPUTS.get(first[1]) if len(first) == 4 else None


def _searchable(shapes: Shapes) -> str:
    """Return the keys, one a line, and those that have a prefix also without it."""
    keys = [key[:MAX_KEY_LENGTH] for key in islice(shapes, MAX_KEYS)]
    return "\n".join([*keys, *(key[found.end() :] for key in keys if (found := PREFIX.match(key)))])


def _first(kinds: Sequence[Kind], text: str) -> str | None:
    """Return the name of the first kind whose patterns all match."""
    for kind in kinds:
        if all(re.search(pattern, text, re.MULTILINE) for pattern in kind.patterns):
            return kind.name
    return None
