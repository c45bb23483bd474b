"""Choose how to train so that a run fits a memory budget.

    plan_training(recipe, model, pictures, buckets)   ->  TrainingPlan, or BudgetError with the smallest that fits

The memory of a step between its two passes is counted: the model is built on the meta device, where tensors have a
shape but no data, takes one training step loaded, and every tensor counts from the operation that creates it until
nothing refers to it. To this are added the weights, the gradients, the optimiser's moments and the averages, and what
the process uses before (memory/footprint.py has those terms).
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
    predict,
)
from mezzotint.memory.headers import ModelHeaders
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

MOMENT_BYTES = {"adamw": 8, "adafactor": 0, "adamw8bit": 2}  # per trained element; adafactor has a few per row
UPDATE_BYTES = 12  # per element of the tensor that the optimiser updates
DECODED_PIXEL_BYTES = 8  # while a picture is opened and resized to its bucket


@dataclass(frozen=True)
class TrainingMeasures:
    """What is done to save memory.

    Attributes:
        offload_frozen: Whether frozen networks other than the UNet are read from their files when they are needed.
        weights: Where a frozen UNet's weights are, as in a Placement.
        storage: How they are stored, as in a Placement.
        vae: How the VAE encodes.
        checkpointing: Whether gradients are checkpointed.
        micro_batch: Pictures in a forward pass; a larger batch is split.
    """

    offload_frozen: bool = False
    weights: str = "resident"
    storage: str | None = None
    vae: VAEMode = "whole"
    checkpointing: bool = False
    micro_batch: int = 1

    @property
    def converts_weights(self) -> bool:
        """Whether the UNet's weights are read or converted as its layers run."""
        return self.weights != "resident" or self.storage is not None


@dataclass(frozen=True)
class TrainingPlan:
    """The measures of a training run, and the memory that it is predicted to need, in bytes.

    Attributes:
        measures: What is done.
        stages: The peak of each stage.
        parts: What the memory of a step consists of.
        step_bytes: Bytes of the tensors of a step.
        limit: The budget.
        batch: Pictures in a batch.
        exact: Whether `measures.storage` is the dtype of the files.
        cpu: Whether training runs on the CPU.
        texts_learn: Whether the text encoders are trained.
    """

    measures: TrainingMeasures
    stages: dict[str, int]
    parts: dict[str, int]
    step_bytes: int
    limit: int
    batch: int
    exact: bool
    cpu: bool
    texts_learn: bool

    @property
    def peak(self) -> int:
        """The peak of the whole run."""
        return max(self.stages.values())

    @property
    def returns_freed(self) -> bool:
        """Whether freed memory must return to the system at once to keep the budget, as in MemoryPlan."""
        return self.cpu and self.peak * SAFETY + HEAP_FACTOR * self.step_bytes > self.limit

    def prepare(self) -> None:
        """Set up the process; call this before the model is loaded."""
        if self.returns_freed:
            system.return_freed()

    def placements(self) -> dict[str, Placement]:
        """Return the placement of each network, for `open_model`."""
        made = {"unet": Placement.of(weights=self.measures.weights, storage=self.measures.storage)}
        if self.measures.offload_frozen:
            made |= dict.fromkeys(("vae", *(() if self.texts_learn else ENCODERS)), Placement(weights="offload"))
        return made

    def table(self) -> str:
        """Format the plan for people: the peak of each stage, what a step consists of, the measures, and the sum."""
        lines = [f"{stage:<9} {format_size(count)}" for stage, count in self.stages.items()]
        lines.append(
            "of a step: " + ", ".join(f"{name} {format_size(count)}" for name, count in self.parts.items() if count)
        )
        done, measures = [], self.measures
        if measures.offload_frozen:
            done.append("the VAE and text encoders are read from their files when they run")
        if measures.vae != "whole":
            done.append("the VAE encodes in strips")
        if measures.storage:
            done.append(
                f"the UNet's weights are stored as {measures.storage}"
                + (", as in the files" if self.exact else " (approximate: training sees rounded weights)")
            )
        if measures.weights == "stream":
            done.append("each of the UNet's layers is read from the files when it runs")
        if measures.checkpointing:
            done.append("gradient checkpointing")
        if measures.micro_batch < self.batch:
            done.append(f"a batch of {self.batch} is split into parts of {measures.micro_batch}")
        if self.returns_freed:
            done.append("freed memory returns to the system at once")
        lines.append(f"measures: {'; '.join(done) or 'none are needed'}")
        lines.append(f"peak {format_size(self.peak)} of {format_size(self.limit)}")
        if self.cpu and not self.returns_freed:
            heap = format_size(HEAP_FACTOR * self.step_bytes)
            lines.append(f"the allocator may keep up to {heap} of freed memory; the budget allows it")
        return "\n".join(lines)


def offload_placements(recipe: Recipe, model: ModelHeaders) -> dict[str, Placement]:
    """Return the placements of the networks that stay in their files because no training step uses them."""
    if model.device.type != "cpu" or recipe.random_crop or recipe.shuffle_tags:
        return {}
    texts = () if recipe.text_encoder or recipe.method == "textual-inversion" else ENCODERS
    return dict.fromkeys(("vae", *texts), Placement(weights="offload"))


def plan_training(
    recipe: Recipe, model: ModelHeaders, pictures: Sequence[Size], buckets: Sequence[Size]
) -> TrainingPlan:
    """Plan the fastest way to train within the recipe's memory budget.

    Args:
        recipe: The recipe; `memory` is set.
        model: The model to train.
        pictures: (width, height) of the pictures of the data set.
        buckets: (width, height) of the buckets.

    Returns:
        The plan.

    Raises:
        BudgetError: If nothing fits; the message has the smallest budget that would.
        CheckpointError: If the model's files are not valid.
    """
    assert recipe.memory
    run = _Run(model, recipe, list(pictures), list(buckets))
    limit = run.limit()
    smallest = None
    for measures in run._measures():
        plan = run.plan(measures, limit)
        if plan.peak * SAFETY <= limit:
            return plan
        smallest = min(smallest, plan, key=lambda one: one.peak) if smallest else plan
    assert smallest
    stage = max(smallest.stages, key=lambda name: smallest.stages[name])
    needed = math.ceil(smallest.peak * SAFETY / 2**20)
    raise BudgetError(
        f"memory is {format_size(limit)}, but this training needs at least {needed}MiB ({stage}); {run.advice()}"
    )


class _Run:
    """Predict one recipe on one model."""

    def __init__(self, model: ModelHeaders, recipe: Recipe, pictures: list[Size], buckets: list[Size]) -> None:
        self.model, self.recipe, self.pictures, self.buckets = model, recipe, pictures, buckets
        self.cpu = model.device.type == "cpu"
        self.itemsize = model.dtype.itemsize
        if recipe.tensorboard and importlib.util.find_spec("tensorboard"):
            importlib.import_module("torch.utils.tensorboard")  # imported here, so that the RSS includes it
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
        """Return the budget in bytes; raise BudgetError if it is not a size."""
        if self.recipe.memory != "auto":
            return parse_size(self.recipe.memory or "")
        if not self.cpu:
            return int(AUTO_SHARE * torch.cuda.mem_get_info(self.model.device)[0])
        free = system.available()
        if free is None:
            raise BudgetError("memory is 'auto', but the free memory is not known here; give a size such as 4GiB")
        return int(self.base + AUTO_SHARE * free)

    def _measures(self) -> Iterator[TrainingMeasures]:
        """Yield measures, from the fastest to those that need least memory; those that round weights come last."""
        recipe = self.recipe
        batches = sorted({max(recipe.batch >> shift, 1) for shift in range(14)}, reverse=True)
        kept: list[tuple[str, str | None]] = [("resident", None)]
        if self.change != "full":
            wide = self.model.dtype == torch.float32
            kept += [
                ("resident", name) for name in ("float16", "bfloat16") if wide and self.model.file_dtypes == {name}
            ]
            kept += [("stream", None)] if self.cpu else []
        yield TrainingMeasures(
            bool(offload_placements(recipe, self.model)), checkpointing=recipe.checkpointing, micro_batch=recipe.batch
        )
        checkpointings = (True,) if recipe.checkpointing else (False, True)
        vae_modes: tuple[VAEMode, ...] = ("whole", "strips")
        for checkpointed, (weights, storage), micro_batch, vae in product(checkpointings, kept, batches, vae_modes):
            yield TrainingMeasures(True, weights, storage, vae, checkpointed, micro_batch)
        if self.change != "full":
            yield from (
                TrainingMeasures(True, "resident", "int8", "strips", True, micro_batch) for micro_batch in batches
            )

    def plan(self, measures: TrainingMeasures, limit: int) -> TrainingPlan:
        """Predict the run with these measures."""
        work = self.walk(measures.checkpointing, measures.micro_batch, measures.converts_weights)
        stages, parts = self.stages(measures, work)
        exact = measures.storage is None or self.model.file_dtypes == {measures.storage}
        return TrainingPlan(measures, stages, parts, work, limit, self.recipe.batch, exact, self.cpu, self.texts_learn)

    def stages(self, measures: TrainingMeasures, work: int) -> tuple[dict[str, int], dict[str, int]]:
        """Return the peak of each stage, and what the memory of a step consists of."""
        model, recipe, weights = self.model, self.recipe, self.model.weights
        own = 0 if self.change == "full" else 4 * self.numbers  # of the parameters that are added to the networks
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
        if measures.offload_frozen:
            away = {"encoder", "decoder"} if self.texts_learn else {"text", "encoder", "decoder"}
        brought = {name: w.large * self.itemsize if name in away else 0 for name, w in weights.items()}
        for name in away:
            kept[name] = weights[name].small * self.itemsize
        before = loaded = base + sum(kept.values())
        if measures.offload_frozen and self.cpu:  # the UNet is loaded when pictures and captions are done
            before -= kept["unet"] - weights["unet"].small * self.itemsize
        largest = max(w.largest for w in weights.values())
        stages = {"load": loaded + (4 * largest if measures.storage else READ_BUFFER_BYTES)}
        if self.change == "full":
            loaded += (4 - self.itemsize) * self.numbers  # trained parameters are float32
        parts = {
            "weights": loaded - base + own,
            "optimiser": MOMENT_BYTES[recipe.optimiser] * self.numbers,
            "averages": 4 * self.numbers if recipe.ema else 0,
        }
        states, gradients = own + parts["optimiser"] + parts["averages"], 4 * self.numbers
        training_state = states + gradients  # while a batch is prepared in the course of training
        workspace = walk.Workspace(
            self.itemsize, copies_conv_weights=self.cpu, materializes_weights=measures.offload_frozen
        )
        opened = DECODED_PIXEL_BYTES * max(width * height for width, height in self.pictures)
        encoding = max(walk.vae_peak(model.vae, 1, h, w, "encode", measures.vae, workspace) for w, h in self.buckets)
        first = loaded + training_state if recipe.random_crop else before
        stages["pictures"] = first + brought["encoder"] + max(opened, encoding)
        if not self.texts_learn:
            text = max(walk.walk_text_encoder(config, self.itemsize).peak(workspace) for config in model.encoders)
            stages["captions"] = (loaded + training_state if recipe.shuffle_tags else before) + brought["text"] + text
        copied = 4 * (weights["unet"].large + weights["text"].large)
        copied += own if self.change == "controlnet" else 0
        if recipe.method == "dreambooth" and recipe.class_prompt:
            stages["class"] = before + weights["unet"].large * self.itemsize + self.sampling_bytes()
        stages["step"] = loaded + states + max(work, gradients + UPDATE_BYTES * self.largest)
        parts["gradients and activations"] = stages["step"] - loaded - states
        if recipe.sample_every:
            stages["samples"] = loaded + training_state + (own and parts["averages"]) + copied + self.sampling_bytes()
        if self.change == "full":
            stages["save"] = loaded + gradients + copied + 2 * weights["unet"].large
        return stages, parts

    def sampling_bytes(self) -> int:
        """Return the bytes that drawing a picture of the model's native size needs, without the weights."""
        estimate = predict(self.model, Request(prompt=""), Placement(weights="offload"), base=0)
        own = sum(w.small for w in self.model.weights.values()) * self.itemsize
        bare = estimate.stages["png"] - own
        step = estimate.stages["step"] - bare - self.model.weights["unet"].large * self.itemsize
        return max(step, estimate.stages["decode"] - bare, estimate.stages["encode"] - bare) - own

    def advice(self) -> str:
        """Suggest what would need less memory."""
        advice = ["a smaller resolution needs less"]
        if self.change == "full":
            advice = ["a LoRA needs less", "the optimiser adafactor has almost no moments", *advice]
        return ", ".join(advice)

    # ---- a step without memory ---------------------------------------------------------------------------------------

    def _build_trainable(self, converts_weights: bool) -> TrainableModel:
        """Build the trainable model on the meta device."""
        found = self.model.found
        networks: dict[str, Any] = {part.name: part.network().to(self.model.dtype) for part in found.parts}
        if converts_weights:
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

    def _walk(self, checkpointed: bool, micro_batch: int, converts_weights: bool) -> int:
        """Return the peak of a step's tensors, gradients included, for the largest bucket."""
        trainable = self.trainable(converts_weights)
        width, height = max(self.buckets, key=lambda one: one[0] * one[1])
        scale = self.model.vae.downscale
        shape = micro_batch, self.model.vae.latent_channels, height // scale, width // scale
        learning = [trainable.controlnet] if trainable.controlnet is not None else []
        networks = [trainable.unet, *learning, *trainable.text_encoders.values()] if checkpointed else []
        hints = torch.zeros(micro_batch, 3, height, width) if learning else None
        twice = self.recipe.accumulate * self.recipe.batch > micro_batch
        with torch.device("meta"), torch.random.fork_rng(devices=[]), backend(_Fused()):
            trainable.zero_grad(set_to_none=True)
            with walk.TensorCounter(trainable) as counter:
                for _ in range(1 + twice):
                    self._step(trainable, shape, networks, hints)
            trainable.zero_grad(set_to_none=True)
        # in sixteen bits the gradients are float32's all the same, and autocast has its copies of what learns
        most: int = counter.peak + (4 * self.numbers if self.itemsize == 2 else 0)
        return most

    def _step(
        self, trainable: TrainableModel, shape: tuple[int, ...], checkpointed: list[nn.Module], hints: Tensor | None
    ) -> None:
        caption = f"a {self.recipe.token}" if self.change == "word" else ""
        with ExitStack() as stack:
            for network in checkpointed:
                stack.enter_context(checkpointing(network))
            total = torch.zeros(())
            for _ in range(2 if self.recipe.class_prompt and self.recipe.method == "dreambooth" else 1):
                draws = torch.zeros(shape[0], dtype=torch.long), torch.zeros(shape)
                time_ids = torch.zeros(shape[0], 6)
                losses = trainable.losses(torch.zeros(shape), [caption] * shape[0], time_ids, *draws, hints)
                total = total + losses.mean()
            torch.autograd.backward(total)


class _Fused(Backend):
    """Attention that stores no scores, as on every device; the meta device's own kernel would."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        made: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)[0]
        return made
