"""Detect what a user has changed in a network: hooks, replaced modules, edited weights.

Fast paths compute a layer's output without calling it, or cache what was computed from weights. They are taken only if
that makes no difference: if the layer has no hook and its original class, and the weights have not changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from mezzotint.models.offload import OffloadedLayer, StoredWeight, WeightSource

OWN_HOOKS: set[Callable[..., Any]] = set()  # hooks of this package, which the fast paths know of
SAMPLE = 32  # elements of a tensor, spread over it: enough to notice a layer that is rewritten
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes; NaN is not equal to itself
GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling the module does more than its class's `forward`: a hook, or a `forward` of its own."""
    return _has_own_hooks(module) or any(GLOBAL_HOOKS)


def _has_own_hooks(module: nn.Module) -> bool:
    return bool(
        (module._forward_hooks and not OWN_HOOKS.issuperset(module._forward_hooks.values()))
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_customized(network: nn.Module) -> bool:
    """Return whether a module of a network has a hook, or is of a class that is neither PyTorch's nor ours."""
    modules = _walk(network)
    classes = {type(module) for module in modules}
    own = ("torch.nn.modules.", "mezzotint.")
    return (
        any(GLOBAL_HOOKS)
        or any(map(_has_own_hooks, modules))
        or not all(kind.__module__.startswith(own) for kind in classes)
    )


def _walk(network: nn.Module) -> list[nn.Module]:
    """Return every module; `network.modules()` also makes their names, which takes several times as long."""
    found = [network]
    for module in found:  # which grows
        found += [inner for inner in module._modules.values() if inner is not None]
    return found


class Snapshot:
    """The state of networks, to find out later whether anything was changed.

    For each module it holds its identity and class, for each parameter and buffer its identity, address and version,
    which PyTorch counts up at each write in place, `load_state_dict` included. A weak reference tells a tensor from a
    later one at the same address. Writes through `tensor.data` are not counted; they show in a sample of the values.
    """

    def __init__(self, *networks: nn.Module) -> None:
        items = [*_items(networks)]
        self._references = [weakref.ref(item) for item, _ in items]
        self._states = [state for _, state in items]
        self._places = _places(items)
        self._samples = self._sample(items)

    def matches(self, *networks: nn.Module) -> bool:
        """Return whether the networks are the same, with the same modules and values."""
        items = [*_items(networks)]
        return (
            len(items) == len(self._states)
            and all(
                reference() is item and before == state
                for reference, before, (item, state) in zip(self._references, self._states, items, strict=True)
            )
            and all(map(torch.equal, self._samples, self._sample(items)))
        )

    @torch.no_grad()
    def _sample(self, items: list[tuple[Any, Any]]) -> list[Tensor]:
        """Return the bits of the sampled elements, for each device and dtype in one tensor."""
        samples = []
        for (_, dtype), places in self._places.items():
            elements = [
                items[number][0].as_strided((count,), (stride,)) if is_dense else items[number][0].reshape(-1)[::stride]
                for number, count, stride, is_dense in places
            ]
            samples.append(torch.cat(elements).view(BITS[dtype.itemsize]))
        return samples


def _places(items: list[tuple[Any, Any]]) -> dict[tuple[torch.device, torch.dtype], list[tuple[int, int, int, bool]]]:
    """Return by device and dtype each tensor's number, the count and stride of its sample, and whether it is dense."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, int, int, bool]]] = {}
    for number, (tensor, _) in enumerate(items):
        if type(tensor) in (nn.Parameter, Tensor) and tensor.dtype.itemsize in BITS and not tensor.is_meta:
            size = tensor.numel()
            stride = 61 * size // (64 * SAMPLE) | 1  # not next to a multiple of the length of a row, so in all columns
            span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            place = number, -(-size // stride), stride, span == size  # elements in any order, without gaps
            groups.setdefault((tensor.device, tensor.dtype), []).append(place)
    return groups


def _items(networks: tuple[nn.Module, ...]) -> Iterator[tuple[Any, Any]]:
    """Yield every module, tensor and weight source with what shows a change of it."""
    for network in networks:
        for module in _walk(network):
            yield module, type(module)
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    yield tensor, tensor_state(tensor)
            if isinstance(module, OffloadedLayer):
                yield module.weight_source, source_state(module.weight_source)


def tensor_state(tensor: Tensor) -> tuple[int, int, torch.dtype, torch.Size]:
    """Return what changes when a tensor is written to, moved, cast or reshaped."""
    return _address(tensor), 0 if tensor.is_inference() else tensor._version, tensor.dtype, tensor.shape


def source_state(source: WeightSource) -> object:
    """Return what changes when the weight of an offloaded layer is written to."""
    return tensor_state(source.data) if isinstance(source, StoredWeight) else None


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a wrapper without memory of its own, as of quantized tensors
        return id(tensor)
