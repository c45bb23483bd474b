"""The UNet against diffusers' UNet2DConditionModel: same weights, same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import tiny
from mezzotint.config import UNetConfig
from mezzotint.models.unet import Condition, UNet

LCM = {"time_cond_proj_dim": 8}


def ours(theirs: UNet2DConditionModel) -> UNet:
    """Our network with their weights, built on the meta device as a loader builds it."""
    with torch.device("meta"):
        unet = UNet(UNetConfig.model_validate(dict(theirs.config)))
    unet.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return unet.eval()


def inputs(theirs: UNet2DConditionModel, size: tuple[int, int] = (8, 8), batch: int = 2) -> tuple[Tensor, Condition]:
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(batch, theirs.config.in_channels, *size, generator=generator)
    context = torch.randn(batch, 7, theirs.config.cross_attention_dim, generator=generator)
    if theirs.config.addition_embed_type is None:
        return sample, Condition(context)
    time_ids = torch.tensor([[1024.0, 768.0, 0.0, 13.0, 1001.0, 1024.0]] * batch)
    return sample, Condition(context, torch.randn(batch, tiny.WIDTH, generator=generator), time_ids)


def run(theirs: UNet2DConditionModel, sample: Tensor, timestep: Any, condition: Condition, **extra: Any) -> Tensor:
    added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    return theirs(sample, timestep, condition.context, added_cond_kwargs=added, return_dict=False, **extra)[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_the_output_is_diffusers(family: str, memory_format: torch.memory_format) -> None:
    theirs = tiny.unet(family)
    unet = ours(theirs).to(memory_format=memory_format)  # type: ignore[call-overload]
    for size, timestep in (
        ((8, 8), torch.tensor([981, 3])),
        ((9, 13), torch.tensor([250.37, 998.99])),  # a picture of 72x104
        ((5, 3), 500),
    ):
        sample, condition = inputs(theirs, size)
        output = unet(sample.to(memory_format=memory_format), timestep, condition)
        assert tiny.apart(output, run(theirs, sample, timestep, condition)) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"mid_block_type": None},
        {"mid_block_type": "UNetMidBlock2D"},
        {
            "layers_per_block": 2,
            "transformer_layers_per_block": [[2, 1], 3],
            "reverse_transformer_layers_per_block": [1, [1, 3, 2]],
        },
        {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "transformer_layers_per_block": (1, 2)},
        {"center_input_sample": True},
        {"flip_sin_to_cos": False, "freq_shift": 1},
        {"layers_per_block": (1, 2)},
        {"use_linear_projection": True, "transformer_layers_per_block": (2, 1)},
        {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2},
        {
            "block_out_channels": (16, 32, 48),
            "down_block_types": ("DownBlock2D",) * 3,
            "up_block_types": ("UpBlock2D",) * 3,
        },
        {"out_channels": 8, "norm_eps": 1e-3},
    ],
    ids=str,
)
@torch.no_grad()
def test_every_field_of_the_configuration_means_the_same(changes: dict[str, Any]) -> None:
    theirs = tiny.unet("sd1", **changes)
    sample, condition = inputs(theirs, (9, 13))
    timestep = torch.tensor([981.0, 20.5])
    assert tiny.apart(ours(theirs)(sample, timestep, condition), run(theirs, sample, timestep, condition)) < 1e-5


@torch.no_grad()
def test_the_guidance_embedding_of_lcm_models() -> None:
    theirs = tiny.unet("sd1", **LCM)
    sample, condition = inputs(theirs)
    cond = torch.randn(2, 8, generator=torch.Generator().manual_seed(6))
    output = ours(theirs)(sample, 999, condition, timestep_cond=cond)
    assert tiny.apart(output, run(theirs, sample, 999, condition, timestep_cond=cond)) < 1e-5


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@torch.no_grad()
def test_the_residuals_of_a_controlnet(family: str) -> None:
    theirs = tiny.unet(family)
    sample, condition = inputs(theirs)
    shapes = [(2, 32, 8, 8), (2, 32, 8, 8), (2, 32, 4, 4), (2, 64, 4, 4), (2, 64, 4, 4)]
    generator = torch.Generator().manual_seed(7)
    *down, mid = [torch.randn(shape, generator=generator) for shape in shapes]
    output = ours(theirs)(sample, 40, condition, down_residuals=down, mid_residual=mid)
    expected = run(
        theirs,
        sample,
        40,
        condition,
        down_block_additional_residuals=tuple(down),
        mid_block_additional_residual=mid,
    )
    assert tiny.apart(output, expected) < 1e-5


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_gradient_of_every_parameter_is_diffusers(family: str) -> None:
    theirs = tiny.unet(family).train()
    unet = ours(theirs)
    unet.load_state_dict(theirs.state_dict())  # parameters of its own
    unet.train().requires_grad_(True)
    sample, condition = inputs(theirs, (5, 8))
    timestep, target = torch.tensor([3, 700]), torch.randn(sample.shape)
    (unet(sample, timestep, condition) - target).square().mean().backward()
    (run(theirs, sample, timestep, condition) - target).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None and expected[name].grad is not None, name
        assert tiny.apart(parameter.grad, expected[name].grad) < 1e-3, name


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("sd1.5", 859_520_964),
        ("sd1.5-inpainting", 859_535_364),
        ("sd2.1", 865_910_724),
        ("sdxl", 2_567_463_684),
        ("refiner", 2_259_526_660),
        ("ssd-1b", 1_331_334_404),
        ("vega", 745_225_604),
        ("tiny-sd", 323_384_964),
    ],
)
def test_full_size_keys_and_shapes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**tiny.FULL_UNETS[name])
        unet = UNet(UNetConfig.model_validate(tiny.FULL_UNETS[name]))
    shapes = {key: tensor.shape for key, tensor in unet.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert sum(shape.numel() for shape in shapes.values()) == parameters
