"""Perturbed-attention guidance against diffusers' PAG pipelines, and FreeU against its pipelines and UNet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPAGPipeline, StableDiffusionXLPAGPipeline
from torch import Tensor

import tiny
from mezzotint.config import UNetConfig
from mezzotint.models.freeu import scale_low_frequencies
from mezzotint.models.unet import Condition, UNet
from pictures import Drawn, Pair, apart, different, fields, ours, same, theirs

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

FREEU = (1.5, 1.6, 0.9, 0.2)  # b1, b2, s1, s2


def theirs_with_pag(pair: Pair, request: dict[str, Any]) -> Drawn:
    """What their PAG pipeline of the same parts draws."""
    options = dict(request)
    layers = list(options.pop("pag_layers", ("mid",)))
    xl = "text_encoder_2" in pair.theirs.components
    kind = StableDiffusionXLPAGPipeline if xl else StableDiffusionPAGPipeline
    names = {} if xl else {"requires_safety_checker": False}
    pipe = kind(**pair.theirs.components, **names, pag_applied_layers=layers)
    pipe.set_progress_bar_config(disable=True)
    return theirs(replace(pair, theirs=pipe), options)


SMALL = {"width": 64, "height": 64, "steps": 3}
PAG: list[tuple[str, dict[str, Any]]] = [
    ("sd1", {"pag_scale": 3.0, "steps": 3}),
    ("sdxl", {"pag_scale": 3.0, "steps": 3}),
    ("sd1", SMALL | {"pag_scale": 3.0, "guidance_scale": 1.0}),
    ("sdxl", SMALL | {"pag_scale": 3.0, "guidance_scale": 1.0, "count": 2}),
    ("sd1", SMALL | {"pag_scale": 2.0, "pag_layers": ("mid", "down_blocks.0"), "guidance_rescale": 0.7}),
    ("sdxl", SMALL | {"pag_scale": 2.0, "pag_layers": ("up_blocks.0.attentions.1",), "eta": 0.5, "sampler": "ddim"}),
    ("sd1", SMALL | {"pag_scale": 4.0, "pag_adaptive_scale": 0.006, "sampler": "dpmpp_2m"}),
    ("sdxl", SMALL | {"pag_scale": 4.0, "pag_adaptive_scale": 0.006, "sampler": "euler_a"}),
]


@pytest.mark.parametrize(("family", "changes"), PAG, ids=str)
def test_pag_draws_their_picture(pairs: dict[str, Pair], family: str, changes: dict[str, Any]) -> None:
    request = fields(**changes)
    drawn = ours(pairs[family], request)
    same(drawn, theirs_with_pag(pairs[family], request))
    names = ("pag_adaptive_scale",) if "pag_adaptive_scale" in request else ("pag_scale", "pag_layers")
    without = {name: value for name, value in request.items() if name not in names}
    assert apart(drawn, ours(pairs[family], without))[0] > 1e-3


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_freeu_draws_their_picture(pairs: dict[str, Pair], family: str) -> None:
    pair = pairs[family]
    b1, b2, s1, s2 = FREEU
    for changes in ({"steps": 3}, SMALL | {"sampler": "euler", "guidance_scale": 1.0}):
        request = fields(**changes)
        pair.theirs.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)
        try:
            expected = theirs(pair, request)
        finally:
            pair.theirs.disable_freeu()
        drawn = ours(pair, request | {"freeu": FREEU})
        same(drawn, expected)
        different(drawn, ours(pair, request))
        different(drawn, ours(pair, request | {"freeu": (b1, 1.0, s1, 1.0)}))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_freeu_of_the_unet(family: str) -> None:
    their_unet = tiny.unet(family)
    our_unet = UNet(UNetConfig.model_validate(dict(their_unet.config))).eval()
    our_unet.load_state_dict(their_unet.state_dict())
    their_unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    draw = torch.Generator().manual_seed(3)
    x, context = (
        torch.randn(2, 4, 9, 13, generator=draw),
        torch.randn(2, 77, our_unet.config.cross_attention_dim, generator=draw),
    )
    pooled = torch.randn(2, tiny.WIDTH, generator=draw) if family == "sdxl" else None
    ids = torch.tensor([[72.0, 104.0, 0.0, 0.0, 72.0, 104.0]] * 2) if family == "sdxl" else None
    added = None if pooled is None else {"text_embeds": pooled, "time_ids": ids}
    with torch.no_grad():
        expected = their_unet(x, 500, context, added_cond_kwargs=added).sample
        condition = Condition(context, pooled, ids)
        assert tiny.apart(our_unet(x, 500.0, condition, freeu_factors=FREEU), expected) < 1e-5
        assert tiny.apart(our_unet(x, 500.0, condition), expected) > 1e-2


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (7, 4), (16, 16)])
def test_the_low_frequencies_of_any_size(size: tuple[int, int]) -> None:
    """The sum of the four frequencies, each from its own sum over the cells, in float64."""
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows, columns = (torch.arange(side, dtype=torch.float64) / side for side in size)
    low = torch.zeros_like(x)
    for u in {0, -1 % size[0]}:
        for v in {0, -1 % size[1]}:
            wave = torch.exp(2j * torch.pi * (u * rows[:, None] + v * columns))
            coefficient: Tensor = (x * wave.conj()).sum((-2, -1), keepdim=True) / (size[0] * size[1])
            low = low + (coefficient * wave).real
    assert tiny.apart(scale_low_frequencies(x.float(), 0.2).double(), x + (0.2 - 1.0) * low) < 1e-6
