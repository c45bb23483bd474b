"""The bundled model in diffusers: the folder loads there, and draws the same picture for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

import mezzotint
from mezzotint.pipeline import BUNDLED

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def peer() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(BUNDLED)  # as a newcomer would
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("sampler", "steps", "guidance"), [(None, 20, 3.0), ("euler", 12, 3.0), ("ddim", 20, 1.0), (None, 20, 7.5)]
)
def test_diffusers_draws_the_same(
    peer: StableDiffusionPipeline, sampler: str | None, steps: int, guidance: float
) -> None:
    prompt, seed = "a lemon on a blue background", 7
    own = peer.scheduler
    others = {"euler": EulerDiscreteScheduler, "ddim": DDIMScheduler}
    try:
        if sampler:
            peer.scheduler = others[sampler].from_config(own.config)
        generator = torch.Generator().manual_seed(seed)
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "width": 128, "height": 128}
        final: list[torch.Tensor] = []
        options["callback_on_step_end"] = lambda _, __, ___, tensors: final.append(tensors["latents"]) or {}
        picture = peer(prompt, generator=generator, output_type="pil", **options).images[0]
        latents = final[-1]
    finally:
        peer.scheduler = own
    request = mezzotint.Request(prompt=prompt, seed=seed, steps=steps, guidance_scale=guidance, sampler=sampler)
    result = mezzotint.load().generate(request)
    # zero-terminal SNR: diffusers' DDIM divides by an alpha of exactly 0, capped here (docs/fidelity.md)
    tolerance = 3e-3 if sampler == "ddim" else 1e-4
    assert (result.latents - latents).abs().max() <= tolerance * latents.abs().max()
    difference = np.abs(np.asarray(result.images[0], dtype=int) - np.asarray(picture, dtype=int))
    assert difference.max() <= (3 if sampler == "ddim" else 1)
