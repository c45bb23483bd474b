"""The Denoiser on a network that records what it is shown."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.config import ScheduleConfig, UNetConfig
from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.prediction import EPSILON, PREDICTIONS, edm_prediction
from mezzotint.diffusion.schedule import Schedule
from mezzotint.models.unet import Condition, UNet

SCHEDULE = Schedule.from_config(ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))


class Recorder(nn.Module):
    """Puts out its sample plus the mean of its keys, in its own dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype), requires_grad=False)
        self.seen: list[tuple[Tensor, Any, Condition]] = []
        self.projected = 0

    def keys_values(self, condition: Condition) -> list[tuple[Tensor, Tensor]]:
        self.projected += 1
        return [(condition.context, condition.context)] * 2

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        condition: Condition,
        *,
        keys_values: list[tuple[Tensor, Tensor]],
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        assert timestep_cond is None
        self.seen.append((sample, timestep, condition))
        assert len(keys_values) == 2
        return sample + keys_values[1][0].mean((1, 2))[:, None, None, None]


def denoiser(unet: nn.Module, *conditions: Condition, **options: Any) -> Denoiser:
    return Denoiser(unet, SCHEDULE, EPSILON, conditions, **options)  # type: ignore[arg-type]


def condition(batch: int, value: float) -> Condition:
    return Condition(torch.full((batch, 3, 2), value) + torch.arange(batch)[:, None, None])


X = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))


def test_scales_the_input_and_converts_the_output() -> None:
    unet = Recorder()
    sigma = float(SCHEDULE.sigmas[400])
    denoised = denoiser(unet, condition(1, 0.0))(X, sigma)
    ((sample, timestep, _),) = unet.seen
    torch.testing.assert_close(sample, X / math.sqrt(sigma**2 + 1))
    assert timestep == pytest.approx(400, abs=1e-9)
    torch.testing.assert_close(denoised, X - sigma * sample)


def test_all_conditions_in_one_call_and_projected_once() -> None:
    unet = Recorder()
    run = denoiser(unet, condition(2, 10.0), condition(1, 20.0))
    for sigma in (5.0, 1.0):
        first, second = run.outputs(X, sigma)
        torch.testing.assert_close(
            first - X / math.sqrt(sigma**2 + 1), torch.tensor([10.0, 11.0])[:, None, None, None].expand_as(X)
        )
        torch.testing.assert_close(second - X / math.sqrt(sigma**2 + 1), torch.full_like(X, 20.0))
    assert [len(sample) for sample, *_ in unet.seen] == [4, 4] and unet.projected == 2
    assert unet.seen[0][2] is unet.seen[1][2]  # the batch of conditions is made once
    (only,) = run.outputs(X, 1.0, 1)
    torch.testing.assert_close(only, first)


def test_conditions_that_are_split_come_one_by_one() -> None:
    unets = Recorder(), Recorder()
    conditions = condition(2, 1.0), condition(2, 5.0), condition(1, 3.0)
    together, split = denoiser(unets[0], *conditions), denoiser(unets[1], *conditions, split=True)
    for a, b in zip(together.outputs(X, 2.0), split.outputs(X, 2.0), strict=True):
        assert torch.equal(a, b)
    assert [len(sample) for sample, _, _ in unets[0].seen] == [6]
    assert [len(sample) for sample, _, _ in unets[1].seen] == [2, 2, 2]
    assert [float(c.context[0, 0, 0]) for _, _, c in unets[1].seen] == [1.0, 5.0, 3.0]
    split.outputs(X, 1.0, count=1)
    assert len(unets[1].seen) == 4 and unets[1].projected == 3


def test_the_network_keeps_its_dtype_and_x_keeps_its_own() -> None:
    unet = Recorder(torch.bfloat16)
    (output,) = denoiser(unet, condition(1, 0.0)).outputs(X, 1.0)
    assert unet.seen[0][0].dtype == unet.seen[0][2].context.dtype == torch.bfloat16
    assert output.dtype == torch.float32


def test_timestep_kinds() -> None:
    lower, upper = SCHEDULE.sigmas[100:102]
    between = lower ** (1 - 0.7) * upper**0.7
    linear = 100 + (between - lower) / (upper - lower)
    expected = {
        "interpolated": 100.7,
        "nearest": 101.0,
        "linear": linear,
        "rounded": 101.0,
        "truncated": 100.0,
        "edm": math.log(between) / 4,
    }
    for kind, timestep in expected.items():
        for levels in (None, [between]):
            run = denoiser(Recorder(), condition(1, 0.0), timestep=kind, levels=levels)
            assert run.timestep(between) == pytest.approx(timestep, abs=1e-9)
        elsewhere = denoiser(Recorder(), condition(1, 0.0), timestep=kind, levels=[1.0]).timestep(between)
        assert elsewhere == pytest.approx(timestep if kind in ("nearest", "edm") else 100.7, abs=1e-9)
    assert linear != pytest.approx(100.7, abs=1e-4)
    assert denoiser(Recorder(), condition(1, 0.0), timestep="truncated").timestep(SCHEDULE.sigma_min) == 0.0


def test_edm_scales_by_its_data() -> None:
    """c_in and c_noise of Karras et al. 2022, table 1."""
    unet = Recorder()
    Denoiser(unet, SCHEDULE, edm_prediction(0.5), [condition(1, 0.0)], "edm")(X, 2.0)  # type: ignore[arg-type]
    ((sample, timestep, _),) = unet.seen
    torch.testing.assert_close(sample, X / math.sqrt(4.0 + 0.25))
    assert timestep == pytest.approx(math.log(2.0) / 4)


def test_is_the_unet_itself() -> None:
    """With a real UNet: batched with precomputed keys equals one plain call for each condition."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = UNetConfig(
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=6,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        unet = UNet(config).requires_grad_(False)
        conditions = [Condition(torch.randn(1, 7, 6)), Condition(torch.randn(2, 7, 6))]
        x = torch.randn(2, 4, 8, 6)
    sigma = 2.5
    run = Denoiser(unet, SCHEDULE, PREDICTIONS["v_prediction"], conditions)
    sizes: list[int] = []
    unet.conv_in.register_forward_hook(lambda _module, args, _output: sizes.append(len(args[0])))
    outputs = run.outputs(x, sigma)
    assert sizes == [2]  # once for both conditions
    for given, output in zip(conditions, outputs, strict=True):
        context = given.context.expand(2, 7, 6)
        plain = unet(x / math.sqrt(sigma**2 + 1), SCHEDULE.timestep(sigma), Condition(context))
        torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        run(x, sigma), PREDICTIONS["v_prediction"].denoised(outputs[0], x, sigma), rtol=1e-4, atol=1e-5
    )
