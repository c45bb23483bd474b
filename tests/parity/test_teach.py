"""A LoRA trained on the bundled model, in diffusers on the same folder: the same picture (issue 8)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import drawings
import mezzotint
from mezzotint.pipeline import BUNDLED
from mezzotint.train.recipe import Recipe
from mezzotint.train.run import run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TEACH = Path(drawings.__file__).parent


def test_diffusers_draws_the_same_with_what_was_trained(trained: Path) -> None:
    prompt, seed = "a lighthouse on a blue background", 7
    request = mezzotint.Request(prompt=prompt, seed=seed, steps=6, guidance_scale=3.0)
    options: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 3.0, "width": 128, "height": 128}
    pipe = mezzotint.load(device="cpu")
    peer = StableDiffusionPipeline.from_pretrained(BUNDLED)
    peer.set_progress_bar_config(disable=True)
    before = pipe.generate(request)
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        after = pipe.generate(request.replace(loras=((str(trained / name), 1.0),)))
        peer.load_lora_weights(trained, weight_name=name)
        latents = peer(prompt, generator=torch.Generator().manual_seed(seed), output_type="latent", **options).images
        peer.unload_lora_weights()
        assert (after.latents - latents).abs().max() <= 1e-4 * latents.abs().max()
        with torch.inference_mode():
            decoded = peer.vae.decode(latents / peer.vae.config.scaling_factor).sample
        assert apart(after.images[0], peer.image_processor.postprocess(decoded)[0]) <= 1
        assert apart(after.images[0], before.images[0]) > 50, "the LoRA is heard"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The showing's recipe for three steps, steep ones."""
    folder = tmp_path_factory.mktemp("teach")
    drawings.draw_pictures(folder / "pictures")
    given = {"data": str(folder / "pictures" / "lighthouse"), "steps": 3, "batch": 2, "warmup": 0, "lr": 2e-2}
    run(Recipe.of("lora", TEACH / "lora.toml", given), folder / "run", device="cpu")
    return folder / "run"


def apart(a: Any, b: Any) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())
