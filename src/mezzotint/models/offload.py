"""Large weights that are no parameters: kept elsewhere, or as something smaller, until their layer runs.

`hold(layer, weight, dtype, device)` takes a Linear, Conv2d or Embedding its parameter. `layer.weight` then is made anew
each time that it is asked for, in the dtype and on the device that the layer computes with, and is not to be written
to: nothing changes in the course of a run, so threads may share a network. Small weights, biases and norms stay
parameters. What a large one is kept as is a Weight:

    Stored      a tensor: in 16 bits, or in 8 with a scale for each output channel
    Offloaded   another one, brought to the device for the time of its network's turn: `with turn(unet): ...`
    Streamed    another one, fetched when its layer runs, while the next one is already on its way
                (and in weights/: one in a model's file, and one with a LoRA's change)

8 bits: float8 is e4m3 (Micikevicius et al. 2022), int8 is symmetric (Jacob et al. 2018). Each row is divided by a scale
that makes its largest number the largest of the format. int8_dynamic multiplies integers: it also rounds each token's
activations to 8 bits, by their own largest (as LLM.int8, Dettmers et al. 2022, without its outliers).
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

from mezzotint.models.convolution import Conv2d
from mezzotint.placement import LEAST

HUGE = 2**21  # bytes of a huge page

SIXTEEN = {"bfloat16": torch.bfloat16, "float16": torch.float16}
EIGHT = {
    "float8": (torch.float8_e4m3fn, 448.0),
    "int8": (torch.int8, 127.0),
    "int8_dynamic": (torch.int8, 127.0),
}


class Weight:
    """A weight of `shape` that is kept somewhere. Frozen but for what Offloaded brings; copies of a layer share it."""

    shape: torch.Size
    turns = False  # whether it is brought for a turn

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """It, for one use: convolutions in channels_last."""
        raise NotImplementedError

    def rows(self, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Of a table (N, D) the rows of ids (B, T): (B, T, D)."""
        return F.embedding(ids, self.tensor(dtype, device))

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """x (..., inputs) times it, (..., outputs)."""
        return F.linear(x, self.tensor(dtype, device), bias)

    def soon(self) -> None:
        """It will be asked for next."""

    def bring(self, dtype: torch.dtype, device: torch.device) -> None:
        """Its network's turn begins."""

    def drop(self) -> None:
        """Its network's turn is over."""

    def __deepcopy__(self, _: dict[int, Any]) -> Weight:
        return self


class Stored(Weight):
    """A tensor, and where it is in 8 bits the scale of each row, (outputs, 1, ...) float32."""

    def __init__(self, kept: Tensor, scale: Tensor | None = None, dynamic: bool = False) -> None:
        self.kept, self.scale, self.dynamic, self.shape = kept, scale, dynamic, kept.shape

    @classmethod
    def of(cls, weight: Tensor, storage: str | None) -> Stored:
        """A weight as `storage` (Placement's) keeps it; the tensor is used up."""
        if storage is None:
            return cls(weight)
        if storage in SIXTEEN:
            return cls(weight.to(SIXTEEN[storage]))
        kind, largest = EIGHT[storage]
        rest = tuple(range(1, weight.ndim))
        scale = torch.maximum(weight.amax(rest, keepdim=True), -weight.amin(rest, keepdim=True)) / largest
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros
        weight = weight.div_(scale)
        return cls((weight.round_() if kind == torch.int8 else weight).to(kind), scale, storage == "int8_dynamic")

    def to(self, device: torch.device) -> Stored:
        """It on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        return Stored(self.kept.to(device, non_blocking=True), scale, self.dynamic)

    def pinned(self, device: torch.device) -> Stored:
        """It in memory of the CPU that a CUDA device can copy from by itself; the scales, which are small, there."""
        kept = self.kept.cpu()
        scale = None if self.scale is None else self.scale.to(device)
        return Stored(kept.pin_memory() if device.type == "cuda" else kept, scale, self.dynamic)

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        kept = self.kept.to(device, non_blocking=True)
        if kept.dtype == dtype:
            return kept
        made = fresh(kept.shape, dtype).copy_(kept) if device.type == "cpu" else kept.to(dtype)
        return made if self.scale is None else made.mul_(self.scale.to(device))  # multiplied in float32

    def rows(self, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        places = ids.to(self.kept.device)
        rows = self.kept[places].to(device, dtype)
        return rows if self.scale is None else rows.mul_(self.scale[places.to(self.scale.device)].to(device))

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.scale is None or not self.dynamic:
            return super().linear(x, bias, dtype, device)
        flat = x.reshape(-1, x.shape[-1]).float()  # (tokens, inputs)
        scale = flat.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127.0
        tokens, weight = (flat / scale).round_(), self.kept.to(device)
        if _multiplies_integers(tokens, weight):
            y = torch._int_mm(tokens.to(torch.int8), weight.t()).float()
        else:  # the same sums
            y = F.linear(tokens, Stored(weight).tensor(torch.float32, device))
        y = y.mul_(scale).mul_(self.scale.to(device).t())  # (tokens, outputs)
        y = y if bias is None else y.add_(bias)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def _multiplies_integers(tokens: Tensor, weight: Tensor) -> bool:
    """Whether the device does so fast: a processor with AVX-512 VNNI; CUDA with more than 16 tokens, multiples of 8."""
    if tokens.device.type == "cpu":
        return torch.cpu._is_vnni_supported()
    return tokens.device.type == "cuda" and len(tokens) > 16 and not any(size % 8 for size in weight.shape)


class Offloaded(Weight):
    """`away` from the device, but while its network has its turn: then it is there, as `storage` keeps it."""

    turns = True

    def __init__(self, away: Weight, storage: str | None = None) -> None:
        self.away, self.storage, self.shape = away, storage, away.shape
        self._here: Stored | None = None
        self._turns = 0  # more than one where threads share it
        self._lock = threading.RLock()  # a run left behind may be found, and end its turn, while this one brings

    @property
    def now(self) -> Weight:
        """What it is made of at this moment. A layer that runs outside a turn works, and is slow."""
        return self._here or self.away

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.now.tensor(dtype, device)

    def rows(self, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.now.rows(ids, dtype, device)

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.now.linear(x, bias, dtype, device)

    def bring(self, dtype: torch.dtype, device: torch.device) -> None:
        with self._lock:
            self._turns += 1
            try:
                self._here = self._here or self._brought(dtype, device)
            except BaseException:
                self.drop()
                raise

    def drop(self) -> None:
        with self._lock:
            self._turns -= 1
            if not self._turns:
                self._here = None

    def _brought(self, dtype: torch.dtype, device: torch.device) -> Stored:
        if isinstance(self.away, Stored):
            return self.away.to(device)
        as_is = self.storage is None
        return Stored.of(self.away.tensor(dtype if as_is else torch.float32, device), self.storage)


class Ahead:
    """Knows in which order the weights of a network were asked for last time, and has the next one come meanwhile."""

    def __init__(self) -> None:
        self._after: dict[Weight, Weight] = {}
        self._last: Weight | None = None  # two threads at once spoil each other's guesses, and nothing else

    def following(self, weight: Weight) -> Weight | None:
        """What was asked for after it, if anything was."""
        if self._last is not None:
            self._after[self._last] = weight
        self._last = weight
        return self._after.get(weight)

    def fetch(self, weight: Weight, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weight; the next one is told that its time comes."""
        made = weight.tensor(dtype, device)
        if (following := self.following(weight)) is not None:
            following.soon()
        return made


class Streamed(Weight):
    """`away` from the device, fetched each time that its layer runs."""

    def __init__(self, away: Weight, ahead: Ahead) -> None:
        self.away, self.ahead, self.shape = away, ahead, away.shape

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.ahead.fetch(self.away, dtype, device)

    def rows(self, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.away.rows(ids, dtype, device)


class Held(nn.Module):
    """A layer whose weight is a Weight."""

    held: Weight
    dtype: torch.dtype  # that it computes in
    device: torch.device

    @property
    def weight(self) -> Tensor:
        """Made for whoever asks: ask once for each use."""
        return self.held.tensor(self.dtype, self.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Held:
        """`.to()`, `.float()` and the like."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.dtype, self.device = moved.dtype, moved.device
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight


class HeldLinear(Held, nn.Linear):  # type: ignore[override]  # `weight` can only be read
    def forward(self, x: Tensor) -> Tensor:
        return self.held.linear(x, self.bias, self.dtype, self.device)


class HeldConv2d(Held, Conv2d):  # type: ignore[override]  # `weight` can only be read
    pass


class HeldEmbedding(Held, nn.Embedding):  # type: ignore[override]  # `weight` can only be read
    def forward(self, ids: Tensor) -> Tensor:
        return self.held.rows(ids, self.dtype, self.device)


KINDS: dict[type[nn.Module], type[Held]] = {nn.Linear: HeldLinear, Conv2d: HeldConv2d, nn.Embedding: HeldEmbedding}


def holdable(layer: nn.Module, weight: Tensor) -> bool:
    """Whether this weight of the layer is large, and of a kind that can be held."""
    return type(layer) in KINDS and weight.numel() >= LEAST


def hold(layer: nn.Module, weight: Weight, dtype: torch.dtype, device: torch.device) -> None:
    """Put a Weight in the place of the layer's parameter."""
    if not isinstance(layer, Held):
        del layer._parameters["weight"]
        layer.__class__ = KINDS[type(layer)]
    layer.held, layer.dtype, layer.device = weight, dtype, device  # type: ignore[assignment]


def shape_of(layer: nn.Module) -> torch.Size:
    """Of its weight, without making it."""
    return layer.held.shape if isinstance(layer, Held) else layer.weight.shape  # type: ignore[return-value]


@contextmanager
def turn(*networks: nn.Module) -> Iterator[None]:
    """Inside it the networks' offloaded weights are on their device; after it, or an exception, no more."""
    held = [m for network in networks for m in network.modules() if isinstance(m, Held) and m.held.turns]
    with ExitStack() as brought:
        if any(layer.device.type == "cuda" for layer in held):
            brought.callback(torch.cuda.empty_cache)  # what torch reserves counts as taken
        for layer in held:
            layer.held.bring(layer.dtype, layer.device)
            brought.callback(layer.held.drop)
        yield


def fresh(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory on the CPU for a weight, which the system has back as soon as the tensor is let go; 4-D in channels_last.

    A large one lies in huge pages where the system has them: the first touch of each page of 4 KiB would cost more time
    than what is written there.
    """
    size = shape.numel() * dtype.itemsize
    if size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(memory, dtype=dtype)
    else:
        flat = torch.empty(shape.numel(), dtype=dtype)
    if len(shape) != 4:
        return flat.view(shape)
    outputs, inputs, height, width = shape
    return flat.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
