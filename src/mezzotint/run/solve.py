"""The denoiser and the noise that a plan's solver is given."""

from __future__ import annotations

from mezzotint.denoiser import Denoiser, Timeline
from mezzotint.diffusion.guidance import METHODS, Guided, Outputs
from mezzotint.diffusion.noise import BrownianNoise, SeededNoise
from mezzotint.diffusion.solvers import Noise
from mezzotint.models.unet import UNet
from mezzotint.run.initial import Run, Start
from mezzotint.run.nan_guard import guard_outputs
from mezzotint.run.plan import RunPlan


def unet_outputs(run: Run, unet: UNet, conditions: list[Timeline], start: Start, split: bool) -> Outputs:
    """Return the UNet's outputs under these conditions, each call looked at for values that are not finite.

    Args:
        run: The batch; its `upcast_parts` gets "unet" if that had to run in float32.
        unet: The network.
        conditions: Of `PromptEncoder.encode_batch`.
        start: Where the run starts, with what an inpainting network is given.
        split: Whether the network is given one condition at a time.
    """
    plan = run.plan

    def denoiser(unet: UNet) -> Denoiser:
        return Denoiser(
            unet,
            plan.schedule,
            plan.prediction,
            conditions,
            plan.sampler.timestep,
            plan.sigmas,
            start.inpaint_channels,
            split,
        )

    return guard_outputs(unet, denoiser, run.upcast_parts)


def guide(plan: RunPlan, outputs: Outputs) -> Guided:
    """Return the guided denoiser of a plan."""
    request = plan.request
    return Guided(
        outputs,
        plan.prediction,
        plan.guidance_scales,
        request.guidance_rescale or 0.0,
        request.guidance_interval,
        request.guidance_steps,
        plan.sigmas,
        METHODS[request.guidance_method or "cfg"](**plan.method_options),
        plan.weights,
        mimic_scale=request.mimic_scale,
        threshold_percentile=request.threshold_percentile or 0.0,
    )


def step_noise(run: Run, noise: SeededNoise) -> Noise:
    """Return the noise of the solver's steps: the run's own stream, or a Brownian path.

    The path is one of the whole list of levels, as in diffusers: it does not depend on where a run from a picture
    begins.
    """
    plan = run.plan
    if plan.sampler.noise == "seeded":
        return noise
    midpoints = plan.sampler.noise == "brownian midpoints"
    return BrownianNoise(run.seeds, noise.shape, plan.all_sigmas, noise.device, midpoints=midpoints)
