"""Run a training recipe: open the model and the data, draw DreamBooth's class pictures, train, write the results."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from mezzotint.errors import RequestError
from mezzotint.files import report_write_errors, write_atomically
from mezzotint.memory.headers import ModelHeaders
from mezzotint.models.offload import onload
from mezzotint.models.unet import UNet
from mezzotint.pipeline import Pipeline
from mezzotint.placement import Placement
from mezzotint.request import Request
from mezzotint.train import checkpoints
from mezzotint.train.batches import Batches, DataOptions, prepare_dataset
from mezzotint.train.buckets import nearest_bucket
from mezzotint.train.budget import TrainingPlan, offload_placements, plan_training
from mezzotint.train.conditions import pair_conditions
from mezzotint.train.data import PICTURES, Dataset, open_data
from mezzotint.train.finetune import OnStep, Report, finetune, make_accelerator
from mezzotint.train.latents import Latents, Texts
from mezzotint.train.recipe import Recipe
from mezzotint.train.saving import CONTROLNET, check_saving, inference_parts, save_embedding, save_results
from mezzotint.train.trainable import TrainableModel
from mezzotint.weights.checkpoint import open_model
from mezzotint.weights.hub import BUNDLED
from mezzotint.weights.save import save_control

Say = Callable[[str], None]


def run(
    recipe: Recipe,
    folder: Path,
    *,
    device: str | torch.device | None = None,
    say: Say = lambda line: None,
    on_step: OnStep | None = None,
) -> list[Path]:
    """Train by a recipe, or resume the run that was started in the folder.

    Args:
        recipe: what to train, on what, and how.
        folder: the run's folder, for checkpoints, logs and results.
        device: as for accelerate; default: what `accelerate launch` gives, or the best device.
        say: called with lines for the user: the recipe in full, and what is being done.
        on_step: called after each step.

    Returns:
        The files and folders with the result.

    Raises:
        RequestError: for a recipe or data that cannot be used.
        CheckpointError: if the model or the run's checkpoints cannot be used.
        MissingExtraError: if an optional package is missing.
        WriteError: if the folder cannot be written.
        TrainingError: if a loss or gradient is not finite.
    """
    inversion = recipe.method == "textual-inversion"
    accelerator = make_accelerator(device, find_unused=recipe.text_encoder or inversion)
    tell: Say = say if accelerator.is_main_process else lambda line: None
    cache = Path(recipe.cache) if recipe.cache else folder / "cache"
    caption = recipe.prompt or (f"a picture of {recipe.token}" if inversion else None)
    dataset = open_data(recipe.data, recipe.broken, caption)
    if recipe.method == "controlnet":
        dataset = pair_conditions(dataset, recipe.conditions, PICTURES, recipe.broken)
    for notice in dataset.notices:
        tell(notice)
    if inversion:
        _check_captions(dataset, recipe.token)
    model = ModelHeaders.of(
        recipe.model or BUNDLED, device=accelerator.device, dtype=recipe.precision, **recipe.model_options
    )
    if model.info.has_aesthetic_score:
        raise RequestError("model is SDXL's refiner, which cannot be trained; give a text-to-image model")
    for notice in model.found.notices:
        tell(notice)
    native = (model.unet.sample_size or 64) * model.vae.downscale
    recipe = recipe.model_copy(update={"resolution": recipe.resolution or native})
    held_out = open_data(recipe.validation, recipe.broken, caption) if recipe.validation else None
    if held_out and recipe.method == "controlnet":
        held_out = pair_conditions(held_out, recipe.conditions, PICTURES, recipe.broken)
    if recipe.memory:
        accelerator.prepare(torch.nn.Linear(1, 1))  # imports 75 MB, which the plan must find in memory
    plan = _plan_memory(recipe, model, [dataset, held_out], tell)
    if plan:
        recipe = recipe.model_copy(update={"checkpointing": plan.measures.checkpointing})
    placements = plan.placements() if plan else offload_placements(recipe, model)
    late = model.device.type == "cpu" and "vae" in placements  # encode pictures and captions before loading the UNet
    parts = open_model(
        recipe.model or BUNDLED,
        device=model.device,
        dtype=model.dtype,
        placement={**placements, "unet": Placement(weights="offload")} if late else placements,
        **recipe.model_options,
    )
    tell(recipe.toml())
    for line in check_saving(recipe, parts) if _is_full(recipe) else ():
        tell(line)
    parts.vae.eval().requires_grad_(False)
    latents = Latents(parts.vae, cache, plan.measures.vae if plan else "whole")

    def batches(pictures: Dataset, **changes: Any) -> Batches:
        options = DataOptions(**{field.name: getattr(recipe, field.name) for field in fields(DataOptions)})
        options = replace(options, **changes)
        with accelerator.main_process_first(), onload(parts.vae.encoder):
            decodable = prepare_dataset(pictures, options, latents, recipe.broken)
        for line in decodable.skipped:
            tell(f"Skipped: {line}")
        return Batches(decodable, options, latents, recipe.seed)

    fixed = {"flip": False, "random_crop": False, "caption_dropout": 0.0, "shuffle_tags": False, "repeats": 1}
    prior = None
    if recipe.class_prompt and recipe.method == "dreambooth":
        with accelerator.main_process_first():
            pictures = _draw_class_pictures(recipe, folder, parts, tell)
        prior = batches(pictures, repeats=1)
    validation = batches(_once(held_out), **fixed) if held_out else None
    train = batches(dataset)
    texts = Texts(parts.tokenizers, parts.text_encoders, cache)
    if "text_encoder" in placements and not recipe.shuffle_tags:
        with accelerator.main_process_first(), onload(*parts.text_encoders):
            for caption in {
                "",
                *(example.caption for one in (train, prior, validation) if one for example in one.examples),
            }:
                texts([caption])
    if late:
        parts = replace(parts, unet=_load_unet(model, placements.get("unet", Placement())))
    trainable = TrainableModel(parts, recipe)
    trainable.texts = texts
    trained, total = trainable.count_parameters()
    tell(f"Training {trained:,} of {total:,} parameters ({100 * trained / total:.2g} %)")
    tell(f"{len(train.ids):,} pictures and {len(train):,} batches per epoch")
    writer = _tensorboard_writer(folder, recipe) if accelerator.is_main_process else None

    def report_step(report: Report) -> None:
        if writer and report.step % recipe.log_every == 0:
            for name, value in report.metrics().items():
                writer.add_scalar(name, value, report.step)
        if on_step:
            on_step(report)

    finetune(
        trainable,
        train,
        folder,
        prior=prior,
        validation=validation,
        on_step=report_step,
        on_sample=lambda now, step: draw_samples(now, folder / "samples", step),
        accelerator=accelerator,
        micro_batch=plan.measures.micro_batch if plan else None,
    )
    if writer:
        writer.close()
    made = save_results(trainable, folder, recipe.steps) if accelerator.is_main_process else []
    accelerator.wait_for_everyone()
    return made


def draw_samples(model: TrainableModel, folder: Path, step: int) -> None:
    """Generate the recipe's sample prompts with the model as it is, as folder/step-00000100-0.png and so on."""
    recipe, embeddings = model.recipe, None
    controls: list[Any] = [None] * len(recipe.sample_prompts)
    if model.controlnet is not None:
        save_control(folder / CONTROLNET, model.controlnet, None)
        controls = [({"file": str(folder / CONTROLNET), "image": name},) for name in recipe.sample_conditions]
    if model.change == "word":
        embeddings = (str(save_embedding(model, folder / f"{recipe.token.strip('<>')}.safetensors")),)
    pipe = Pipeline(inference_parts(model))
    for number, (text, control) in enumerate(zip(recipe.sample_prompts, controls, strict=True)):
        request = Request(prompt=text, seed=recipe.sample_seed + number, embeddings=embeddings, control=control)
        image = pipe.generate(request).images[0]
        _save_picture(image, folder / f"step-{step:08}-{number}.png")


def _load_unet(model: ModelHeaders, placement: Placement) -> UNet:
    part = next(part for part in model.found.parts if part.name == "unet")
    network = cast(UNet, part.network())
    part.load(network, model.dtype, model.device, placement)
    return network


def _plan_memory(
    recipe: Recipe, model: ModelHeaders, pictures: Sequence[Dataset | None], tell: Say
) -> TrainingPlan | None:
    """Plan for the recipe's memory budget, if it has one, and print the plan. Raises BudgetError."""
    if recipe.memory is None:
        return None
    sizes = [example.size for dataset in pictures if dataset for example in dataset]
    buckets = DataOptions(
        resolution=recipe.resolution or 0, buckets=recipe.buckets, bucket_step=recipe.bucket_step
    ).sizes()
    used = {nearest_bucket(size, buckets) for size in sizes}
    if recipe.class_prompt:
        used.add(nearest_bucket((1, 1), buckets))
    made = plan_training(recipe, model, sizes, sorted(used))
    tell(made.table())
    made.prepare()
    return made


def _save_picture(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically. Raises WriteError."""
    data = io.BytesIO()
    image.save(data, format="PNG")
    with report_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data.getvalue())


def _tensorboard_writer(folder: Path, recipe: Recipe) -> Any:
    """Return TensorBoard's writer, or None if it is not installed or not wanted."""
    if not recipe.tensorboard or importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    found = checkpoints.list_all(folder)
    done = int(found[0].name.rpartition("-")[2]) if found else 0
    return SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)


def _draw_class_pictures(recipe: Recipe, folder: Path, parts: Any, tell: Say) -> Dataset:
    """Open the class pictures, generating those that are missing up to class_count with the untrained model."""
    place = Path(recipe.class_folder) if recipe.class_folder else folder / "class"
    there = sum(path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") for path in place.glob("*"))
    if there < recipe.class_count:
        tell(f"Generating {recipe.class_count - there} pictures of {recipe.class_prompt!r} into {place}")
        pipe = Pipeline(parts)
        for number in range(there, recipe.class_count):
            image = pipe(recipe.class_prompt or "", seed=recipe.seed + number)
            _save_picture(image, place / f"class-{number:05}.png")
    return open_data(place, recipe.broken, recipe.class_prompt)


def _check_captions(dataset: Dataset, token: str) -> None:
    for example in dataset:
        if token not in example.caption:
            raise RequestError(
                f"the caption of {example.place!r} is {example.caption[:60]!r}; it must contain the token {token}"
            )


def _once(dataset: Dataset) -> Dataset:
    """Return the dataset with one use of each picture in an epoch."""
    return replace(dataset, examples=tuple(replace(example, repeats=1) for example in dataset))


def _is_full(recipe: Recipe) -> bool:
    return recipe.method == "full" or (recipe.method == "dreambooth" and recipe.change == "full")
