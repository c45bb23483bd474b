"""Solve a run: the guided denoiser and the noise of a plan, and the solver that takes its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mezzotint.denoiser import Denoiser, Timeline, timestep_at
from mezzotint.diffusion.guidance import METHODS, Guided, Outputs, interpolate_scale, is_guided, step_index
from mezzotint.diffusion.noise import BrownianNoise, SeededNoise
from mezzotint.diffusion.solvers import SOLVERS, Denoise, Noise, Step
from mezzotint.errors import RequestError
from mezzotint.models.controlnet import ControlRun
from mezzotint.models.ip_adapter import ImagePrompt
from mezzotint.models.t2i_adapter import T2IRun
from mezzotint.models.unet import UNet
from mezzotint.run.batches import Batch
from mezzotint.run.initial import InitialLatents
from mezzotint.run.nan_guard import guard_outputs, require_finite
from mezzotint.run.plan import RunPlan
from mezzotint.run.refiners import Handover
from mezzotint.run.regions import part_weights
from mezzotint.samplers import OWN


@dataclass(frozen=True, eq=False)
class Refining:
    """The refiner of a pass.

    Attributes:
        unet: Its network.
        conditions: The result of its `PromptEncoder.encode_batch`.
        take_over: Called before its first step.
    """

    unet: UNet
    conditions: list[Timeline]
    take_over: Callable[[], None]


def solve(
    batch: Batch,
    unet: UNet,
    conditions: list[Timeline],
    initial: InitialLatents,
    noise: SeededNoise,
    split: bool,
    controls: Sequence[ControlRun | T2IRun] = (),
    images: Sequence[ImagePrompt] = (),
    refining: Refining | None = None,
) -> Iterator[Step]:
    """Return an iterator of the steps of one pass, from the initial latents to the last noise level.

    Args:
        batch: The batch; its `upcast_parts` receives "unet" if that had to run in float32.
        unet: The network.
        conditions: The result of `PromptEncoder.encode_batch`.
        initial: What the run starts from.
        noise: The noise of the run.
        split: Whether the network is given one condition at a time.
        controls: The ControlNets and T2I-Adapters.
        images: The pictures that the run is prompted with; a refiner does not see them.
        refining: The refiner, which takes the last steps.
    """
    plan, stream = batch.plan, step_noise(batch, noise)
    outputs = unet_outputs(batch, unet, conditions, initial, split, controls, images)
    denoise = initial.wrap(guide(plan, outputs, initial.x.device))
    if plan.refined and plan.switch and refining:
        outputs = unet_outputs(batch, refining.unet, refining.conditions, initial, split, plan=plan.refined)
        last = initial.wrap(guide(plan.refined, outputs, initial.x.device))
        if plan.switch.step is None:
            denoise = Handover(denoise, last, plan.switch.sigma, refining.take_over)
        else:
            steps = _take_both(plan, plan.switch.step, (denoise, last), initial.x, stream, refining.take_over)
            return _check_steps(plan, initial, steps)
    return _check_steps(plan, initial, _take_steps(plan, denoise, initial.x, stream))


def _take_steps(plan: RunPlan, denoise: Denoise, x: Tensor, noise: Noise) -> Iterator[Step]:
    """Return an iterator of the steps of a plan's solver."""
    name, own = plan.sampler.solver, OWN.get(plan.sampler.solver)
    solver = own.function if own else SOLVERS[name]
    steps = solver(denoise, x, plan.sigmas, noise, **plan.solver_options)
    return _check_own_steps(name, x, steps) if own else steps


def _take_both(
    plan: RunPlan,
    first_steps: int,
    denoisers: tuple[Denoise, Denoise],
    x: Tensor,
    noise: Noise,
    take_over: Callable[[], None],
) -> Iterator[Step]:
    """Yield the steps of two runs of the solver on one list of noise levels, the second of which begins anew.

    Args:
        plan: The plan of both.
        first_steps: Number of steps of the first run, whose solver knows the whole list.
        denoisers: The denoiser of each run.
        x: Latents at the first noise level.
        noise: The noise of both.
        take_over: Called before the second run, if that has steps.
    """
    index, level = 0, plan.sigmas[first_steps]
    for step in _take_steps(plan, denoisers[0], x, noise) if first_steps else ():
        yield step
        x, index = step.x, step.index + 1
        if step.sigma <= level:
            break
    if first_steps == len(plan.sigmas) - 1:
        return
    take_over()
    rest = replace(plan, sigmas=plan.sigmas[first_steps:])
    for step in _take_steps(rest, denoisers[1], x, noise):
        yield replace(step, index=index + step.index)


def unet_outputs(
    batch: Batch,
    unet: UNet,
    conditions: list[Timeline],
    initial: InitialLatents,
    split: bool,
    controls: Sequence[ControlRun | T2IRun] = (),
    images: Sequence[ImagePrompt] = (),
    plan: RunPlan | None = None,
) -> Outputs:
    """Return the UNet's outputs under these conditions, guarded against values that are not finite.

    With a `plan` that is not the batch's, it is the refiner's.
    """
    name = "unet" if plan is None else "refiner"
    plan = plan or batch.plan

    def denoiser(unet: UNet, controls: Sequence[ControlRun | T2IRun]) -> Denoiser:
        return Denoiser(
            unet,
            plan.schedule,
            plan.prediction,
            conditions,
            timestep=plan.sampler.timestep,
            levels=plan.sigmas,
            inpaint_channels=initial.inpaint_channels,
            split=split,
            guidance_scale=partial(guidance_scale_at, plan) if plan.model.embeds_guidance else None,
            controls=controls,
            prompts=len(plan.weights),
            perturbed_layers=plan.request.pag_layers or (),
            freeu=plan.request.freeu,
            image_prompts=images,
        )

    return guard_outputs(unet, controls, denoiser, batch.upcast_parts, name)


def guidance_scale_at(plan: RunPlan, sigma: float) -> float:
    """Return the guidance scale at a noise level, for a UNet that takes it as an input; 1 where guidance is off."""
    step, steps, request = step_index(sigma, plan.sigmas), len(plan.sigmas) - 1, plan.request
    if not is_guided(sigma, step, steps, request.guidance_interval, request.guidance_steps):
        return 1.0
    return interpolate_scale(plan.guidance_scales, step, steps)


def pag_scale_at(plan: RunPlan, sigma: float) -> float:
    """Return the scale of perturbed-attention guidance at a noise level; the adaptive scale lowers it by timesteps."""
    scale, decline = plan.request.pag_scale or 0.0, plan.request.pag_adaptive_scale or 0.0
    if not decline:
        return scale
    timestep = timestep_at(sigma, plan.schedule, plan.sampler.timestep, plan.sigmas)
    return max(scale - decline * (1000.0 - timestep), 0.0)


def guide(plan: RunPlan, outputs: Outputs, device: torch.device) -> Guided:
    """Return the guided denoiser of a plan."""
    request = plan.request
    return Guided(
        outputs,
        plan.prediction,
        1.0 if plan.model.embeds_guidance else plan.guidance_scales,
        request.guidance_rescale or 0.0,
        request.guidance_interval,
        request.guidance_steps,
        plan.sigmas,
        METHODS[request.guidance_method or "cfg"](**plan.method_options),
        part_weights(plan, device),
        mimic_scale=request.mimic_scale,
        threshold_percentile=request.threshold_percentile or 0.0,
        pag_scale=partial(pag_scale_at, plan) if request.pag_scale else None,
    )


def step_noise(batch: Batch, noise: SeededNoise) -> Noise:
    """Return the noise of the solver's steps: the run's own stream, or a Brownian path.

    The path spans the whole list of noise levels, as in diffusers: it does not depend on where a run from a picture
    begins.
    """
    plan = batch.plan
    if plan.sampler.noise == "seeded":
        return noise
    midpoints = plan.sampler.noise == "brownian midpoints"
    path = BrownianNoise(batch.seeds, noise.whole_shape, plan.all_sigmas, noise.device, midpoints=midpoints)
    return lambda sigma, sigma_next: noise.crop(path(sigma, sigma_next))


def _check_own_steps(name: str, x: Tensor, steps: object) -> Iterator[Step]:
    """Yield the steps of a user's own solver.

    Raises:
        RequestError: If it yields something else, another shape, or nothing.
    """
    wanted = f"the solver {name!r} {{}}; it must be a generator that yields Step(index, sigma, x, denoised)"
    if not isinstance(steps, Iterator):
        raise RequestError(wanted.format(f"returned a {type(steps).__name__}"))
    step = None
    for step in steps:
        if not isinstance(step, Step):
            raise RequestError(wanted.format(f"yielded a {type(step).__name__}"))
        if step.x.shape != x.shape:
            raise RequestError(wanted.format(f"yielded x of shape {tuple(step.x.shape)} for {tuple(x.shape)}"))
        yield step
    if step is None:
        raise RequestError(wanted.format("yielded no step"))


def _check_steps(plan: RunPlan, initial: InitialLatents, steps: Iterator[Step]) -> Iterator[Step]:
    """Yield each step if it is finite, the last one with the original restored where it is kept."""
    for step in steps:
        if step.sigma == plan.sigmas[-1]:
            step = replace(step, x=initial.restore(step.x, plan.final_scale(step.sigma)))
        yield require_finite(step)
