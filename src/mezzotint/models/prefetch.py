"""Weights on their way to a CUDA device: copied by a stream of their own, the next while this one's layer runs.

There are two buffers on the device, each as large as the largest weight. A copy into one waits until the weight that
was in it has been taken out; a layer waits until its own has arrived. Both are waits of the device's streams: the CPU
goes on.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from mezzotint.models.offload import Ahead, Stored, Weight


class Staging(Ahead):
    """The way of a network's weights to its device; they lie in pinned memory."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self._lock = device, threading.Lock()
        self._slots = [_Slot(device), _Slot(device)]
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fetch(self, weight: Weight, dtype: torch.dtype, device: torch.device) -> Tensor:
        if not isinstance(weight, Stored) or device != self.device:  # somebody moved the network
            return super().fetch(weight, dtype, device)
        with self._lock:
            here, other = self._slots if self._slots[0].weight is weight else self._slots[::-1]
            if here.weight is not weight:
                here.send(weight, self._stream)
            made = here.taken(dtype)
            following = self.following(weight)
            if isinstance(following, Stored) and following is not weight and other.weight is not following:
                other.send(following, self._stream)
            return made


class _Slot:
    """One buffer, and what was sent into it last."""

    def __init__(self, device: torch.device) -> None:
        self.weight: Stored | None = None
        self._device, self._buffer = device, torch.empty(0, dtype=torch.uint8, device=device)
        self._arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._left: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def send(self, weight: Stored, stream: Any) -> None:
        """Begin the copy of a weight into the buffer, after what is in it has left."""
        if self._buffer.numel() < weight.kept.nbytes:
            self.weight = None
            stream.synchronize()  # the old buffer's memory goes back to torch's pool
            self._buffer = torch.empty(weight.kept.nbytes, dtype=torch.uint8, device=self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
        stream.wait_event(self._left)
        with torch.inference_mode(), torch.cuda.stream(stream):  # the buffer may have been made in it
            self._view(weight).copy_(weight.kept, non_blocking=True)
            self._arrived.record(stream)
        self.weight = weight

    def taken(self, dtype: torch.dtype) -> Tensor:
        """The weight, in memory that belongs to the current stream."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._arrived)
        assert self.weight is not None
        sent = Stored(self._view(self.weight), self.weight.scale)
        made = sent.tensor(dtype, self._device)
        made = made.clone() if made is sent.kept else made
        self._left.record(current)
        return made

    def _view(self, weight: Stored) -> Tensor:
        """The buffer as a tensor of the weight's dtype, shape and format."""
        flat = self._buffer[: weight.kept.nbytes].view(weight.kept.dtype)
        return flat.as_strided(weight.kept.shape, weight.kept.stride())
