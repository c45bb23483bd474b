"""Save training results, and build a model for generation from one in training.

A LoRA is saved in the formats of peft and kohya, a full model as a diffusers folder or single file, a textual inversion
as learned_embeds.safetensors, and a ControlNet as a diffusers folder.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.errors import CheckpointError, RequestError
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.unet import UNet
from mezzotint.train.recipe import Recipe
from mezzotint.train.trainable import ENCODERS, TEXT_TARGETS, TrainableModel, lora_pairs, merged_state_dict
from mezzotint.weights.checkpoint import Parts
from mezzotint.weights.keys import Levels, rename_keys, unet_table
from mezzotint.weights.save import save_control
from mezzotint.weights.save_lora import save_lora
from mezzotint.weights.save_model import save_parts
from mezzotint.weights.save_single import check_single, save_single
from mezzotint.weights.save_tensors import write_tensors

PEFT, KOHYA, WORD, MODEL = "pytorch_lora_weights.safetensors", "kohya.safetensors", "{}.safetensors", "model"
CONTROLNET = "controlnet"
BASES = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}  # kohya's ss_base_model_version


def save_results(model: TrainableModel, folder: Path, step: int, dtype: torch.dtype = torch.float16) -> list[Path]:
    """Save the result of a run in its folder. Return the paths. Raises WriteError."""
    if model.change == "lora":
        return [save_peft(model, folder / PEFT, dtype), save_kohya(model, folder / KOHYA, step, dtype)]
    if model.change == "word":
        return [save_embedding(model, folder / WORD.format(model.recipe.token.strip("<>")))]
    if model.controlnet is not None:
        save_control(folder / CONTROLNET, model.controlnet, dtype)
        return [folder / CONTROLNET]
    return save_model(model, folder / MODEL, dtype)


def save_peft(model: TrainableModel, path: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Save a LoRA as diffusers' `pipe.load_lora_weights` reads it, rank and alpha in the header. Raises WriteError.

    unet.<layer>.lora_A.weight (rank, inputs, ...), .lora_B.weight (outputs, rank, ...); text_encoder.<layer>...
    """
    networks = {name: lora_pairs(network) for name, network in model.networks.items()}
    configs: dict[str, Any] = {}
    for name, changes in networks.items():
        if changes:
            fields = {"peft_type": "LORA", "r": model.recipe.rank, "lora_alpha": _alpha(model.recipe)}
            configs |= {f"{name}.{key}": value for key, value in fields.items()}
            # endings, since the beginnings differ between transformers 5 and earlier
            configs[f"{name}.target_modules"] = sorted(TEXT_TARGETS if name in ENCODERS else changes)
    return save_lora(path, networks, dtype, {"lora_adapter_metadata": json.dumps(configs, sort_keys=True)})


def save_kohya(model: TrainableModel, path: Path, step: int, dtype: torch.dtype = torch.float16) -> Path:
    """Save a LoRA as kohya's sd-scripts do, with ss_* training metadata. Raises WriteError.

    Keys: lora_unet_<layer with underscores for dots>.lora_down.weight, .lora_up.weight, .alpha; lora_te_... for a text
    encoder, lora_te1_ and lora_te2_ if there are two. As with kohya, SDXL's UNet has the original layer names
    (input_blocks_4_1_...).
    """
    recipe, family = model.recipe, model.parts.family
    original = _original_names(model.unet) if family == "sdxl" else {}
    alone = len(model.text_encoders) == 1
    prefixes = {"unet": "unet", "text_encoder": "te" if alone else "te1", "text_encoder_2": "te2"}
    tensors: dict[str, Tensor] = {}
    for name, network in model.networks.items():
        for layer, (down, up) in lora_pairs(network).items():
            spelled = original.get(layer, layer) if name == "unet" else layer
            key = f"lora_{prefixes[name]}_{spelled.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = _to_cpu(down, dtype)
            tensors[f"{key}.lora_up.weight"] = _to_cpu(up, dtype)
            tensors[f"{key}.alpha"] = torch.tensor(_alpha(recipe), dtype=dtype)
    facts = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": recipe.rank,
        "ss_network_alpha": _alpha(recipe),
        "ss_base_model_version": BASES[family],
        "ss_v2": family == "sd2",
        "ss_sd_model_name": model.parts.source.name,
        "ss_learning_rate": recipe.lr,
        "ss_unet_lr": recipe.lr,
        "ss_text_encoder_lr": (recipe.text_lr or recipe.lr) if recipe.text_encoder else None,
        "ss_optimizer": recipe.optimiser,
        "ss_lr_scheduler": recipe.schedule,
        "ss_lr_warmup_steps": recipe.warmup,
        "ss_max_train_steps": recipe.steps,
        "ss_steps": step,
        "ss_total_batch_size": recipe.batch * recipe.accumulate,
        "ss_gradient_accumulation_steps": recipe.accumulate,
        "ss_gradient_checkpointing": recipe.checkpointing,
        "ss_max_grad_norm": recipe.clip,
        "ss_mixed_precision": {"float32": "no", "bfloat16": "bf16"}[recipe.precision],
        "ss_min_snr_gamma": recipe.min_snr,
        "ss_noise_offset": recipe.noise_offset or None,
        "ss_zero_terminal_snr": recipe.zero_snr,
        "ss_caption_dropout_rate": recipe.caption_dropout,
        "ss_shuffle_caption": recipe.shuffle_tags,
        "ss_keep_tokens": recipe.keep_tags,
        "ss_resolution": f"({recipe.resolution}, {recipe.resolution})",
        "ss_enable_bucket": recipe.buckets,
        "ss_seed": recipe.seed,
        "ss_output_name": path.stem,
    }
    return write_tensors(path, tensors, {key: str(value) for key, value in facts.items()})


def save_embedding(model: TrainableModel, path: Path) -> Path:
    """Save a textual inversion in float32: one key, the token, as diffusers does; for SDXL clip_l and clip_g."""
    keys = [model.recipe.token] if len(model.vectors) == 1 else ["clip_l", "clip_g"]
    tensors = {key: _to_cpu(vectors, torch.float32) for key, vectors in zip(keys, model.vectors, strict=True)}
    return write_tensors(path, tensors)


def save_model(model: TrainableModel, path: Path, dtype: torch.dtype = torch.float16) -> list[Path]:
    """Save the full model in the recipe's `layout`: a diffusers folder at `path`, a single file next to it, or both.

    Raises:
        WriteError: if it cannot be written.
        RequestError: for a model that a single file cannot describe.
    """
    check_saving(model.recipe, model.parts)
    parts, layout = inference_parts(model), model.recipe.layout
    made = []
    if layout != "file":
        save_parts(path, parts, _few_step_file(model.recipe, model.parts), dtype)
        made.append(path)
    if layout != "folder":
        made.append(path.with_suffix(".safetensors"))
        save_single(made[-1], parts, dtype)
    return made


def check_saving(recipe: Recipe, parts: Parts) -> list[str]:
    """Check before a run that its result can be saved. Return sentences on what will not be saved as it was.

    Raises:
        RequestError: for a model that a single file cannot describe.
    """
    notes = []
    if recipe.layout != "folder":
        try:
            check_single(replace(parts, scheduler_config=_scheduler_config(recipe, parts)))
        except CheckpointError as error:
            raise RequestError(f'layout is {recipe.layout!r}: {error} (layout = "folder")') from None
    few = parts.few_step
    if few and recipe.layout != "folder":
        notes.append(f"The few-step LoRA {few.lora} is not saved: a single file cannot contain it")
    if few and recipe.layout != "file":
        notes.append(
            f"The few-step LoRA {few.lora} is copied unchanged: it was made for the weights before training"
            if _few_step_file(recipe, parts)
            else f"The few-step LoRA {few.lora} is not saved: it is missing, or was made for another prediction"
        )
    return notes


def _few_step_file(recipe: Recipe, parts: Parts) -> Path | None:
    """Return the few-step LoRA's file, if it exists and the prediction type and schedule are unchanged."""
    if parts.few_step is None or _scheduler_config(recipe, parts) != parts.scheduler_config:
        return None
    path = parts.source / parts.few_step.lora
    return path if path.exists() else None


def inference_parts(model: TrainableModel) -> Parts:
    """Return the model as it is now, in networks of its own, for a Pipeline."""
    with torch.device("meta"):
        unet = UNet(model.unet.config)
        encoders = [CLIPTextModel(encoder.config) for encoder in model.text_encoders.values()]
    unet.load_state_dict(merged_state_dict(model.unet), assign=True)
    for encoder, own in zip(encoders, model.text_encoders.values(), strict=True):
        encoder.load_state_dict(merged_state_dict(own), assign=True)
    return replace(
        model.parts,
        unet=unet,
        text_encoders=encoders,
        few_step=None,
        checker=None,
        unchecked="",
        scheduler_config=_scheduler_config(model.recipe, model.parts),
    )


def _original_names(unet: UNet) -> dict[str, str]:
    """Return the original layout's name of each layer that has one."""
    try:
        table = {module: block for block, module in unet_table(Levels.of_config(unet.config)).items()}
    except ValueError:
        return {}
    sources, _ = rename_keys([name for name, _ in unet.named_modules()], table)
    return {source.key: name for name, source in sources.items()}


def _scheduler_config(recipe: Recipe, parts: Parts) -> dict[str, Any]:
    """Return the scheduler config for the prediction type and schedule that were trained."""
    config = dict(parts.scheduler_config)
    if recipe.prediction and recipe.prediction != config.get("prediction_type", "epsilon"):
        config["prediction_type"] = recipe.prediction
    if recipe.zero_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}  # Lin et al. 2023, section 3.3
    return config


def _alpha(recipe: Recipe) -> float:
    return float(recipe.alpha or recipe.rank)


def _to_cpu(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()
