"""Read the description of a single file in the original layout (.safetensors, .ckpt) from its tensors' shapes.

What shapes do not show (the scheduler, the native size, the number of heads) is the published default of the family.
"""

from __future__ import annotations

from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from mezzotint.errors import CheckpointError
from mezzotint.model_options import ModelOptions
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.weights import keys
from mezzotint.weights.evidence import MARKERS, find_evidence
from mezzotint.weights.files import TensorFile
from mezzotint.weights.keys import Family, Shapes, Sources
from mezzotint.weights.kinds import REFINER, describe_kind, find_other_family
from mezzotint.weights.model_files import AESTHETIC, NO_PROJECTION, ModelFiles, NetworkFiles

CLIP_TOKENS = 49408
# What LCM models' scheduler_config.json has in place of SD1's.
LCM_SCHEDULER = {
    "_class_name": "LCMScheduler",
    "original_inference_steps": 50,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_scaling": 10.0,
}


def plan_file(
    path: Path,
    options: ModelOptions = ModelOptions(),  # noqa: B008  # frozen
    file: TensorFile | None = None,
) -> ModelFiles:
    """Describe a single file without reading weights. What is wrong with the model is in `problems`.

    Args:
        path: The file.
        options: What overrules the file. With a `vae` the file's own is passed over.
        file: The same file, if it is already open.

    Raises:
        CheckpointError: If the file is damaged or is not a Stable Diffusion model.
    """
    file = file or TensorFile(path)
    shapes = file.shapes
    prefixes = {kind: keys.find_prefix(shapes, known) for kind, known in keys.PREFIXES.items()}
    other = find_other_family(shapes)
    refines = other == REFINER and prefixes["open_clip"] is not None
    if prefixes["unet"] is None or (other and not refines):
        raise CheckpointError(
            f"{path} contains {describe_kind(shapes)}; it must contain a whole Stable Diffusion model"
        )
    family = cast("Family | None", options.family) or _family(
        keys.strip_prefix(shapes, prefixes["unet"]), prefixes["open_clip"] is not None
    )
    kinds = {"unet": "unet", "vae": "vae", "text_encoder": "clip"}
    if family == "sdxl":
        kinds["text_encoder_2"] = "open_clip"
    elif family == "sd2" and prefixes["open_clip"]:
        kinds["text_encoder"] = "open_clip"
    if refines:
        del kinds["text_encoder"]
    if options.vae is not None:
        del kinds["vae"]

    evidence = find_evidence(file, prefixes["unet"], family, options.prediction)
    plan = ModelFiles(path, "single file", family, files=[path, *evidence.files], options=options)
    plan.notices, plan.prediction_source = evidence.notices, evidence.source
    plan.scheduler_config = {**default_scheduler(family, evidence.prediction), **evidence.schedule}
    plan.scheduler_config |= options.config_of("scheduler")
    plan.latents = {"scaling_factor": keys.SCALING_FACTORS[family], **evidence.latents}
    plan.model_index = {"_class_name": "StableDiffusionPipeline"}
    if family == "sdxl":
        plan.model_index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    if refines:
        plan.model_index = {"_class_name": "StableDiffusionXLImg2ImgPipeline", AESTHETIC: True}
        plan.model_index["force_zeros_for_empty_prompt"] = False  # as in the published folder
    found: dict[str, tuple[dict[str, Any], Sources, list[str]]] = {}
    for name, kind in kinds.items():
        try:
            found[name] = read_network(path, name, kind, prefixes[kind], shapes, family)
        except CheckpointError as error:
            plan.problems.append(str(error))
    if "unet" in found:
        second = found["text_encoder_2"][0] if "text_encoder_2" in found else None
        add_family_fields(found["unet"][0], family, plan.scheduler_config["prediction_type"], second, 6 - refines)
        if "time_cond_proj_dim" in found["unet"][0]:
            plan.scheduler_config |= {**LCM_SCHEDULER, **options.config_of("scheduler")}
    if "vae" in found:
        found["vae"][0].update(plan.latents)
    if family == "sdxl" and "text_encoder_2" in found and "text_projection.weight" not in found["text_encoder_2"][1]:
        plan.notices.append(f"{path.name} {NO_PROJECTION}")
    for name, (fields, sources, unknown) in found.items():
        try:
            files = dict.fromkeys((source.key for source in sources.values()), file)
            fields |= options.config_of(name)
            plan.parts.append(NetworkFiles.of(name, path, fields, files, sources, unknown))
        except CheckpointError as error:
            plan.problems.append(str(error))
        if name.startswith("text_encoder"):
            plan.tokenizers.append(partial(clip_tokenizer, kinds[name]))
            if fields["vocab_size"] != CLIP_TOKENS:
                plan.problems.append(
                    f"{path}: its text encoder has {fields['vocab_size']} tokens instead of CLIP's {CLIP_TOKENS}; "
                    "a model with its own tokenizer must be a folder"
                )
    used = tuple(prefix for kind in kinds.values() if (prefix := prefixes[kind]))
    over = Counter(key.partition(".")[0] for key in shapes if not key.startswith((*used, *MARKERS)))
    plan.passed_over = [f"{top} ({count} tensor{'s' * (count > 1)})" for top, count in over.items()]
    return plan


def _family(unet: Shapes, open_clip: bool) -> Family:
    if "label_emb.0.0.weight" in unet:
        return "sdxl"
    context = next((shape[-1] for key, shape in unet.items() if key.endswith("attn2.to_k.weight") and shape), 0)
    return "sd2" if open_clip or context == 1024 else "sd1"


def read_network(
    path: Path, name: str, kind: str, prefix: str | None, shapes: Shapes, family: Family
) -> tuple[dict[str, Any], Sources, list[str]]:
    """Return the config fields, sources and unknown keys of one network in the original layout.

    Args:
        path: The file, for error messages.
        name: The network.
        kind: The form of its names, a key of `keys.CONFIGS`.
        prefix: The prefix of its tensors; None if the file has none of them.
        shapes: The shapes in the file.
        family: The family.

    Raises:
        CheckpointError: If the file does not have the network in this form.
    """
    if prefix is None:
        fix = ": give one with vae, on the command line --vae FILE" if name == "vae" else ""
        raise CheckpointError(f"{path} has no {name}, which an {family} model needs{fix}")
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


@cache
def clip_tokenizer(kind: str) -> Tokenizer:
    """Return the tokenizer of a "clip" or "open_clip" text encoder. OpenCLIP pads with id 0, which is "!"."""
    return Tokenizer.clip(pad="!") if kind == "open_clip" else Tokenizer.clip()


def add_family_fields(
    unet: dict[str, Any], family: Family, prediction: str, second: dict[str, Any] | None, numbers: int = 6
) -> None:
    """Set the UNet's config fields that its shapes do not show.

    Args:
        unet: The fields.
        family: The family.
        prediction: The prediction type.
        second: The fields of SDXL's second text encoder.
        numbers: How many numbers of sizes, crops and scores SDXL's UNet takes.
    """
    unet["sample_size"] = {"sd1": 64, "sd2": 96 if prediction == "v_prediction" else 64, "sdxl": 128}[family]
    unet["upcast_attention"] = family == "sd2"  # its attention overflows float16 otherwise
    inputs = unet.get("projection_class_embeddings_input_dim")
    if inputs and second:  # the other inputs are these numbers
        unet["addition_time_embed_dim"] = (inputs - second["projection_dim"]) // numbers


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
