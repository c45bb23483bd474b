"""Few-step distillation: what a guided teacher does in twenty steps, its student does in four, without guidance.

The teacher solves the probability-flow equation from noise to picture and is watched at the levels that the solver
`lcm` will visit; from each of them the student learns to say at once where the trajectory ends. That is the consistency
function of Song et al. 2023 (eq. 2), learnt from whole trajectories (Luhman and Luhman 2021) and not, as in latent
consistency distillation (Luo et al. 2023), from the student's own answer one level below, which is right only when all
levels below already are. The boundary scalings of that paper are 0 and 1 to seven digits at every level that is
visited, so the student's denoised estimate is the consistency function, which is what `lcm` takes it for.

The student is the teacher's UNet under a change of low rank, as in LCM-LoRA (Luo et al. 2023b): a small file. No
picture is needed, only captions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mezzotint import samplers
from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.guidance import guided
from mezzotint.diffusion.prediction import Prediction
from mezzotint.diffusion.schedule import Schedule
from mezzotint.diffusion.solvers import SOLVERS
from mezzotint.diffusion.spacing import SPACINGS
from mezzotint.models.unet import Condition, UNet
from mezzotint.train.scratch.diffusion import TextToLatents
from mezzotint.train.scratch.stage import Losses, Stage, train
from mezzotint.weights.low_rank import Lora, changed, layers

POOL = 8  # batches of trajectories drawn at once
VISITS = 2  # to each level of each of them, before the next are drawn
SUBSTEPS = 5  # of the teacher between two levels of the student: 20 in all where that has 4


class LowRank(nn.Module):
    """What is trained in this stage: the change, zero at first, of every matrix and convolution of a UNet."""

    def __init__(self, unet: UNet, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()  # by layer, / for the dots that torch forbids
        for name, layer in layers(unet).items():
            key, weight = name.replace(".", "/"), layer.weight
            ones = (1,) * (weight.ndim - 2)
            self.down[key] = torch.randn((rank, *weight.shape[1:]), device=weight.device) / weight[0].numel() ** 0.5
            self.up[key] = torch.zeros((len(weight), rank, *ones), device=weight.device)

    def lora(self) -> Lora:
        """The change as it is now; its tensors are the parameters."""
        return {key.replace("/", "."): (self.down[key], self.up[key]) for key in self.down}

    def run(self, unet: UNet, sample: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The changed UNet's output; gradients reach the change alone where the UNet is frozen."""
        weights = {
            f"{name}.weight": changed(unet.get_parameter(f"{name}.weight"), down, up)
            for name, (down, up) in self.lora().items()
        }
        output: Tensor = functional_call(unet, weights, (sample, timesteps, condition))
        return output


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained UNet and how it is used: its guidance, and `unconditional` (1, T, D), the empty caption's context."""

    unet: UNet
    schedule: Schedule
    prediction: Prediction
    unconditional: Tensor
    guidance_scale: float

    @torch.no_grad()
    def trajectories(
        self, context: Tensor, noise: Tensor, sigmas: Sequence[float], substeps: int
    ) -> tuple[Tensor, Tensor]:
        """From unit-variance noise (B, C, h, w) under context (B, T, D) to pictures, by DPM-Solver++(2M).

        sigmas: falling levels, ending in 0.0. Between two of them the teacher takes `substeps` steps, even in timestep.
        Returns x (B, L, C, h, w) at each level but the last, and the ends (B, C, h, w).
        """
        conditions = [Condition(context), Condition(self.unconditional)]
        denoiser = Denoiser(self.unet, self.schedule, self.prediction, conditions)
        denoise = guided(denoiser.outputs, self.prediction, self.guidance_scale)
        levels = refined(self.schedule, sigmas, substeps)
        passed = [noise * levels[0]]
        passed += [step.x for step in SOLVERS["dpmpp_2m"](denoise, passed[0], levels, None)]
        return torch.stack(passed[:-1:substeps], dim=1), passed[-1]


def refined(schedule: Schedule, sigmas: Sequence[float], parts: int) -> list[float]:
    """The levels with parts - 1 more between each two, even in timestep; the end, 0.0, counts as timestep 0."""
    levels: list[float] = []
    timesteps = [schedule.timestep(sigma) for sigma in sigmas[:-1]] + [0.0]
    for first, last in pairwise(timesteps):
        levels += [schedule.sigma(first + (last - first) * k / parts, log=True) for k in range(parts)]
    return [*levels, 0.0]


def distill_losses(
    change: LowRank, teacher: Teacher, x: Tensor, sigma: Tensor, ends: Tensor, context: Tensor
) -> Losses:
    """Pseudo-Huber distance (Song and Dhariwal 2023, eq. 7) of the student's estimates from where the teacher ended.

    x (B, C, h, w) on a trajectory at levels sigma (B,), its ends (B, C, h, w), context (B, T, D). `rms` is the distance
    in units of the latents.
    """
    schedule, level = teacher.schedule, sigma.view(-1, 1, 1, 1)
    timesteps = torch.tensor([schedule.timestep(value) for value in sigma.tolist()], device=x.device)
    sample = x / (level.square() + teacher.prediction.sigma_data**2).sqrt()
    sample = sample.contiguous(memory_format=torch.channels_last)
    output = change.run(teacher.unet, sample, timesteps, Condition(context))
    squared = (teacher.prediction.denoised(output, x, level) - ends).square().flatten(1)
    c = 0.00054 * math.sqrt(squared.shape[1])
    loss = (squared.sum(1) + c * c).sqrt().mean() - c
    return {"loss": loss / math.sqrt(squared.shape[1]), "rms": squared.detach().mean().sqrt()}


def distill(
    model: TextToLatents,
    ids: Tensor,
    empty: Tensor,
    scheduler_config: Mapping[str, Any],
    stage: Stage,
    folder: Path,
    *,
    shape: tuple[int, int, int],
    guidance_scale: float,
    rank: int,
    steps: int = 4,
    log: Callable[[str], None] = print,
) -> Lora:
    """The whole stage: the change of rank `rank` with which `lcm` draws in `steps` steps, without guidance.

    model: trained and frozen, float32. ids (N, T): windows of captions, on the model's device; empty (T,): that of the
    empty one. shape: (C, h, w) of the latents. The teacher draws a pool of captions at a time, each a function of the
    stage's seed and the pool's number, so that a killed run goes on bit for bit. Raises as `train` does.
    """
    sampler = samplers.resolve("lcm", scheduler_config)
    schedule, prediction = Schedule.from_config(sampler.schedule), Prediction.from_config(sampler.schedule)
    sigmas = SPACINGS[sampler.spacing](schedule, steps, **sampler.spacing_options)
    with torch.no_grad():
        unconditional, _ = model.text_encoder(empty[None])
    teacher = Teacher(model.unet, schedule, prediction, unconditional, guidance_scale)
    levels = torch.tensor(sigmas[:-1], device=ids.device)
    size = POOL * stage.batch

    @lru_cache(maxsize=1)
    def drawn(pool: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + pool)
        rows = torch.randint(len(ids), (size,), generator=generator).to(ids.device)
        noise = torch.randn((size, *shape), generator=generator).to(ids.device)
        order = torch.cat([torch.randperm(size * steps, generator=generator) for _ in range(VISITS)])
        with torch.no_grad():
            context, _ = model.text_encoder(ids[rows])
        parts = zip(torch.split(context, stage.batch), torch.split(noise, stage.batch), strict=True)
        x, ends = zip(*(teacher.trajectories(*part, sigmas, SUBSTEPS) for part in parts), strict=True)
        return torch.cat(x), torch.cat(ends), context, order

    def losses(step: int, generator: torch.Generator) -> Losses:
        pool, place = divmod(step, POOL * steps * VISITS)
        x, ends, context, order = drawn(pool)
        chosen = order[place * stage.batch : (place + 1) * stage.batch].to(ids.device)
        row, level = chosen // steps, chosen % steps
        return distill_losses(change, teacher, x[row, level], levels[level], ends[row], context[row])

    torch.manual_seed(stage.seed)
    change = LowRank(model.unet, rank)
    train(change, losses, stage, folder, adamw_only=("conv_in", "conv_out"), log=log)
    return change.requires_grad_(False).lora()
