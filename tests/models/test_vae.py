"""The VAE by itself: shapes, scaling, the posterior's draws, building without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mezzotint.config import VAEConfig
from mezzotint.models.vae import VAE, Posterior


def build(**changes: Any) -> VAE:
    torch.manual_seed(0)
    config = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4} | changes
    return VAE(VAEConfig.model_validate(config)).eval()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 40), (72, 104)])
@torch.no_grad()
def test_a_latent_is_eight_times_smaller(height: int, width: int) -> None:
    vae = build()
    posterior = vae.encode(torch.zeros(2, 3, height, width))
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, height // 8, width // 8)
    assert vae.decode(posterior.mean).shape == (2, 3, height, width)


@torch.no_grad()
def test_the_factor_follows_the_levels() -> None:
    vae = build(block_out_channels=(8, 16), latent_channels=3)
    assert vae.config.downscale == 2
    mean = vae.encode(torch.zeros(1, 3, 8, 6)).mean
    assert mean.shape == (1, 3, 4, 3)
    assert vae.decode(mean).shape == (1, 3, 8, 6)


@torch.no_grad()
def test_pictures_of_a_batch_do_not_touch() -> None:
    vae = build()
    a, b = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    together = vae.encode(torch.cat([a, b])).mean
    torch.testing.assert_close(together, torch.cat([vae.encode(a).mean, vae.encode(b).mean]))
    torch.testing.assert_close(vae.decode(together), torch.cat([vae.decode(z[None]) for z in together]))


@pytest.mark.parametrize("shift", [None, 0.1159])
def test_unscale_is_the_inverse_of_scale(shift: float | None) -> None:
    vae = build(scaling_factor=0.3611, shift_factor=shift)
    z = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(vae.scale(z), (z - (shift or 0.0)) * 0.3611)
    torch.testing.assert_close(vae.unscale(vae.scale(z)), z)


def test_a_sample_is_its_generators() -> None:
    posterior = Posterior(mean=torch.full((1, 4, 2, 2), 3.0), logvar=torch.full((1, 4, 2, 2), 2.0))
    first = posterior.sample(torch.Generator().manual_seed(5))
    assert torch.equal(first, posterior.sample(torch.Generator().manual_seed(5)))
    assert not torch.equal(first, posterior.sample(torch.Generator().manual_seed(6)))
    noise = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(first, 3.0 + torch.e * noise)  # the standard deviation is exp(logvar / 2)


def test_the_log_variance_is_bounded() -> None:
    vae = build()
    with torch.no_grad():
        vae.quant_conv.bias.fill_(1e6)
        assert vae.encode(torch.zeros(1, 3, 8, 8)).logvar.max() == 20
        vae.quant_conv.bias.fill_(-1e6)
        posterior = vae.encode(torch.zeros(1, 3, 8, 8))
    assert posterior.logvar.max() == -30
    assert posterior.sample().isfinite().all()


def test_it_is_built_without_memory() -> None:
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    assert all(tensor.is_meta for tensor in vae.state_dict().values())


def test_optional_parts_are_left_out_of_the_names() -> None:
    bare = build(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)
    assert not [name for name in bare.state_dict() if "quant" in name or "attentions" in name]
    assert {"quant_conv.weight", "post_quant_conv.bias", "decoder.mid_block.attentions.0.to_out.0.weight"} <= set(
        build().state_dict()
    )
