"""FSDP (Zhao et al. 2023; torch's fully_shard): what learns, its gradients, averages and moments split over the
processes, where `accelerate launch --use_fsdp` asks for it. The UNet is whole only while it computes.

Of the launcher's options only that it is asked for counts. So it is the same on GPUs and, over gloo, on CPUs, where
accelerate's own FSDP does nothing and says nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.errors import RequestError
from mezzotint.train.learner import Learner


def asked() -> bool:
    """Whether the launcher was told to."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shard(learner: Learner, device: torch.device) -> None:
    """Split the UNet, which lies on `device` whole and alike in every process.

    Raises RequestError for what cannot be split, or what the processes would not do equally often: a text encoder runs
    once a caption, and a budget of memory cuts batches, of which some are shorter.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    recipe = learner.recipe
    if learner.change != "full":
        raise RequestError("FSDP is for full, whose weights all learn; start this without --use_fsdp, with --multi_gpu")
    if recipe.optimiser != "adamw":
        raise RequestError(f"optimiser is {recipe.optimiser!r}; with FSDP it must be adamw")
    for name in ("text_encoder", "memory"):
        if getattr(recipe, name):
            raise RequestError(f"{name} is {getattr(recipe, name)!r}; with FSDP it must be left out")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for parameter in learner.unet.parameters():
        parameter.data = parameter.data.contiguous()  # it splits no channels_last weights
    # One unit, since a UNet's forward projects all blocks' keys and times before they run. Split again after each
    # forward: else one without a backward (validation) would leave whole weights that no step reaches.
    fully_shard(learner.unet, mesh=mesh, reshard_after_forward=True)


@contextmanager
def apart(learner: Learner) -> Iterator[None]:
    """Gradients are added up inside, and not yet among the processes."""
    unet: Any = learner.unet
    unet.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        unet.set_requires_gradient_sync(True)


@contextmanager
def gathered(learner: Learner) -> Iterator[None]:
    """Inside, what learns is whole in every process, to be drawn with and saved. All processes must come here."""
    split = make_whole(learner)
    try:
        yield
    finally:
        for module, name, parameter in split:
            module._parameters[name] = parameter


def make_whole(learner: Learner) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Put whole parameters in the place of split ones, which come back with where they were."""
    split = []
    for module in learner.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and hasattr(parameter, "full_tensor"):
                split.append((module, name, parameter))
                module._parameters[name] = nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)
    return split


def whole(value: Any) -> Any:
    """A tensor's parts from all processes put together, and so in lists and dicts. All processes must come here."""
    if isinstance(value, dict):
        return {key: whole(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(whole, value))
    return value.detach().full_tensor() if hasattr(value, "full_tensor") else value


def like(value: Tensor, target: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `target` is split."""
    if not hasattr(target, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    split: Any = target
    return distribute_tensor(value.to(split.device), split.device_mesh, split.placements)
