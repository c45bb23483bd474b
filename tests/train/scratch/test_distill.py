"""Few-step distillation: the teacher's trajectories against the exact ones, the loss by hand, the stage as a whole."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.config import CLIPConfig, ScheduleConfig, UNetConfig
from mezzotint.diffusion.prediction import V_PREDICTION
from mezzotint.diffusion.schedule import Schedule
from mezzotint.models.adapters import LayerChange, LowRank, merge_copy
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.unet import Condition, UNet
from mezzotint.train.scratch import distill as stage
from mezzotint.train.scratch.diffusion import TextToLatents
from mezzotint.train.scratch.distill import LoraLayers, Teacher, distill, distill_losses, refine_levels
from mezzotint.train.scratch.stage import Stage
from mezzotint.weights.save_lora import LoraPairs

SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
}
SCHEDULE = Schedule.from_config(ScheduleConfig.model_validate(SCHEDULER))
TIMESTEPS = (999, 759, 499, 259)  # of LCMScheduler's four steps
SIGMAS = [*(SCHEDULE.sigma(t) for t in TIMESTEPS), 0.0]
SPREAD = 0.4
UNET = UNetConfig(
    sample_size=4,
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=16,
    attention_head_dim=2,
    norm_num_groups=8,
)
CLIP = CLIPConfig(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=6,
    bos_token_id=18,
    eos_token_id=19,
    pad_token_id=19,
)
IDS = torch.tensor([[18, k, 2 * k, 19, 19, 19] for k in range(8)])
EMPTY = torch.tensor([18, 19, 19, 19, 19, 19])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Gaussian(nn.Module):
    """The exact v-prediction network of data N(mean, SPREAD^2), where the mean is the context's one number.

    `ends`: not the posterior mean, but the end of the trajectory through x, which is known in closed form too.
    """

    def __init__(self, ends: bool = False) -> None:
        super().__init__()
        self.ends = ends
        self.parameter = nn.Parameter(torch.zeros(()), requires_grad=False)

    def keys_values(self, condition: Condition) -> list[tuple[Tensor, Tensor]]:
        return [(condition.context[:, None], condition.context[:, None])]

    def forward(self, sample: Tensor, timestep: Tensor | float, condition: Condition, **_: Any) -> Tensor:
        times = torch.as_tensor(timestep).reshape(-1).tolist()
        sigma = torch.tensor([SCHEDULE.sigma(t, "log_sigma") for t in times]).view(-1, 1, 1, 1)
        mean, x = condition.context.view(-1, 1, 1, 1), sample * (sigma**2 + 1).sqrt()
        share = SPREAD / (SPREAD**2 + sigma**2).sqrt()
        return V_PREDICTION.output(mean + (x - mean) * (share if self.ends else share**2), x, sigma)


def teacher(guidance_scale: float = 1.0, ends: bool = False) -> Teacher:
    return Teacher(Gaussian(ends), SCHEDULE, V_PREDICTION, torch.full((1, 1, 1), -0.2), guidance_scale)  # type: ignore[arg-type]


# ---- the teacher -----------------------------------------------------------------------------------------------------


def test_the_finer_levels_are_even_in_timestep() -> None:
    levels = refine_levels(SCHEDULE, SIGMAS, 5)
    assert len(levels) == 21 and levels[::5] == pytest.approx(SIGMAS) and levels[-1] == 0.0
    timesteps = [SCHEDULE.timestep(sigma) for sigma in levels[:-1]]
    steps = [round(a - b, 3) for a, b in pairwise(timesteps)]
    assert steps == [48.0] * 5 + [52.0] * 5 + [48.0] * 5 + [51.8] * 4


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_trajectories_are_the_exact_ones(scale: float) -> None:
    context, noise = torch.tensor([0.5, 1.0, -0.7]).view(3, 1, 1), randn(3, 2, 4, 4)
    mean = (context if scale == 1.0 else -0.2 + scale * (context + 0.2)).view(3, 1, 1, 1)

    def errors(substeps: int) -> tuple[float, float]:
        x, ends = teacher(scale).trajectories(context, noise, SIGMAS, substeps)
        assert x.shape == (3, 4, 2, 4, 4) and torch.equal(x[:, 0], noise * SIGMAS[0])
        start = (noise * SIGMAS[0] - mean) / math.sqrt(SIGMAS[0] ** 2 + SPREAD**2)
        exact = [mean + start * math.sqrt(sigma**2 + SPREAD**2) for sigma in SIGMAS]
        on_the_way = max(((x[:, k] - exact[k]).abs().max() / exact[k].abs().max()).item() for k in range(1, 4))
        return on_the_way, (ends - exact[-1]).abs().max().item()

    coarse, fine = errors(5), errors(40)
    assert coarse[0] < 2e-3 and fine[0] < coarse[0] / 16  # second order
    assert coarse[1] < 0.2 and fine[1] < coarse[1] / 7  # to level 0 there is one step of the first order


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_the_consistency_function_has_no_loss_and_the_posterior_mean_the_papers() -> None:
    context, noise = torch.tensor([0.5, 1.0]).view(2, 1, 1), randn(2, 2, 4, 4)
    x, ends = teacher().trajectories(context, noise, SIGMAS, 100)
    sigma = torch.tensor([SIGMAS[1], SIGMAS[3]])
    x = torch.stack([x[0, 1], x[1, 3]])
    change = LoraLayers(Gaussian(), rank=1)  # type: ignore[arg-type]
    right = distill_losses(change, teacher(ends=True), x, sigma, ends, context)
    assert right["rms"] < 0.005 and right["loss"] < 0.005
    wrong = distill_losses(change, teacher(), x, sigma, ends, context)
    level, mean = sigma.view(-1, 1, 1, 1), context.view(-1, 1, 1, 1)
    away = (mean + (x - mean) * SPREAD**2 / (SPREAD**2 + level**2) - ends).square().flatten(1)
    c = 0.00054 * math.sqrt(32)  # Song and Dhariwal 2023, section 3.4
    expected = ((away.sum(1) + c**2).sqrt() - c).mean() / math.sqrt(32)
    assert expected > 0.02
    torch.testing.assert_close(wrong["loss"], expected)
    torch.testing.assert_close(wrong["rms"], away.mean().sqrt())


def test_the_scalings_of_lcm_are_zero_and_one_at_the_levels_visited() -> None:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [*TIMESTEPS]
    for timestep in TIMESTEPS:
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        assert float(c_skip) < 1e-7 and abs(float(c_out) - 1.0) < 1e-7


# ---- the student -----------------------------------------------------------------------------------------------------


def test_the_student_begins_as_the_teacher_and_is_then_the_merged_unet() -> None:
    torch.manual_seed(0)
    unet = UNet(UNET).requires_grad_(False)
    change = LoraLayers(unet, rank=3)
    inputs = randn(2, 4, 4, 4), torch.tensor([999.0, 259.0]), Condition(randn(2, 5, 16))
    plain = unet(*inputs)
    torch.testing.assert_close(change.run(unet, *inputs), plain)
    with torch.no_grad():
        for up in change.up.values():
            up.normal_(std=0.1)
    output = change.run(unet, *inputs)
    assert (output - plain).abs().max() > 0.1
    changes = {f"unet.{name}": [(LayerChange(LowRank(*pair)), 1.0)] for name, pair in change.pairs().items()}
    torch.testing.assert_close(output, merge_copy(unet, changes)(*inputs), atol=1e-5, rtol=1e-4)
    output.square().mean().backward()
    layers = {name for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    assert change.pairs().keys() == layers
    for name, parameter in change.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert all(parameter.grad is None for parameter in unet.parameters())


# ---- the stage -------------------------------------------------------------------------------------------------------


def run(folder: Path, steps: int = 6) -> tuple[LoraPairs, list[str]]:
    """The stage on a random model: what it gives and what it logs."""
    torch.manual_seed(0)
    model = TextToLatents(CLIPTextModel(CLIP), UNet(UNET)).eval().requires_grad_(False)
    stage = Stage(steps=steps, batch=8, lr=1e-2, warmup=1, decay=1, ema=0.5, save_every=2, log_every=1)
    lines: list[str] = []
    lora = distill(
        model, IDS, EMPTY, SCHEDULER, stage, folder, shape=(4, 4, 4), guidance_scale=3.0, rank=2, log=lines.append
    )
    return lora, lines


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "POOL", 1)
    monkeypatch.setattr(stage, "VISITS", 1)  # 8 trajectories of 4 levels make 4 batches
    whole, _ = run(tmp_path / "whole")
    drawn = Teacher.trajectories
    calls = []

    def killed(self: Teacher, *arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return drawn(self, *arguments)

    monkeypatch.setattr(Teacher, "trajectories", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")  # in its fifth step, when the second pool is drawn
    monkeypatch.setattr(Teacher, "trajectories", drawn)
    again, lines = run(tmp_path / "killed")
    assert len(lines) == 2
    for name, pair in whole.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, again[name], strict=True)), name


def test_each_level_of_each_trajectory_is_visited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "POOL", 1)
    seen: list[tuple[float, float]] = []

    def record(change: LoraLayers, teacher: Teacher, x: Tensor, sigma: Tensor, ends: Tensor, context: Tensor) -> Any:
        seen.extend(zip(sigma.tolist(), ends.sum((1, 2, 3)).tolist(), strict=True))
        return distill_losses(change, teacher, x, sigma, ends, context)

    monkeypatch.setattr(stage, "distill_losses", record)
    run(tmp_path, steps=8)
    assert len(seen) == 64 and len(set(seen)) == 32
    assert sorted({sigma for sigma, _ in seen}, reverse=True) == pytest.approx(SIGMAS[:-1])


def test_the_stage_learns_what_the_teacher_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "POOL", 1)
    monkeypatch.setattr(stage, "VISITS", 6)
    _, lines = run(tmp_path, steps=24)
    rms = [float(line.partition('"rms": ')[2].partition(",")[0].rstrip("}")) for line in lines]
    assert sum(rms[-8:]) < 0.9 * sum(rms[:8])
