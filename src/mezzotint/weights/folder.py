"""Read the description of a model folder in the diffusers layout: model_index.json and one folder per component."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from mezzotint.config import CLIPConfig, UNetConfig
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.files import MAX_TEXT_BYTES, read_text
from mezzotint.model_options import ModelOptions
from mezzotint.models.tokenizer import FILES as TOKENIZER_FILES
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.request import Request
from mezzotint.weights import keys
from mezzotint.weights.files import TensorFile
from mezzotint.weights.keys import Family
from mezzotint.weights.model_files import (
    AESTHETIC,
    ENCODERS,
    NETWORKS,
    NO_PROJECTION,
    TINY_VAE,
    FewStep,
    ModelFiles,
    NetworkFiles,
    join_names,
)

NOT_PASSED_OVER = ("scheduler", "vae", "safety_checker", "feature_extractor")  # each has its own line, or is read
LATENT_FIELDS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of a VAE's config
STEMS = {"safetensors": ("diffusion_pytorch_model", "model"), "bin": ("diffusion_pytorch_model", "pytorch_model")}
VARIANT = re.compile(  # the variant in a file's name; shards of "fp16" are named by an index
    r"(?:diffusion_pytorch_model|(?:pytorch_)?model)(?:\.(?:safetensors|bin)\.index)?\.([\w-]{1,40})"
    r"\.(?:safetensors|bin|json)"
)
OTHER_PIPELINES = re.compile(
    r"UnCLIP|Upscale|Depth2Img|InstructPix2Pix|VideoDiffusion|TextToVideo|AnimateDiff|GLIGEN|AudioLDM|LDMTextToImage"
    r"|^(Kolors|Kandinsky|IF)"
)
SHARD = re.compile(r"[\w.-]{1,200}\.(safetensors|bin)")


def plan_folder(path: Path, options: ModelOptions = ModelOptions()) -> ModelFiles:  # noqa: B008  # frozen
    """Describe the files of a model folder without reading weights.

    Args:
        path: The folder.
        options: What overrules the folder's files. With a `vae` the folder's own is passed over.

    Returns:
        The description; what is wrong with the model is in its `problems`.

    Raises:
        CheckpointError: If it is not a Stable Diffusion model.
    """
    index_path = path / "model_index.json"
    if not index_path.exists() and (class_name := _network_class(path / "config.json")):
        raise CheckpointError(
            f"{path} has no model_index.json; it contains only one network ({class_name}), not a whole model"
        )
    if not index_path.exists():
        raise CheckpointError(
            f"{path} has no model_index.json, so it is not a model folder in the diffusers layout; "
            "for a single .safetensors or .ckpt file, give the path of the file"
        )
    index = read_json(index_path)
    if kind := _other_kind(index):
        raise CheckpointError(f"{path} is {kind}, which is not supported; give a text-to-image base model")
    named = {name: row[1] for name, row in index.items() if isinstance(row, list) and len(row) == 2 and row[1]}
    if "unet" not in named:
        raise CheckpointError(
            f"{path} is a {index.get('_class_name', 'model')} without a unet; mezzotint supports Stable Diffusion "
            "1, 2 and XL, and small models of the same architecture"
        )
    plan = ModelFiles(path, "diffusers folder", model_index=index, files=[index_path], options=options)
    variant = options.variant
    needed = {"unet", "vae"} | (ENCODERS.keys() & named.keys() or {"text_encoder"})
    if options.vae is not None:
        needed.remove("vae")
        plan.latents = _latent_fields(path / "vae" / "config.json")
    varied = False
    for name in (name for name in NETWORKS if name in needed):
        try:
            part = read_part(path / name, name, named.get(name), options)
            paths = sorted({file.path for file in part.files.values()})
            varied |= any(f".{variant}" in file.name for file in paths)
            plan.parts.append(part)
            plan.files += [path / name / "config.json", *paths]
        except CheckpointError as error:
            plan.problems.append(str(error))
        if name in ENCODERS:
            _add_tokenizer(plan, path / ENCODERS[name])
    if variant and not varied and not plan.problems:
        plan.problems.append(f"{path} has no files of the variant {variant!r}; give another variant, or leave it out")
    for name, class_name in named.items():
        if name not in (*needed, *ENCODERS.values(), *NOT_PASSED_OVER):
            plan.passed_over.append(f"{name} ({class_name}): not needed to generate pictures")
    try:
        plan.scheduler_config = read_json(path / "scheduler" / "scheduler_config.json")
        plan.files.append(path / "scheduler" / "scheduler_config.json")
        if (path / "mezzotint.json").exists():
            _add_settings(plan, path / "mezzotint.json")
    except CheckpointError as error:
        plan.problems.append(str(error))
    if options.prediction:
        plan.prediction_source = "as given"
        plan.scheduler_config["prediction_type"] = options.prediction
    plan.scheduler_config |= options.config_of("scheduler")
    plan.family = cast("Family | None", options.family) or _family(plan)
    second = plan.config("text_encoder_2")
    if plan.family == "sdxl" and isinstance(second, CLIPConfig) and not second.has_projection:
        plan.notices.append(f"{path.name} {NO_PROJECTION}")
    _check_numbers(plan)
    return plan


def _check_numbers(plan: ModelFiles) -> None:
    """Add a problem if SDXL's UNet takes another number of sizes, crops and scores than model_index.json says."""
    unet, text = plan.config("unet"), plan.config("text_encoder_2")
    if not (isinstance(unet, UNetConfig) and isinstance(text, CLIPConfig) and unet.addition_time_embed_dim):
        return
    pooled = text.projection_dim if text.has_projection else text.hidden_size
    wanted = 5 if plan.model_index.get(AESTHETIC) else 6
    numbers = ((unet.projection_class_embeddings_input_dim or 0) - pooled) / unet.addition_time_embed_dim
    if numbers != wanted:
        plan.problems.append(
            f"{plan.path}: the UNet takes {numbers:g} numbers of sizes, crops and scores, but by {AESTHETIC} in "
            f"model_index.json, {'set' if wanted == 5 else 'not set'}, there are {wanted}"
        )


def _network_class(config: Path) -> str | None:
    """Return the class of a network's config.json, or None if there is none."""
    if not config.is_file():
        return None
    fields = read_json(config)
    architectures = fields.get("architectures")
    found = fields.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else "")
    return str(found)[:100] or None


def _other_kind(index: dict[str, Any]) -> str | None:
    """Name a pipeline other than Stable Diffusion text to image, with its article; return None for that one."""
    name = str(index.get("_class_name", ""))
    return f"a {name[:100]}" if OTHER_PIPELINES.search(name) else None


def choose_weights(names: Iterable[str], variant: str | None) -> str | None:
    """Choose the file of weights, or the index of its shards, among the names in a network's folder.

    Safetensors files are preferred to PyTorch's, and single files to shards. The requested variant is preferred to the
    plain files; without a variant, the plain files are preferred to fp16.
    """
    listing = set(names)
    for kind in (f".{variant}", "") if variant else ("", ".fp16"):
        for suffix, stems in STEMS.items():
            for stem in stems:
                for name in (f"{stem}{kind}.{suffix}", f"{stem}.{suffix}.index{kind}.json"):
                    if name in listing:
                        return name
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError if the file is missing or is something else."""
    try:
        table = json.loads(read_text(path, "utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({str(error)[:120]})") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return table


def read_part(folder: Path, name: str, class_name: str | None, options: ModelOptions) -> NetworkFiles:
    """Describe one network of a diffusers folder.

    Args:
        folder: The network's folder.
        name: The network, such as "vae".
        class_name: Its class in model_index.json, if that names one.
        options: What overrules its files.

    Raises:
        CheckpointError: If it is missing, of another class, or its config or weights are not valid.
    """
    classes = NETWORKS[name][0]
    if class_name is None or not folder.is_dir():
        fix = "; give one with vae, on the command line --vae FOLDER" if name == "vae" else ""
        raise CheckpointError(f"{folder} is missing; the model needs its {name}{fix}")
    if class_name not in classes:
        raise CheckpointError(f"{folder} is a {class_name}; it must be {' or '.join(classes)}")
    fields = read_json(folder / "config.json")
    fields["_class_name"] = class_name  # model_index.json decides, as in diffusers
    if name in ENCODERS:
        fields["architectures"] = [class_name]
    files: dict[str, TensorFile] = {}
    for path in _weight_files(folder, name, options.variant):
        file = TensorFile(path)
        twice = sorted(files.keys() & file.entries.keys())
        if twice:
            raise CheckpointError(f"{path} contains tensors that another shard contains too: {join_names(twice)}")
        files |= dict.fromkeys(file.entries, file)
    sources = keys.folder_sources(files, name)
    if name == "safety_checker":
        fields |= _concept_counts(files)
    if class_name == "CLIPTextModel":
        sources.pop("text_projection.weight", None)  # some files keep it; this class has none
    return NetworkFiles.of(name, folder, {**fields, **options.config_of(name)}, files, sources, [])


def _latent_fields(path: Path) -> dict[str, Any]:
    """Return the fields of a VAE's config.json that describe the latent space, if there is one."""
    fields = read_json(path) if path.exists() else {}
    if fields.get("_class_name") == TINY_VAE:  # whose latents are already the UNet's
        return {}
    return {name: fields[name] for name in LATENT_FIELDS if fields.get(name) is not None}


def _concept_counts(files: dict[str, TensorFile]) -> dict[str, int]:
    """Return the numbers of concepts of a safety checker, which only the shapes of its tensors tell."""
    rows = {"concepts": "concept_embeds", "special_care": "special_care_embeds"}
    shapes = {name: files[key].entries[key].shape for name, key in rows.items() if key in files}
    return {name: shapes[name][0] if shapes.get(name) else 1 for name in rows}


def _weight_files(folder: Path, name: str, variant: str | None) -> list[Path]:
    chosen = choose_weights((path.name for path in _inside(folder)), variant)
    if chosen is None:
        stem = STEMS["safetensors"][name not in ("unet", "vae")]
        others = sorted({found[1] for path in _inside(folder) if (found := VARIANT.fullmatch(path.name))})
        if others:
            raise CheckpointError(
                f"{folder} has only weights of the variant{'s' * (len(others) > 1)} {join_names(others)}; give it as "
                f"variant, on the command line --variant {others[0]}"
            )
        raise CheckpointError(
            f"{folder} has no weights; it must have {stem}.safetensors, whole or sharded, or a .bin file"
        )
    if not chosen.endswith(".json"):
        return [folder / chosen]
    shards = read_json(folder / chosen).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{folder / chosen} has no weight_map, which lists the tensors of each shard")
    for shard in shards.values():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{folder / chosen} names the shard {str(shard)[:100]!r}; a shard must be a file in the same folder"
            )
        if not (folder / shard).exists():
            raise CheckpointError(f"{folder / shard} is missing; {chosen} names it")
    return [folder / shard for shard in sorted(set(shards.values()))]


def _add_tokenizer(plan: ModelFiles, folder: Path) -> None:
    if not folder.is_dir():
        plan.problems.append(f"{folder} is missing; the text encoder needs its tokenizer")
        return
    plan.tokenizers.append(partial(Tokenizer.from_folder, folder))
    present = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    plan.problems += [
        f"{file} has more than {MAX_TEXT_BYTES:,} bytes" for file in present if file.stat().st_size > MAX_TEXT_BYTES
    ]
    plan.files += present


def _add_settings(plan: ModelFiles, path: Path) -> None:
    plan.settings = read_json(path)
    plan.files.append(path)
    known = {name: value for name, value in plan.settings.items() if name in Request.model_fields and name != "prompt"}
    try:
        defaults = Request.model_validate({"prompt": "", **known})
    except RequestError as error:
        raise CheckpointError(f"{path}: {error}") from None
    for name in known:
        plan.settings[name] = getattr(defaults, name)
        if plan.settings[name] is None:  # as if it were not there
            del plan.settings[name]
    if "few_step" not in plan.settings:
        return
    try:
        plan.few_step = FewStep.model_validate(plan.settings["few_step"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("few_step", *first["loc"])))
        raise CheckpointError(f"{path} has an invalid {where}: {first['msg']}") from None
    lora = path.with_name(plan.few_step.lora)
    plan.files += [lora] if lora.exists() else []  # only generation in few steps needs it


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from None


def _family(plan: ModelFiles) -> Family:
    unet = plan.config("unet")
    if plan.config("text_encoder_2") or (isinstance(unet, UNetConfig) and unet.addition_embed_type == "text_time"):
        return "sdxl"
    second = isinstance(unet, UNetConfig) and (unet.cross_attention_dim == 1024 or unet.use_linear_projection)
    return "sd2" if second else "sd1"
