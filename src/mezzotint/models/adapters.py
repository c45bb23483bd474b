"""Changes to the layers of a network that a run can put on: LoRA (Hu et al. 2021) and its relatives.

    W' = W + s ΔW,   and at run time   y' = W x + s ΔW x

    LowRank      ΔW = up down, or up mid down (a convolution between them)     LoRA; LoCon with a Tucker core
    Hadamard     ΔW = (w1_a w1_b) * (w2_a w2_b)                                LoHa, Hyeon-Woo et al. 2022
    Kronecker    ΔW = w1 ⊗ w2                                                  LoKr, Edalati et al. 2022
    Full         ΔW as it is, of a norm's weight too
    Decomposed   ΔW = m (W + ΔV) / |W + ΔV| - W                                DoRA, Liu et al. 2024, eq. 5

The layers that a set of changes touches get a forward hook, which looks for the changes in a context variable. So they
are this thread's and this run's alone, and are put on, rescaled and taken off by setting the variable:

    with apply_adapters(networks, changes):
        unet(...)

Or they are made part of the weights (`merge`), until `MergedWeights.undo` puts the tensors back that were there.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.models.offload import OffloadedLayer, WeightSource, offload_weight, weight_shape

if TYPE_CHECKING:  # the UNet's layers import this module
    from mezzotint.models.unet import UNet

LAYERS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)  # all that can be changed
NAME = "adapted_name"  # attribute of a layer with a hook: what `Changes` call it
HOOKED = "adapted_layers"  # attribute of a network: the names of its layers that have it


class Change:
    """A change to the weight of one layer, of any shape that has the weight's numbers in its order."""

    def product(self) -> Tensor:
        """ΔW (outputs, ...) float32, for the scale 1."""
        raise NotImplementedError

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW for this weight, in its shape, float32, for the scale 1."""
        return self.product().view(weight.shape)

    def effect(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What it adds to the layer's output for x, in the dtype of x, for the scale 1."""
        made = self.product().view(weight_shape(layer))
        return _layer(layer, x, made.to(x.dtype))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Change:
        """It on a device, in memory that is shared where it is there already; dtype: what its factors meet there."""
        moved = {part.name: getattr(self, part.name) for part in fields(self)}  # type: ignore[arg-type]  # dataclasses
        return type(self)(**{n: v.to(device) if isinstance(v, Tensor | Change) else v for n, v in moved.items()})


@dataclass(frozen=True, eq=False)
class LowRank(Change):
    """down (rank, inputs, ...), up (outputs, rank, ...), mid (rank, rank, kh, kw); the strides are down's, or mid's."""

    down: Tensor
    up: Tensor
    mid: Tensor | None = None
    factor: float = 1.0  # alpha / rank

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

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LowRank:
        down, up, mid = (t if t is None else t.to(device, dtype) for t in (self.down, self.up, self.mid))
        assert down is not None and up is not None
        return LowRank(down, up, mid, self.factor)


@dataclass(frozen=True, eq=False)
class Hadamard(Change):
    """w_a (outputs, rank), w_b (rank, inputs * kh * kw); with t (rank, rank, kh, kw): w_a (rank, outputs), w_b (rank,
    inputs).
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


@dataclass(frozen=True, eq=False)
class Kronecker(Change):
    """w1 (a, b) and w2 (c, d, ...), whole or as products of low rank; t2 as in Hadamard."""

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
        return torch.kron(first, second).mul_(self.factor)


@dataclass(frozen=True, eq=False)
class Full(Change):
    """The difference itself."""

    diff: Tensor

    def product(self) -> Tensor:
        return self.diff.float()


@dataclass(frozen=True, eq=False)
class Decomposed(Change):
    """Another change, after which each row of the weight (inputs: each column) has the length `magnitude`.

    For a scale s the weight is moved by s times the way there, so that 0 is none of it, and changes add up.
    """

    change: Change
    magnitude: Tensor  # (outputs,), or (inputs,)
    inputs: bool = False

    def product(self) -> Tensor:
        return self.change.product()

    def delta(self, weight: Tensor) -> Tensor:
        before = weight.float()
        moved = before + self.change.delta(weight)
        axis = 1 if self.inputs else 0
        rest = [k for k in range(weight.ndim) if k != axis]
        length = moved.square().sum(rest, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return moved * (self.magnitude.float().view(length.shape) / length) - before

    def effect(self, layer: nn.Module, x: Tensor) -> Tensor:
        return _layer(layer, x, self.delta(layer.weight.detach()).to(x.dtype))  # type: ignore[operator]


@dataclass(frozen=True, eq=False)
class LayerChange:
    """What one file says of one layer: a change of its weight, of its bias, or of both."""

    weight: Change | None = None
    bias: Tensor | None = None  # (outputs,)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LayerChange:
        """It elsewhere."""
        return LayerChange(self.weight and self.weight.to(device, dtype), _to(self.bias, device, dtype))


Changes = Mapping[str, Sequence[tuple[LayerChange, float]]]  # layer, as "unet.conv_in" -> each change and its scale

_applied: ContextVar[Changes | None] = ContextVar("adapters", default=None)
_installing = threading.Lock()
_merges = itertools.count(1)


@contextmanager
def apply_adapters(networks: Mapping[str, nn.Module], changes: Changes) -> Iterator[None]:
    """Has the networks, "unet" and the like, run with these changes inside, in this thread."""
    for name, network in networks.items():
        _install(name, network, changes)
    before = _applied.set(changes or None)
    try:
        yield
    finally:
        _applied.reset(before)


def is_adapted(layer: nn.Module) -> bool:
    """Whether this run changes the layer: then its weight alone does not say what it does."""
    changes = _applied.get()
    return changes is not None and getattr(layer, NAME, None) in changes


def _install(name: str, network: nn.Module, changes: Changes) -> None:
    """Give the layers that will be changed the hook, which stays: outside of `apply_adapters` it does nothing."""
    prefix = f"{name}."
    known: set[str] = vars(network).setdefault(HOOKED, set())
    missing = [full for full in changes if full not in known and full.startswith(prefix)]
    if missing:
        with _installing:
            for full in missing:
                layer = network.get_submodule(full.removeprefix(prefix))
                if not hasattr(layer, NAME):  # else another thread was here meanwhile
                    setattr(layer, NAME, full)
                    layer.register_forward_hook(_hook)
            known.update(missing)


def _hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """Adds what this run's changes of the layer do."""
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


def _layer(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What the layer would make of x with this weight and no bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    if isinstance(layer, nn.Conv2d):
        y: Tensor = layer._conv_forward(x, weight, None)  # with its sides joined where they are
        return y
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, None, layer.eps)
    assert isinstance(layer, nn.GroupNorm)
    return F.group_norm(x, layer.num_groups, weight, None, layer.eps)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core (i, j, kh, kw), a (i, outputs), b (j, inputs) -> (outputs, inputs, kh, kw), float32."""
    return torch.einsum("ijkl,ip,jr->prkl", core.float(), a.float(), b.float())


def _compose(core: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a.float() @ b.float() if core is None else _tucker(core, a, b)


def _full_or_product(whole: Tensor | None, core: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    if whole is not None:
        return whole.float()
    assert a is not None and b is not None
    return _compose(core, a, b)


def _to(tensor: Tensor | None, device: torch.device, dtype: torch.dtype | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device, dtype)


# MergedWeights into the weights


def add_scaled(tensor: Tensor, deltas: Sequence[tuple[Tensor, float]]) -> Tensor:
    """tensor + the sum of scale * delta, in float32, rounded once to the tensor's dtype and in its memory format."""
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
    """What `merge` has put aside: for each layer its own weight and bias."""

    layers: Sequence[tuple[nn.Module, WeightSource | nn.Parameter | None, nn.Parameter | None]]
    networks: Sequence[nn.Module]

    def undo(self) -> None:
        """The tensors that were there are put back, the same objects."""
        for layer, weight, bias in self.layers:
            if isinstance(weight, WeightSource):
                layer.weight_source = weight  # type: ignore[assignment]
            elif weight is not None:
                layer.register_parameter("weight", weight)
            if bias is not None:
                layer.register_parameter("bias", bias)
        _stamp(self.networks)


def merge(networks: Mapping[str, nn.Module], changes: Changes) -> MergedWeights:
    """Make the changes part of the networks' weights: W + s ΔW in float32, rounded once. No run may be under way."""
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
    _stamp([*networks.values()])
    return MergedWeights(kept, [*networks.values()])


def merge_copy(unet: UNet, changes: Changes) -> UNet:
    """Return a second UNet with the changes merged; the first stays as it is and shares every weight they do not touch.

    Args:
        unet: The network, on any device; its weights may be offloaded.
        changes: Layer, as "unet.conv_in" -> each change and its scale.

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


def _stamp(networks: Sequence[nn.Module]) -> None:
    """What is kept of the networks' work, by their weights' places in memory, is no longer theirs."""
    for network in networks:
        network.weights_version = next(_merges)  # type: ignore[assignment]


def weights_version(network: nn.Module) -> int:
    """Another number after each merge and each undoing; 0 before the first."""
    return getattr(network, "weights_version", 0)
