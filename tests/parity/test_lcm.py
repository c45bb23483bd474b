"""Models whose UNet takes the guidance scale as an input (LCM), against diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel

import tiny
from mezzotint import Request
from mezzotint.config import UNetConfig
from mezzotint.errors import RequestError
from mezzotint.memory.footprint import predict
from mezzotint.memory.headers import ModelHeaders
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import UNet
from pictures import NEGATIVE, PROMPT, Pair, apart, different, fields, load, ours, same, save, theirs

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers with numpy 2


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Path]:
    folder = tmp_path_factory.mktemp("lcm")
    tokenizer = Tokenizer.subset([PROMPT, NEGATIVE])
    ids = {"vocab_size": len(tokenizer.vocab), "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    unet: UNet2DConditionModel = tiny.unet("sd1", time_cond_proj_dim=9)
    with torch.no_grad():
        unet.time_embedding.cond_proj.weight.mul_(5)  # the scale must be heard
    save(folder, "sd1", tokenizer, [tiny.clip("sd1", **ids)], unet, tiny.vae())
    return load(folder, "sd1"), folder


@pytest.mark.parametrize("dim", [8, 9, 256])
def test_the_guidance_embedding_is_diffusers(dim: int) -> None:
    unet = UNet(UNetConfig.model_validate(tiny.UNETS["sd1"] | {"time_cond_proj_dim": dim}))
    for scale in (1.0, 1.37, 8.5):
        expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
            None, torch.tensor([scale - 1]), embedding_dim=dim
        )
        # float32 rounds an angle of up to 7500 by 2^-12
        torch.testing.assert_close(unet.guidance_embedding(scale), expected, rtol=0, atol=2**-11)


def test_the_picture_is_that_of_the_lcm_pipeline(lcm: tuple[Pair, Path]) -> None:
    pair, _ = lcm
    parts = pair.theirs.components
    del parts["image_encoder"]
    pipe = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for scale in (8.5, 1.5):
        request = fields(sampler="lcm", steps=4, guidance_scale=scale, count=2)
        del request["negative_prompt"]
        drawn.append(ours(pair, request))
        same(drawn[-1], theirs(Pair(pipe, pair.ours, pair.scheduler), request))
    different(*drawn)


def test_other_samplers_and_a_negative_prompt_that_has_no_effect(lcm: tuple[Pair, Path]) -> None:
    pair, _ = lcm
    for sampler in ("euler", "ddim"):
        request = fields(sampler=sampler)
        same(ours(pair, request), theirs(pair, request))
    plain = {name: value for name, value in request.items() if name != "negative_prompt"}
    assert apart(ours(pair, plain), ours(pair, request))[0] == 0.0
    notices = pair.ours.plan(Request(**request)).notices
    assert len(notices) == 1 and notices[0].startswith("negative_prompt: without effect")
    assert pair.ours.plan(Request(**plain)).notices == ()


def test_scales_over_the_run_and_an_interval(lcm: tuple[Pair, Path]) -> None:
    """Outside the interval the scale is 1; a list is spread over the steps."""
    pair, _ = lcm
    usual = fields(sampler="euler", steps=2) | {"negative_prompt": None}
    scales, halved = usual | {"guidance_scale": (1.0, 7.5)}, usual | {"guidance_steps": (0.5, 1.0)}
    assert apart(ours(pair, scales), ours(pair, halved))[0] == 0.0
    different(ours(pair, usual), ours(pair, halved))


def test_one_condition_is_planned_and_run(lcm: tuple[Pair, Path]) -> None:
    pair, folder = lcm
    plan = pair.ours.plan(Request(**fields()))
    assert (plan.guides, plan.condition_count) == (False, 1)
    model = ModelHeaders.of(folder, device="cpu")
    guided, plain = (predict(model, Request(**fields(guidance_scale=w)), base=0) for w in (7.5, 1.0))
    assert guided.macs == plain.macs
    # what the process itself uses is in every stage, and grows between the two
    assert guided.stages["step"] - guided.stages["png"] == plain.stages["step"] - plain.stages["png"]
    assert pair.ours.plan("a lemon").request.steps == 4
    with pytest.raises(RequestError, match="needs an unconditional output"):
        pair.ours.plan(Request(prompt="a lemon", sampler="dpmpp_2m_cfg_pp"))
