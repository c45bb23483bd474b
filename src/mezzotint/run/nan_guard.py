"""Nothing silently broken: what a network gave is looked at, and where it is no number the network runs in float32.

float16 ends at 65504, and activations of some networks do not: they become infinite, then NaN, and the picture black.
A part that gave such values is run again with a float32 copy of its network, made for this run alone, and its name is
upcast_parts for the picture's record. What is no number in float32 either is an error, never a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.guidance import Outputs
from mezzotint.diffusion.solvers import Step
from mezzotint.errors import MezzotintError
from mezzotint.models.unet import UNet

Network = TypeVar("Network", bound=nn.Module)
Made = TypeVar("Made")


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values are numbers; one look at the device, whatever the number of tensors."""
    sums = [tensor.float().sum() for tensor in tensors]  # NaN stays NaN in a sum, and infinity becomes one of the two
    return math.isfinite(float(torch.stack(sums).sum())) if sums else True


def in_float32(network: Network) -> Network:
    """A copy of the network in float32."""
    copy = deepcopy(network).float()
    if isinstance(copy, UNet):
        copy.fuse_projections()  # what was one weight became three
    return copy


def with_fp32_fallback(
    name: str,
    network: Network,
    run: Callable[[Network], Made],
    tensors: Callable[[Made], Iterable[Tensor]],
    upcast_parts: list[str],
) -> Made:
    """What `run` makes with the network; where its tensors are not finite, what it makes with a float32 copy of it.

    upcast_parts: gets the name of the part where it ran again. Raises MezzotintError where float32 does not help.
    """
    made = run(network)
    if finite(tensors(made)):
        return made
    if _is_float32(network):
        raise MezzotintError(_sentence(name))
    made = run(in_float32(network))
    if not finite(tensors(made)):
        raise MezzotintError(_sentence(name))
    upcast_parts.append(name)
    return made


def guard_outputs(unet: UNet, denoiser: Callable[[UNet], Denoiser], upcast_parts: list[str]) -> Outputs:
    """A denoiser's outputs, looked at after each call; from the first that is not finite on, a float32 UNet's.

    denoiser: makes one of a UNet. upcast_parts: gets "unet". Raises MezzotintError where float32 does not help.
    """
    current = denoiser(unet)

    def outputs(x: Tensor, sigma: float, count: int | None = None) -> tuple[Tensor, ...]:
        nonlocal current
        found = current.outputs(x, sigma, count)
        if finite(found):
            return found
        if not finite([x]):
            raise MezzotintError(
                f"what the UNet was to denoise at sigma {sigma:.4g} has values that are not numbers (NaN or infinite); "
                "the sampler made them, or the latents that were given"
            )
        if current.unet is unet and not _is_float32(unet):
            current = denoiser(in_float32(unet))
            found = current.outputs(x, sigma, count)
            if finite(found):
                upcast_parts.append("unet")
                return found
        raise MezzotintError(f"{_sentence('unet')} (at sigma {sigma:.4g})")

    return outputs


def require_finite(step: Step) -> Step:
    """The step. Raises MezzotintError where the solver made something that is no number of what were numbers."""
    if not finite([step.x, step.denoised]):
        raise MezzotintError(
            f"step {step.index + 1} gave values that are not numbers (NaN or infinite), though the UNet's were; a "
            "lower guidance_scale, another sampler or other sigmas may help"
        )
    return step


def _is_float32(network: nn.Module) -> bool:
    return next(network.parameters()).dtype in (torch.float32, torch.float64)


def _sentence(name: str) -> str:
    return (
        f"the {name} gave values that are not numbers (NaN or infinite), in float32 too; its weights are damaged, or "
        "something given to it is (an embedding, a LoRA)"
    )
