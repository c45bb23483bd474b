"""Changes to the weights of a network's layers: LoRA (Hu et al. 2021) and its relatives.

    W' = W + s ΔW,   and at run time   y' = W x + s ΔW x

    LowRank      ΔW = up down, or up mid down (a convolution between them)     LoRA; LoCon with a Tucker core
    Hadamard     ΔW = (w1_a w1_b) * (w2_a w2_b)                                LoHa, Hyeon-Woo et al. 2022
    Kronecker    ΔW = w1 ⊗ w2                                                  LoKr, Edalati et al. 2022
    Full         ΔW itself, for norms too
    Decomposed   ΔW = m (W + ΔV) / |W + ΔV| - W                                DoRA, Liu et al. 2024, eq. 5

and those of relative_adapters.py. They are applied in one of two ways. At run time, each layer concerned has a forward
hook that looks up its changes in a context variable, so they affect only the current thread and only inside the block:

    with apply_adapters(networks, changes):
        unet(...)

Or `merge` adds them to the weights, until `MergedWeights.undo` restores the original tensors.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.models.edits import OWN_HOOKS
from mezzotint.models.offload import OffloadedLayer, WeightSource, offload_weight, weight_shape

if TYPE_CHECKING:  # the UNet's layers import this module
    from mezzotint.models.unet import UNet

LAYERS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)  # the layers that can be changed
NAME = "adapted_name"  # attribute of a layer with a hook: its name in `Changes`


class Change:
    """A change to the weight of one layer, in any shape with the same elements in the same order."""

    def product(self) -> Tensor:
        """Return ΔW (outputs, ...) in float32, at scale 1."""
        raise NotImplementedError

    def shape(self) -> tuple[int, ...]:
        """Return the shape of ΔW without computing it.

        Raises:
            ValueError: If the shapes of the tensors do not match.
        """
        raise NotImplementedError

    def delta(self, weight: Tensor) -> Tensor:
        """Return ΔW for this weight, in its shape and float32, at scale 1."""
        return self.product().view(weight.shape)

    def effect(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return what the change adds to the layer's output for x, in the dtype of x, at scale 1."""
        made = self.product().view(weight_shape(layer))
        return _layer(layer, x, made.to(x.dtype))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether the change is one for a weight of this shape. Its tensors may be on the meta device."""
        return _is_shape_of(self.shape(), shape)

    def at(self, scale: float) -> tuple[Change, float]:
        """Return the change to apply at a scale, and the factor to apply it with."""
        return self, scale

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Change:
        """Return the change on a device, without a copy if it is there already. `dtype` is that of the layer there."""
        moved = {part.name: getattr(self, part.name) for part in fields(self)}  # type: ignore[arg-type]  # dataclasses
        return type(self)(**{n: v.to(device) if isinstance(v, Tensor | Change) else v for n, v in moved.items()})


def _is_shape_of(change: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Return whether a change of this shape has the elements of a weight of that shape, in the same order."""
    flat = (weight[0], math.prod(weight[1:]))
    return change in (weight, flat, (*weight, 1, 1)) or (*change, 1, 1) == weight


@dataclass(frozen=True, eq=False)
class LowRank(Change):
    """A product of low rank. With `mid`, the kernel size and stride of the convolution are mid's, otherwise down's.

    Attributes:
        down: Shape (rank, inputs, ...).
        up: Shape (outputs, rank, ...).
        mid: Shape (rank, rank, kh, kw), or None.
        factor: alpha / rank.
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None = None
    factor: float = 1.0

    def product(self) -> Tensor:
        up = self.up.float().flatten(1) * self.factor
        if self.mid is not None:
            return _tucker(self.mid, up.t(), self.down.flatten(1))
        return (up @ self.down.float().flatten(1)).view(len(up), *self.down.shape[1:])

    def effect(self, layer: nn.Module, x: Tensor) -> Tensor:
        down, up = self.down.to(x), self.up.to(x)
        if isinstance(layer, nn.Linear):
            return F.linear(F.linear(x, down.flatten(1)), up.flatten(1)).mul_(self.factor)
        up = up.view(*up.shape[:2], 1, 1)
        down = down if down.ndim == 4 else down[:, :, None, None]
        inner = (x, down) if self.mid is None else (F.conv2d(x, down), self.mid.to(x))
        return F.conv2d(_layer(layer, *inner).mul_(self.factor), up)  # (B, outputs, h, w)

    def shape(self) -> tuple[int, ...]:
        up, down = self.up.flatten(1), self.down.flatten(1)
        if self.mid is not None:
            return composed_shape(self.mid, up.t(), down)
        return (composed_shape(None, up, down)[0], *self.down.shape[1:])

    def fits(self, shape: tuple[int, ...]) -> bool:
        rest = tuple(self.down.shape[1:])
        whole = rest == shape[1:] or (*rest, 1, 1) == shape[1:] or rest == (*shape[1:], 1, 1)
        return (whole or self.mid is not None) and super().fits(shape)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LowRank:
        down, up, mid = (t if t is None else t.to(device, dtype) for t in (self.down, self.up, self.mid))
        assert down is not None and up is not None
        return LowRank(down, up, mid, self.factor)


@dataclass(frozen=True, eq=False)
class Hadamard(Change):
    """An elementwise product of two low-rank matrices.

    Without t1 and t2, w_a is (outputs, rank) and w_b (rank, inputs * kh * kw). With them, (rank, rank, kh, kw), w_a is
    (rank, outputs) and w_b (rank, inputs).
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None
    factor: float = 1.0

    def product(self) -> Tensor:
        first = _compose(self.t1, self.w1_a, self.w1_b)
        return first.mul_(_compose(self.t2, self.w2_a, self.w2_b)).mul_(self.factor)

    def shape(self) -> tuple[int, ...]:
        first, second = composed_shape(self.t1, self.w1_a, self.w1_b), composed_shape(self.t2, self.w2_a, self.w2_b)
        if first != second:
            raise ValueError(f"the products have the shapes {first} and {second}")
        return first


@dataclass(frozen=True, eq=False)
class Kronecker(Change):
    """A Kronecker product of w1 (a, b) and w2 (c, d, ...), in full or as low-rank products as in Hadamard."""

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    factor: float = 1.0

    def product(self) -> Tensor:
        first = _full_or_product(self.w1, None, self.w1_a, self.w1_b)
        second = _full_or_product(self.w2, self.t2, self.w2_a, self.w2_b)
        first = first[:, :, None, None] if second.ndim == 4 else first
        return torch.kron(first, second.contiguous()).mul_(self.factor)  # torch.kron fails for some strides

    def shape(self) -> tuple[int, ...]:
        first = _shape_or_composed(self.w1, None, self.w1_a, self.w1_b)
        second = _shape_or_composed(self.w2, self.t2, self.w2_a, self.w2_b)
        first = (*first, 1, 1) if len(second) == 4 else first
        return tuple(a * b for a, b in zip(first, second, strict=True))


@dataclass(frozen=True, eq=False)
class Full(Change):
    """The difference of the weights itself."""

    diff: Tensor

    def product(self) -> Tensor:
        return self.diff.float()

    def shape(self) -> tuple[int, ...]:
        return tuple(self.diff.shape)


class RelativeChange(Change):
    """A change whose ΔW depends on the weight."""

    def effect(self, layer: nn.Module, x: Tensor) -> Tensor:
        return _layer(layer, x, self.delta(layer.weight.detach()).to(x.dtype))  # type: ignore[operator]


@dataclass(frozen=True, eq=False)
class Decomposed(RelativeChange):
    """Another change, after which the weight's rows (with `inputs`, its columns) are rescaled to the norms `magnitude`.

    A scale s adds s times the resulting difference, so that scale 0 changes nothing and changes can be added.
    """

    change: Change
    magnitude: Tensor  # (outputs,), or (inputs,)
    inputs: bool = False

    def product(self) -> Tensor:
        return self.change.product()

    def shape(self) -> tuple[int, ...]:
        return self.change.shape()

    def delta(self, weight: Tensor) -> Tensor:
        before = weight.float()
        moved = before + self.change.delta(weight)
        axis = 1 if self.inputs else 0
        rest = [k for k in range(weight.ndim) if k != axis]
        length = moved.square().sum(rest, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return moved * (self.magnitude.float().view(length.shape) / length) - before

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.change.fits(shape) and self.magnitude.numel() == (shape[1] if self.inputs else shape[0])


@dataclass(frozen=True, eq=False)
class LayerChange:
    """The change that one file makes to one layer: to its weight, its bias, or both."""

    weight: Change | None = None
    bias: Tensor | None = None  # (outputs,)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LayerChange:
        """Return the change on a device, as `Change.to` does."""
        return LayerChange(self.weight and self.weight.to(device, dtype), _to(self.bias, device, dtype))

    def at(self, scale: float) -> list[tuple[LayerChange, float]]:
        """Return the changes that make up this one at a scale, each with the factor to apply it with."""
        weight, factor = self.weight.at(scale) if self.weight else (None, scale)
        if factor == scale or self.bias is None:
            return [(LayerChange(weight, self.bias), factor)]
        return [(LayerChange(weight), factor), (LayerChange(bias=self.bias), scale)]


Changes = Mapping[str, Sequence[tuple[LayerChange, float]]]  # layer ("unet.conv_in") -> its changes and their scales

_applied: ContextVar[Changes | None] = ContextVar("adapters", default=None)
_installing = threading.Lock()


@contextmanager
def apply_adapters(networks: Mapping[str, nn.Module], changes: Changes) -> Iterator[None]:
    """Apply changes to networks inside the block, in this thread.

    Args:
        networks: The networks by name ("unet", "text_encoder", ...).
        changes: The changes of each layer and their scales. Layers of other networks are ignored.
    """
    install_adapters(networks, changes)
    with active_adapters(changes):
        yield


def install_adapters(networks: Mapping[str, nn.Module], changes: Changes) -> None:
    """Register the hook on the layers to change. It stays, and does nothing outside of `active_adapters`."""
    for full in changes:
        name, _, path = full.partition(".")
        if name in networks:
            layer = networks[name].get_submodule(path)  # looked up anew, because it may have been replaced
            if not hasattr(layer, NAME):
                with _installing:
                    if not hasattr(layer, NAME):  # another thread may have been faster
                        setattr(layer, NAME, full)
                        layer.register_forward_hook(_hook)


@contextmanager
def active_adapters(changes: Changes) -> Iterator[None]:
    """Apply changes inside the block, in this thread, to layers on which `install_adapters` was called."""
    before = _applied.set(changes or None)
    try:
        yield
    finally:
        _applied.reset(before)


def is_adapted(layer: nn.Module) -> bool:
    """Return whether `apply_adapters` is changing the layer now, so that its output depends on more than its weight."""
    changes = _applied.get()
    return changes is not None and getattr(layer, NAME, None) in changes


def _hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """Add the effects of the current changes to the layer's output."""
    changes = _applied.get()
    found = changes.get(getattr(layer, NAME)) if changes else None
    if not found:
        return None
    (x,) = inputs
    for change, scale in found:
        if change.weight is not None:
            output = torch.add(output, change.weight.effect(layer, x), alpha=scale)
        if change.bias is not None:
            bias = change.bias.to(output)
            bias = bias if isinstance(layer, nn.Linear | nn.LayerNorm) else bias[:, None, None]
            output = torch.add(output, bias, alpha=scale)
    return output


OWN_HOOKS.add(_hook)


def _layer(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Return the layer's output for x with this weight and no bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    if isinstance(layer, nn.Conv2d):
        y: Tensor = layer._conv_forward(x, weight, None)  # with the padding of seamless pictures
        return y
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, None, layer.eps)
    assert isinstance(layer, nn.GroupNorm)
    return F.group_norm(x, layer.num_groups, weight, None, layer.eps)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Multiply core (i, j, kh, kw), a (i, outputs) and b (j, inputs) to (outputs, inputs, kh, kw) in float32."""
    return torch.einsum("ijkl,ip,jr->prkl", core.float(), a.float(), b.float())


def _compose(core: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a.float() @ b.float() if core is None else _tucker(core, a, b)


def _full_or_product(whole: Tensor | None, core: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    if whole is not None:
        return whole.float()
    assert a is not None and b is not None
    return _compose(core, a, b)


def composed_shape(core: Tensor | None, a: Tensor, b: Tensor) -> tuple[int, ...]:
    """Return the shape of `_compose(core, a, b)` without computing it.

    Multiplying on the meta device would import torch's compiler, which takes 2 s and 70 MB.

    Raises:
        ValueError: If the shapes do not match.
    """
    if core is None:
        (outputs, rank), (inner, inputs) = a.shape, b.shape
        ranks, kernel = rank == inner, []
    else:
        (first, outputs), (second, inputs), (i, j, *kernel) = a.shape, b.shape, core.shape
        ranks = (i, j) == (first, second) and len(kernel) == 2
    if not ranks:
        raise ValueError(f"the ranks of {tuple(a.shape)} and {tuple(b.shape)} do not match")
    return (outputs, inputs, *kernel)


def _shape_or_composed(
    whole: Tensor | None, core: Tensor | None, a: Tensor | None, b: Tensor | None
) -> tuple[int, ...]:
    if whole is not None:
        return tuple(whole.shape)
    assert a is not None and b is not None
    return composed_shape(core, a, b)


def _to(tensor: Tensor | None, device: torch.device, dtype: torch.dtype | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device, dtype)


# Merging


def add_scaled(tensor: Tensor, deltas: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return tensor + the sum of scale * delta, computed in float32, in the tensor's dtype and memory format."""
    total = tensor.float()
    for delta, scale in deltas:
        total = torch.add(total, delta.to(total), alpha=scale)
    return torch.empty_like(tensor).copy_(total)


class ChangedWeight(WeightSource):
    """An offloaded weight with changes, which are added each time it is read."""

    def __init__(self, base: WeightSource, changes: Sequence[tuple[Change, float]]) -> None:
        self.base, self.changes, self.shape, self.needs_onload = base, changes, base.shape, base.needs_onload

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        weight = self.base.tensor(dtype, device)
        return add_scaled(weight, [(change.to(device).delta(weight), scale) for change, scale in self.changes])

    def onload(self, dtype: torch.dtype, device: torch.device) -> None:
        self.base.onload(dtype, device)

    def offload(self) -> None:
        self.base.offload()


@dataclass(frozen=True, eq=False)
class MergedWeights:
    """The original weight and bias of each layer that `merge` changed."""

    layers: Sequence[tuple[nn.Module, WeightSource | nn.Parameter | None, nn.Parameter | None]]

    def undo(self) -> None:
        """Restore the original tensors, the same objects."""
        for layer, weight, bias in self.layers:
            if isinstance(weight, WeightSource):
                layer.weight_source = weight  # type: ignore[assignment]
            elif weight is not None:
                layer.register_parameter("weight", weight)
            if bias is not None:
                layer.register_parameter("bias", bias)


def merge(networks: Mapping[str, nn.Module], changes: Changes) -> MergedWeights:
    """Add changes to the weights of networks: W + s ΔW in float32, rounded once. No run may be in progress.

    Args:
        networks: The networks by name ("unet", "text_encoder", ...).
        changes: The changes of each layer and their scales. Layers of other networks are ignored.

    Returns:
        The original weights, to undo it.
    """
    kept: list[tuple[nn.Module, WeightSource | nn.Parameter | None, nn.Parameter | None]] = []
    for full, found in changes.items():
        name, _, path = full.partition(".")
        if name not in networks:
            continue
        layer = networks[name].get_submodule(path)
        weights = [(change.weight, scale) for change, scale in found if change.weight is not None]
        biases = [(change.bias, scale) for change, scale in found if change.bias is not None]
        before: WeightSource | nn.Parameter | None = None
        if weights and isinstance(layer, OffloadedLayer):
            before, layer.weight_source = layer.weight_source, ChangedWeight(layer.weight_source, weights)
        elif weights:
            before = layer.weight  # type: ignore[assignment]
            assert isinstance(before, nn.Parameter)
            own = before.detach()
            deltas = [(change.to(own.device).delta(own), scale) for change, scale in weights]
            layer.register_parameter(
                "weight", nn.Parameter(add_scaled(own, deltas), requires_grad=before.requires_grad)
            )
        bias: Any = None
        if biases:
            bias = layer.bias
            new = nn.Parameter(add_scaled(bias.detach(), biases), requires_grad=bias.requires_grad)
            layer.register_parameter("bias", new)
        kept.append((layer, before, bias))
    return MergedWeights(kept)


def merge_copy(unet: UNet, changes: Changes) -> UNet:
    """Return a second UNet with the changes merged; the first stays as it is and shares every weight they do not touch.

    Args:
        unet: The network, on any device; its weights may be offloaded.
        changes: The changes of each layer ("unet.conv_in") and their scales.

    Returns:
        A UNet without gradients and without the first one's hooks.
    """
    with torch.device("meta"):
        copy = type(unet)(unet.config).train(unet.training)
    for name, module in unet.named_modules():
        if isinstance(module, OffloadedLayer):
            offload_weight(copy.get_submodule(name), module.weight_source, module.dtype, module.device)
    for name, parameter in unet.named_parameters():
        layer, _, leaf = name.rpartition(".")
        copy.get_submodule(layer).register_parameter(leaf, nn.Parameter(parameter.detach(), requires_grad=False))
    merge({"unet": copy}, changes)
    return copy
