"""Sampler: the solver, spacing and options that a sampler name resolves to. Importing this does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mezzotint.config import ScheduleConfig

Start = Literal["sigma", "vp"]
TimestepKind = Literal["interpolated", "nearest", "linear", "rounded", "truncated", "edm", "log_alpha", "lcm"]
NoiseKind = Literal["seeded", "brownian", "brownian midpoints"]
NoisedAt = Literal["first", "before"]
Counts = Literal["diffusers", "a1111", "a1111 timesteps", "a1111 unipc", "comfyui"]


@dataclass(frozen=True)
class Sampler:
    """How a run gets from noise to a picture.

    Attributes:
        name: The name that was requested, or our name of the model's own sampler.
        solver: A key of `diffusion.solvers.SOLVERS`.
        spacing: A key of `diffusion.spacing.SPACINGS`.
        options: Keyword arguments of the solver.
        spacing_options: Keyword arguments of the spacing.
        start: Scale of the starting noise: "sigma", or "vp" for sqrt(sigma^2 + 1).
        timestep: How the denoiser converts noise levels to timesteps.
        noise: Noise of the steps: "seeded" draws, or a "brownian" path, which "brownian midpoints" also evaluates
            halfway.
        rescale_final: Whether to divide the final latents by sqrt(1 + sigma_last^2) before decoding.
        schedule: The training schedule of the model, as the class that runs reads it.
        steps: Default number of steps, if the sampler has one.
        guidance_scale: Default guidance scale, if the sampler has one.
        guidance_divisor: The requested guidance scale is divided by this.
        noised_at: Level of the noise that is added to a picture: the run's "first" level, or the one "before" it in
            the list. The noised latents, scaled to be variance-preserving, are then used at the first level unchanged.
        steps_from: A spacing and its options whose number of levels is the number of steps, instead of the request's.
            In img2img `spacing` then begins at the first of those levels that the run takes.
        counts: Whose rule determines the number of steps of an image-to-image run (run/levels.py).
    """

    name: str
    solver: str
    spacing: str
    options: dict[str, Any] = field(default_factory=dict)
    spacing_options: dict[str, Any] = field(default_factory=dict)
    start: Start = "sigma"
    timestep: TimestepKind = "interpolated"
    noise: NoiseKind = "seeded"
    rescale_final: bool = False
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_divisor: float = 1.0
    noised_at: NoisedAt = "first"
    steps_from: tuple[str, dict[str, Any]] | None = None
    counts: Counts = "diffusers"
