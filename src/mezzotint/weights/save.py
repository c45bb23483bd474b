"""Write a model as a folder in the diffusers layout, which diffusers and `open_model` read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mezzotint.errors import CheckpointError
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import UNet
from mezzotint.models.vae import VAE

DIFFUSERS = "0.30.0"  # the release whose folder layout this is


def save_folder(
    folder: str | Path,
    *,
    unet: UNet,
    vae: VAE,
    text_encoder: CLIPTextModel,
    tokenizer: Tokenizer,
    scheduler_config: dict[str, Any],
    second: tuple[CLIPTextModel, Tokenizer] | None = None,
    model_index: Mapping[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
    shard_bytes: int = 15_000_000,
) -> None:
    """Write a model; weights as safetensors of `dtype` in shards of at most `shard_bytes` bytes.

    `second`: SDXL's other text encoder. `model_index`: further fields of that file, as force_zeros_for_empty_prompt.
    `settings` becomes mezzotint.json (native size, steps, guidance). Each part's folder is written whole beside the old
    one and then takes its place, so a kill leaves the old part or the new, never half of one; other files in `folder`
    stay. Raises CheckpointError when a scheduler has no `_class_name` or the folder cannot be written.
    """
    if "_class_name" not in scheduler_config:
        raise CheckpointError("scheduler_config needs a _class_name, such as 'DDIMScheduler'")
    root = Path(folder)
    levels = len(vae.config.block_out_channels)
    vae_fields = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    encoders = {"": (text_encoder, tokenizer)} | ({"_2": second} if second else {})
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if second else "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler_config["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if not second:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _Swapped(root / "unet") as part:
            _write_json(part / "config.json", _described("UNet2DConditionModel", unet.config.model_dump(), {}))
            _write_weights(part, "diffusion_pytorch_model", unet.state_dict(), dtype, shard_bytes)
        with _Swapped(root / "vae") as part:
            _write_json(part / "config.json", _described("AutoencoderKL", vae.config.model_dump(), vae_fields))
            _write_weights(part, "diffusion_pytorch_model", vae.state_dict(), dtype, shard_bytes)
        for number, (encoder, its_tokenizer) in encoders.items():
            kind = "CLIPTextModelWithProjection" if encoder.config.has_projection else "CLIPTextModel"
            index[f"text_encoder{number}"] = ["transformers", kind]
            index[f"tokenizer{number}"] = ["transformers", "CLIPTokenizer"]
            fields = {
                "architectures": [kind],
                "model_type": "clip_text_model",
                "torch_dtype": "float32",  # else transformers alone would take the file's dtype, and diffusers mix both
            }
            with _Swapped(root / f"text_encoder{number}") as part:
                _write_json(part / "config.json", encoder.config.model_dump() | fields)
                _write_weights(part, "model", encoder.state_dict(), dtype, shard_bytes)
            with _Swapped(root / f"tokenizer{number}") as part:
                its_tokenizer.save(part)
        with _Swapped(root / "scheduler") as part:
            _write_json(part / "scheduler_config.json", {"_diffusers_version": DIFFUSERS, **scheduler_config})
        if settings is not None:
            _write_json(root / "mezzotint.json", settings)
        _write_json(root / "model_index.json", index | dict(model_index or {}))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{root} cannot be written: {getattr(error, 'strerror', None) or error}") from error


class _Swapped:
    """A new folder to write into, which takes the place of `target` when the block ends well."""

    def __init__(self, target: Path):
        self.target = target
        self.new = target.with_name(f".{target.name}.new")
        self.old = target.with_name(f".{target.name}.old")

    def __enter__(self) -> Path:
        shutil.rmtree(self.new, ignore_errors=True)
        self.new.mkdir()
        return self.new

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            shutil.rmtree(self.old, ignore_errors=True)
            if self.target.exists():
                self.target.rename(self.old)
            self.new.rename(self.target)
            shutil.rmtree(self.old, ignore_errors=True)
        else:
            shutil.rmtree(self.new, ignore_errors=True)


def _described(class_name: str, fields: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return {"_class_name": class_name, "_diffusers_version": DIFFUSERS, **fields, **more}


def _write_json(path: Path, table: dict[str, Any]) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(new, path)


def _write_weights(folder: Path, stem: str, weights: dict[str, Tensor], dtype: torch.dtype, shard_bytes: int) -> None:
    """One .safetensors, or numbered shards and their index. Tensors keep the module's order and are row-major."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, tensor in weights.items():
        size = tensor.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        of = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{stem}{of}.safetensors"
        where |= dict.fromkeys(names, file)
        tensors = {name: weights[name].detach().to("cpu", dtype).contiguous() for name in names}
        path = folder / file
        path.touch()
        mode = path.stat().st_mode  # as the umask has it; save_file makes files that only their owner can read
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)
    if len(shards) > 1:
        total = sum(tensor.numel() for tensor in weights.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / f"{stem}.safetensors.index.json", index)
