"""Read the description of a single file in the original layout (.safetensors, .ckpt) from its tensors' shapes.

What shapes do not show (the scheduler, the native size, the number of heads) is the published default of the family.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from mezzotint.errors import CheckpointError
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.weights import keys
from mezzotint.weights.files import TensorFile
from mezzotint.weights.keys import Family, Shapes, Sources
from mezzotint.weights.model_files import ModelFiles, NetworkFiles, Overrides, join_names

CLIP_TOKENS = 49408
PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "velocity": "v_prediction", "epsilon": "epsilon"}

# Kinds of files that are not whole models, by a fragment of a key.
KINDS = {
    "lora": "a LoRA",
    "double_blocks.": "a Flux model",
    "joint_blocks.": "a Stable Diffusion 3 model",
    "control_model.": "a ControlNet",
    "controlnet_": "a ControlNet",
    "string_to_param": "a textual-inversion embedding",
    "emb_params": "a textual-inversion embedding",
    "encoder.down": "a VAE alone",
    "down_blocks.": "a UNet alone",
    "input_blocks.": "a UNet alone",
    "text_model.": "a text encoder alone",
}


def plan_file(path: Path, family: Family | None, prediction: str | None, config: Overrides) -> ModelFiles:
    """Describe a single file without reading weights. What is wrong with the model is in `problems`.

    Raises:
        CheckpointError: If the file is damaged or is not a Stable Diffusion model.
    """
    file = TensorFile(path)
    shapes = file.shapes
    prefixes = {kind: keys.find_prefix(shapes, known) for kind, known in keys.PREFIXES.items()}
    if prefixes["unet"] is None:
        raise CheckpointError(f"{path} holds {describe_kind(shapes)}, not a whole Stable Diffusion model")
    if prefixes["clip"] is None and any(key.startswith(keys.REFINER) for key in shapes):
        raise CheckpointError(f"{path} is SDXL's refiner, which mezzotint cannot run")
    family = family or _family(keys.strip_prefix(shapes, prefixes["unet"]), prefixes["open_clip"] is not None)
    kinds = {"unet": "unet", "vae": "vae", "text_encoder": "clip"}
    if family == "sdxl":
        kinds["text_encoder_2"] = "open_clip"
    elif family == "sd2" and prefixes["open_clip"]:
        kinds["text_encoder"] = "open_clip"

    plan = ModelFiles(path, "single file", family, files=[path])
    plan.scheduler_config = _scheduler(file, family, prediction)
    plan.model_index = {"_class_name": "StableDiffusionPipeline"}
    if family == "sdxl":
        plan.model_index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    found: dict[str, tuple[dict[str, Any], Sources, list[str]]] = {}
    for name, kind in kinds.items():
        try:
            found[name] = _read(path, name, kind, prefixes[kind], shapes, family)
        except CheckpointError as error:
            plan.problems.append(str(error))
    if "unet" in found:
        second = found["text_encoder_2"][0] if "text_encoder_2" in found else None
        add_family_fields(found["unet"][0], family, plan.scheduler_config["prediction_type"], second)
    for name, (fields, sources, unknown) in found.items():
        try:
            files = dict.fromkeys((source.key for source in sources.values()), file)
            plan.parts.append(NetworkFiles.of(name, path, {**fields, **config.get(name, {})}, files, sources, unknown))
        except CheckpointError as error:
            plan.problems.append(str(error))
        if name.startswith("text_encoder"):
            plan.tokenizers.append(partial(clip_tokenizer, kinds[name]))
            if fields["vocab_size"] != CLIP_TOKENS:
                plan.problems.append(
                    f"{path}: its text encoder knows {fields['vocab_size']} tokens, not CLIP's {CLIP_TOKENS}; "
                    "a model with a tokenizer of its own must be a folder"
                )
    used = tuple(prefix for kind in kinds.values() if (prefix := prefixes[kind]))
    over = Counter(key.partition(".")[0] for key in shapes if not key.startswith(used))
    plan.passed_over = [f"{top} ({count} tensor{'s' * (count > 1)})" for top, count in over.items()]
    return plan


def describe_kind(shapes: Shapes) -> str:
    """Return what a file that is not a whole model seems to be."""
    for fragment, kind in KINDS.items():
        if any(fragment in key for key in shapes):
            return kind
    return (
        f"{len(shapes)} tensors of an unknown kind (such as {join_names(list(shapes), 2)})" if shapes else "no tensors"
    )


def _family(unet: Shapes, open_clip: bool) -> Family:
    if "label_emb.0.0.weight" in unet:
        return "sdxl"
    context = next((shape[-1] for key, shape in unet.items() if key.endswith("attn2.to_k.weight") and shape), 0)
    return "sd2" if open_clip or context == 1024 else "sd1"


def _read(
    path: Path, name: str, kind: str, prefix: str | None, shapes: Shapes, family: Family
) -> tuple[dict[str, Any], Sources, list[str]]:
    """Return the config fields, sources and unknown keys of one network."""
    if prefix is None:
        raise CheckpointError(f"{path} has no {name}, which a {family} model needs")
    shapes = {key: shape for key, shape in keys.strip_prefix(shapes, prefix).items() if not keys.IGNORED.search(key)}
    try:
        fields = keys.CONFIGS[kind](shapes, family)
        sources, unknown = keys.SOURCES[kind](shapes, family)
    except KeyError as error:
        raise CheckpointError(f"{path} ({name}) lacks {prefix}{error.args[0]}") from None
    except (ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path} ({name}) is not in the original layout: {error}") from None
    sources = {target: source._replace(key=prefix + source.key) for target, source in sources.items()}
    return fields, sources, [prefix + key for key in unknown]


def clip_tokenizer(kind: str) -> Tokenizer:
    """Return the tokenizer of a "clip" or "open_clip" text encoder. OpenCLIP pads with id 0, which is "!"."""
    return Tokenizer.clip(pad="!") if kind == "open_clip" else Tokenizer.clip()


def add_family_fields(unet: dict[str, Any], family: Family, prediction: str, second: dict[str, Any] | None) -> None:
    """Set the UNet's config fields that its shapes do not show."""
    unet["sample_size"] = {"sd1": 64, "sd2": 96 if prediction == "v_prediction" else 64, "sdxl": 128}[family]
    unet["upcast_attention"] = family == "sd2"  # its attention overflows float16 otherwise
    inputs = unet.get("projection_class_embeddings_input_dim")
    if inputs and second:  # the other inputs are six numbers of sizes and crops
        unet["addition_time_embed_dim"] = (inputs - second["projection_dim"]) // 6


def _scheduler(file: TensorFile, family: Family, prediction: str | None) -> dict[str, Any]:
    config = default_scheduler(family, prediction or _marked_prediction(file) or _default_prediction(file, family))
    if "ztsnr" in file.entries:
        config["rescale_betas_zero_snr"] = True
    return config


def default_scheduler(family: Family, prediction: str = "epsilon") -> dict[str, Any]:
    """Return the published scheduler_config.json of SD 1.5, SD 2-base, SD 2.1 (v) or SDXL base."""
    config: dict[str, Any] = {
        "_class_name": "PNDMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "prediction_type": prediction,
    }
    if family == "sdxl":
        config |= {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    elif family == "sd2" and prediction == "v_prediction":
        config["_class_name"] = "DDIMScheduler"
    return config


def _marked_prediction(file: TensorFile) -> str | None:
    """Return the prediction type from ModelSpec metadata, a marker tensor or SD2-base's step count, or None."""
    said = file.metadata.get("modelspec.prediction_type", "").lower()
    architecture = file.metadata.get("modelspec.architecture", "")
    if said in PREDICTIONS:
        return PREDICTIONS[said]
    if "v_pred" in file.entries or architecture.startswith("stable-diffusion-v2-768-v"):
        return "v_prediction"
    if architecture.startswith("stable-diffusion-v2-512") or file.scalars.get("global_step") == 875000:
        return "epsilon"
    return None


def _default_prediction(file: TensorFile, family: Family) -> str:
    """Return v_prediction for SD 2.1's shapes, which SD 2-base shares, and epsilon for others."""
    first = file.shapes.get("model.diffusion_model.input_blocks.0.0.weight", ())
    return "v_prediction" if family == "sd2" and first[:2] == (320, 4) else "epsilon"
