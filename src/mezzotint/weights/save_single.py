"""Write a model as one file in the original layout (CompVis, Stability), with the names that `single.py` reads.

Such a file shows heads, norms, tokenizers and the scheduler only through its shapes and family. A model that would be
read as a different one is refused; it can be saved as a folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.config import CLIPConfig, ScheduleConfig, UNetConfig, VAEConfig
from mezzotint.errors import CheckpointError
from mezzotint.weights import keys
from mezzotint.weights.checkpoint import Parts
from mezzotint.weights.model_files import AESTHETIC, ENCODERS, NETWORKS, Config, join_names
from mezzotint.weights.save_tensors import own_copy, write_tensors
from mezzotint.weights.single import add_family_fields, clip_tokenizer, default_scheduler

# The layout of each network of a family in a file, and the prefix of its tensors.
_BOTH = {"unet": ("unet", "model.diffusion_model."), "vae": ("vae", "first_stage_model.")}
LAYOUTS = {
    "sd1": _BOTH | {"text_encoder": ("clip", "cond_stage_model.transformer.")},
    "sd2": _BOTH | {"text_encoder": ("open_clip", "cond_stage_model.model.")},
    "sdxl": _BOTH
    | {
        "text_encoder": ("clip", "conditioner.embedders.0.transformer."),
        "text_encoder_2": ("open_clip", "conditioner.embedders.1.model."),
    },
}
LAYOUTS["refiner"] = _BOTH | {"text_encoder_2": ("open_clip", keys.REFINER_TEXT)}
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
    "refiner": "stable-diffusion-xl-v1-refiner",
}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # in the words of ModelSpec 1.0

# Fields that do not affect the result, or that other fields express.
UNCOMPARED = {
    UNetConfig: ("sample_size", "upcast_attention", "attention_head_dim", "num_attention_heads", "layers_per_block",
                 "transformer_layers_per_block", "reverse_transformer_layers_per_block"),
    VAEConfig: ("sample_size", "force_upcast"),
    CLIPConfig: ("projection_dim", "bos_token_id", "eos_token_id", "pad_token_id", "architectures"),
}  # fmt: skip


def save_single(path: Path, parts: Parts, dtype: torch.dtype | None = torch.float16) -> None:
    """Write a model as a .safetensors file, whole or not at all.

    The header has ModelSpec's architecture and prediction_type. SDXL's v-prediction is marked by an empty tensor
    `v_pred` and zero-terminal SNR by `ztsnr`, as ComfyUI reads them.

    Args:
        path: The file. Missing parent folders are made.
        parts: The model.
        dtype: The dtype of the weights; None is each weight's own.

    Raises:
        CheckpointError: If the original layout cannot express the model.
        WriteError: If the file cannot be written.
    """
    check_single(parts)
    prediction, zero_snr = _schedule(parts)
    architecture = ARCHITECTURES[_layout(parts)]
    if architecture.endswith("v2-512") and prediction == "v_prediction":
        architecture = "stable-diffusion-v2-768-v"
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.prediction_type": PREDICTIONS[prediction],
    }
    tensors = {key: own_copy(tensor, dtype) for key, tensor in _tensors(parts)}
    if prediction == "v_prediction" and parts.family == "sdxl":
        tensors["v_pred"] = torch.empty(0)
    if zero_snr:
        tensors["ztsnr"] = torch.empty(0)
    write_tensors(path, tensors, metadata)


def check_single(parts: Parts) -> None:
    """Raise CheckpointError, which names a field, if a single file of the model would be read as a different model."""
    networks = _networks(parts)
    try:
        shapes = {key: tuple(tensor.shape) for key, tensor in _tensors(parts)}
        fields = _fields(parts, shapes)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{parts.source} cannot be written in the original layout ({error}); save it as a folder"
        ) from None
    wrong = [
        difference
        for name, network in networks.items()
        for difference in _differences(name, network.config, NETWORKS[name][1].model_validate(fields[name]))
    ]
    forms = [form for name, (form, _) in LAYOUTS[_layout(parts)].items() if name in ENCODERS]
    for form, tokenizer in zip(forms, parts.tokenizers, strict=True):
        published = clip_tokenizer(form)
        if (tokenizer.vocab, tokenizer.pad) != (published.vocab, published.pad):
            wrong.append(f"its tokenizer is not CLIP's, which has {len(published.vocab)} tokens")
    own, usual = (ScheduleConfig.model_validate(c) for c in (parts.scheduler_config, default_scheduler(parts.family)))
    stored = {"prediction_type": own.prediction_type, "rescale_betas_zero_snr": own.rescale_betas_zero_snr}
    if own != usual.model_copy(update=stored) or own.prediction_type not in PREDICTIONS:
        wrong.append("its noise schedule is not the family's")
    if wrong:
        raise CheckpointError(f"{parts.source} would load as a different model from a single file: "
                              f"{join_names(wrong)}; save it as a folder")  # fmt: skip


def _layout(parts: Parts) -> str:
    """Return the key of a model's layout."""
    return "refiner" if parts.model_index.get(AESTHETIC) else parts.family


def _networks(parts: Parts) -> dict[str, Any]:
    encoders = dict(zip(parts.encoder_names, parts.text_encoders, strict=True))
    return {"unet": parts.unet, "vae": parts.vae, **encoders}


def _tensors(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor with its original name. Raises ValueError if the layout has no name for a module."""
    networks = _networks(parts)
    for name, (form, prefix) in LAYOUTS[_layout(parts)].items():
        network = networks[name]
        state = network.state_dict()
        if form == "open_clip":
            state = _open_clip(state, network.config.num_hidden_layers)
        elif form != "clip":
            state = _to_original_names(state, _table(network))
        for key, tensor in state.items():
            yield prefix + key, tensor


def _table(network: nn.Module) -> keys.Table:
    if isinstance(network.config, UNetConfig):
        return keys.unet_table(keys.Levels.of_config(network.config))
    config = network.config
    assert isinstance(config, VAEConfig)
    return keys.vae_table(len(config.block_out_channels), config.layers_per_block)


def _to_original_names(state: dict[str, Tensor], table: keys.Table) -> dict[str, Tensor]:
    """Rename tensors from module to original names, with the VAE's attention as 1x1 convolutions."""
    sources, unknown = keys.rename_keys(state, {module: original for original, module in table.items()})
    if unknown:
        raise ValueError(f"no original name for {join_names(unknown)}")
    turned = {}
    for key, source in sources.items():
        tensor = state[source.key]
        conv = ".attn_1." in key and tensor.ndim == 2
        turned[key] = tensor[:, :, None, None] if conv else tensor
    return turned


def _open_clip(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Convert a text encoder to OpenCLIP's names: q, k, v in one tensor, the projection transposed."""
    rest = dict(state)
    made: dict[str, Tensor] = {}
    if "text_projection.weight" in rest:
        made["text_projection"] = rest.pop("text_projection.weight").T
    for i in range(layers):
        module = f"text_model.encoder.layers.{i}.self_attn"
        for kind in ("weight", "bias"):
            thirds = [rest.pop(f"{module}.{name}_proj.{kind}") for name in "qkv"]
            made[f"transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat(thirds)
    return made | _to_original_names(rest, keys.open_clip_table(layers))


def _fields(parts: Parts, shapes: keys.Shapes) -> dict[str, dict[str, Any]]:
    """Return the configs that a reader derives from these shapes."""
    fields = {
        name: keys.CONFIGS[form](keys.strip_prefix(shapes, prefix), parts.family)
        for name, (form, prefix) in LAYOUTS[_layout(parts)].items()
    }
    numbers = 5 if _layout(parts) == "refiner" else 6
    add_family_fields(fields["unet"], parts.family, _schedule(parts)[0], fields.get("text_encoder_2"), numbers)
    return fields


def _differences(name: str, own: Config, read: Config) -> list[str]:
    """Return sentences about the fields in which the network read from the file would differ."""
    pairs = {f: (getattr(own, f), getattr(read, f)) for f in type(own).model_fields if f not in UNCOMPARED[type(own)]}
    if isinstance(own, UNetConfig) and isinstance(read, UNetConfig):
        pairs["heads"] = own.per_level(own.heads), read.per_level(read.heads)
        pairs["depths"] = (own.down_depths, own.up_depths), (read.down_depths, read.up_depths)
    if isinstance(own, CLIPConfig) and isinstance(read, CLIPConfig):
        pairs["a projection"] = own.has_projection, read.has_projection
    return [f"{name} has {field} {a}, not {b}" for field, (a, b) in pairs.items() if a != b]


def _schedule(parts: Parts) -> tuple[str, bool]:
    config = ScheduleConfig.model_validate(parts.scheduler_config)
    return config.prediction_type, config.rescale_betas_zero_snr
