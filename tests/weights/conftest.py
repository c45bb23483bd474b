"""One tiny model for the tests of weights/: random, of every kind of part, and written once as a diffusers folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mezzotint.config import CLIPConfig, UNetConfig, VAEConfig
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import UNet
from mezzotint.models.vae import VAE
from mezzotint.weights import save_folder

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}


@dataclass
class Tiny:
    unet: UNet
    vae: VAE
    text_encoder: CLIPTextModel
    tokenizer: Tokenizer
    folder: Path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The model, and the folder that save_folder wrote of it (float32, one file a part)."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.subset(["a lemon on a blue background"])
    unet = UNet(
        UNetConfig(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=8,
        )
    )
    vae = VAE(VAEConfig(block_out_channels=(8, 16), norm_num_groups=4, sample_size=16))
    text_encoder = CLIPTextModel(
        CLIPConfig(
            vocab_size=len(tokenizer.vocab),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos,
            eos_token_id=tokenizer.eos,
            pad_token_id=tokenizer.pad,
        )
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(
        folder,
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler_config=SCHEDULER,
        settings={"size": 16, "steps": 4},
        dtype=torch.float32,
    )
    return Tiny(unet.eval(), vae.eval(), text_encoder.eval(), tokenizer, folder)


@pytest.fixture
def folder(tiny_model: Tiny, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, to be damaged."""
    return Path(shutil.copytree(tiny_model.folder, tmp_path / "tiny"))
