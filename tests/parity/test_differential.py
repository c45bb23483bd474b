"""Differential diffusion: its authors' loop, written out around diffusers' img2img pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mezzotint.diffusion.blend import DifferentialBlend
from mezzotint.errors import RequestError
from mezzotint.request import Request
from mezzotint.samplers.diffusers_classes import CLASSES
from pictures import Drawn, Pair, apart, ours, pixels, same
from test_img2img import IMG2IMG, NO_CHECKER, SIZE, fields, photograph

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def grey(width: int = SIZE[0], height: int = SIZE[1]) -> Image.Image:
    """A ramp from black to white with noise on it, between a black and a white column."""
    ramp = np.tile(np.linspace(0, 255, width), (height, 1)) + np.random.default_rng(1).normal(0, 20, (height, width))
    ramp[:, :8], ramp[:, -8:] = 0, 255
    return Image.fromarray(ramp.clip(0, 255).astype(np.uint8))


def theirs(pair: Pair, family: str, request: dict[str, Any]) -> Drawn:
    """Their img2img; before each step but the first, the places whose map is above i / n become the original again."""
    kind = IMG2IMG[family]
    pipe = kind(**{**pair.theirs.components, "scheduler": pair.scheduler}, **NO_CHECKER.get(kind, {}))
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps" if name == "steps" else name: value for name, value in request.items()}
    seed, row, mask = options.pop("seed"), CLASSES[options.pop("sampler")], options.pop("mask")
    pipe.scheduler = getattr(diffusers, row.name).from_config(pair.scheduler.config, **row.flags)
    del options["count"]
    draw = torch.Generator().manual_seed(seed)
    x = torch.from_numpy(np.asarray(request["image"], np.float32)).permute(2, 0, 1)[None] / 127.5 - 1.0
    with torch.no_grad():
        x0 = pipe.vae.encode(x).latent_dist.sample(draw) * pipe.vae.config.scaling_factor
    noise = torch.randn(x0.shape, generator=draw)
    change_map = torch.from_numpy(255.0 - np.asarray(mask, np.float32))[None, None] / 255.0
    change_map = F.interpolate(change_map, x0.shape[2:], mode="bilinear", antialias=False)
    final = []

    def replace(_pipe: Any, index: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        timesteps, latents = pipe.scheduler.timesteps[-left:], tensors["latents"]
        if index + 1 < left:
            original = pipe.scheduler.add_noise(x0, noise, timesteps[index + 1 : index + 2])
            kept = (change_map > torch.tensor((index + 1) / left)).float()
            latents = original * kept + latents * (1 - kept)
        final[:] = [latents]
        return {"latents": latents}

    left = int(request["steps"] * request["strength"])
    images = pipe(generator=torch.Generator().manual_seed(seed), callback_on_step_end=replace, **options).images
    return Drawn(final[0], pixels(images))


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_their_loop_draws_the_same_picture(pairs: dict[str, Pair], family: str, sampler: str) -> None:
    request = fields(sampler=sampler, strength=0.75, mask=grey())
    expected = theirs(pairs[family], family, request)
    drawn = ours(pairs[family], request | {"differential": True})
    black = np.asarray(request["mask"]) == 0  # where the pixels are the original's, which their pipeline changes
    assert np.array_equal(drawn.pixels[0][black], np.asarray(request["image"], np.int16)[black])
    for picture in (drawn, expected):
        picture.pixels[0][black] = 0
    same(drawn, expected)
    for changes in ({"differential": False}, {"differential": True, "mask": Image.new("L", SIZE, 255)}):
        assert apart(drawn, ours(pairs[family], request | changes))[0] > 1e-2


def test_at_full_strength_the_picture_is_still_under_the_noise(pairs: dict[str, Pair]) -> None:
    request = fields(sampler="euler", strength=1.0, steps=4, mask=Image.new("L", SIZE, 255))
    same(ours(pairs["sd1"], request | {"differential": True}), theirs(pairs["sd1"], "sd1", request))


def test_an_inverted_mask_and_the_masked_area_alone(pairs: dict[str, Pair]) -> None:
    request = fields(sampler="euler", steps=4, mask=grey(), differential=True)
    inverted = Image.fromarray(255 - np.asarray(grey()))
    assert (
        apart(ours(pairs["sd1"], request), ours(pairs["sd1"], request | {"mask": inverted, "invert_mask": True}))[0]
        == 0
    )
    mask = Image.new("L", SIZE)
    mask.paste(90, (10, 15, 30, 35))  # too dark to be inpainted
    alone = request | {"mask": mask, "only_masked": 4, "width": 64, "height": 64, "strength": 1.0}
    drawn, original = ours(pairs["sd1"], alone).pixels[0], np.asarray(photograph(), np.int16)
    changed = (drawn != original).any(-1)
    assert changed[15:35, 10:30].mean() > 0.9
    changed[15:35, 10:30] = False
    assert not changed.any()
    with pytest.raises(RequestError, match="mask is too dark"):
        ours(pairs["sd1"], alone | {"differential": False})


def test_every_place_has_its_share_of_the_steps() -> None:
    keep = torch.tensor([0.0, 0.2, 0.5, 0.74, 0.76, 1.0]).reshape(1, 1, 1, 6)
    x0, noise = torch.full_like(keep, 3.0), torch.zeros_like(keep)
    sigmas = [8.0, 4.0, 2.0, 1.0, 0.0]

    class Zero:
        def __call__(self, x: Tensor, sigma: float) -> Tensor:
            return torch.zeros_like(x)

        def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
            return torch.zeros_like(x), torch.zeros_like(x)

    blend = DifferentialBlend(Zero(), keep, x0, noise, sigmas)
    steps = torch.stack([(blend(x0, sigma) == 0.0).flatten() for sigma in sigmas[:-1]]).sum(0)
    assert steps.tolist() == [4, 4, 3, 2, 1, 1]  # 1 + int(4 (1 - keep)) but for the whole, as in the authors' loop
    assert torch.equal(blend.pair(x0, 4.0)[1], blend(x0, 4.0))


def test_what_it_does_not_go_with(pairs: dict[str, Pair]) -> None:
    for fields_, sentence in (
        ({"differential": True}, "differential is given, but there is no mask"),
        (
            {"image": b"x", "mask": b"x", "differential": True, "masked_content": "noise"},
            "masked_content must be original",
        ),
        ({"image": b"x", "mask": b"x", "differential": True, "hires": 2.0}, "hires and image are both given"),
    ):
        with pytest.raises(RequestError, match=sentence):
            pairs["sd1"].ours.resolve(Request(**{"prompt": "a lemon", "width": 64, "height": 64} | fields_))
    with pytest.raises(RequestError, match="differential is 1; it must be true or false"):
        Request(prompt="", differential=1)
