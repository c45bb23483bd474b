"""One loop for LoRA, full fine-tuning, DreamBooth and textual inversion, on accelerate: one CPU, one GPU or several.

    model = finetune(TrainableModel(parts, recipe), batches, folder)

A step is a function of the recipe, the pictures and the step's number: process p of P takes the micro-batches
(step * accumulate + k) * P + p of the unending run. So a run that was killed goes on from its newest checkpoint bit for
bit, and two processes are one with twice the accumulation.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mezzotint.errors import CheckpointError, MissingExtraError, TrainingError, WriteError
from mezzotint.images.io import write_whole
from mezzotint.models.checkpointing import checkpointing
from mezzotint.train import checkpoints, keyed_rng, sharding
from mezzotint.train.recipe import Recipe
from mezzotint.train.trainable import Batch, TrainableModel, swap_weights

LOG, RECIPE = "log.jsonl", "recipe.toml"
LEVELS = 4  # timesteps at which the validation loss is taken


class Batches(Sized, Protocol):
    """len: batches of an epoch. at(k): batch k of the unending run, which is in epoch k // len."""

    def at(self, k: int) -> Batch: ...


@dataclass(frozen=True)
class Report:
    """After a step: how many are done, its loss, rate and gradient's norm, pictures a second, and the validation loss
    where it was due."""

    step: int
    loss: float
    lr: float
    norm: float
    rate: float
    validation: float | None = None

    def numbers(self) -> dict[str, float]:
        """All but the step, by name."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "step"}

    def line(self) -> str:
        """As log.jsonl has it."""
        return json.dumps({"step": self.step} | {n: float(f"{value:.6g}") for n, value in self.numbers().items()})


OnStep = Callable[[Report], None]
OnSample = Callable[[TrainableModel, int], None]


def finetune(
    model: TrainableModel,
    batches: Batches,
    folder: Path,
    *,
    prior: Batches | None = None,
    held: Batches | None = None,
    on_step: OnStep | None = None,
    on_sample: OnSample | None = None,
    accelerator: Any = None,
    at_once: int | None = None,
) -> TrainableModel:
    """Train by the model's recipe; it comes back holding what was learnt, the averages where the recipe has `ema`.

    folder: the run's own, with its checkpoints, from the newest of which it goes on, recipe.toml and log.jsonl. prior:
    what must not be forgotten. held: for the validation loss. on_step is called after each step; what it raises ends
    the run, after a checkpoint if it is KeyboardInterrupt. on_sample(model, step) draws. accelerator: accelerate's,
    else one for this process. at_once: pictures that go through the network together; a larger batch is cut into
    pieces, whose gradients add up to its own. Raises TrainingError for a loss that is no number, CheckpointError,
    WriteError.
    """
    recipe = model.recipe
    accelerator = accelerator or make_accelerator("cpu")
    model.to(accelerator.device)
    split = sharding.is_requested()
    if split:
        sharding.shard(model, accelerator.device)
    parameters = model.trainable_parameters()
    optimiser = make_optimiser(model)
    averages = {name: p.detach().clone() for name, p in parameters.items()} if recipe.ema else {}
    together = recipe.accumulate * accelerator.num_processes
    start = _resume(folder, model, optimiser, averages, together)
    if accelerator.is_main_process:
        _begin(folder, recipe, start)
    wrapped: Any = model
    if not split:
        wrapped, optimiser = accelerator.prepare(model, optimiser)
    rates = [group["lr"] for group in _groups(model)]

    def save(step: int) -> None:
        state = {
            "trained": {name: sharding.full_tensors(p.detach()).cpu() for name, p in parameters.items()},
            "averages": {name: sharding.full_tensors(average).cpu() for name, average in averages.items()},
            "optimiser": sharding.full_tensors(optimiser.state_dict()),
            "recipe": recipe.model_dump_json(),
            "together": together,
            "step": step,
        }
        if accelerator.is_main_process:
            checkpoints.save(folder, step, state, recipe.keep)
        accelerator.wait_for_everyone()

    with _prepared(model, accelerator.device):
        clock, pictures = time.monotonic(), 0
        for step in range(start, recipe.steps):
            optimiser.zero_grad(set_to_none=True)
            loss, ids = torch.zeros((), device=accelerator.device), list[tuple[str, ...]]()
            for k in range(recipe.accumulate):
                number = (step * recipe.accumulate + k) * accelerator.num_processes + accelerator.process_index
                batch = batches.at(number)
                ids.append(tuple(batch.ids))
                torch.manual_seed(keyed_rng.integer(recipe.seed, number, "dropout"))
                cut = list(pieces(batch, None if prior is None else prior.at(number), at_once))
                for place, piece in enumerate(cut, 1):
                    last = k + 1 == recipe.accumulate and place == len(cut)
                    with nullcontext() if last else sharding.no_sync(model) if split else accelerator.no_sync(wrapped):
                        with _cast(recipe, accelerator.device):
                            part = wrapped(*piece) / recipe.accumulate
                        accelerator.backward(part)
                    loss += part.detach().float()
            norm = accelerator.clip_grad_norm_(list(parameters.values()), recipe.clip or math.inf)
            mean_loss, norm = float(accelerator.reduce(loss, "mean")), float(sharding.full_tensors(norm))
            if not (math.isfinite(mean_loss) and math.isfinite(norm)):
                raise TrainingError(_no_number(folder, step, mean_loss, loss, ids, accelerator))
            scale = lr_scale(recipe, step)
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            optimiser.step()
            with torch.no_grad():
                for name, average in averages.items():
                    average.lerp_(parameters[name], 1 - min(recipe.ema, (step + 1) / (step + 10)))
            done = step + 1
            saved = done % recipe.save_every == 0 or done == recipe.steps
            if saved:
                save(done)
            validation = None
            if held is not None and recipe.validate_every and done % recipe.validate_every == 0:
                with swap_weights(model, averages):
                    validation = validation_loss(model, held)
            if on_sample and recipe.sample_every and done % recipe.sample_every == 0:
                with swap_weights(model, averages), sharding.gather_parameters(model):
                    if accelerator.is_main_process:
                        on_sample(model, done)
                accelerator.wait_for_everyone()
            pictures += sum(map(len, ids)) * accelerator.num_processes
            rate = pictures / max(time.monotonic() - clock, 1e-9)
            report = Report(done, mean_loss, recipe.lr * scale, norm, rate, validation)
            if accelerator.is_main_process:
                if done % recipe.log_every == 0 or validation is not None or done == recipe.steps:
                    _log(folder, report)
                try:
                    if on_step:
                        on_step(report)
                except KeyboardInterrupt:
                    if not saved:
                        save(done)
                    raise
    with torch.no_grad():
        for name, average in averages.items():
            parameters[name].copy_(average)
    sharding.unshard(model)
    return model


def pieces(
    batch: Batch, prior: Batch | None, at_once: int | None
) -> Iterator[tuple[Batch | None, Batch | None, tuple[float, float]]]:
    """A batch, and what must not be forgotten, cut into pieces of at most so many pictures, with each piece's shares of
    the two: what TrainableModel.forward makes of them adds up to what it makes of the whole."""
    wholes = (batch, prior)
    count = max(-(-len(one.ids) // (at_once or len(one.ids))) for one in wholes if one is not None)
    for k in range(count):
        cut: list[Batch | None] = []
        for one in wholes:
            length = 0 if one is None else len(one.ids)
            part = slice(k * length // count, (k + 1) * length // count)
            cut.append(_piece(one, part) if one is not None and part.start < part.stop else None)
        shares = [
            len(part.ids) / len(one.ids) if one is not None and part is not None else 0.0
            for one, part in zip(wholes, cut, strict=True)
        ]
        yield cut[0], cut[1], (shares[0], shares[1])


def _piece(batch: Any, part: slice) -> Batch:
    cut = {name: getattr(batch, name)[part] for name in ("ids", "captions", "latents", "time_ids")}
    made: Batch = replace(batch, **cut)
    return made


def make_accelerator(device: str | torch.device | None = None, find_unused: bool = False) -> Any:
    """accelerate's Accelerator, on the CPU where that is asked for or there is nothing else: not told so, it would take
    each of several processes for the only one. Raises MissingExtraError."""
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError:
        raise MissingExtraError("training needs accelerate and peft: pip install 'mezzotint[train]'") from None
    cpu = str(device) == "cpu" or not torch.accelerator.is_available()
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=find_unused)]
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)


def make_optimiser(model: TrainableModel) -> torch.optim.Optimizer:
    """The recipe's optimiser over what learns. Raises MissingExtraError for one that is not installed."""
    recipe, groups = model.recipe, _groups(model)
    if recipe.optimiser == "adafactor":
        return torch.optim.Adafactor(groups, weight_decay=recipe.weight_decay)
    if recipe.optimiser == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise MissingExtraError(
                "optimiser adamw8bit needs bitsandbytes: pip install bitsandbytes; adamw needs nothing, adafactor as "
                "little memory"
            ) from None
        return AdamW8bit(groups, weight_decay=recipe.weight_decay)  # type: ignore[no-any-return, unused-ignore]
    return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)


def lr_scale(recipe: Recipe, step: int) -> float:
    """The fraction of the learning rate at a step: a straight rise over `warmup`, then the schedule's."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    passed = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return {"constant": 1.0, "linear": 1.0 - passed, "cosine": 0.5 + 0.5 * math.cos(math.pi * passed)}[recipe.schedule]


@torch.no_grad()
def validation_loss(model: TrainableModel, held: Batches) -> float:
    """The mean loss of pictures held out, each at the same few timesteps and noise whenever it is asked for."""
    total, count = 0.0, 0
    for k in range(len(held)):
        batch = held.at(k)
        for level in range(LEVELS):
            at = (2 * level + 1) * model.schedule.num_train_timesteps // (2 * LEVELS)
            _, noise = model.draw_noise(batch, at=f"validation {level}")
            timesteps = torch.full((len(batch.ids),), at)
            losses = model.losses(batch.latents, batch.captions, batch.time_ids, timesteps, noise)
            total, count = total + float(losses.sum()), count + len(losses)
    return total / count


def _groups(model: TrainableModel) -> list[dict[str, Any]]:
    """The UNet's parameters (and words) and the text encoders', each with its rate."""
    recipe, trained = model.recipe, model.trainable_parameters()
    text = [p for name, p in trained.items() if name.startswith("text_encoder")]
    rest = [p for name, p in trained.items() if not name.startswith("text_encoder")]
    groups = [{"params": rest, "lr": recipe.lr}, {"params": text, "lr": recipe.text_lr or recipe.lr}]
    return [group for group in groups if group["params"]]


@contextmanager
def _prepared(model: TrainableModel, device: torch.device) -> Iterator[None]:
    """Gradient checkpointing where the recipe asks for it; the caller's random numbers stay his."""
    devices = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        if model.recipe.checkpointing:
            stack.enter_context(checkpointing(model.unet))
            for name, encoder in model.text_encoders.items():
                if model.vectors or any(key.startswith(f"{name}.") for key in model.trainable_parameters()):
                    stack.enter_context(checkpointing(encoder))
        yield


def _cast(recipe: Recipe, device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if recipe.precision == "bfloat16" else nullcontext()


def _resume(
    folder: Path, model: TrainableModel, optimiser: torch.optim.Optimizer, averages: dict[str, Tensor], together: int
) -> int:
    """Put the newest checkpoint's state in place; the steps that are done. Raises CheckpointError."""
    found = checkpoints.load_newest(folder)
    if found is None:
        return 0
    path, state = found
    try:
        before = Recipe.model_validate_json(state["recipe"])
        if differences := before.differences(model.recipe):
            raise CheckpointError(
                f"{path} is of another run ({'; '.join(differences[:5])}); the same recipe goes on from it, and "
                "another one needs another folder"
            )
        if state["together"] != together:
            raise CheckpointError(
                f"{path} was made with {state['together']} batches a step (accumulate times processes), not {together}"
            )
        parameters = model.trainable_parameters()
        with torch.no_grad():
            for values, targets in ((state["trained"], parameters), (state["averages"], averages)):
                if values.keys() != targets.keys():
                    raise KeyError("names")
                for name, value in values.items():
                    targets[name].copy_(sharding.shard_like(value, targets[name]))
        optimiser.load_state_dict(_split(state["optimiser"], optimiser))
        return int(state["step"])
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(f"{path} is of another model ({reason}); give the run another folder") from error


def _split(state: dict[str, Any], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state with this process's part of the moments, as its parameters are split."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    moments = {
        number: {
            name: sharding.shard_like(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def _begin(folder: Path, recipe: Recipe, step: int) -> None:
    """Write the recipe into the folder; what its log has of steps that will be made again goes. Raises WriteError."""
    log = folder / LOG
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RECIPE, recipe.toml().encode())
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
        write_whole(log, "".join(_before(lines, step)).encode())
    except OSError as error:
        raise WriteError(f"{folder} cannot be written: {error.strerror}") from error


def _log(folder: Path, report: Report) -> None:
    try:
        with (folder / LOG).open("a", encoding="utf-8") as file:
            file.write(report.line() + "\n")
    except OSError as error:
        raise WriteError(f"{folder / LOG} cannot be written: {error.strerror}") from error


def _before(lines: Sequence[str], step: int) -> Iterator[str]:
    for line in lines:
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                yield line
        except ValueError:  # half a line, of a kill
            return


def _no_number(folder: Path, step: int, mean: float, loss: Tensor, ids: list[tuple[str, ...]], accelerator: Any) -> str:
    from accelerate.utils import gather_object

    own = [", ".join(name for batch in ids for name in batch)]
    bad = own if math.isfinite(mean) or not math.isfinite(float(loss)) else []
    names = gather_object(bad) if accelerator.num_processes > 1 else bad
    paths = checkpoints.list_all(folder)
    kept = f"the last good checkpoint is {paths[0]}" if paths else "there is no checkpoint yet"
    what = "the gradient" if math.isfinite(mean) else "the loss"
    return (
        f"step {step + 1}: {what} is no number, in the batch of {'; '.join(names)[:500]}; {kept}. A lower lr, a longer "
        "warmup or precision float32 may help, or the picture is to be looked at"
    )
