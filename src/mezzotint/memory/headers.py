"""Describe a model by its configurations and the headers of its files, for plans and predictions of memory.

    ModelHeaders.of("model.safetensors")

No weight is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from mezzotint.config import CLIPConfig, UNetConfig, VAEConfig
from mezzotint.devices import best_device, device_of, dtype_on
from mezzotint.entries.ip_adapter import IPAdapter
from mezzotint.placement import MIN_OFFLOAD_NUMEL
from mezzotint.request import Request
from mezzotint.run.model_info import ModelInfo
from mezzotint.run.plan import RunPlan, plan_run
from mezzotint.run.refiners import describe_refiner
from mezzotint.weights.checkpoint import scan_model
from mezzotint.weights.control_files import ControlFiles, scan_control
from mezzotint.weights.hub import BUNDLED
from mezzotint.weights.ip_adapter_files import AdapterFiles, scan_encoder, scan_ip_adapter
from mezzotint.weights.model_files import ModelFiles, NetworkFiles
from mezzotint.weights.t2i_files import T2IFiles
from mezzotint.weights.vision_files import VisionFiles

STORAGE_ITEMSIZE = {"bfloat16": 2, "float16": 2, "float8": 1, "int8": 1, "int8_dynamic": 1}


@dataclass(frozen=True)
class Weights:
    """Sizes of a network's weights.

    Attributes:
        large: Elements of the weights that can be offloaded.
        rows: Rows of those.
        small: Elements of the other weights.
        largest: Elements of the largest weight.
        stored: Bytes in the files.
    """

    large: int = 0
    rows: int = 0
    small: int = 0
    largest: int = 0
    stored: int = 0

    @classmethod
    def of(cls, part: NetworkFiles, begins: str = "") -> Weights:
        """Count the weights of a part whose names start with `begins`, from the headers of the files."""
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

    def stored_bytes(self, storage: str | None, itemsize: int) -> int:
        """Return the bytes of the large weights in a storage format; None: with `itemsize` bytes an element."""
        if storage is None:
            return self.large * itemsize
        each = STORAGE_ITEMSIZE[storage]
        return self.large * each + (4 * self.rows if each == 1 else 0)


@dataclass(frozen=True)
class ModelHeaders:
    """A model as its configs and the headers of its files describe it.

    Attributes:
        found: Its files.
        device: The device that it will run on.
        dtype: The dtype that it will compute in.
    """

    found: ModelFiles
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
    ) -> ModelHeaders:
        """Describe a model; the arguments are those of `mezzotint.load`.

        Raises:
            CheckpointError: If the files are not a model.
            RequestError: If the device or dtype is not available.
        """
        place = device_of(device or best_device())
        return cls(scan_model(path_or_id or BUNDLED, **options), place, dtype_on(place, dtype))

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device}"

    @cached_property
    def weights(self) -> dict[str, Weights]:
        """Sizes of "text" (all text encoders), "unet", and the VAE's "encoder" and "decoder", if there is one."""
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
            **{half: Weights.of(parts["vae"], half) for half in ("encoder", "decoder") if "vae" in parts},
        }

    @cached_property
    def checker(self) -> Weights:
        """Sizes of the safety checker's weights."""
        return Weights.of(self.found.checker.network) if self.found.checker else Weights()

    @cached_property
    def file_dtypes(self) -> set[str]:
        """The dtypes that most weights of each network have in the files."""
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

    def control(self, name: str) -> ControlFiles | T2IFiles:
        """Describe a ControlNet or T2I-Adapter; each is read once.

        Raises:
            CheckpointError: If it is missing, damaged, or for another model.
        """
        if name not in self._controls:
            self._controls[name] = scan_control(name, self.unet)
        return self._controls[name]

    def ip_adapter(self, entry: IPAdapter) -> tuple[AdapterFiles, VisionFiles | None]:
        """Describe an IP-Adapter, and its vision encoder unless embeddings are given; each is read once.

        Raises:
            CheckpointError: If one is missing, damaged, or does not fit.
        """
        key = entry.file, entry.encoder, entry.embeds is None
        if key not in self._ip_adapters:
            files = scan_ip_adapter(entry.file, self.unet)
            self._ip_adapters[key] = files, scan_encoder(entry.encoder, files) if entry.embeds is None else None
        return self._ip_adapters[key]

    @cached_property
    def _ip_adapters(self) -> dict[object, tuple[AdapterFiles, VisionFiles | None]]:
        return {}

    @cached_property
    def _controls(self) -> dict[str, ControlFiles | T2IFiles]:
        return {}

    def refiner(self, name: str) -> ModelHeaders:
        """Describe a refiner, without a VAE; each is read once.

        Raises:
            CheckpointError: If it is missing, damaged, or of another family.
        """
        if name not in self._refiners:
            found = describe_refiner(name, self.vae, self.device.type).files
            self._refiners[name] = ModelHeaders(found, self.device, self.dtype)
        return self._refiners[name]

    @cached_property
    def _refiners(self) -> dict[str, ModelHeaders]:
        return {}

    def plan(self, request: Request) -> RunPlan:
        """Plan the run of a request, from configurations alone.

        Raises:
            RequestError: If the request does not fit the model.
        """
        return plan_run(self.info, request)
