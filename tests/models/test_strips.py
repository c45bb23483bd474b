"""The VAE in strips and in tiles against the whole VAE, and their memory against the predicted memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from short_form import short_form
from torch import Tensor, nn

import mezzotint
from mezzotint.config import VAEConfig
from mezzotint.errors import RequestError
from mezzotint.models import vae_modes
from mezzotint.models.convolution import seamless
from mezzotint.models.strips import Strips, decode_in_strips, encode_in_strips
from mezzotint.models.tiles import decode_in_tiles, encode_in_tiles, spans, untiled_layers
from mezzotint.models.vae import VAE

LIMIT = 1e-5  # relative to the range; measured at most 2e-6
CONFIGS: dict[str, dict[str, Any]] = {
    "sd": {},
    "two layers": {"layers_per_block": 2},
    "bare": {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False},
    "f=4, always wider": {"block_out_channels": (8, 16, 32), "latent_channels": 16},
    "one level": {"block_out_channels": (8,)},
}
ONE_ROW_PAIR, SOME, ALL = 1, 2000, 2**21  # elements of a strip


def build(seed: int = 0, **changes: Any) -> VAE:
    torch.manual_seed(seed)
    config = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4} | changes
    vae = VAE(VAEConfig.model_validate(config)).eval().to(memory_format=torch.channels_last)
    for norm in (m for m in vae.modules() if isinstance(m, nn.GroupNorm)):
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias, 0.0, 0.3)
    return vae.requires_grad_(False)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def apart(a: Tensor, b: Tensor) -> float:
    """The greatest difference, relative to the range."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / (b.max() - b.min()))


def psnr(a: Tensor, b: Tensor) -> float:
    """Of pictures in [-1, 1]."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean()
    return float(10 * torch.log10(4 / error))


@pytest.mark.parametrize(
    ("config", "strip", "axes"), short_form([*CONFIGS], [ONE_ROW_PAIR, SOME, ALL], ["", "x", "y", "xy"], together=2)
)
@torch.inference_mode()
def test_strips_give_what_the_whole_way_gives(config: str, strip: int, axes: str) -> None:
    vae = build(**CONFIGS[config])
    pixels = noise(2, 3, *((40, 56) if vae.config.downscale > 1 else (9, 26))).clamp(-1, 1)
    with seamless(axes):
        whole = vae.encode(pixels)
        strips = encode_in_strips(vae, pixels, strip)
        assert apart(strips.mean, whole.mean) < LIMIT
        assert apart(strips.logvar, whole.logvar) < LIMIT
        assert apart(decode_in_strips(vae, whole.mean, strip), vae.decode(whole.mean)) < LIMIT


@torch.inference_mode()
def test_strips_are_exact_in_float64() -> None:
    """So what differs in float32 is rounding, and no row is wrong by a little."""
    vae, z = build().double(), noise(1, 4, 9, 13, dtype=torch.float64)
    assert apart(decode_in_strips(vae, z, SOME), vae.decode(z)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_strips_round_no_worse_than_the_whole_way(dtype: torch.dtype) -> None:
    vae, z = build(), noise(1, 4, 4, 6)
    exact = vae.decode(z)
    vae = vae.to(dtype)
    strips = decode_in_strips(vae, z.to(dtype), SOME)
    assert strips.dtype == dtype
    assert apart(strips.float(), exact) < 1.5 * apart(vae.decode(z.to(dtype)).float(), exact)


@torch.inference_mode()
def test_statistics_do_not_lose_a_small_spread_on_a_large_mean() -> None:
    x = 1000 + noise(1, 8, 30, 7)
    mean, variance = Strips(300).measure(nn.GroupNorm(4, 8), x)
    groups = x.double().unflatten(1, (4, 2)).flatten(2)
    torch.testing.assert_close(mean.double(), groups.mean(-1)[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), groups.var(-1, correction=0)[0], rtol=1e-4, atol=0)


def test_a_layers_weight_is_asked_for_once() -> None:
    """An offloaded layer loads its weight at each access."""
    asked = []

    class Held(nn.Conv2d):
        @property
        def weight(self) -> Tensor:
            asked.append(self)
            return self.kept

    vae, z = build(), noise(1, 4, 4, 6)
    whole = decode_in_strips(vae, z)
    conv = vae.decoder.conv_out
    conv.kept = conv.weight
    del conv.weight
    conv.__class__ = Held
    torch.testing.assert_close(decode_in_strips(vae, z, strip=100), whole)
    assert len(asked) == 1


def test_what_was_given_stays_as_it_was_and_no_gradients_are_kept() -> None:
    vae, z, pixels = build(block_out_channels=(8,), mid_block_add_attention=False), noise(1, 4, 6, 6), noise(1, 3, 6, 6)
    vae.requires_grad_(True)
    before = z.clone(), pixels.clone()
    for way in ("strips", "tiles"):
        assert not vae_modes.decode(vae, z, way).requires_grad
        vae_modes.encode(vae, pixels, way)
    assert torch.equal(z, before[0]) and torch.equal(pixels, before[1])


def test_the_ways_have_their_names() -> None:
    vae, z = build(), noise(1, 4, 4, 6)
    assert torch.equal(vae_modes.decode(vae, z), vae.decode(z))
    assert torch.equal(vae_modes.encode(vae, vae.decode(z)).mean, vae.encode(vae.decode(z)).mean)
    assert torch.equal(vae_modes.decode(vae, z, "strips"), decode_in_strips(vae, z))
    assert torch.equal(vae_modes.decode(vae, z, "tiles"), decode_in_tiles(vae, z))


@cache
def bundled() -> tuple[VAE, Tensor]:
    """The bundled model's VAE, and a 256x256 picture: soft discs of many colours, smooth and sharp at once."""
    vae = mezzotint.load(device="cpu", dtype="float32").vae
    y, x = torch.meshgrid(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256), indexing="ij")
    picture = torch.stack([y * 0.5 + 0.3, 0.2 - x * 0.4, x * y]).clone()
    for k, centre in enumerate(noise(12, 2).clamp(-1, 1) * 0.8):
        inside = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2).sqrt() < 0.08 + 0.02 * k
        picture[:, inside] = noise(12, 3)[k].clamp(-1, 1)[:, None]
    return vae, picture[None].clamp(-1, 1)


@torch.inference_mode()
def test_the_bundled_vae_in_strips_and_tiles() -> None:
    vae, pixels = bundled()
    posterior = vae.encode(pixels)
    whole = vae.decode(posterior.mean)
    assert apart(decode_in_strips(vae, posterior.mean, 2**14), whole) < LIMIT
    assert apart(encode_in_strips(vae, pixels, 2**14).mean, posterior.mean) < LIMIT
    tiled = decode_in_tiles(vae, posterior.mean, tile=16, overlap=4, strip=2**14)
    assert 40 < psnr(tiled, whole) < 80, "close, and not the whole way by another name"
    encoded = encode_in_tiles(vae, pixels, tile=16, overlap=4, strip=2**14).mean
    assert psnr(vae.decode(encoded), whole) > 40


@pytest.mark.parametrize("axes", ["", "xy"])
@torch.inference_mode()
def test_no_seam_is_seen_between_tiles(axes: str) -> None:
    """Compare with tiles that are decoded independently and placed side by side."""
    vae, pixels = bundled()
    with seamless(axes):
        z = vae.encode(pixels[:, :, 64:192]).mean
        whole = vae.decode(z)
        tiled = decode_in_tiles(vae, z, tile=16, overlap=4, strip=2**14)
    apart = torch.cat([vae.decode(half) for half in z.split(16, dim=3)], dim=3)
    jumps, seam = (((x - whole).diff(dim=3).abs().mean((0, 1, 2))[2:-2]) for x in (tiled, apart))
    assert float(jumps.max()) < 0.3 * float(seam[125]), "columns 127 and 128"
    assert psnr(tiled, whole) > psnr(apart, whole) + 10


@torch.inference_mode()
def test_a_picture_of_a_tiles_size_is_not_tiled() -> None:
    vae, z = build(), noise(2, 4, 12, 16)
    assert untiled_layers(vae.config, 96, 128, "decode", 16) == len(vae.decoder.layers())
    assert untiled_layers(vae.config, 256, 384, "decode", 16) < len(vae.decoder.layers())
    assert torch.equal(decode_in_tiles(vae, z, tile=16, overlap=4), decode_in_strips(vae, z))
    pixels = vae.decode(z)
    assert torch.equal(encode_in_tiles(vae, pixels, 16, 4).mean, encode_in_strips(vae, pixels).mean)


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(5, 8, 2), (8, 8, 2), (9, 8, 2), (65, 64, 16), (33, 12, 3), (128, 64, 16)]
)
def test_tiles_cover_everything_once(length: int, tile: int, overlap: int) -> None:
    total = torch.zeros(length * 3)
    found = spans(length, tile, overlap)
    for span in found:
        total[span.cells(3)] += span.weights(3, total)
    torch.testing.assert_close(total, torch.ones(length * 3))
    assert {span.last - span.first for span in found} <= set(range(1, tile + 1))
    with pytest.raises(RequestError, match="at most a quarter of the tile"):
        spans(length, tile, tile // 4 + 1)
    assert all(span.after >= overlap for span in found[:-1])
