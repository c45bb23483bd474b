"""The UNet by itself: what is computed once a run, fused projections, training, and refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mezzotint.config import UNetConfig
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.models.blocks import Attention
from mezzotint.models.unet import Condition, UNet

SMALL: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
SDXL = SMALL | {
    "transformer_layers_per_block": (2, 1),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 24,
}


def build(config: dict[str, Any] = SMALL) -> UNet:
    torch.manual_seed(0)
    return UNet(UNetConfig.model_validate(config)).eval()


def inputs(batch: int = 2) -> tuple[Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, 6, 5, generator=generator)
    context = torch.randn(batch, 7, 24, generator=generator)
    pooled = torch.randn(batch, 24, generator=generator)
    return sample, Condition(context, pooled, torch.full((batch, 6), 1001.0))


@pytest.mark.parametrize("adapter", [False, True], ids=["", "t2i"])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SDXL,
        SMALL | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")},
        SMALL | {"down_block_types": ("DownBlock2D", "DownBlock2D"), "mid_block_type": "UNetMidBlock2D"},
    ],
    ids=["sd1", "sdxl", "attention-below", "attention-on-the-way-up"],
)
@torch.no_grad()
def test_latents_that_several_conditions_share(config: dict[str, Any], adapter: bool) -> None:
    """The same in float64 as with the latents repeated; what precedes the first condition has the smaller batch."""
    unet = build(config).double()
    sample, _ = inputs(2)
    _, condition = inputs(6)
    sample, condition = sample.double(), condition.to(dtype=torch.float64)
    sizes: list[int] = []
    first = unet.down_blocks[0].resnets[0].conv1  # type: ignore[index, union-attr]
    first.register_forward_hook(lambda _module, args, _output: sizes.append(len(args[0])))
    features = [torch.randn(6, 16, 3, 3).double(), torch.randn(6, 32, 3, 3).double()] if adapter else ()
    if adapter and config["down_block_types"][0].startswith("Cross"):
        features = [torch.randn(6, 16, 6, 5).double(), features[1]]
    shared = unet(sample, 500.0, condition, features=features)
    repeated = unet(sample.repeat(3, 1, 1, 1), 500.0, condition, features=features)
    assert sizes == [2, 6]
    torch.testing.assert_close(shared, repeated, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", [SMALL, SDXL], ids=["sd1", "sdxl"])
@torch.no_grad()
def test_what_is_computed_once_a_run_changes_nothing(config: dict[str, Any]) -> None:
    unet = build(config)
    sample, condition = inputs()
    timestep = torch.tensor([981.5, 20.0])
    keys_values = unet.keys_values(condition)
    times = unet.time_projections(timestep, condition)
    # Down: one attending level; bottom; up: two layers.
    depth = unet.config.per_level(unet.config.transformer_layers_per_block)
    assert len(keys_values) == depth[0] + depth[1] + 2 * depth[0]
    assert keys_values[0][0].shape == (2, 2, 7, 8)
    assert [time.shape for time in times] == [(2, c) for c in (16, 32, 32, 32, 32, 32, 16, 16)]
    plain = unet(sample, timestep, condition)
    assert torch.equal(unet(sample, timestep, condition, keys_values=keys_values, time_projections=times), plain)


@torch.no_grad()
def test_one_timestep_stands_for_the_whole_batch() -> None:
    unet = build()
    sample, condition = inputs()
    expected = unet(sample, torch.tensor([7.5, 7.5]), condition)
    for timestep in (7.5, torch.tensor(7.5), torch.tensor([7.5])):
        torch.testing.assert_close(unet(sample, timestep, condition), expected)


@torch.no_grad()
def test_the_two_memory_formats_agree_and_channels_last_stays() -> None:
    unet = build()
    sample, condition = inputs()
    expected = unet(sample, 500, condition)
    assert expected.is_contiguous()
    output = unet.to(memory_format=torch.channels_last)(sample, 500, condition)  # type: ignore[call-overload]
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected)


def matmuls(attn: Attention, x: Tensor, context: Tensor | None) -> int:
    """How many matmuls the projections take: to_out not counted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attn.keys_values(context) if context is not None else attn(x)
    return sum(event.count for event in profile.key_averages() if event.key == "aten::linear") - (context is None)


@torch.no_grad()
def test_fused_projections_are_views_of_one_weight_and_give_the_same() -> None:
    unet = build(SDXL)
    sample, condition = inputs()
    plain, keys = unet(sample, 500, condition), {k: v.clone() for k, v in unet.state_dict().items()}
    unet.fuse_projections()
    assert {k: v.shape for k, v in unet.state_dict().items()} == {k: v.shape for k, v in keys.items()}
    assert all(torch.equal(value, keys[key]) for key, value in unet.state_dict().items())
    torch.testing.assert_close(unet(sample, 500, condition), plain)
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    for attn in attentions:
        fused = [attn.to_k, attn.to_v] if attn.cross else [attn.to_q, attn.to_k, attn.to_v]
        storages = {layer.weight.untyped_storage().data_ptr() for layer in fused}
        assert len(storages) == 1
        assert fused[0].weight.untyped_storage().nbytes() == sum(layer.weight.nbytes for layer in fused)
        x = torch.randn(1, 3, attn.to_q.in_features)
        assert matmuls(attn, x, condition.context if attn.cross else None) == 1
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert matmuls(attentions[0], torch.randn(1, 3, 16), None) == 1


class Doubled(nn.Module):
    """An adapter: wraps a layer, as peft does."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = 2 * self.base(x)
        return output


@torch.no_grad()
def test_a_wrapped_replaced_or_changed_weight_is_obeyed() -> None:
    def output(fuse: bool, change: Any) -> Tensor:
        attn = Attention(16, 2)
        attn.load_state_dict(weights)
        if fuse:
            attn.fuse()
        change(attn)
        result: Tensor = attn(x)
        return result

    def wrap(attn: Attention) -> None:
        attn.to_k = Doubled(attn.to_k)  # type: ignore[assignment]

    def replace(attn: Attention) -> None:
        attn.to_v.weight = nn.Parameter(attn.to_v.weight * 3)

    def change(attn: Attention) -> None:
        attn.to_q.weight.mul_(3)

    def move(attn: Attention) -> None:
        attn.double().float()

    torch.manual_seed(0)
    weights, x = Attention(16, 2).state_dict(), torch.randn(2, 5, 16)
    for edit in (wrap, replace, change, move, copy.deepcopy):
        torch.testing.assert_close(output(True, edit), output(False, edit))
    assert not torch.allclose(output(True, wrap), output(True, copy.deepcopy))


def test_a_fused_network_is_saved_and_trained_like_any_other(tmp_path: Path) -> None:
    unet, plain = build(), build()
    unet.fuse_projections()
    save_file(unet.state_dict(), tmp_path / "unet.safetensors")
    loaded = load_file(tmp_path / "unet.safetensors")
    assert all(torch.equal(loaded[key], value) for key, value in plain.state_dict().items())
    sample, condition = inputs()
    for network in (unet, plain):
        network(sample, 500, condition).square().mean().backward()
    for (name, parameter), other in zip(unet.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None, name
        torch.testing.assert_close(parameter.grad, other.grad)
        assert parameter.grad.abs().max() > 0, name


def test_frozen_and_fused_it_still_passes_gradients_on() -> None:
    attn = Attention(16, 2)
    x = torch.randn(1, 3, 16, requires_grad=True)
    expected = torch.autograd.grad(attn(x).sum(), x)[0]
    attn.requires_grad_(False).fuse()
    torch.testing.assert_close(torch.autograd.grad(attn(x).sum(), x)[0], expected)


@torch.no_grad()
def test_upcast_attention_computes_in_float32_and_answers_in_the_dtype_of_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append({q.dtype, k.dtype, v.dtype})
        return nn.functional.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr("mezzotint.models.blocks.attention", spy)
    sample, condition = inputs()
    for upcast, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        unet = build(SMALL | {"upcast_attention": upcast}).to(torch.bfloat16)
        output = unet(sample.bfloat16(), 500, condition.to(dtype=torch.bfloat16))
        assert output.dtype == torch.bfloat16
        assert seen.pop() == {dtype}


def test_conditions_join_repeat_and_move() -> None:
    _, two = inputs(2)
    _, one = inputs(1)
    joined = Condition.cat([two, one])
    assert joined.pooled is not None and joined.time_ids is not None
    assert joined.context.shape == (3, 7, 24) and joined.pooled.shape == (3, 24) and joined.time_ids.shape == (3, 6)
    assert Condition.cat([two, Condition(one.context)]).pooled is None
    assert torch.equal(two.repeat(2).context, torch.cat([two.context, two.context]))
    moved = two.to("cpu", torch.bfloat16)
    assert moved.context.dtype == torch.bfloat16
    assert moved.time_ids is not None and moved.time_ids.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, "down_block_types.*AttnDownBlock2D"),
        ({"up_block_types": ("UpBlock2D", "SkipUpBlock2D")}, "up_block_types.*SkipUpBlock2D"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type.*SimpleCrossAttn"),
        ({"reverse_transformer_layers_per_block": (1,)}, "reverse_transformer_layers_per_block has 1 numbers for 2"),
        ({"transformer_layers_per_block": ((1, 2), 1)}, r"transformer_layers_per_block has \[1, 2\] for a block of 1"),
        ({"transformer_layers_per_block": ((2,), 1)}, r"reverse_.* has \[2\] for a block of 2 layers"),
        ({"act_fn": "mish"}, "act_fn.*mish"),
        ({"only_cross_attention": True}, "only_cross_attention.*True"),
        ({"layers_per_block": (1, 2, 3)}, "layers_per_block has 3 numbers for 2"),
        ({"attention_head_dim": (1,)}, "attention_head_dim has 1 numbers for 2"),
        ({"attention_head_dim": 5}, "16, which 5 heads"),
        ({"norm_num_groups": 32}, "32 groups"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim"),
    ],
)
def test_a_configuration_that_it_cannot_be_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words), torch.device("meta"):
        UNet(UNetConfig.model_validate(SMALL | changes))


@torch.no_grad()
def test_inputs_that_it_has_no_place_for_are_refused_by_name() -> None:
    sample, condition = inputs()
    with pytest.raises(RequestError, match="timestep_cond"):
        build()(sample, 1, condition, timestep_cond=torch.zeros(2, 8))
    with pytest.raises(RequestError, match=r"condition\.pooled"):
        build(SDXL)(sample, 1, Condition(condition.context))
    with pytest.raises(RequestError, match="1 down_residuals were given; this UNet takes 4"):
        build()(sample, 1, condition, down_residuals=[sample])
