"""Guard against NaN: check what a network returns, and run it in float32 if a value is not finite.

float16 ends at 65504, and the activations of some networks exceed it: they become infinite, then NaN, and the picture
turns black. A network that returned such values runs again as a float32 copy, made for this run alone, and its name is
added to `upcast_parts` for the picture's record. What is not finite in float32 either is an error, never a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.guidance import Outputs
from mezzotint.diffusion.solvers import Step
from mezzotint.errors import MezzotintError
from mezzotint.models.controlnet import ControlRun
from mezzotint.models.t2i_adapter import T2IRun
from mezzotint.models.unet import DownPath, UNet

Network = TypeVar("Network", bound=nn.Module)
Output = TypeVar("Output")


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all values are finite; the device is synchronized once, whatever the number of tensors."""
    sums = [tensor.float().sum() for tensor in tensors]  # NaN stays NaN in a sum, and infinity becomes one of the two
    return math.isfinite(float(torch.stack(sums).sum())) if sums else True


def copy_in_float32(network: Network) -> Network:
    """Return a copy of the network in float32."""
    copy = deepcopy(network).float()
    if isinstance(copy, DownPath):
        copy.fuse_projections()  # the fused weight was copied as three
    return copy


def with_fp32_fallback(
    name: str,
    network: Network,
    run: Callable[[Network], Output],
    tensors: Callable[[Output], Iterable[Tensor]],
    upcast_parts: list[str],
) -> Output:
    """Run a network, and again in float32 if its output is not finite.

    Args:
        name: The network's name.
        network: The network.
        run: Computes the output with a network.
        tensors: Returns the tensors of an output.
        upcast_parts: Receives the name if the network ran in float32.

    Raises:
        MezzotintError: If the output is not finite in float32 either.
    """
    output = run(network)
    if all_finite(tensors(output)):
        return output
    if _is_float32(network):
        raise MezzotintError(_sentence(name))
    output = run(copy_in_float32(network))
    if not all_finite(tensors(output)):
        raise MezzotintError(_sentence(name))
    upcast_parts.append(name)
    return output


def guard_outputs(
    unet: UNet,
    controls: Sequence[ControlRun | T2IRun],
    denoiser: Callable[[UNet, Sequence[ControlRun | T2IRun]], Denoiser],
    upcast_parts: list[str],
    name: str = "unet",
) -> Outputs:
    """Return a denoiser's outputs, checked at each call; from the first one that is not finite on, in float32.

    Args:
        unet: The network.
        controls: The ControlNets and T2I-Adapters, which run in float32 with the UNet.
        denoiser: Makes a denoiser of a UNet and ControlNets.
        upcast_parts: Receives the name if it ran in float32.
        name: What it is called.

    Returns:
        A function like `Denoiser.outputs`. It raises MezzotintError if its input is not finite, or its output is not in
        float32 either.
    """
    current = denoiser(unet, controls)

    def outputs(x: Tensor, sigma: float, count: int | None = None, perturbed: int = 0) -> tuple[Tensor, ...]:
        nonlocal current
        found = current.outputs(x, sigma, count, perturbed)
        if all_finite(found):
            return found
        if not all_finite([x]):
            raise MezzotintError(
                f"the UNet's input at sigma {sigma:.4g} has values that are not finite (NaN or infinite); they come "
                "from the sampler, or from the latents that were given"
            )
        if current.unet is unet and not _is_float32(unet):
            # each kind of control takes its own kind of network
            copies = [control.of(copy_in_float32(control.network)) for control in controls]  # type: ignore[arg-type]
            current = denoiser(copy_in_float32(unet), copies)
            found = current.outputs(x, sigma, count, perturbed)
            if all_finite(found):
                upcast_parts.append(name)
                return found
        raise MezzotintError(f"{_sentence(name)} (at sigma {sigma:.4g})")

    return outputs


def require_finite(step: Step) -> Step:
    """Return the step.

    Raises:
        MezzotintError: If the solver made values that are not finite from the UNet's, which were.
    """
    if not all_finite([step.x, step.denoised]):
        raise MezzotintError(
            f"step {step.index + 1} has values that are not finite (NaN or infinite), although the UNet's output is "
            "finite; a lower guidance_scale, another sampler or other sigmas may help"
        )
    return step


def _is_float32(network: nn.Module) -> bool:
    return next(network.parameters()).dtype in (torch.float32, torch.float64)


def _sentence(name: str) -> str:
    return (
        f"the {name} returned values that are not finite (NaN or infinite), in float32 too; its weights are damaged, "
        "or something that it is given is, such as an embedding or a LoRA"
    )
