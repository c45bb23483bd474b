"""A byte budget for a training run, and what is done so that it is kept.

    fitted(recipe, sizes, device)   ->  TrainingPlan, or BudgetError with the least that would do

What a step holds between its two passes is walked through, not guessed: the model is built on the meta device, where
tensors have shapes and no memory, takes one step there, and every tensor is counted from the operation that makes it
until nothing names it any more. To that come, by their numbers, the weights, the gradients, the optimiser's moments and
the averages; and what the process takes before (memory/footprint.py has those terms).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn

from mezzotint.errors import BudgetError
from mezzotint.memory import system, walk
from mezzotint.memory.footprint import (
    DEFAULT_MAPPED_BYTES,
    LIBRARY_MEMORY,
    READ_BUFFER_BYTES,
    TOKENIZER_BYTES_PER_TOKEN,
    Model,
    predict,
)
from mezzotint.memory.planner import AUTO_SHARE, HEAP_FACTOR, SAFETY
from mezzotint.models.attention import backend
from mezzotint.models.backends import Backend
from mezzotint.models.checkpointing import checkpointing
from mezzotint.models.unet import Condition
from mezzotint.models.vae_modes import VAEMode
from mezzotint.placement import Placement, format_size, parse_size
from mezzotint.request import Request
from mezzotint.train.buckets import Size
from mezzotint.train.latents import Texts
from mezzotint.train.recipe import Recipe
from mezzotint.train.trainable import ENCODERS, TrainableModel
from mezzotint.weights.checkpoint import Parts

MOMENTS = {"adamw": 8, "adafactor": 0, "adamw8bit": 2}  # bytes of each number that learns; adafactor's are a row's
UPDATE = 12  # and of each in the tensor that the optimiser is at
DECODED = 8  # bytes of a pixel of a picture while it is opened and brought to its bucket


@dataclass(frozen=True)
class Measures:
    """What is done. aside: networks that do not learn, but for the UNet, are read from their files when they are
    needed. weights, storage: of a UNet that does not learn itself, as in a Placement. vae: its way to encode.
    """

    aside: bool = False
    weights: str = "resident"
    storage: str | None = None
    vae: VAEMode = "whole"
    checkpointing: bool = False
    at_once: int = 1

    @property
    def held(self) -> bool:
        """Whether the UNet's weights are made whole as its layers run."""
        return self.weights != "resident" or self.storage is not None


@dataclass(frozen=True)
class TrainingPlan:
    """Measures, and the peak of each stage that is foreseen with them. work: bytes of a step's tensors."""

    measures: Measures
    stages: dict[str, int]
    parts: dict[str, int]
    work: int
    limit: int
    batch: int
    exact: bool
    cpu: bool
    texts_learn: bool

    @property
    def most(self) -> int:
        """Of the whole run."""
        return max(self.stages.values())

    @property
    def tight(self) -> bool:
        """As in memory.Plan."""
        return self.cpu and self.most * SAFETY + HEAP_FACTOR * self.work > self.limit

    def keep(self) -> None:
        """To be called before loading."""
        if self.tight:
            system.return_freed()

    def placements(self) -> dict[str, Placement]:
        """For `open_model`."""
        made = {"unet": Placement.of(weights=self.measures.weights, storage=self.measures.storage)}
        if self.measures.aside:
            made |= dict.fromkeys(("vae", *(() if self.texts_learn else ENCODERS)), Placement(weights="offload"))
        return made

    def table(self) -> str:
        """For a person."""
        lines = [f"{stage:<9} {format_size(count)}" for stage, count in self.stages.items()]
        lines.append(
            "of a step: " + ", ".join(f"{name} {format_size(count)}" for name, count in self.parts.items() if count)
        )
        done, measures = [], self.measures
        if measures.aside:
            done.append("the VAE and text encoders are read from their files when they are needed")
        if measures.vae != "whole":
            done.append("the VAE in strips")
        if measures.storage:
            done.append(
                f"the UNet's weights kept as {measures.storage}"
                + (", as in the files" if self.exact else ": approximate, what is learnt is learnt on rounded weights")
            )
        if measures.weights == "stream":
            done.append("each layer's weights of the UNet read from the files when it runs")
        if measures.checkpointing:
            done.append("gradient checkpointing")
        if measures.at_once < self.batch:
            done.append(f"a batch of {self.batch} by {measures.at_once} at a time")
        if self.tight:
            done.append("freed memory goes back to the system at once")
        lines.append(f"done: {'; '.join(done) or 'nothing needs to be'}")
        lines.append(f"at most {format_size(self.most)} of {format_size(self.limit)}")
        if self.cpu and not self.tight:
            heap = format_size(HEAP_FACTOR * self.work)
            lines.append(f"the allocator may keep up to {heap} of freed memory; the budget allows it")
        return "\n".join(lines)


def aside(recipe: Recipe, model: Model) -> dict[str, Placement]:
    """Networks that wait in their files, for `open_model`: those that a run uses before its first step and no more."""
    if model.device.type != "cpu" or recipe.random_crop or recipe.shuffle_tags:
        return {}
    texts = () if recipe.text_encoder or recipe.method == "textual-inversion" else ENCODERS
    return dict.fromkeys(("vae", *texts), Placement(weights="offload"))


def fitted(recipe: Recipe, model: Model, pictures: Sequence[Size], buckets: Sequence[Size]) -> TrainingPlan:
    """The quickest way to train by the recipe, which has a `memory`, that keeps it.

    pictures: (width, height) of those that are opened. buckets: of those that are learnt from. Raises BudgetError with
    the least that would do, CheckpointError.
    """
    assert recipe.memory
    run = _Run(model, recipe, list(pictures), list(buckets))
    limit = run.limit()
    least = None
    for measures in run.ways():
        plan = run.plan(measures, limit)
        if plan.most * SAFETY <= limit:
            return plan
        least = min(least, plan, key=lambda one: one.most) if least else plan
    assert least
    stage = max(least.stages, key=lambda name: least.stages[name])
    raise BudgetError(
        f"memory is {format_size(limit)}, and this training takes at least {math.ceil(least.most * SAFETY / 2**20)}MiB "
        f"({stage}); {run.advice()}"
    )


class _Run:
    """One recipe on one model."""

    def __init__(self, model: Model, recipe: Recipe, pictures: list[Size], buckets: list[Size]) -> None:
        self.model, self.recipe, self.pictures, self.buckets = model, recipe, pictures, buckets
        self.cpu = model.device.type == "cpu"
        self.itemsize = model.dtype.itemsize
        if recipe.tensorboard and importlib.util.find_spec("tensorboard"):
            importlib.import_module("torch.utils.tensorboard")  # what the run will import is to be there, and measured
        self.walk = lru_cache(maxsize=None)(self._walk)
        self.trainable = lru_cache(maxsize=None)(self._build_trainable)
        trainable = self.trainable(False)
        trained = trainable.trainable_parameters()
        self.change = trainable.change
        self.numbers = sum(p.numel() for p in trained.values())
        self.largest = max(p.numel() for p in trained.values())
        self.texts_learn = self.change == "word" or any(name.startswith(ENCODERS) for name in trained)
        self.base = system.resident() if self.cpu else 0

    def limit(self) -> int:
        """The budget in bytes. Raises BudgetError for what is none."""
        if self.recipe.memory != "auto":
            return parse_size(self.recipe.memory or "")
        if not self.cpu:
            return int(AUTO_SHARE * torch.cuda.mem_get_info(self.model.device)[0])
        free = system.available()
        if free is None:
            raise BudgetError("memory is 'auto', and what is free is not known here; name a size such as 4GiB")
        return int(self.base + AUTO_SHARE * free)

    def ways(self) -> Iterator[Measures]:
        """From the quickest to the smallest; those that round weights last."""
        recipe = self.recipe
        batches = sorted({max(recipe.batch >> shift, 1) for shift in range(14)}, reverse=True)
        kept: list[tuple[str, str | None]] = [("resident", None)]
        if self.change != "full":
            wide = self.model.dtype == torch.float32
            kept += [
                ("resident", name) for name in ("float16", "bfloat16") if wide and self.model.file_dtypes == {name}
            ]
            kept += [("stream", None)] if self.cpu else []
        yield Measures(bool(aside(recipe, self.model)), checkpointing=recipe.checkpointing, at_once=recipe.batch)
        agains = (True,) if recipe.checkpointing else (False, True)
        ways: tuple[VAEMode, ...] = ("whole", "strips")
        for again, (weights, storage), at_once, vae in product(agains, kept, batches, ways):
            yield Measures(True, weights, storage, vae, again, at_once)
        if self.change != "full":
            yield from (Measures(True, "resident", "int8", "strips", True, at_once) for at_once in batches)

    def plan(self, measures: Measures, limit: int) -> TrainingPlan:
        """What is foreseen with these measures."""
        work = self.walk(measures.checkpointing, measures.at_once, measures.held)
        stages, parts = self.stages(measures, work)
        exact = measures.storage is None or self.model.file_dtypes == {measures.storage}
        return TrainingPlan(measures, stages, parts, work, limit, self.recipe.batch, exact, self.cpu, self.texts_learn)

    def stages(self, measures: Measures, work: int) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes at most in each stage; and of what those of a step are made."""
        model, recipe, weights = self.model, self.recipe, self.model.weights
        own = 0 if self.change == "full" else 4 * self.numbers  # of what is added to the networks
        base = self.base
        if self.cpu:
            base += int(LIBRARY_MEMORY["cpu"] * (system.mapped() or DEFAULT_MAPPED_BYTES))
            base += TOKENIZER_BYTES_PER_TOKEN * sum(config.vocab_size for config in model.encoders)
        else:
            base += int(LIBRARY_MEMORY["cuda"])
        kept = {name: (w.small + w.large) * self.itemsize for name, w in weights.items()}
        if measures.weights == "stream":
            kept["unet"] = weights["unet"].small * self.itemsize
        elif measures.storage:
            kept["unet"] = weights["unet"].small * self.itemsize + weights["unet"].stored_bytes(
                measures.storage, self.itemsize
            )
        away: set[str] = set()
        if measures.aside:
            away = {"encoder", "decoder"} if self.texts_learn else {"text", "encoder", "decoder"}
        brought = {name: w.large * self.itemsize if name in away else 0 for name, w in weights.items()}
        for name in away:
            kept[name] = weights[name].small * self.itemsize
        before = there = base + sum(kept.values())
        if measures.aside and self.cpu:  # the UNet is loaded when pictures and captions are done
            before -= kept["unet"] - weights["unet"].small * self.itemsize
        largest = max(w.largest for w in weights.values())
        stages = {"load": there + (4 * largest if measures.storage else READ_BUFFER_BYTES)}
        if self.change == "full":
            there += (4 - self.itemsize) * self.numbers  # what learns is float32
        parts = {
            "weights": there - base + own,
            "optimiser": MOMENTS[recipe.optimiser] * self.numbers,
            "averages": 4 * self.numbers if recipe.ema else 0,
        }
        states, gradients = own + parts["optimiser"] + parts["averages"], 4 * self.numbers
        beside = states + gradients  # what there is while a batch is made ready in the course of training
        workspace = walk.Workspace(self.itemsize, copies_conv_weights=self.cpu, materializes_weights=measures.aside)
        opened = DECODED * max(width * height for width, height in self.pictures)
        encoding = max(walk.vae_peak(model.vae, 1, h, w, "encode", measures.vae, workspace) for w, h in self.buckets)
        first = there + beside if recipe.random_crop else before
        stages["pictures"] = first + brought["encoder"] + max(opened, encoding)
        if not self.texts_learn:
            text = max(walk.walk_text_encoder(config, self.itemsize).peak(workspace) for config in model.encoders)
            stages["captions"] = (there + beside if recipe.shuffle_tags else before) + brought["text"] + text
        copied = 4 * (weights["unet"].large + weights["text"].large)
        if recipe.method == "dreambooth" and recipe.class_prompt:
            stages["class"] = before + weights["unet"].large * self.itemsize + self.drawn()
        stages["step"] = there + states + max(work, gradients + UPDATE * self.largest)
        parts["gradients and activations"] = stages["step"] - there - states
        if recipe.sample_every:
            stages["samples"] = there + beside + (own and parts["averages"]) + copied + self.drawn()
        if self.change == "full":
            stages["save"] = there + gradients + copied + 2 * weights["unet"].large
        return stages, parts

    def drawn(self) -> int:
        """Bytes that drawing a picture of the model's own size takes, beyond the weights."""
        estimate = predict(self.model, Request(prompt=""), Placement(weights="offload"), base=0)
        own = sum(w.small for w in self.model.weights.values()) * self.itemsize
        bare = estimate.stages["png"] - own
        step = estimate.stages["step"] - bare - self.model.weights["unet"].large * self.itemsize
        return max(step, estimate.stages["decode"] - bare, estimate.stages["encode"] - bare) - own

    def advice(self) -> str:
        """What the recipe could ask less of."""
        ways = ["a smaller resolution takes less"]
        if self.change == "full":
            ways = ["a LoRA takes less", "optimiser adafactor has next to no moments", *ways]
        return ", ".join(ways)

    # ---- a step without memory ---------------------------------------------------------------------------------------

    def _build_trainable(self, held: bool) -> TrainableModel:
        """It, on the meta device."""
        found = self.model.found
        networks: dict[str, Any] = {part.name: part.network().to(self.model.dtype) for part in found.parts}
        if held:
            walk.offload_to_meta(networks["unet"])
        encoders = [networks[name] for name in ENCODERS if name in networks]
        parts = Parts(
            found.family, networks["unet"], networks["vae"], encoders, [make() for make in found.tokenizers],
            dict(found.scheduler_config), found.model_index, found.settings, found.path, found.files,
        )  # fmt: skip
        with torch.device("meta"):
            trainable = TrainableModel(parts, self.recipe).to(self.model.dtype)  # in bfloat16 autocast makes it so
        context = sum(encoder.config.hidden_size for encoder in encoders)
        window, pooled = encoders[0].config.max_position_embeddings, encoders[-1].config.projection_dim
        trainable.texts = cast(
            Texts,
            lambda captions, keep: Condition(
                torch.empty(len(captions), window, context), torch.empty(len(captions), pooled)
            ),
        )
        return trainable

    def _walk(self, again: bool, at_once: int, held: bool) -> int:
        """Bytes of the tensors of a step at most, the gradients among them: of the largest bucket."""
        trainable = self.trainable(held)
        width, height = max(self.buckets, key=lambda one: one[0] * one[1])
        scale = self.model.vae.downscale
        shape = at_once, self.model.vae.latent_channels, height // scale, width // scale
        networks = [trainable.unet, *trainable.text_encoders.values()] if again else []
        twice = self.recipe.accumulate * self.recipe.batch > at_once
        with torch.device("meta"), torch.random.fork_rng(devices=[]), backend(_Fused()):
            trainable.zero_grad(set_to_none=True)
            with walk.TensorCounter(trainable) as counter:
                for _ in range(1 + twice):
                    self._step(trainable, shape, networks)
            trainable.zero_grad(set_to_none=True)
        # in sixteen bits the gradients are float32's all the same, and autocast has its copies of what learns
        most: int = counter.peak + (4 * self.numbers if self.itemsize == 2 else 0)
        return most

    def _step(self, trainable: TrainableModel, shape: tuple[int, ...], again: list[nn.Module]) -> None:
        caption = f"a {self.recipe.token}" if self.change == "word" else ""
        with ExitStack() as stack:
            for network in again:
                stack.enter_context(checkpointing(network))
            total = torch.zeros(())
            for _ in range(2 if self.recipe.class_prompt and self.recipe.method == "dreambooth" else 1):
                draws = torch.zeros(shape[0], dtype=torch.long), torch.zeros(shape)
                losses = trainable.losses(torch.zeros(shape), [caption] * shape[0], torch.zeros(shape[0], 6), *draws)
                total = total + losses.mean()
            torch.autograd.backward(total)


class _Fused(Backend):
    """Attention that holds no scores, as every device's has it; the meta device's own choice would."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        made: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)[0]
        return made
