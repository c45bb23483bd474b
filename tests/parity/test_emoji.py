"""The bundled model in diffusers: the folder loads there, and draws the same picture for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from PIL import Image, ImageDraw

import mezzotint
from mezzotint.weights.hub import BUNDLED, BUNDLED_CONTROL

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def peer() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(BUNDLED)  # as a newcomer would
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("sampler", "steps", "guidance"), [(None, 20, 3.0), ("euler", 6, 3.0), ("ddim", 8, 1.0), (None, 8, 7.5)]
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


def test_its_controlnet_in_diffusers(peer: StableDiffusionPipeline) -> None:
    """The bundled ControlNet by its name, and diffusers' with its folder."""
    edges = Image.new("RGB", (128, 128))
    ImageDraw.Draw(edges).ellipse((8, 40, 63, 95), outline="white", width=2)
    network = ControlNetModel.from_pretrained(BUNDLED_CONTROL)
    pipe = StableDiffusionControlNetPipeline(**peer.components, controlnet=network)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    generator = torch.Generator().manual_seed(7)
    latents = pipe("a lemon on a blue background", image=edges, generator=generator, **options).images
    control = [{"file": "emoji-outline", "image": edges}]
    request = mezzotint.Request(prompt="a lemon on a blue background", seed=7, steps=4, control=control)
    result = mezzotint.load().generate(request)
    assert (result.latents - latents).abs().max() <= 1e-4 * latents.abs().max()
    weights = sum(path.stat().st_size for path in BUNDLED_CONTROL.glob("*.safetensors"))
    assert weights <= 10_000_000 and all(p.dtype == torch.float32 for p in network.parameters())
