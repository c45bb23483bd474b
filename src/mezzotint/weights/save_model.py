"""Write an opened model as a diffusers folder or as one file in the original layout."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mezzotint.errors import RequestError
from mezzotint.files import atomic_path, report_write_errors
from mezzotint.weights.checkpoint import Parts
from mezzotint.weights.model_files import AESTHETIC, join_names
from mezzotint.weights.safety import CLASS, NAME, PROCESSOR
from mezzotint.weights.save import save_folder
from mezzotint.weights.save_single import save_single

ZEROS = "force_zeros_for_empty_prompt"  # the field of model_index.json that a picture depends on
SHARD_BYTES = 2_000_000_000


def save_model(path: Path, parts: Parts, dtype: torch.dtype | None = None) -> None:
    """Write a model as it is in memory, with what belongs to it.

    Args:
        path: A file name that ends in .safetensors, or a folder.
        parts: The model.
        dtype: The dtype of the weights; None is each weight's own, which loses nothing.

    Raises:
        RequestError: If the path has another ending, or a module of the networks is of a user's own.
        CheckpointError: If one file cannot express the model.
        WriteError: If it cannot be written.
    """
    _check_modules(parts)
    if path.suffix == ".safetensors":
        save_single(path, parts, dtype)
    elif path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise RequestError(f"{path} cannot be written; give a name that ends in .safetensors, or a folder")
    elif path.is_file():
        raise RequestError(f"{path} is a file; give a folder, or a name that ends in .safetensors")
    else:
        few_step = parts.source / parts.few_step.lora if parts.few_step else None
        save_parts(path, parts, few_step if few_step and few_step.exists() else None, dtype)


def save_parts(folder: Path, parts: Parts, few_step: Path | None, dtype: torch.dtype | None) -> None:
    """Write a model as a diffusers folder.

    Args:
        folder: The folder.
        parts: The model; its safety checker is copied.
        few_step: The LoRA of its few-step form, which is copied; without it mezzotint.json does not name one.
        dtype: The dtype of the weights; None is each weight's own.

    Raises:
        WriteError: If the folder cannot be written.
    """
    settings = {name: value for name, value in parts.settings.items() if few_step or name != "few_step"}
    pairs = dict(zip(parts.encoder_names, zip(parts.text_encoders, parts.tokenizers, strict=True), strict=True))
    index: dict[str, Any] = {name: parts.model_index[name] for name in (ZEROS, AESTHETIC) if name in parts.model_index}
    copies = {few_step: folder / few_step.name} if few_step else {}
    if parts.checker:
        index |= {NAME: ["stable_diffusion", CLASS], "feature_extractor": ["transformers", "CLIPImageProcessor"]}
        copies |= {
            source: folder / ("feature_extractor" if source.name == PROCESSOR else NAME) / source.name
            for source in parts.checker.paths
        }
    save_folder(
        folder,
        unet=parts.unet,
        vae=parts.vae,
        text_encoder=pairs["text_encoder"][0] if "text_encoder" in pairs else None,
        tokenizer=pairs["text_encoder"][1] if "text_encoder" in pairs else None,
        second=pairs.get("text_encoder_2"),
        model_index=index or None,
        scheduler_config=parts.scheduler_config,
        settings=settings or None,
        dtype=dtype,
        shard_bytes=SHARD_BYTES,
    )
    for source, target in copies.items():
        if source.resolve() != target.resolve():
            with report_write_errors(target):
                target.parent.mkdir(exist_ok=True)
                with atomic_path(target) as temporary:
                    shutil.copyfile(source, temporary)


def _check_modules(parts: Parts) -> None:
    """Raise RequestError if a network has other weights than its config says, because its modules were replaced."""
    encoders: Sequence[Any] = parts.text_encoders
    names = "unet", "vae", *parts.encoder_names
    for name, network in zip(names, (parts.unet, parts.vae, *encoders), strict=True):
        with torch.device("meta"):
            plain = {key: tensor.shape for key, tensor in type(network)(network.config).state_dict().items()}
        own = {key: tensor.shape for key, tensor in network.state_dict().items()}
        if wrong := sorted({key for key in plain | own if plain.get(key) != own.get(key)}):
            raise RequestError(
                f"the {name} cannot be saved: it has modules of another kind than its config says ({join_names(wrong)})"
            )
