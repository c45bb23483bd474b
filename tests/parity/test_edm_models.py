"""Models with EDM's preconditioning, and latents with a mean and a deviation: folders and single files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from PIL import Image
from safetensors.torch import save_file

import mezzotint
import pictures
import tiny
from mezzotint.config import VAEConfig
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.vae import VAE
from mezzotint.weights import open_model
from pictures import Pair, fields, ours, same, theirs
from test_single_file import Model

MEAN, STD = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]  # Playground v2.5's, published
PLAYGROUND = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5, "prediction_type": "epsilon"}
COSXL = {
    "_class_name": "EDMEulerScheduler",
    "sigma_data": 1.0,
    "sigma_max": 120.0,
    "prediction_type": "v_prediction",
    "sigma_schedule": "exponential",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """An SDXL-shaped folder as Playground v2.5's is: its scheduler, its latents."""
    folder = tmp_path_factory.mktemp("edm") / "sdxl"
    folder.mkdir()
    tokenizer = Tokenizer.subset([pictures.PROMPT, pictures.NEGATIVE])
    ids = {"vocab_size": len(tokenizer.vocab), "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    encoders = [tiny.clip("sdxl", **ids), tiny.clip("sdxl", seed=3, projection=True, **ids)]
    vae = tiny.vae(scaling_factor=0.5, latents_mean=MEAN, latents_std=STD)
    pictures.save(folder, "sdxl", tokenizer, encoders, tiny.unet("sdxl"), vae)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(PLAYGROUND))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", PLAYGROUND["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return pictures.load(folder, "sdxl")


@pytest.mark.parametrize("config", [PLAYGROUND, COSXL], ids=["playground", "cosxl"])
def test_a_folder_draws_what_diffusers_draws(pair: Pair, config: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, config["_class_name"])
    pair.scheduler = scheduler.from_config(config)
    pair.ours.scheduler_config = config
    request = fields(steps=6)
    same(ours(pair, request), theirs(pair, request))


def test_img2img_encodes_with_the_mean_and_deviation(pair: Pair) -> None:
    pair.ours.scheduler_config = PLAYGROUND
    picture = Image.effect_mandelbrot((72, 104), (-2.0, -1.5, 1.0, 1.5), 50).convert("RGB")
    pipe = StableDiffusionXLImg2ImgPipeline(**pair.theirs.components)
    pipe.scheduler = diffusers.EDMDPMSolverMultistepScheduler.from_config(PLAYGROUND)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 6, "strength": 0.5, "guidance_scale": 7.5, "output_type": "latent"}
    expected = pipe(
        pictures.PROMPT, image=picture, generator=[torch.Generator().manual_seed(7)], **options  # type: ignore[arg-type]
    ).images  # fmt: skip
    request = mezzotint.Request(
        prompt=pictures.PROMPT, image=picture, steps=6, strength=0.5, guidance_scale=7.5, seed=7
    )
    found = pair.ours.generate(request).latents
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def test_scaling_is_that_of_the_pipeline() -> None:
    """z std / scaling + mean, and its inverse; the latents' own channel decides."""
    vae = VAE(VAEConfig(scaling_factor=0.5, latents_mean=tuple(MEAN), latents_std=tuple(STD)))
    z = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD))
    assert torch.equal(vae.unscale(z), z * std / 0.5 + mean)
    assert torch.equal(vae.scale(z), (z - mean) * 0.5 / std)


def test_a_file_with_edm_markers_is_the_folder(tmp_path: Path) -> None:
    model = Model("sdxl")
    weights = model.single()
    markers = {"edm_mean": torch.tensor(MEAN).view(1, 4, 1, 1), "edm_std": torch.tensor(STD).view(1, 4, 1, 1)}
    save_file(weights | markers, tmp_path / "playground.safetensors")
    parts = open_model(tmp_path / "playground.safetensors", config=model.config)
    assert parts.scheduler_config.items() >= PLAYGROUND.items()
    ours, theirs = parts.vae, tiny.vae(scaling_factor=0.5, latents_mean=MEAN, latents_std=STD)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD))
        expected = theirs.decode(z * std / theirs.config.scaling_factor + mean).sample
        torch.testing.assert_close(ours.decode(ours.unscale(z)), expected, rtol=1e-4, atol=1e-4)
    save_file(weights | {"edm_vpred.sigma_max": torch.tensor(120.0)}, tmp_path / "cosxl.safetensors")
    parts = open_model(tmp_path / "cosxl.safetensors", config=model.config)
    assert parts.scheduler_config.items() >= COSXL.items()
    assert parts.vae.config.scaling_factor == 0.13025
