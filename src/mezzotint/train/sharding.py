"""FSDP (Zhao et al. 2023; torch's fully_shard) for full fine-tuning under `accelerate launch --use_fsdp`.

The UNet's parameters, gradients, averages and optimiser moments are split over the processes; the UNet is whole only
while it computes. Of the launcher's FSDP options only --use_fsdp itself is read, so sharding works the same on GPUs and
over gloo on CPUs, where accelerate's own FSDP silently does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.errors import RequestError
from mezzotint.train.trainable import TrainableModel


def is_requested() -> bool:
    """Return whether the launcher was started with --use_fsdp."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shard(model: TrainableModel, device: torch.device) -> None:
    """Shard the UNet, which must be whole and identical on `device` in every process.

    Raises:
        RequestError: for a recipe that FSDP does not support. A trained text encoder runs once per caption, and a
            memory budget splits batches of unequal length: both would make processes synchronise unequally often.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    recipe = model.recipe
    if model.change != "full":
        raise RequestError("FSDP supports only full fine-tuning; start this run with --multi_gpu instead of --use_fsdp")
    if recipe.optimiser != "adamw":
        raise RequestError(f"optimiser is {recipe.optimiser!r}; with FSDP it must be adamw")
    for name in ("text_encoder", "memory"):
        if getattr(recipe, name):
            raise RequestError(f"{name} is {getattr(recipe, name)!r}; with FSDP it must not be set")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for parameter in model.unet.parameters():
        parameter.data = parameter.data.contiguous()  # fully_shard does not accept channels_last weights
    # One unit, since the UNet projects all blocks' keys and times before they run. Resharded after each forward:
    # otherwise a forward without backward (validation) would leave whole weights that no optimiser step updates.
    fully_shard(model.unet, mesh=mesh, reshard_after_forward=True)


@contextmanager
def no_sync(model: TrainableModel) -> Iterator[None]:
    """Accumulate gradients inside without reducing them over the processes."""
    unet: Any = model.unet
    unet.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        unet.set_requires_gradient_sync(True)


@contextmanager
def gather_parameters(model: TrainableModel) -> Iterator[None]:
    """Give every process whole parameters inside, for sampling and saving. A collective: all processes must enter."""
    sharded = unshard(model)
    try:
        yield
    finally:
        for module, name, parameter in sharded:
            module._parameters[name] = parameter


def unshard(model: TrainableModel) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Replace sharded parameters by whole ones. Return (module, name, sharded parameter) of each."""
    sharded = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and hasattr(parameter, "full_tensor"):
                sharded.append((module, name, parameter))
                module._parameters[name] = nn.Parameter(full_tensors(parameter), requires_grad=parameter.requires_grad)
    return sharded


def full_tensors(value: Any) -> Any:
    """Gather sharded tensors, also in nested lists and dicts. A collective: all processes must call it."""
    if isinstance(value, dict):
        return {key: full_tensors(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(full_tensors, value))
    return value.detach().full_tensor() if hasattr(value, "full_tensor") else value


def shard_like(value: Tensor, target: Tensor) -> Tensor:
    """Return this process's shard of a whole tensor, if `target` is sharded; otherwise the tensor itself."""
    if not hasattr(target, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = target
    return distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements)
