"""The VAE against diffusers' AutoencoderKL: same weights, same latents, same pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

import tiny
from mezzotint.config import VAEConfig
from mezzotint.models.vae import VAE

LIMIT = 1e-4  # relative to the greatest value; measured at most 4e-6
SIZES = [(64, 64), (72, 104)]
CONFIGS: dict[str, dict[str, Any]] = {
    "sd": {},
    "no quant convs": {"use_quant_conv": False, "use_post_quant_conv": False},
    "one quant conv": {"use_post_quant_conv": False},
    "no attention": {"mid_block_add_attention": False},
    "16 channels, shifted": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    "two layers": {"layers_per_block": 2, "norm_num_groups": 4},
    "f=4": {
        "block_out_channels": (16, 16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    },
}

FULL: dict[str, Any] = {  # vae/config.json of Stable Diffusion 1 and 2; XL's differs in scaling_factor alone
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}


def ours(theirs: AutoencoderKL) -> VAE:
    """Our network with their weights, built on the meta device as a loader builds it."""
    with torch.device("meta"):
        vae = VAE(VAEConfig.model_validate(dict(theirs.config)))
    vae.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return vae.eval()


def pixels(size: tuple[int, int]) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_encoding_is_diffusers(changes: dict[str, Any]) -> None:
    theirs = tiny.vae(**changes)
    vae = ours(theirs)
    for size in SIZES:
        posterior = vae.encode(pixels(size))
        expected = theirs.encode(pixels(size)).latent_dist
        assert tiny.apart(posterior.mean, expected.mean) < LIMIT
        assert tiny.apart(posterior.logvar, expected.logvar) < LIMIT
        sample = posterior.sample(torch.Generator().manual_seed(7))
        assert tiny.apart(sample, expected.sample(torch.Generator().manual_seed(7))) < LIMIT


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_decoding_is_diffusers(changes: dict[str, Any]) -> None:
    theirs = tiny.vae(**changes)
    vae = ours(theirs)
    for height, width in SIZES:
        shape = (2, vae.config.latent_channels, height // vae.config.downscale, width // vae.config.downscale)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(4))
        # as diffusers' pipelines unscale: shift_factor where there is one
        z = latents / theirs.config.scaling_factor + (theirs.config.shift_factor or 0.0)
        decoded = vae.decode(vae.unscale(latents))
        assert decoded.shape == (2, 3, height, width)
        assert tiny.apart(decoded, theirs.decode(z).sample) < LIMIT


@torch.no_grad()
def test_a_wide_log_variance_is_clamped_as_in_diffusers() -> None:
    theirs = tiny.vae()
    theirs.quant_conv.bias[4:] = torch.tensor([-100.0, 100.0, 0.0, 20.0])
    posterior = ours(theirs).encode(pixels((64, 64)))
    expected = theirs.encode(pixels((64, 64))).latent_dist
    assert tiny.apart(posterior.logvar, expected.logvar) < LIMIT
    assert posterior.logvar.min() == -30 and posterior.logvar.max() == 20


@torch.no_grad()
def test_channels_last_changes_nothing() -> None:
    theirs = tiny.vae()
    vae = ours(theirs).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = pixels((72, 104))
    mean = theirs.encode(image).latent_dist.mean
    assert tiny.apart(vae.encode(image.to(memory_format=torch.channels_last)).mean, mean) < LIMIT
    assert tiny.apart(vae.decode(mean), theirs.decode(mean).sample) < LIMIT


def test_full_size_names_and_shapes_are_diffusers() -> None:
    with torch.device("meta"):
        theirs = AutoencoderKL(**FULL)
        vae = VAE(VAEConfig.model_validate(dict(theirs.config)))
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
