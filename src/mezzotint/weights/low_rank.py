"""LoRA files: a change of low rank, up times down, to the weights of a UNet (Hu et al. 2021, eq. 3).

Names are those of peft and diffusers, whose `pipe.load_lora_weights` reads what `save_lora` writes:

    unet.mid_block.resnets.0.conv1.lora_A.weight    down, (rank, inputs) or (rank, inputs, kh, kw)
    unet.mid_block.resnets.0.conv1.lora_B.weight    up, (outputs, rank) or (outputs, rank, 1, 1)

A file is its own scale: alpha equals the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from mezzotint.errors import CheckpointError
from mezzotint.models.offload import Held, Weight, hold, shape_of
from mezzotint.models.unet import UNet
from mezzotint.weights.files import TensorFile
from mezzotint.weights.model_plan import listed

Lora = dict[str, tuple[Tensor, Tensor]]  # layer of the UNet -> (down, up)
KEYS = "unet.{}.lora_A.weight", "unet.{}.lora_B.weight"


def layers(unet: UNet) -> dict[str, nn.Linear | nn.Conv2d]:
    """Name -> layer, in module order: all that a LoRA may change, every matrix and every convolution."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def changed(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """weight (outputs, inputs, ...) plus up (outputs, rank) times down (rank, inputs, ...); float32, in its format."""
    change = (up.flatten(1).float() @ down.flatten(1).float()).view(weight.shape)
    return weight.float() + change


class Changed(Weight):
    """One that is held, with a LoRA's change made each time that it is asked for."""

    def __init__(self, base: Weight, down: Tensor, up: Tensor) -> None:
        self.base, self.down, self.up, self.shape, self.turns = base, down, up, base.shape, base.turns

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        weight = self.base.tensor(dtype, device)
        return torch.empty_like(weight).copy_(changed(weight, self.down.to(device), self.up.to(device)))

    def bring(self, dtype: torch.dtype, device: torch.device) -> None:
        self.base.bring(dtype, device)

    def drop(self) -> None:
        self.base.drop()


def save_lora(path: str | Path, lora: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float16) -> None:
    """Write a .safetensors file. Raises CheckpointError where it cannot be written."""
    tensors = {
        key.format(name): tensor.detach().to("cpu", dtype).contiguous()
        for name, pair in lora.items()
        for key, tensor in zip(KEYS, pair, strict=True)
    }
    try:
        Path(path).write_bytes(save(tensors, metadata={"format": "pt"}))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def read_lora(path: Path, unet: UNet) -> Lora:
    """A file for this UNet, on the CPU. Raises CheckpointError for one that is missing, damaged or another UNet's."""
    file = TensorFile(path)
    lora: Lora = {}
    known: set[str] = set()
    for name, layer in layers(unet).items():
        keys = [key.format(name) for key in KEYS]
        present = [key for key in keys if key in file.entries]
        if len(present) == 1:
            raise CheckpointError(f"{path} has {present[0]} alone: lora_A and lora_B come in pairs")
        if not present:
            continue
        known.update(keys)
        (rank, *inputs), (outputs, *ranks) = (file.entries[key].shape or (0,) for key in keys)
        shape = shape_of(layer)
        if (outputs, *inputs) != shape or ranks != [rank, *(1 for _ in inputs[1:])]:
            shapes = " and ".join(str(file.entries[key].shape) for key in keys)
            raise CheckpointError(
                f"{path} is of another UNet: its {name} has the shapes {shapes}, and the weight to be changed "
                f"{tuple(shape)}"
            )
        lora[name] = file.read(keys[0]), file.read(keys[1])
    if foreign := [key for key in file.entries if key not in known]:
        raise CheckpointError(f"{path} holds tensors that the UNet has no place for: {listed(foreign)}")
    return lora


def merged(unet: UNet, lora: Mapping[str, tuple[Tensor, Tensor]]) -> UNet:
    """A second UNet with the changes made. What they do not touch is the first one's memory; the first stays as it is.

    The sum is made in float32 and rounded once to the weight's dtype.
    """
    with torch.device("meta"):
        second = UNet(unet.config).train(unet.training)
    for name, module in unet.named_modules():
        if isinstance(module, Held):
            weight = Changed(module.held, *lora[name]) if name in lora else module.held
            hold(second.get_submodule(name), weight, module.dtype, module.device)
    for name, parameter in unet.named_parameters():
        layer, _, leaf = name.rpartition(".")
        new = parameter.detach()
        if leaf == "weight" and layer in lora:
            down, up = (tensor.to(new.device) for tensor in lora[layer])
            new = torch.empty_like(new).copy_(changed(new, down, up).detach())
        second.get_submodule(layer).register_parameter(leaf, nn.Parameter(new, requires_grad=False))
    return second
