"""Where a large weight is until its layer uses it, and as what: a Placement's words become a Weight.

On the CPU what is away from the device is in the model's files, read again when its turn comes; for another device it
is in the CPU's memory, pinned for CUDA.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mezzotint.errors import RequestError
from mezzotint.models.offload import Ahead, Offloaded, Stored, Streamed, Weight, fresh
from mezzotint.models.prefetch import Staging
from mezzotint.placement import Placement
from mezzotint.weights.files import TensorFile
from mezzotint.weights.keys import Source


class FileWeight(Weight):
    """One in a model's file, read each time."""

    def __init__(self, file: TensorFile, source: Source, shape: torch.Size) -> None:
        """shape: the parameter's. That of the tensor may be a 1x1 convolution's where it is a linear layer's, or the
        other way round.
        """
        self.file, self.source, self.shape = file, source, shape

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Where it goes to another device it is converted there."""
        made = fresh(self.shape, dtype if device.type == "cpu" else self.file.entries[self.source.key].dtype)
        target = made
        have = len(self.file.entries[self.source.key].shape)
        if have > target.ndim:
            target = target[:, :, None, None]
        elif have < target.ndim:
            target = target[:, :, 0, 0]
        self.file.read_into(target.T if self.source.transpose else target, self.source.key, self.source.third)
        return made.to(device, dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Only these are read."""
        if self.source.third is not None or self.source.transpose:
            return super().rows(ids, dtype, device)
        rows = self.file.read_rows(self.source.key, ids.flatten().tolist())
        return rows.to(device, dtype).view(*ids.shape, math.prod(self.shape[1:]))

    def soon(self) -> None:
        self.file.soon(self.source.key)


class Keeper:
    """Decides for one network, which computes in `dtype` on `device`."""

    def __init__(self, placement: Placement, dtype: torch.dtype, device: torch.device) -> None:
        """Raises RequestError for a placement that says nothing on this device."""
        self.weights, self.dtype, self.device = placement.weights, dtype, device
        self.storage = None if placement.storage == str(dtype).removeprefix("torch.") else placement.storage
        if self.weights == "stream" and device.type == "cpu" and self.storage:
            raise RequestError(
                f"placement: storage is {self.storage!r} and weights 'stream', which on the CPU leaves the weights in "
                "the model's files, as they are there; leave one of the two out"
            )
        self._ahead: Ahead | None = None

    @property
    def holds(self) -> bool:
        """Whether large weights are anything but parameters."""
        return self.weights != "resident" or self.storage is not None

    def keep(self, weight: FileWeight) -> Weight:
        """The weight as it is kept, where any is held."""
        if self.weights == "resident":
            return Stored.of(weight.tensor(torch.float32, self.device), self.storage)
        away: Weight = weight
        if self.device.type != "cpu":
            dtype = self.dtype if self.storage is None else torch.float32
            away = Stored.of(weight.tensor(dtype, torch.device("cpu")), self.storage).pinned(self.device)
        if self.weights == "offload":
            return Offloaded(away, self.storage)
        if self._ahead is None:
            self._ahead = Staging(self.device) if self.device.type == "cuda" else Ahead()
        return Streamed(away, self._ahead)
