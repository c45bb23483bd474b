"""Write a model as a folder in the diffusers layout, which diffusers and `open_model` read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.config import TinyVAEConfig, VAEConfig
from mezzotint.errors import CheckpointError
from mezzotint.files import atomic_path, remove_leftovers, report_write_errors, write_atomically
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.controlnet import ControlNet
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import UNet
from mezzotint.models.vae import VAE
from mezzotint.weights.control_files import CLASS
from mezzotint.weights.model_files import TINY_VAE
from mezzotint.weights.save_tensors import own_copy, save_safetensors

DIFFUSERS = "0.30.0"  # the release whose folder layout this is


def save_folder(
    folder: str | Path,
    *,
    unet: UNet,
    vae: VAE,
    text_encoder: CLIPTextModel | None,
    tokenizer: Tokenizer | None,
    scheduler_config: dict[str, Any],
    second: tuple[CLIPTextModel, Tokenizer] | None = None,
    model_index: Mapping[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    dtype: torch.dtype | None = torch.float16,
    shard_bytes: int = 15_000_000,
) -> None:
    """Write a model as a diffusers folder.

    Each network's folder is written whole under another name and then replaces the old one, so a killed process leaves
    the old folder or the new one. Other files in `folder` stay.

    Args:
        folder: The folder to write.
        unet: The UNet.
        vae: The VAE.
        text_encoder: The text encoder; SDXL's first one, or None for its refiner, which has the second alone.
        tokenizer: Its tokenizer.
        scheduler_config: The content of scheduler_config.json, with a `_class_name`.
        second: SDXL's second text encoder and its tokenizer.
        model_index: More fields for model_index.json, such as force_zeros_for_empty_prompt.
        settings: The content of mezzotint.json: native size, steps, guidance scale, ...
        dtype: The dtype of the weights; None is each weight's own.
        shard_bytes: The largest size of a file of weights, in bytes. Networks that need more are split into shards.

    Raises:
        CheckpointError: If `scheduler_config` has no `_class_name`.
        WriteError: If the folder cannot be written.
    """
    if "_class_name" not in scheduler_config:
        raise CheckpointError("scheduler_config needs a _class_name, such as 'DDIMScheduler'")
    root = Path(folder)
    unet_config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": DIFFUSERS, **unet.config.model_dump()}
    vae_config = {"_diffusers_version": DIFFUSERS, **_vae_fields(vae.config)}
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if second else "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler_config["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae_config["_class_name"]],
    }
    if not second:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    encoders: dict[str, tuple[CLIPTextModel, Tokenizer]] = {"_2": second} if second else {}
    if text_encoder and tokenizer:
        encoders = {"": (text_encoder, tokenizer), **encoders}
    else:
        index |= {
            "_class_name": "StableDiffusionXLImg2ImgPipeline",
            "text_encoder": [None, None],
            "tokenizer": [None, None],
        }
    with report_write_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        with _new_folder(root / "unet") as new:
            _write_json(new / "config.json", unet_config)
            _write_weights(new, "diffusion_pytorch_model", unet.state_dict(), dtype, shard_bytes)
        with _new_folder(root / "vae") as new:
            _write_json(new / "config.json", vae_config)
            _write_weights(new, "diffusion_pytorch_model", vae.state_dict(), dtype, shard_bytes)
        for suffix, (encoder, encoder_tokenizer) in encoders.items():
            class_name = "CLIPTextModelWithProjection" if encoder.config.has_projection else "CLIPTextModel"
            index[f"text_encoder{suffix}"] = ["transformers", class_name]
            index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
            fields = {
                "architectures": [class_name],
                "model_type": "clip_text_model",
                "torch_dtype": "float32",  # transformers would otherwise take the file's dtype, and diffusers mix both
            }
            with _new_folder(root / f"text_encoder{suffix}") as new:
                _write_json(new / "config.json", encoder.config.model_dump() | fields)
                _write_weights(new, "model", encoder.state_dict(), dtype, shard_bytes)
            with _new_folder(root / f"tokenizer{suffix}") as new:
                encoder_tokenizer.save(new)
        with _new_folder(root / "scheduler") as new:
            _write_json(new / "scheduler_config.json", {"_diffusers_version": DIFFUSERS, **scheduler_config})
        if settings is not None:
            _write_json(root / "mezzotint.json", settings)
        _write_json(root / "model_index.json", index | dict(model_index or {}))


def save_control(folder: Path, network: ControlNet, dtype: torch.dtype | None = torch.float16) -> None:
    """Write a ControlNet as a diffusers folder, replacing one that is there. Raises WriteError."""
    others = {"up_block_types", "sample_size", "out_channels", "time_cond_proj_dim", "center_input_sample"}
    others |= {"reverse_transformer_layers_per_block"}  # of a UNet, but not of diffusers' ControlNetModel
    fields = {name: value for name, value in network.config.model_dump().items() if name not in others}
    with report_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _new_folder(folder) as new:
            _write_json(new / "config.json", {"_class_name": CLASS, "_diffusers_version": DIFFUSERS, **fields})
            _write_weights(new, "diffusion_pytorch_model", network.state_dict(), dtype, 2**62)


def _vae_fields(config: VAEConfig) -> dict[str, Any]:
    """Return the content of a VAE's config.json, without the version."""
    if isinstance(config, TinyVAEConfig):
        shared = {"in_channels", "out_channels", "latent_channels"}
        own = TinyVAEConfig.__annotations__.keys() - {"norm_num_groups"}
        return {"_class_name": TINY_VAE, **config.model_dump(include=shared | own)}
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        **config.model_dump(),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    with atomic_path(target) as new:
        new.mkdir()
        yield new


def _write_json(path: Path, table: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(table, indent=2, sort_keys=True) + "\n").encode())


def _write_weights(
    folder: Path, stem: str, weights: dict[str, Tensor], dtype: torch.dtype | None, shard_bytes: int
) -> None:
    """Write one .safetensors file, or numbered shards and their index, in the module's order."""
    shards: list[list[str]] = [[]]
    free = shard_bytes
    for name, tensor in weights.items():
        size = tensor.numel() * (dtype or tensor.dtype).itemsize
        if size > free and shards[-1]:
            shards.append([])
            free = shard_bytes
        shards[-1].append(name)
        free -= size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{stem}{suffix}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        tensors = {name: own_copy(weights[name], dtype) for name in names}
        save_safetensors(folder / file, tensors)
    if len(shards) > 1:
        total = sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / f"{stem}.safetensors.index.json", index)
