"""Predict how much memory a request needs, from shapes alone.

    predict(model, request, placement)   ->  MemoryEstimate: the peak of each stage of a run, in bytes

`model` is a `ModelHeaders`, which is read from the headers of the files and the configs. No weight is read and no
network runs with data.

The peak of a stage is the sum of

    what the process uses before the model is opened (on the CPU its RSS at that time; on a GPU nothing, since only
    torch's own memory is counted there), and what torch's libraries use when they first compute (LIBRARY_MEMORY)
    the tokenizers: TOKENIZER_BYTES_PER_TOKEN for each token of their vocabularies
    the weights that are in memory in this stage, in the dtype they are stored in (Placement.storage), and 4 bytes a
    row for the scales of 8-bit formats
    the request's LoRA files
    the tensors that exist while the stage runs (walk.py)

The constants belong to torch's CPU build and to the tokenizers. They were measured once and are the same for every
model, size and placement. On the CPU the sum is right if freed memory returns to the system: `system.return_freed`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from mezzotint.config import SafetyCheckerConfig
from mezzotint.memory import system, walk
from mezzotint.memory.headers import STORAGE_ITEMSIZE, ModelHeaders, Weights
from mezzotint.memory.walk import Footprint, Workspace, count_upscaler
from mezzotint.models.controlnet import ControlNet
from mezzotint.models.ip_adapter import cross_layers
from mezzotint.models.tiles import Half
from mezzotint.models.upscaler import TILE
from mezzotint.placement import Placement
from mezzotint.request import Request
from mezzotint.run.controls import check_files
from mezzotint.run.plan import RunPlan
from mezzotint.run.safety import checker_dtype, checker_placement
from mezzotint.run.tiling import tile_plan, tiles_of
from mezzotint.weights.control_files import ControlFiles
from mezzotint.weights.files import TensorFile
from mezzotint.weights.model_files import CheckerFiles
from mezzotint.weights.t2i_files import T2IFiles
from mezzotint.weights.upscaler_files import load_upscaler

# On the CPU a share of the bytes of libraries that are mapped after the import; on CUDA bytes, mostly cuBLAS's.
LIBRARY_MEMORY = {"cpu": 0.42, "cuda": 40 * 2**20}
DEFAULT_MAPPED_BYTES = 90 * 10**6  # bytes of mapped libraries where the system does not tell
TOKENIZER_BYTES_PER_TOKEN = 650
PATCHES = 257  # tokens of embeddings with one for each patch, whose encoder is not known
READ_BUFFER_BYTES = 2 * 2**22  # a piece of a weight as it is in its file, and converted
FULL_SIZE_KEYS = ("hada_", "lokr_", "dora_scale", "magnitude", ".diff")  # of adapters that are not a pair of factors
MACS_PER_BYTE = 20  # multiply-accumulates in the time of one byte, read from the page cache or written to new memory


@dataclass(frozen=True)
class MemoryEstimate:
    """The predicted memory of a run, in bytes.

    Attributes:
        stages: The peak of each stage: load, encode (the prompts), picture prompts (of IP-Adapters), upscale (by
            hires-fix's upscaler), image (of an initial image), step (of a tile, if the picture is drawn in tiles),
            refine (a refiner's step), decode, check (by the safety checker), png.
        workspace: The part of it that a stage needs only while it runs, at most.
        macs: Multiply-accumulates of the run.
        bytes_moved: Bytes of weights that are read or converted again, which the default placement does not do.
    """

    stages: Mapping[str, int]
    workspace: int = 0
    macs: int = 0
    bytes_moved: int = 0

    @property
    def peak(self) -> int:
        """The peak of the whole run."""
        return max(self.stages.values())


def predict(
    model: ModelHeaders,
    request: Request | RunPlan,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    *,
    base: int | None = None,
) -> MemoryEstimate:
    """Predict the peak of loading the model and drawing a request.

    Args:
        model: The model.
        request: A request, or its planned run.
        placement: How the model is run.
        base: Bytes that the process uses before the model is loaded; None: its RSS now on the CPU, 0 elsewhere.

    Returns:
        The estimate.

    Raises:
        RequestError: If the request does not fit the model.
    """
    plan = request if isinstance(request, RunPlan) else model.plan(request)
    return _Run(model, plan, placement, base).estimate()


class _Run:
    """Predict one planned run with one placement."""

    def __init__(self, model: ModelHeaders, plan: RunPlan, placement: Placement, base: int | None) -> None:
        self.model, self.plan, self.request, self.placement = model, plan, plan.request, placement
        self.itemsize = model.dtype.itemsize
        self.cpu = model.device.type == "cpu"
        own = placement.storage
        self.storage = None if own == str(model.dtype).removeprefix("torch.") else own
        self.base = (system.resident() if self.cpu else 0) if base is None else base
        self.offloaded = placement.weights != "resident" or self.storage is not None
        self.workspace = Workspace(
            itemsize=self.itemsize,
            copies_conv_weights=self.cpu,
            unfolds_conv_inputs=self.cpu and not _has_convolution(model.dtype),
            materializes_weights=placement.weights == "stream" or self.storage is not None,
            buffer=READ_BUFFER_BYTES if placement.weights == "stream" else 0,
            attention=placement.attention,
            fuses_geglu=self.cpu and self.itemsize == 4 and not self.offloaded and not plan.loras,
        )
        self.controls = [model.control(entry.file) for entry in plan.request.control or ()]
        self.refiner = model.refiner(plan.request.refiner) if plan.request.refiner else None
        # those of a refiner are "refiner text" and "refiner unet"
        self.weights = {**model.weights, **_with_prefix(self.refiner.weights if self.refiner else {})}
        encoders = [*model.encoders, *(self.refiner.encoders if self.refiner else ())]
        for each in (plan, *([plan.second_pass] if plan.second_pass else [])):
            check_files(each, self.controls, model.unet)
        self.adapters = [model.ip_adapter(entry) for entry in plan.request.ip_adapter or ()]
        self.constant = self.base
        if self.cpu:
            self.constant += TOKENIZER_BYTES_PER_TOKEN * sum(config.vocab_size for config in encoders)
        self.constant += sum(w.small for w in self.weights.values()) * self.itemsize + self.lora_bytes()
        if placement.weights == "resident":
            self.constant += sum(self.weight_bytes(name) for name in self.weights)
        self.loaded = self.constant
        libraries = LIBRARY_MEMORY.get(model.device.type, 0)
        self.constant += sum(self.control_bytes(files) for files in set(self.controls))
        self.constant += int(libraries * (system.mapped() or DEFAULT_MAPPED_BYTES)) if self.cpu else int(libraries)
        self.macs = self.bytes_moved = self.workspace_peak = 0

    def estimate(self) -> MemoryEstimate:
        """Estimate all stages, with hires those of both passes."""
        first, stages = self.plan, {"load": self.load(), "encode": self.encode()}
        if self.adapters:
            stages["picture prompts"] = self.picture_prompts()
        if first.request.upscaler:
            stages["upscale"] = self.upscaler()
        passes = [first, *([first.second_pass] if first.second_pass else [])]
        for plan in passes:
            one = plan.request
            pictures = min(one.count, one.batch or 1)
            if one.image is not None or (plan is not first and first.request.hires_upscale != "latent"):
                stages["image"] = max(stages.get("image", 0), self.vae(one, 1, "encode"))
            parts = [tile_plan(plan, tile) for tile in tiles_of(plan)] if one.tile else [plan]
            stages["step"] = max(stages.get("step", 0), *(self.step(part, pictures) for part in parts))
            if self.refiner and plan is passes[-1]:
                stages["refine"] = self.refine(self.refiner, plan, pictures)
            stages["decode"] = max(stages.get("decode", 0), self.vae(one, pictures, "decode"))
        if first.safety != "off":
            stages["check"] = self.check(passes[-1].request)
        stages["png"] = self.constant + 4 * self.picture_bytes(passes[-1].request) * 3
        return MemoryEstimate(stages, self.workspace_peak, self.macs, self.bytes_moved)

    def picture_prompts(self) -> int:
        """Return the peak of encoding the pictures of IP-Adapters, of which keys and values stay in memory."""
        peak, width = 0, sum(layer.dim for layer in cross_layers(self.model.unet))
        for (adapter, encoder), tokens, pictures in zip(self.adapters, *self.image_tokens(), strict=True):
            numbers = sum(math.prod(shape) for shape in adapter.shapes.values())
            largest = max(math.prod(shape) for shape in adapter.shapes.values())
            peak = max(peak, (numbers + largest) * self.itemsize)
            if encoder is not None:
                one = walk.walk_vision(encoder.config, self.itemsize)
                peak = max(peak, self.reader(encoder, Weights.of(encoder.network), one, self.itemsize, pictures))
                self.macs += 2 * pictures * one.macs
            self.constant += 2 * 2 * tokens * width * self.itemsize  # of the pictures and of no picture
        return self.constant + peak

    def image_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the number of tokens of each IP-Adapter's pictures, and the number of its pictures."""
        pictures = tuple(len(entry.image or "1") for entry in self.request.ip_adapter or ())
        tokens = tuple(
            count * (adapter.projection.tokens or (encoder.config.positions if encoder else PATCHES))
            for (adapter, encoder), count in zip(self.adapters, pictures, strict=True)
        )
        return tokens, pictures

    def upscaler(self) -> int:
        """Return the peak of hires-fix's upscaler, which stays in memory from its first picture on."""
        path, request = Path(self.request.upscaler or ""), self.request
        network = load_upscaler(path.expanduser(), torch.device("cpu"), torch.float32)
        itemsize = 4 if self.cpu else 2
        self.constant += sum(weight.numel() for weight in network.module.parameters()) * itemsize
        height, width = request.height or 0, request.width or 0
        side = TILE if network.tiled else max(height, width)
        tensors = count_upscaler(network, min(side, height), min(side, width)) or 0
        return self.constant + tensors * itemsize // 4 + 12 * height * width * (2 + 2 * network.scale**2)

    def lora_bytes(self) -> int:
        """Return the bytes of the request's LoRA files, as they are and in the dtype that they are added in.

        Adapters that are not a pair of factors are computed at full size: three times the largest weight more.
        """
        total, made = 0, 0
        for name, _ in self.plan.loras:
            place = Path(name)
            files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))[:1]
            for path in files:
                entries = TensorFile(path).entries
                total += sum(e.count * (e.dtype.itemsize + (e.dtype != self.model.dtype) * self.itemsize)
                             for e in entries.values())  # fmt: skip
                if any(word in key for key in entries for word in FULL_SIZE_KEYS):
                    made = 3 * 4 * max(w.largest for w in self.model.weights.values())
        return total + made

    def control_bytes(self, files: ControlFiles | T2IFiles) -> int:
        """Return the bytes of such a network that stay in memory: all, or those that cannot be offloaded."""
        weights = Weights.of(files.network)
        resident = self.placement.weights == "resident" or files.depends_on_unet
        large = weights.stored_bytes(None if files.depends_on_unet else self.storage, self.itemsize) if resident else 0
        return weights.small * self.itemsize + large

    def control(self, plan: RunPlan, rows: int, calls: int, tokens: int) -> tuple[int, int, int]:
        """Return what the ControlNets and T2I-Adapters add to a step.

        Args:
            plan: The plan of the pass.
            rows: Latents of one call.
            calls: Number of calls of the UNet.
            tokens: Length of the context.

        Returns:
            The bytes that stay for the whole run or step, those of the residuals and features, and the largest peak of
            a call.
        """
        stays = residuals = peak = 0
        _, height, width = plan.latent_shape
        size = plan.request.height or 0, plan.request.width or 0
        for entry, files in zip(plan.request.control or (), self.controls, strict=True):
            weights = Weights.of(files.network)
            if self.placement.weights == "offload" and not files.depends_on_unet:
                stays += weights.stored_bytes(self.storage, self.itemsize)
                self.bytes_moved += weights.stored
            if isinstance(files, T2IFiles):
                one = walk.walk_t2i(files.config, *size, self.itemsize)
                peak = max(peak, residuals + one.peak(self.workspace))
                copies = rows if entry.mode == "control" else 1  # all rows share one if all have it
                residuals += 2 * one.result * copies  # scaled, and the sum
                stays += 3 * 4 * size[0] * size[1] + one.result
                self.macs += one.macs
                continue
            one = walk.walk_control(files.config, height, width, tokens, self.itemsize)
            hint = walk.walk_hint(files.config, *size, self.itemsize).peak(self.workspace)
            peak = max(peak, residuals + one.peak(self.workspace, rows), hint)
            residuals += one.result * rows * (1 if files is self.controls[0] else 2)  # and their sum
            stays += 3 * 4 * size[0] * size[1] * len(entry.pictures)
            stays += files.config.block_out_channels[0] * height * width * self.itemsize
            kept = walk.keys_values_numel(files.config, tokens, ControlNet) * rows * self.itemsize
            stays += kept * self.count_variants()
            self.macs += calls * rows * one.macs
            if self.workspace.materializes_weights:
                read = weights.stored if self.placement.weights == "stream" else 0
                self.bytes_moved += calls * (weights.large * self.itemsize + read)
        return stays, residuals, peak

    def weight_bytes(self, name: str) -> int:
        """Return the bytes of a network's large weights as they are stored."""
        return self.weights[name].stored_bytes(self.storage, self.itemsize)

    def onload_bytes(self, name: str) -> int:
        """Return the bytes that are loaded for a network's own stage, and count that they are read."""
        weights = self.weights[name]
        if self.placement.weights == "offload":
            self.bytes_moved += weights.stored
            return self.weight_bytes(name)
        return 0

    def count_calls(self, name: str, times: int) -> None:
        """Count calls of a network, each of which may convert or read its weights."""
        if self.workspace.materializes_weights:
            read = self.weights[name].stored if self.placement.weights == "stream" else 0
            self.bytes_moved += times * (self.weights[name].large * self.itemsize + read)

    def load(self) -> int:
        """Return the peak of loading: all weights that stay, and the largest one while it is converted."""
        largest = max(w.largest for w in self.weights.values())
        if self.placement.weights == "resident":
            return self.loaded + (4 * largest if self.storage else READ_BUFFER_BYTES)
        return self.loaded + READ_BUFFER_BYTES

    def encode(self) -> int:
        """Return the peak of the text encoders, which take one window of one text at a time."""
        models = {"text": self.model, **({"refiner text": self.refiner} if self.refiner else {})}
        return self.constant + max(self.encode_with(name, model) for name, model in models.items())

    def encode_with(self, name: str, model: ModelHeaders) -> int:
        """Return the bytes that one model's text encoders need while they run."""
        walks = [walk.walk_text_encoder(config, self.itemsize) for config in model.encoders]
        windows = (2 + len(self.plan.regions)) * self.count_windows()
        self.macs += windows * sum(one.macs for one in walks)
        self.count_calls(name, windows)
        onloaded = self.onload_bytes(name) + max(one.peak(self.workspace) for one in walks)
        if self.placement.weights == "offload" and self.storage:  # the token embeddings are converted first
            onloaded = max(onloaded, self.weights[name].largest * (4 + STORAGE_ITEMSIZE[self.storage]))
        return onloaded

    def step(self, plan: RunPlan, pictures: int) -> int:
        """Return the peak of a step: the UNet, the run's keys and values, the latents of a multistep solver."""
        tokens = self.model.encoders[0].max_position_embeddings * self.count_windows()
        channels, height, width = plan.latent_shape
        conditions = self.plan.condition_count
        split = self.placement.guidance == "split"
        batch = pictures * (1 if split else conditions)
        images, _ = self.image_tokens()
        step = walk.walk_unet(self.model.unet, height, width, tokens, self.itemsize, plan.request.freeu, images)
        peak = step.peak(self.workspace, batch)
        groups = math.ceil(plan.request.count / pictures)
        refined = self.refined_steps(plan)
        calls = (len(plan.sigmas) - 1 - refined) * groups * (conditions if split else 1)
        self.macs += calls * batch * step.macs
        self.count_calls("unet", calls)
        if split:
            self.bytes_moved += self.model.weights["unet"].large * self.itemsize * (calls - calls // conditions)
        stays, residuals, controlling = self.control(plan, batch, calls, tokens)
        peak = max(peak + residuals, controlling)
        self.workspace_peak = max(self.workspace_peak, peak)
        run = walk.keys_values_numel(self.model.unet, tokens) * conditions * (1 + pictures) * self.itemsize
        run = run * self.count_variants() + stays
        run += walk.keys_values_numel(self.model.unet, sum(images)) * batch * self.itemsize
        run += 16 * pictures * channels * height * width * 4
        merged = self.weight_bytes("unet") if plan.few_step and self.placement.weights == "resident" else 0
        return self.constant + self.onload_bytes("unet") + merged + run + peak

    def refined_steps(self, plan: RunPlan) -> int:
        """Return how many of the steps of a pass its refiner takes."""
        return sum(sigma <= plan.switch.sigma for sigma in plan.sigmas[:-1]) if plan.switch else 0

    def refine(self, refiner: ModelHeaders, plan: RunPlan, pictures: int) -> int:
        """Return the peak of a refiner's step. The run's keys and values of the first UNet stay in memory."""
        tokens = refiner.encoders[0].max_position_embeddings * self.count_windows()
        channels, height, width = plan.latent_shape
        conditions = self.plan.condition_count
        split = self.placement.guidance == "split"
        batch = pictures * (1 if split else conditions)
        step = walk.walk_unet(refiner.unet, height, width, tokens, self.itemsize)
        peak = step.peak(self.workspace, batch)
        self.workspace_peak = max(self.workspace_peak, peak)
        groups = math.ceil(plan.request.count / pictures)
        calls = self.refined_steps(plan) * groups * (conditions if split else 1)
        self.macs += calls * batch * step.macs
        self.count_calls("refiner unet", calls)
        if split:
            self.bytes_moved += self.weights["refiner unet"].large * self.itemsize * (calls - calls // conditions)
        numbers = sum(walk.keys_values_numel(unet, tokens) for unet in (self.model.unet, refiner.unet))
        run = numbers * conditions * (1 + pictures) * self.itemsize * self.count_variants()
        run += 16 * pictures * channels * height * width * 4
        return self.constant + self.onload_bytes("refiner unet") + run + peak

    def vae(self, request: Request, pictures: int, half: Half) -> int:
        """Return the peak of one half of the VAE, with the finished pictures."""
        name = "encoder" if half == "encode" else "decoder"
        onloaded = self.onload_bytes(name)
        height, width = request.height or 0, request.width or 0
        itemsize = self.model.info.vae_dtype(self.model.dtype).itemsize
        if itemsize != self.itemsize:
            onloaded += self.model.weights[name].large * 2 if not self.offloaded else 0
        workspace = replace(self.workspace, itemsize=itemsize)
        peak = walk.vae_peak(self.model.vae, pictures, height, width, half, self.placement.vae, workspace)
        self.workspace_peak = max(self.workspace_peak, peak)
        times = math.ceil(request.count / pictures) * pictures
        work = times * walk.walk_vae(self.model.vae, height, width, half, itemsize=itemsize).macs
        self.macs += work
        if self.placement.vae != "whole":
            self.bytes_moved += work // MACS_PER_BYTE // 5  # a fifth slower, as measured
        self.count_calls(name, times if self.placement.vae != "whole" else times // pictures)
        return self.constant + onloaded + peak + self.picture_bytes(request) * (1 if half == "decode" else 0)

    def check(self, request: Request) -> int:
        """Return the peak of the safety checker, which takes one picture at a time, with the finished pictures."""
        files = cast(CheckerFiles, self.model.found.checker)
        itemsize = checker_dtype(self.model.device, self.model.dtype).itemsize
        one = walk.walk_checker(cast(SafetyCheckerConfig, files.network.config), itemsize)
        self.macs += request.count * one.macs
        return self.constant + self.reader(files, self.model.checker, one, itemsize) + self.picture_bytes(request)

    def reader(self, files: CheckerFiles, weights: Weights, one: Footprint, itemsize: int, pictures: int = 1) -> int:
        """Return what a network that reads pictures needs at most.

        Args:
            files: Its files.
            weights: Its weights.
            one: Its walk for one picture.
            itemsize: Bytes of a number that it computes in.
            pictures: How many pictures it reads at once.
        """
        placement = checker_placement(files, self.model.device, self.placement)
        streams = placement.weights == "stream"
        workspace = replace(
            self.workspace,
            itemsize=itemsize,
            unfolds_conv_inputs=False,
            materializes_weights=streams or placement.storage is not None,
            buffer=READ_BUFFER_BYTES if streams else 0,
        )
        onloaded = 0 if streams else weights.stored_bytes(placement.storage, itemsize)
        if placement.storage:  # each weight is read in float32 first
            onloaded += 4 * weights.largest
        height, width = files.processor.crop_size
        pixels = 3 * 4 * height * width * (7 + pictures)  # a picture while it is resized and normalized
        return onloaded + weights.small * itemsize + pixels + one.peak(workspace, pictures)

    def picture_bytes(self, request: Request) -> int:
        """Return the bytes of the finished pictures."""
        return (request.width or 0) * (request.height or 0) * 3 * request.count

    def count_windows(self) -> int:
        """Return the number of windows of tokens that the longer prompt needs, at most."""
        regions = (region.prompt for region in self.request.regions or ())
        longest = max(map(_count_tokens, (self.request.prompt, self.request.negative_prompt or "", *regions)))
        return max(math.ceil(longest / (self.model.encoders[0].max_position_embeddings - 2)), 1)

    def count_variants(self) -> int:
        """Return how many variants of the prompts the run uses; keys and values of all of them stay in memory."""
        parts = [*self.plan.parts, *self.plan.negative.parts]
        return len({tuple(part.at(step).text for part in parts) for step in range(self.plan.schedule_steps)})


def _with_prefix(weights: Mapping[str, Weights]) -> dict[str, Weights]:
    """Return the sizes of a refiner's networks by their names here."""
    return {f"refiner {name}": each for name, each in weights.items()}


def _count_tokens(text: str) -> int:
    """Return about the most tokens of a text: one for 3 letters, for a sign, for a byte of what is not ASCII."""
    found = re.findall(r"[A-Za-z]{1,3}|[^A-Za-z\s]", text)
    return sum(1 if piece.isascii() else len(piece.encode()) for piece in found)


def _has_convolution(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN has convolutions in this dtype on this processor.

    It has them in bfloat16 from AVX-512 on. In float16, which few processors have, torch does not tell.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    return dtype == torch.float32 or (dtype == torch.bfloat16 and capability.startswith("AVX512"))
