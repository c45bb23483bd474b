"""Fine-tuning by a recipe (LoRA, full, DreamBooth, textual inversion, ControlNet), on one or several CPUs or GPUs.

    model = finetune(TrainableModel(parts, recipe), batches, folder)

A step is a function of the recipe, the data and the step's number: process p of P takes micro-batches
(step * accumulate + k) * P + p of an endless sequence. So a run that was killed resumes with the same bits, and two
processes are equivalent to one with twice the accumulation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mezzotint.errors import CheckpointError, MissingExtraError
from mezzotint.files import report_write_errors, write_atomically
from mezzotint.models.checkpointing import checkpointing
from mezzotint.train import keyed_rng, sharding
from mezzotint.train.loop import MetricsLog, TrainingLoop
from mezzotint.train.recipe import Recipe
from mezzotint.train.trainable import Batch, TrainableModel, swap_weights

RECIPE = "recipe.toml"
VALIDATION_LEVELS = 4  # timesteps at which the validation loss is taken


class Batches(Sized, Protocol):
    """An endless sequence of batches; its length is that of an epoch."""

    def at(self, k: int) -> Batch:
        """Return batch k, which is in epoch k // len(self)."""
        ...


@dataclass(frozen=True)
class Report:
    """Metrics after a step.

    step: number of steps done. loss: mean over the step. lr: learning rate. norm: the gradient's, before clipping.
    rate: pictures per second since the run began or resumed. validation: validation loss, if it was due.
    """

    step: int
    loss: float
    lr: float
    norm: float
    rate: float
    validation: float | None = None

    def metrics(self) -> dict[str, float]:
        """Return all values but the step, by name."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "step"}


OnStep = Callable[[Report], None]
OnSample = Callable[[TrainableModel, int], None]


def finetune(
    model: TrainableModel,
    batches: Batches,
    folder: Path,
    *,
    prior: Batches | None = None,
    validation: Batches | None = None,
    on_step: OnStep | None = None,
    on_sample: OnSample | None = None,
    accelerator: Any = None,
    micro_batch: int | None = None,
) -> TrainableModel:
    """Train a model by its recipe.

    Args:
        model: trained in place.
        batches: training data.
        folder: for recipe.toml, log.jsonl and checkpoints, from the newest of which training resumes.
        prior: DreamBooth's class pictures (prior preservation).
        validation: held-out data for the validation loss.
        on_step: called after each step. A KeyboardInterrupt from it ends the run after a checkpoint.
        on_sample: called with the model and the number of steps done when samples are due.
        accelerator: accelerate's; default: one for a single process.
        micro_batch: largest number of pictures in one forward pass. Larger batches are split and their gradients added.

    Returns:
        The model, holding the averaged weights if the recipe has `ema`.

    Raises:
        TrainingError: if a loss or gradient is not finite.
        CheckpointError: if the folder's checkpoints are damaged or of another run.
        WriteError: if the folder cannot be written.
    """
    recipe = model.recipe
    accelerator = accelerator or make_accelerator("cpu")
    model.to(accelerator.device)
    sharded = sharding.is_requested()
    if sharded:
        sharding.shard(model, accelerator.device)
    per_step = recipe.accumulate * accelerator.num_processes  # micro-batches
    loop = TrainingLoop(
        model.trainable_parameters(),
        make_optimiser(model),
        folder,
        recipe,
        lambda step: lr_scale(recipe, step),
        extra={"recipe": recipe.model_dump_json(), "together": per_step},
        check=lambda path, state: _check_same_run(path, state, recipe, per_step),
        accelerator=accelerator,
    )
    metrics_log = _start_logs(folder, recipe, loop.step) if loop.is_main else None
    wrapped: Any = model if sharded else accelerator.prepare(model)
    ids, own_loss = list[tuple[str, ...]](), torch.zeros(())  # this process's, of the step in progress

    def backward(step: int) -> dict[str, Tensor]:
        nonlocal own_loss
        own_loss = torch.zeros((), device=accelerator.device)
        ids.clear()
        for k in range(recipe.accumulate):
            number = step * per_step + k * accelerator.num_processes + accelerator.process_index
            batch = batches.at(number)
            ids.append(tuple(batch.ids))
            torch.manual_seed(keyed_rng.integer(recipe.seed, number, "dropout"))
            splits = list(split_batch(batch, None if prior is None else prior.at(number), micro_batch))
            for place, split in enumerate(splits, 1):
                last = k + 1 == recipe.accumulate and place == len(splits)
                no_sync = sharding.no_sync(model) if sharded else accelerator.no_sync(wrapped)
                with nullcontext() if last else no_sync:
                    with _autocast(recipe, accelerator.device):
                        loss = wrapped(*split) / recipe.accumulate
                    accelerator.backward(loss)
                own_loss += loss.detach().float()
        return {"loss": accelerator.reduce(own_loss, "mean")}

    def culprit() -> str:
        mean = accelerator.reduce(own_loss, "mean")
        names = [", ".join(name for batch in ids for name in batch)]
        names = names if mean.isfinite() or not own_loss.isfinite() else []
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            names = gather_object(names)
        return f", in the batch of {'; '.join(names)[:500]}"

    with _prepare(model, accelerator.device):
        clock, pictures = time.monotonic(), 0
        for done in loop.run(backward, culprit):
            step, loss = done.step, None
            if validation is not None and recipe.validate_every and step % recipe.validate_every == 0:
                with swap_weights(model, loop.averages):
                    loss = validation_loss(model, validation)
            if on_sample and recipe.sample_every and step % recipe.sample_every == 0:
                with swap_weights(model, loop.averages), sharding.gather_parameters(model):
                    if loop.is_main:
                        on_sample(model, step)
                accelerator.wait_for_everyone()
            pictures += sum(map(len, ids)) * accelerator.num_processes
            rate = pictures / max(time.monotonic() - clock, 1e-9)
            report = Report(step, done.losses["loss"], recipe.lr * lr_scale(recipe, step - 1), done.norm, rate, loss)
            if metrics_log and (step % recipe.log_every == 0 or loss is not None or step == recipe.steps):
                metrics_log.write(step, report.metrics())
            try:
                if on_step and loop.is_main:
                    on_step(report)
            except KeyboardInterrupt:
                loop.save()
                raise
    loop.use_averages()
    sharding.unshard(model)
    return model


def split_batch(
    batch: Batch, prior: Batch | None, micro_batch: int | None
) -> Iterator[tuple[Batch | None, Batch | None, tuple[float, float]]]:
    """Split a batch and its class pictures into parts of at most `micro_batch` pictures.

    Yields the arguments of TrainableModel.forward: the two parts and their shares of the whole, so that the parts'
    losses add up to the whole's.
    """
    wholes = (batch, prior)
    count = max(-(-len(one.ids) // (micro_batch or len(one.ids))) for one in wholes if one is not None)
    for k in range(count):
        parts: list[Batch | None] = []
        for one in wholes:
            length = 0 if one is None else len(one.ids)
            part = slice(k * length // count, (k + 1) * length // count)
            parts.append(_slice(one, part) if one is not None and part.start < part.stop else None)
        shares = [
            len(part.ids) / len(one.ids) if one is not None and part is not None else 0.0
            for one, part in zip(wholes, parts, strict=True)
        ]
        yield parts[0], parts[1], (shares[0], shares[1])


def _slice(batch: Any, part: slice) -> Batch:
    names = ("ids", "captions", "latents", "time_ids", *(("hints",) if batch.hints is not None else ()))
    sliced: Batch = replace(batch, **{name: getattr(batch, name)[part] for name in names})
    return sliced


def make_accelerator(device: str | torch.device | None = None, find_unused: bool = False) -> Any:
    """Return accelerate's Accelerator, on the CPU if `device` says so or there is no accelerator device.

    `find_unused`: whether some trained parameters may have no gradient in a step. Raises MissingExtraError.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError:
        raise MissingExtraError("training needs accelerate and peft: pip install 'mezzotint[train]'") from None
    # Told explicitly, since otherwise each of several CPU processes would take itself for the only one.
    cpu = str(device) == "cpu" or not torch.accelerator.is_available()
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=find_unused)]
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)


def make_optimiser(model: TrainableModel) -> torch.optim.Optimizer:
    """Return the recipe's optimiser. Raises MissingExtraError if it is not installed."""
    recipe, groups = model.recipe, _parameter_groups(model)
    if recipe.optimiser == "adafactor":
        return torch.optim.Adafactor(groups, weight_decay=recipe.weight_decay)
    if recipe.optimiser == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise MissingExtraError(
                "optimiser adamw8bit needs bitsandbytes: pip install bitsandbytes; adafactor takes as little memory "
                "without it"
            ) from None
        return AdamW8bit(groups, weight_decay=recipe.weight_decay)  # type: ignore[no-any-return, unused-ignore]
    return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)


def lr_scale(recipe: Recipe, step: int) -> float:
    """Return the fraction of the learning rate at a step: linear warmup, then the recipe's schedule."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}[
        recipe.schedule
    ]


@torch.no_grad()
def validation_loss(model: TrainableModel, batches: Batches) -> float:
    """Return the mean loss of held-out pictures, each at the same few timesteps and noise every time."""
    total, count = 0.0, 0
    for k in range(len(batches)):
        batch = batches.at(k)
        for level in range(VALIDATION_LEVELS):
            timestep = (2 * level + 1) * model.schedule.num_train_timesteps // (2 * VALIDATION_LEVELS)
            _, noise = model.draw_noise(batch, purpose=f"validation {level}")
            timesteps = torch.full((len(batch.ids),), timestep)
            losses = model.losses(batch.latents, batch.captions, batch.time_ids, timesteps, noise, batch.hints)
            total, count = total + float(losses.sum()), count + len(losses)
    return total / count


def _parameter_groups(model: TrainableModel) -> list[dict[str, Any]]:
    """Return parameter groups with their learning rates: the UNet and embeddings, and the text encoders."""
    recipe, trained = model.recipe, model.trainable_parameters()
    text = [p for name, p in trained.items() if name.startswith("text_encoder")]
    rest = [p for name, p in trained.items() if not name.startswith("text_encoder")]
    groups = [{"params": rest, "lr": recipe.lr}, {"params": text, "lr": recipe.text_lr or recipe.lr}]
    return [group for group in groups if group["params"]]


@contextmanager
def _prepare(model: TrainableModel, device: torch.device) -> Iterator[None]:
    """Turn on gradient checkpointing if the recipe asks for it, and restore the caller's random state afterwards."""
    devices = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        if model.recipe.checkpointing:
            for network in (model.unet, model.controlnet):
                if network is not None:
                    stack.enter_context(checkpointing(network))
            for name, encoder in model.text_encoders.items():
                if model.vectors or any(key.startswith(f"{name}.") for key in model.trainable_parameters()):
                    stack.enter_context(checkpointing(encoder))
        yield


def _autocast(recipe: Recipe, device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if recipe.precision == "bfloat16" else nullcontext()


def _check_same_run(path: Path, state: dict[str, Any], recipe: Recipe, per_step: int) -> None:
    """Raise CheckpointError for a checkpoint of a run with another recipe or number of micro-batches per step."""
    if differences := Recipe.model_validate_json(state["recipe"]).differences(recipe):
        raise CheckpointError(
            f"{path} is of another run ({'; '.join(differences[:5])}); resume it with the same recipe, or use "
            "another folder"
        )
    if state["together"] != per_step:
        raise CheckpointError(
            f"{path} was made with {state['together']} batches per step (accumulate times processes), not {per_step}"
        )


def _start_logs(folder: Path, recipe: Recipe, step: int) -> MetricsLog:
    """Write recipe.toml and open log.jsonl. Raises WriteError."""
    log = MetricsLog(folder, step)
    with report_write_errors(folder):
        write_atomically(folder / RECIPE, recipe.toml().encode())
    return log
