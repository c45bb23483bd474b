"""Weights that are not parameters: stored elsewhere, or in a smaller dtype, until their layer runs.

`offload_weight(layer, source, dtype, device)` replaces the parameter `weight` of a Linear, Conv2d or Embedding by a
`WeightSource`. `layer.weight` is then computed each time it is read, in the dtype and on the device that the layer
computes with, and must not be written to. Reading it changes nothing, so threads may share a network. Small weights,
biases and norms remain parameters. The sources are:

    StoredWeight      a tensor in memory, in 16 bits, or in 8 bits with a scale for each output channel
    OffloadedWeight   another source, loaded to the device while its network runs: `with onload(unet): ...`
    StreamedWeight    another source, read each time its layer runs, while the next weight is prefetched
                      (weights/ adds FileWeight, a tensor in a model's file; adapters.py a weight with LoRAs applied)

8-bit formats: float8 is e4m3 (Micikevicius et al. 2022), int8 is symmetric (Jacob et al. 2018). Each row is divided by
a scale that maps its largest absolute value to the largest value of the format. int8_dynamic also rounds the
activations of each token to 8 bits and multiplies integers (as LLM.int8, Dettmers et al. 2022, without its outliers).
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.errors import RequestError
from mezzotint.models.convolution import Conv2d
from mezzotint.models.linear import Linear, linear
from mezzotint.placement import MIN_OFFLOAD_NUMEL

HUGE_PAGE_BYTES = 2**21

STORAGE_16_BIT = {"bfloat16": torch.bfloat16, "float16": torch.float16}
STORAGE_8_BIT = {  # dtype, and its largest value
    "float8": (torch.float8_e4m3fn, 448.0),
    "int8": (torch.int8, 127.0),
    "int8_dynamic": (torch.int8, 127.0),
}


class WeightSource:
    """Where a layer's weight comes from. Copies of a layer share it.

    Attributes:
        shape: Shape of the weight.
        needs_onload: Whether it is loaded to the device by `onload`.
    """

    shape: torch.Size
    needs_onload = False

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the weight for one use; convolution weights are in channels_last."""
        raise NotImplementedError

    def rows(self, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the rows of `ids` (B, T) of an embedding table (N, D), of shape (B, T, D)."""
        return F.embedding(ids, self.tensor(dtype, device))

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Apply the weight as a linear layer: (..., inputs) -> (..., outputs)."""
        return linear(x, self.tensor(dtype, device), bias)

    def prefetch(self) -> None:
        """Start reading the weight, which will be used next."""

    def onload(self, dtype: torch.dtype, device: torch.device) -> None:
        """Load the weight to the device, because its network starts to run."""

    def offload(self) -> None:
        """Release the weight on the device, because its network has run."""

    def __deepcopy__(self, _: dict[int, Any]) -> WeightSource:
        return self


class StoredWeight(WeightSource):
    """A tensor in memory.

    Attributes:
        data: The weight, in the dtype that it is stored in.
        scale: For 8-bit formats the scale of each row, (outputs, 1, ...) float32.
        dynamic: Whether activations are rounded to 8 bits too.
    """

    def __init__(self, data: Tensor, scale: Tensor | None = None, dynamic: bool = False) -> None:
        self.data, self.scale, self.dynamic, self.shape = data, scale, dynamic, data.shape

    @classmethod
    def from_tensor(cls, weight: Tensor, storage: str | None) -> StoredWeight:
        """Store a weight in the format `storage`, as in `Placement.storage`. The tensor may be overwritten."""
        if storage is None:
            return cls(weight)
        if storage in STORAGE_16_BIT:
            return cls(weight.to(STORAGE_16_BIT[storage]))
        dtype, largest = STORAGE_8_BIT[storage]
        axes = tuple(range(1, weight.ndim))
        scale = torch.maximum(weight.amax(axes, keepdim=True), -weight.amin(axes, keepdim=True)) / largest
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros
        weight = weight.div_(scale)
        return cls((weight.round_() if dtype == torch.int8 else weight).to(dtype), scale, storage == "int8_dynamic")

    def to(self, device: torch.device) -> StoredWeight:
        """Copy the weight to another device."""
        scale = None if self.scale is None else self.scale.to(device)
        return StoredWeight(self.data.to(device, non_blocking=True), scale, self.dynamic)

    def pin(self, device: torch.device) -> StoredWeight:
        """Copy the weight to the CPU, pinned for a CUDA device; its scales, which are small, to the device."""
        data = self.data.cpu()
        scale = None if self.scale is None else self.scale.to(device)
        return StoredWeight(data.pin_memory() if device.type == "cuda" else data, scale, self.dynamic)

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        data = self.data.to(device, non_blocking=True)
        if data.dtype == dtype:
            return data
        weight = allocate_weight(data.shape, dtype).copy_(data) if device.type == "cpu" else data.to(dtype)
        return weight if self.scale is None else weight.mul_(self.scale.to(device))  # multiplied in float32

    def rows(self, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        places = ids.to(self.data.device)
        rows = self.data[places].to(device, dtype)
        return rows if self.scale is None else rows.mul_(self.scale[places.to(self.scale.device)].to(device))

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.scale is None or not self.dynamic:
            return super().linear(x, bias, dtype, device)
        flat = x.reshape(-1, x.shape[-1]).float()  # (tokens, inputs)
        scale = flat.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127.0
        tokens, weight = (flat / scale).round_(), self.data.to(device)
        if _has_fast_int8(tokens, weight):
            y = torch._int_mm(tokens.to(torch.int8), weight.t()).float()
        else:  # the same sums
            y = linear(tokens, StoredWeight(weight).tensor(torch.float32, device))
        y = y.mul_(scale).mul_(self.scale.to(device).t())  # (tokens, outputs)
        y = y if bias is None else y.add_(bias)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def _has_fast_int8(tokens: Tensor, weight: Tensor) -> bool:
    """Tell whether the device multiplies int8 fast: AVX-512 VNNI; CUDA with more than 16 tokens, multiples of 8."""
    if tokens.device.type == "cpu":
        return torch.cpu._is_vnni_supported()
    return tokens.device.type == "cuda" and len(tokens) > 16 and not any(size % 8 for size in weight.shape)


class OffloadedWeight(WeightSource):
    """A weight that is on the device only while its network runs, stored there as `storage`."""

    needs_onload = True

    def __init__(self, source: WeightSource, storage: str | None = None) -> None:
        self.source, self.storage, self.shape = source, storage, source.shape
        self._onloaded: StoredWeight | None = None
        self._users = 0  # more than one where threads share the network
        self._lock = threading.RLock()  # an abandoned run may be collected, and offload, while this one onloads

    @property
    def current(self) -> WeightSource:
        """The copy on the device or, outside `onload`, the source, which works but is slow."""
        return self._onloaded or self.source

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.current.tensor(dtype, device)

    def rows(self, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.current.rows(ids, dtype, device)

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.current.linear(x, bias, dtype, device)

    def onload(self, dtype: torch.dtype, device: torch.device) -> None:
        with self._lock:
            self._users += 1
            try:
                self._onloaded = self._onloaded or self._load(dtype, device)
            except BaseException:
                self.offload()
                raise

    def offload(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._onloaded = None

    def _load(self, dtype: torch.dtype, device: torch.device) -> StoredWeight:
        if isinstance(self.source, StoredWeight):
            return self.source.to(device)
        loaded = self.source.tensor(dtype if self.storage is None else torch.float32, device)
        return StoredWeight.from_tensor(loaded, self.storage)


class Prefetcher:
    """Prefetch the weights of a network in the order in which they were used the last time."""

    def __init__(self) -> None:
        self._successors: dict[WeightSource, WeightSource] = {}
        self._last: WeightSource | None = None  # two threads at once spoil each other's guesses, nothing else

    def next_after(self, weight: WeightSource) -> WeightSource | None:
        """Return the weight that was used after this one, if any, and record that this one is used now."""
        if self._last is not None:
            self._successors[self._last] = weight
        self._last = weight
        return self._successors.get(weight)

    def fetch(self, weight: WeightSource, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the weight, and start to prefetch the next one."""
        tensor = weight.tensor(dtype, device)
        if (successor := self.next_after(weight)) is not None:
            successor.prefetch()
        return tensor


class StreamedWeight(WeightSource):
    """A weight that is read from its source each time its layer runs."""

    def __init__(self, source: WeightSource, prefetcher: Prefetcher) -> None:
        self.source, self.prefetcher, self.shape = source, prefetcher, source.shape

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.prefetcher.fetch(self.source, dtype, device)

    def rows(self, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.source.rows(ids, dtype, device)


class OffloadedLayer(nn.Module):
    """A layer whose weight comes from a `WeightSource`.

    Attributes:
        weight_source: The source.
        dtype: The dtype that the layer computes in.
        device: The device that it computes on.
    """

    weight_source: WeightSource
    dtype: torch.dtype
    device: torch.device

    @property
    def weight(self) -> Tensor:
        """The weight, computed at each access; PyTorch refuses to write to it, which would have no effect."""
        with torch.inference_mode():
            return self.weight_source.tensor(self.dtype, self.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OffloadedLayer:
        """Implement `.to()`, `.float()` and the like."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.dtype, self.device = moved.dtype, moved.device
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight_source.tensor(self.dtype, self.device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}weight" in state_dict:
            raise RequestError(
                f"{prefix}weight cannot be loaded: the model was placed so that this weight is stored elsewhere or in "
                "fewer bits; load the model without placement and memory to change its weights"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class OffloadedLinear(OffloadedLayer, Linear):  # type: ignore[override]  # `weight` can only be read
    """A linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., inputs) -> (..., outputs)."""
        return self.weight_source.linear(x, self.bias, self.dtype, self.device)


class OffloadedConv2d(OffloadedLayer, Conv2d):  # type: ignore[override]  # `weight` can only be read
    """A convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (B, inputs, h, w) -> (B, outputs, h', w')."""
        return self._conv_forward(x, self.weight_source.tensor(self.dtype, self.device), self.bias)


class OffloadedEmbedding(OffloadedLayer, nn.Embedding):  # type: ignore[override]  # `weight` can only be read
    """An embedding table."""

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the rows of ids: (B, T) -> (B, T, D)."""
        return self.weight_source.rows(ids, self.dtype, self.device)


OFFLOADED_TYPES: dict[type[nn.Module], type[OffloadedLayer]] = {
    Linear: OffloadedLinear,
    nn.Linear: OffloadedLinear,
    Conv2d: OffloadedConv2d,
    nn.Embedding: OffloadedEmbedding,
}


def can_offload(layer: nn.Module, weight: Tensor) -> bool:
    """Tell whether the layer is of a type that can be offloaded, and this weight of it large enough."""
    return type(layer) in OFFLOADED_TYPES and weight.numel() >= MIN_OFFLOAD_NUMEL


def offload_weight(layer: nn.Module, source: WeightSource, dtype: torch.dtype, device: torch.device) -> None:
    """Replace the layer's parameter `weight` by a source, in place.

    Args:
        layer: A Linear, Conv2d or Embedding, or one that is offloaded already.
        source: The new source of its weight.
        dtype: The dtype that the layer computes in.
        device: The device that it computes on.
    """
    if not isinstance(layer, OffloadedLayer):
        del layer._parameters["weight"]
        layer.__class__ = OFFLOADED_TYPES[type(layer)]
    layer.weight_source, layer.dtype, layer.device = source, dtype, device  # type: ignore[assignment]


def weight_shape(layer: nn.Module) -> torch.Size:
    """Return the shape of the layer's weight without loading it."""
    return layer.weight_source.shape if isinstance(layer, OffloadedLayer) else layer.weight.shape  # type: ignore[return-value]


def count_parameters(network: nn.Module) -> int:
    """Return the number of a network's parameters, offloaded ones included."""
    offloaded = sum(weight_shape(module).numel() for module in network.modules() if isinstance(module, OffloadedLayer))
    return offloaded + sum(parameter.numel() for parameter in network.parameters())


@contextmanager
def onload(*networks: nn.Module) -> Iterator[None]:
    """Keep the networks' offloaded weights on their device inside the block."""
    layers = [
        module
        for network in networks
        for module in network.modules()
        if isinstance(module, OffloadedLayer) and module.weight_source.needs_onload
    ]
    with ExitStack() as stack:
        if any(layer.device.type == "cuda" for layer in layers):
            stack.callback(torch.cuda.empty_cache)  # memory that torch reserves counts as used
        for layer in layers:
            layer.weight_source.onload(layer.dtype, layer.device)
            stack.callback(layer.weight_source.offload)
        yield


def allocate_weight(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Allocate a weight on the CPU whose memory returns to the system when it is freed; 4-D in channels_last.

    A large one lies in huge pages where the system has them: the first access to each page of 4 KiB would take longer
    than writing the weight.
    """
    size = shape.numel() * dtype.itemsize
    if size >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(memory, dtype=dtype)
    else:
        flat = torch.empty(shape.numel(), dtype=dtype)
    if len(shape) != 4:
        return flat.view(shape)
    outputs, inputs, height, width = shape
    return flat.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
