"""Choose where each large weight is stored, and in which format: turn a `Placement` into weight sources.

On the CPU, offloaded and streamed weights are in the model's files and are read again each time they are needed. For
other devices they are in the CPU's memory, pinned for CUDA.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mezzotint.errors import RequestError
from mezzotint.models.offload import (
    OffloadedWeight,
    Prefetcher,
    StoredWeight,
    StreamedWeight,
    WeightSource,
    allocate_weight,
)
from mezzotint.models.prefetch import CudaPrefetcher
from mezzotint.placement import Placement
from mezzotint.weights.files import TensorFile
from mezzotint.weights.keys import Source


class FileWeight(WeightSource):
    """A weight in a model's file, read at each use."""

    def __init__(self, file: TensorFile, source: Source, shape: torch.Size, scale: Tensor | None = None) -> None:
        """Refer to a tensor of the file.

        Args:
            file: The file.
            source: Which tensor of it, and how it becomes the parameter.
            shape: Shape of the parameter. The tensor may be a 1x1 convolution's where the parameter is a linear
                layer's, or vice versa.
            scale: Factor of a quantized tensor, in float32: one number, or one for each of its rows.
        """
        self.file, self.source, self.shape, self.scale = file, source, shape, scale

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Read the weight. For another device it is converted there, unless it is quantized."""
        if self.scale is not None:
            return self._scaled(self.scale).to(device, dtype)
        made = allocate_weight(self.shape, dtype if device.type == "cpu" else self.file.entries[self.source.key].dtype)
        target = made
        have = len(self.file.entries[self.source.key].shape)
        if have > target.ndim:
            target = target[:, :, None, None]
        elif have < target.ndim:
            target = target[:, :, 0, 0]
        self.file.read_into(target.T if self.source.transpose else target, self.source.key, self.source.third)
        return made.to(device, dtype)

    def _scaled(self, scale: Tensor) -> Tensor:
        """Read a quantized weight and multiply it by its scale, in float32."""
        values = self.file.read(self.source.key).float()
        values = values * (scale.flatten() if scale.numel() == 1 else scale.view(-1, *(1,) * (values.ndim - 1)))
        part = values if self.source.third is None else values.chunk(3)[self.source.third]
        made = allocate_weight(self.shape, torch.float32)
        return made.copy_((part.T if self.source.transpose else part).reshape(self.shape))

    def rows(self, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Read only these rows."""
        if self.source.third is not None or self.source.transpose or self.scale is not None:
            return super().rows(ids, dtype, device)
        rows = self.file.read_rows(self.source.key, ids.flatten().tolist())
        return rows.to(device, dtype).view(*ids.shape, math.prod(self.shape[1:]))

    def prefetch(self) -> None:
        """Ask the system to read the weight into its cache."""
        self.file.prefetch(self.source.key)


class WeightPlacer:
    """Place the large weights of one network, which computes in `dtype` on `device`."""

    def __init__(self, placement: Placement, dtype: torch.dtype, device: torch.device) -> None:
        """Prepare to place weights.

        Raises:
            RequestError: If the placement is not possible on this device.
        """
        self.weights, self.dtype, self.device = placement.weights, dtype, device
        self.storage = None if placement.storage == str(dtype).removeprefix("torch.") else placement.storage
        if self.weights == "stream" and device.type == "cpu" and self.storage:
            raise RequestError(
                f"placement: storage is {self.storage!r} and weights 'stream', which on the CPU leaves the weights in "
                "the model's files, as they are there; leave one of the two out"
            )
        self._prefetcher: Prefetcher | None = None

    @property
    def replaces_parameters(self) -> bool:
        """Whether large weights become weight sources instead of parameters."""
        return self.weights != "resident" or self.storage is not None

    def place(self, weight: FileWeight) -> WeightSource:
        """Return the source that the layer uses instead of its parameter."""
        if self.weights == "resident":
            return StoredWeight.from_tensor(weight.tensor(torch.float32, self.device), self.storage)
        source: WeightSource = weight
        if self.device.type != "cpu":
            dtype = self.dtype if self.storage is None else torch.float32
            source = StoredWeight.from_tensor(weight.tensor(dtype, torch.device("cpu")), self.storage).pin(self.device)
        if self.weights == "offload":
            return OffloadedWeight(source, self.storage)
        if self._prefetcher is None:
            self._prefetcher = CudaPrefetcher(self.device) if self.device.type == "cuda" else Prefetcher()
        return StreamedWeight(source, self._prefetcher)
