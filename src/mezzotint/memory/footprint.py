"""How much memory a request takes, from shapes alone.

    predict(model, request, placement)   ->  Peak: bytes at most in each stage of a run

`model` is a `Model`: what the files' headers and configs say. No weight is read, no tensor made, no network run.

A stage's peak is the sum of

    what the process takes before the model is opened (its RSS now; on a GPU nothing: there only torch's own memory is
    counted) and LIBRARIES, what torch's libraries take when they first compute
    the tokenizers, TOKEN bytes a token of their vocabulary
    the weights that are there in this stage: numbers times bytes of what they are kept as (placement.storage), and 4
    bytes a row for the scales of 8-bit ones
    the request's LoRA files
    what the stage holds while it works (walk.py: each tensor from when it is made until nothing refers to it)

The constants are of torch's CPU build and of the tokenizers, measured once, and the same for every model, size and
placement. On the CPU freed memory must go back to the system for the sum to be right: `system.return_freed`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from mezzotint.config import CLIPConfig, UNetConfig, VAEConfig
from mezzotint.devices import best_device, device_of, dtype_of
from mezzotint.memory import system, walk
from mezzotint.memory.walk import Working
from mezzotint.models.tiles import Half
from mezzotint.placement import MIN_OFFLOAD_NUMEL, Placement
from mezzotint.request import Request
from mezzotint.run.model_info import ModelInfo
from mezzotint.run.plan import RunPlan, plan_run
from mezzotint.weights.checkpoint import look_through
from mezzotint.weights.files import TensorFile
from mezzotint.weights.hub import BUNDLED
from mezzotint.weights.model_plan import Part
from mezzotint.weights.model_plan import Plan as Found

LIBRARIES = {"cpu": 0.42, "cuda": 40 * 2**20}  # share of what is mapped of them on import; bytes, mostly cuBLAS' own
MAPPED = 90 * 10**6  # bytes of libraries in memory after the import, where the system does not say
TOKEN = 650  # bytes of a tokenizer for each token that it knows
PIECE = 2 * 2**22  # bytes in which a weight comes out of its file, as they are there and as they shall be
KEPT_AS = {"bfloat16": 2, "float16": 2, "float8": 1, "int8": 1, "int8_dynamic": 1}  # bytes of a number
MADE_WHOLE = ("hada_", "lokr_", "dora_scale", "magnitude", ".diff")  # in names of what is no plain pair of factors
MOVED = 20  # multiplications in the time of one byte, read from the page cache or written to fresh memory


@dataclass(frozen=True)
class Weights:
    """Numbers in the weights of a network: of those that a placement may keep elsewhere, their rows, and the others;
    the largest; bytes in the files.
    """

    large: int = 0
    rows: int = 0
    small: int = 0
    largest: int = 0
    stored: int = 0

    @classmethod
    def of(cls, part: Part, begins: str = "") -> Weights:
        """Those of a part whose names begin so, from the files' tables of contents."""
        large = rows = small = largest = stored = 0
        for name, source in part.sources.items():
            if not name.startswith(begins):
                continue
            entry = part.files[source.key].entries[source.key]
            numbers = math.prod(entry.shape) // (1 if source.third is None else 3)
            stored += numbers * entry.dtype.itemsize
            largest = max(largest, numbers)
            if numbers >= MIN_OFFLOAD_NUMEL and len(entry.shape) > 1:
                large, rows = large + numbers, rows + max(entry.shape)
            else:
                small += numbers
        return cls(large, rows, small, largest, stored)

    def kept(self, storage: str | None, itemsize: int) -> int:
        """Bytes of the large ones."""
        if storage is None:
            return self.large * itemsize
        each = KEPT_AS[storage]
        return self.large * each + (4 * self.rows if each == 1 else 0)


@dataclass(frozen=True)
class Model:
    """A model as the configs and headers of its files describe it, to run on `device` in `dtype`."""

    found: Found
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        path_or_id: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> Model:
        """The arguments of `mezzotint.load`. Raises CheckpointError, RequestError."""
        place = device_of(device or best_device())
        kind = dtype_of(dtype) if dtype is not None else torch.float32 if place.type == "cpu" else torch.bfloat16
        return cls(look_through(path_or_id or BUNDLED, **options), place, kind)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device}"

    @cached_property
    def weights(self) -> dict[str, Weights]:
        """Of "text" (all encoders), "unet", "encoder" and "decoder" of the VAE."""
        parts = {part.name: part for part in self.found.parts}
        texts = [Weights.of(part) for name, part in parts.items() if name.startswith("text_encoder")]
        return {
            "text": Weights(
                sum(w.large for w in texts),
                sum(w.rows for w in texts),
                sum(w.small for w in texts),
                max(w.largest for w in texts),
                sum(w.stored for w in texts),
            ),
            "unet": Weights.of(parts["unet"]),
            "encoder": Weights.of(parts["vae"], "encoder"),
            "decoder": Weights.of(parts["vae"], "decoder"),
        }

    @cached_property
    def file_dtypes(self) -> set[str]:
        """What the files keep most of each network as."""
        return {str(part.natural_dtype()).removeprefix("torch.") for part in self.found.parts}

    @property
    def unet(self) -> UNetConfig:
        """The UNet's configuration."""
        return cast(UNetConfig, self.found.config("unet"))

    @property
    def vae(self) -> VAEConfig:
        """The VAE's configuration."""
        return cast(VAEConfig, self.found.config("vae"))

    @property
    def encoders(self) -> list[CLIPConfig]:
        """The text encoders' configurations."""
        return [part.config for part in self.found.parts if isinstance(part.config, CLIPConfig)]

    @cached_property
    def info(self) -> ModelInfo:
        """What a run plan needs to know of the model."""
        return ModelInfo.of(self.found, self.unet, self.vae, self.device.type)

    def plan(self, request: Request) -> RunPlan:
        """Plan the run of a request, from configurations alone. Raises RequestError where it does not fit the model."""
        return plan_run(self.info, request)


@dataclass(frozen=True)
class Peak:
    """Bytes at most in each stage: load, encode (words), image (a picture that is drawn on), step, decode, png.

    working: of them, bytes that a stage holds only while it works. work: multiplications; moved: bytes of weights read
    again or made anew, beyond what the fast way does.
    """

    stages: Mapping[str, int]
    working: int = 0
    work: int = 0
    moved: int = 0

    @property
    def most(self) -> int:
        """Of the whole run."""
        return max(self.stages.values())


def predict(
    model: Model,
    request: Request | RunPlan,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    *,
    base: int | None = None,
) -> Peak:
    """The peak of opening the model and drawing the request. base: bytes that the process takes without the model; its
    RSS now, unless said.

    Raises RequestError where the request does not fit the model.
    """
    plan = request if isinstance(request, RunPlan) else model.plan(request)
    return _Run(model, plan, placement, base).peak()


class _Run:
    """One request, resolved, under one placement."""

    def __init__(self, model: Model, plan: RunPlan, placement: Placement, base: int | None) -> None:
        self.model, self.plan, self.request, self.placement = model, plan, plan.request, placement
        self.itemsize = model.dtype.itemsize
        self.cpu = model.device.type == "cpu"
        own = placement.storage
        self.storage = None if own == str(model.dtype).removeprefix("torch.") else own
        self.base = (system.resident() if self.cpu else 0) if base is None else base
        self.offloaded = placement.weights != "resident" or self.storage is not None
        self.working = Working(
            itemsize=self.itemsize,
            relays=self.cpu,
            unfolds=self.cpu and not _convolves(model.dtype),
            makes=placement.weights == "stream" or self.storage is not None,
            buffer=PIECE if placement.weights == "stream" else 0,
            attention=placement.attention,
        )
        self.always = self.base
        if self.cpu:
            self.always += TOKEN * sum(config.vocab_size for config in model.encoders)
        self.always += sum(w.small for w in model.weights.values()) * self.itemsize + self.adapters()
        if placement.weights == "resident":
            self.always += sum(self.kept(name) for name in model.weights)
        self.loaded = self.always
        libraries = LIBRARIES.get(model.device.type, 0)
        self.always += int(libraries * (system.mapped() or MAPPED)) if self.cpu else int(libraries)
        self.work = self.moved = self.most = 0

    def peak(self) -> Peak:
        """All stages; with hires both passes."""
        first, stages = self.plan, {"load": self.load(), "encode": self.encode()}
        passes = [first, *([first.second_pass] if first.second_pass else [])]
        for plan in passes:
            one = plan.request
            pictures = min(one.count, one.batch or 1)
            if one.image is not None or (plan is not first and first.request.hires_upscale == "pixels"):
                stages["image"] = max(stages.get("image", 0), self.vae(one, 1, "encode"))
            stages["step"] = max(stages.get("step", 0), self.step(plan, pictures))
            stages["decode"] = max(stages.get("decode", 0), self.vae(one, pictures, "decode"))
        stages["png"] = self.always + 4 * self.pixels(passes[-1].request) * 3
        return Peak(stages, self.most, self.work, self.moved)

    def adapters(self) -> int:
        """Bytes of the request's LoRA files: as they are read, and in the dtype that they are added in; and of a change
        that is made whole each time (any but a LoRA's and a LoCon's) three times the largest weight.
        """
        total, made = 0, 0
        for name, _ in self.plan.loras:
            place = Path(name)
            files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))[:1]
            for path in files:
                entries = TensorFile(path).entries
                total += sum(e.count * (e.dtype.itemsize + (e.dtype != self.model.dtype) * self.itemsize)
                             for e in entries.values())  # fmt: skip
                if any(word in key for key in entries for word in MADE_WHOLE):
                    made = 3 * 4 * max(w.largest for w in self.model.weights.values())
        return total + made

    def kept(self, name: str) -> int:
        """Bytes of a network's large weights where they are kept."""
        return self.model.weights[name].kept(self.storage, self.itemsize)

    def there(self, name: str) -> int:
        """Bytes in a network's own stage beyond what is always there; and what bringing them costs."""
        weights = self.model.weights[name]
        if self.placement.weights == "offload":
            self.moved += weights.stored
            return self.kept(name)
        return 0

    def uses(self, name: str, times: int) -> None:
        """Notes that a network is used so often."""
        if self.working.makes:
            read = self.model.weights[name].stored if self.placement.weights == "stream" else 0
            self.moved += times * (self.model.weights[name].large * self.itemsize + read)

    def load(self) -> int:
        """Weights one after another: at last all, and the largest while it is made what it is kept as."""
        largest = max(w.largest for w in self.model.weights.values())
        if self.placement.weights == "resident":
            return self.loaded + (4 * largest if self.storage else PIECE)
        return self.loaded + PIECE

    def encode(self) -> int:
        """The text encoders, on one window of one text at a time."""
        walks = [walk.walk_text_encoder(config, self.itemsize) for config in self.model.encoders]
        windows = 2 * self.windows()
        self.work += windows * sum(one.work for one in walks)
        self.uses("text", windows)
        there = self.there("text") + max(one.peak(self.working) for one in walks)
        if self.placement.weights == "offload" and self.storage:  # the table of tokens comes first, and is large
            there = max(there, self.model.weights["text"].largest * (4 + KEPT_AS[self.storage]))
        return self.always + there

    def step(self, plan: RunPlan, pictures: int) -> int:
        """A step: the UNet, the run's keys and values, the latents of a multistep solver."""
        tokens = self.model.encoders[0].max_position_embeddings * self.windows()
        channels, height, width = plan.latent_shape
        conditions = self.plan.condition_count
        split = self.placement.guidance == "split"
        batch = pictures * (1 if split else conditions)
        step = walk.walk_unet(self.model.unet, height, width, tokens, self.itemsize)
        peak = step.peak(self.working, batch)
        groups = math.ceil(plan.request.count / pictures)
        calls = (len(plan.sigmas) - 1) * groups * (conditions if split else 1)
        self.work += calls * batch * step.work
        self.uses("unet", calls)
        self.moved += self.model.weights["unet"].large * self.itemsize * (calls - calls // conditions if split else 0)
        self.most = max(self.most, peak)
        run = walk.keys_values_numel(self.model.unet, tokens) * conditions * (1 + pictures) * self.itemsize
        run *= self.variants()
        run += 16 * pictures * channels * height * width * 4
        merged = self.kept("unet") if plan.few_step and self.placement.weights == "resident" else 0
        return self.always + self.there("unet") + merged + run + peak

    def vae(self, request: Request, pictures: int, half: Half) -> int:
        """One half of the VAE, and the pictures that are done."""
        name = "encoder" if half == "encode" else "decoder"
        there = self.there(name)
        height, width = request.height or 0, request.width or 0
        itemsize = self.model.info.vae_dtype(self.model.dtype).itemsize
        if itemsize != self.itemsize:
            there += self.model.weights[name].large * 2 if not self.offloaded else 0
        working = replace(self.working, itemsize=itemsize)
        peak = walk.vae_peak(self.model.vae, pictures, height, width, half, self.placement.vae, working)
        self.most = max(self.most, peak)
        times = math.ceil(request.count / pictures) * pictures
        work = times * walk.walk_vae(self.model.vae, height, width, half, itemsize=itemsize).work
        self.work += work
        if self.placement.vae != "whole":
            self.moved += work // MOVED // 5  # a fifth slower, as measured
        self.uses(name, times if self.placement.vae != "whole" else times // pictures)
        return self.always + there + peak + self.pixels(request) * (1 if half == "decode" else 0)

    def pixels(self, request: Request) -> int:
        """Bytes of the finished pictures."""
        return (request.width or 0) * (request.height or 0) * 3 * request.count

    def windows(self) -> int:
        """Of tokens that the longer prompt takes."""
        longest = max(_tokens(self.request.prompt), _tokens(self.request.negative_prompt or ""))
        return max(math.ceil(longest / (self.model.encoders[0].max_position_embeddings - 2)), 1)

    def variants(self) -> int:
        """How many things the prompts say in the course of the run, one after another: keys and values of all stay."""
        parts = [*self.plan.positive.parts, *self.plan.negative.parts]
        return len({tuple(part.at(step).text for part in parts) for step in range(self.plan.schedule_steps)})


def _tokens(text: str) -> int:
    """About how many a text has at the most: one for 3 letters, for a sign, for a byte of what is not ASCII."""
    found = re.findall(r"[A-Za-z]{1,3}|[^A-Za-z\s]", text)
    return sum(1 if piece.isascii() else len(piece.encode()) for piece in found)


def _convolves(dtype: torch.dtype) -> bool:
    """Whether oneDNN has convolutions in this dtype on this processor: in bfloat16 from AVX-512 on; of float16's, which
    few have, it is not known.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    return dtype == torch.float32 or (dtype == torch.bfloat16 and capability.startswith("AVX512"))
