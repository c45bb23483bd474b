"""Prefetch weights to a CUDA device: the next one is copied on a stream of its own while the current layer runs.

There are two buffers on the device, each as large as the largest weight. A copy into a buffer waits until the weight
in it has been used, and a layer waits until its weight has arrived. Both waits are between streams of the device, so
the CPU continues.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from mezzotint.models.offload import Prefetcher, StoredWeight, WeightSource


class CudaPrefetcher(Prefetcher):
    """Prefetch a network's weights from pinned memory to a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self._lock = device, threading.Lock()
        self._buffers = [_Buffer(device), _Buffer(device)]
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fetch(self, weight: WeightSource, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the weight on the device, and start to copy the next one."""
        if not isinstance(weight, StoredWeight) or device != self.device:  # the network was moved
            return super().fetch(weight, dtype, device)
        with self._lock:
            current, other = self._buffers if self._buffers[0].weight is weight else self._buffers[::-1]
            if current.weight is not weight:
                current.send(weight, self._stream)
            tensor = current.take(dtype)
            successor = self.next_after(weight)
            if isinstance(successor, StoredWeight) and successor is not weight and other.weight is not successor:
                other.send(successor, self._stream)
            return tensor


class _Buffer:
    """A buffer on the device, and the weight that was last copied into it."""

    def __init__(self, device: torch.device) -> None:
        self.weight: StoredWeight | None = None
        self._device, self._memory = device, torch.empty(0, dtype=torch.uint8, device=device)
        self._arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._used: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def send(self, weight: StoredWeight, stream: Any) -> None:
        """Start to copy a weight into the buffer, once the one in it has been used."""
        if self._memory.numel() < weight.data.nbytes:
            self.weight = None
            stream.synchronize()  # the old buffer's memory goes back to torch's pool
            self._memory = torch.empty(weight.data.nbytes, dtype=torch.uint8, device=self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
        stream.wait_event(self._used)
        with torch.inference_mode(), torch.cuda.stream(stream):  # the buffer may have been made in inference mode
            self._view(weight).copy_(weight.data, non_blocking=True)
            self._arrived.record(stream)
        self.weight = weight

    def take(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, in memory that belongs to the current stream."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._arrived)
        assert self.weight is not None
        sent = StoredWeight(self._view(self.weight), self.weight.scale)
        tensor = sent.tensor(dtype, self._device)
        tensor = tensor.clone() if tensor is sent.data else tensor
        self._used.record(current)
        return tensor

    def _view(self, weight: StoredWeight) -> Tensor:
        """View the buffer as a tensor of the weight's dtype, shape and memory format."""
        flat = self._memory[: weight.data.nbytes].view(weight.data.dtype)
        return flat.as_strided(weight.data.shape, weight.data.stride())
