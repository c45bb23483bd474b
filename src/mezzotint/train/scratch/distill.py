"""Few-step distillation: a student does in four steps without guidance what a guided teacher does in twenty.

The teacher solves the probability-flow ODE from noise to picture, and its trajectory is recorded at the noise levels
that the solver `lcm` visits. From each of them the student learns to predict the trajectory's end in one step. This is
the consistency function of Song et al. 2023 (eq. 2), learned from whole trajectories (Luhman and Luhman 2021), not, as
in latent consistency distillation (Luo et al. 2023), from the student's own output one level below, which is right only
once all levels below are. That paper's boundary scalings are 0 and 1 to seven digits at every level visited, so the
student's denoised estimate is the consistency function, as `lcm` assumes.

The student is the teacher's UNet with a LoRA, as in LCM-LoRA (Luo et al. 2023b). No pictures are needed, only captions.
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
from mezzotint.models.adapters import LowRank
from mezzotint.models.unet import Condition, UNet
from mezzotint.train.scratch.diffusion import TextToLatents
from mezzotint.train.scratch.stage import Losses, Stage, train
from mezzotint.weights.save_lora import LoraPairs

POOL = 8  # batches of trajectories computed at once
VISITS = 2  # to each level of each trajectory before the next pool
SUBSTEPS = 5  # of the teacher between two levels of the student: 20 in all for 4 levels


class LoraLayers(nn.Module):
    """A LoRA, initially zero, of every linear and convolution layer of a UNet."""

    def __init__(self, unet: UNet, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()  # by layer, with / for the dots
        for name, layer in unet.named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                continue
            key, weight = name.replace(".", "/"), layer.weight
            ones = (1,) * (weight.ndim - 2)
            self.down[key] = torch.randn((rank, *weight.shape[1:]), device=weight.device) / weight[0].numel() ** 0.5
            self.up[key] = torch.zeros((len(weight), rank, *ones), device=weight.device)

    def pairs(self) -> LoraPairs:
        """Return the LoRA by layer; its tensors are the parameters."""
        return {key.replace("/", "."): (self.down[key], self.up[key]) for key in self.down}

    def run(self, unet: UNet, sample: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Run the UNet with the LoRA; if the UNet is frozen, only the LoRA gets gradients."""
        weights = {}
        for name, (down, up) in self.pairs().items():
            weight = unet.get_parameter(f"{name}.weight")
            weights[f"{name}.weight"] = weight.float() + LowRank(down, up).delta(weight)
        output: Tensor = functional_call(unet, weights, (sample, timesteps, condition))
        return output


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained UNet with its guidance scale and `unconditional` (1, T, D), the context of the empty caption."""

    unet: UNet
    schedule: Schedule
    prediction: Prediction
    unconditional: Tensor
    guidance_scale: float

    @torch.no_grad()
    def trajectories(
        self, context: Tensor, noise: Tensor, sigmas: Sequence[float], substeps: int
    ) -> tuple[Tensor, Tensor]:
        """Solve from noise to latents by DPM-Solver++(2M).

        Args:
            context: (B, T, D).
            noise: (B, C, h, w), of unit variance.
            sigmas: falling noise levels, ending in 0.0.
            substeps: steps between two levels, evenly spaced in timestep.

        Returns:
            x at each level but the last, (B, L, C, h, w), and the ends (B, C, h, w).
        """
        conditions = [Condition(context), Condition(self.unconditional)]
        denoiser = Denoiser(self.unet, self.schedule, self.prediction, conditions)
        denoise = guided(denoiser.outputs, self.prediction, self.guidance_scale)
        levels = refine_levels(self.schedule, sigmas, substeps)
        passed = [noise * levels[0]]
        passed += [step.x for step in SOLVERS["dpmpp_2m"](denoise, passed[0], levels, None)]
        return torch.stack(passed[:-1:substeps], dim=1), passed[-1]


def refine_levels(schedule: Schedule, sigmas: Sequence[float], parts: int) -> list[float]:
    """Insert parts - 1 levels between each two, evenly spaced in timestep; the end, 0.0, counts as timestep 0."""
    levels: list[float] = []
    timesteps = [schedule.timestep(sigma) for sigma in sigmas[:-1]] + [0.0]
    for first, last in pairwise(timesteps):
        levels += [schedule.sigma(first + (last - first) * k / parts, "log_sigma") for k in range(parts)]
    return [*levels, 0.0]


def distill_losses(
    lora: LoraLayers, teacher: Teacher, x: Tensor, sigma: Tensor, ends: Tensor, context: Tensor
) -> Losses:
    """Return the pseudo-Huber distance (Song and Dhariwal 2023, eq. 7) of the student's estimates from the ends.

    Args:
        lora: the student's LoRA.
        teacher: the frozen model.
        x: (B, C, h, w), on a trajectory.
        sigma: (B,), noise levels of x.
        ends: (B, C, h, w), the trajectory's end.
        context: (B, T, D).

    Returns:
        "loss", and "rms", the distance in units of the latents.
    """
    schedule, level = teacher.schedule, sigma.view(-1, 1, 1, 1)
    timesteps = torch.tensor([schedule.timestep(value) for value in sigma.tolist()], device=x.device)
    sample = x / (level.square() + teacher.prediction.sigma_data**2).sqrt()
    sample = sample.contiguous(memory_format=torch.channels_last)
    output = lora.run(teacher.unet, sample, timesteps, Condition(context))
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
) -> LoraPairs:
    """Train a LoRA with which `lcm` generates in `steps` steps without guidance.

    The teacher's trajectories are computed in pools, each a function of the stage's seed and the pool's number, so that
    a killed run resumes with the same bits.

    Args:
        model: trained and frozen, float32.
        ids: (N, T), token windows of captions, on the model's device.
        empty: (T,), the window of the empty caption.
        scheduler_config: the model's.
        stage: length and learning rate.
        folder: for checkpoints and log.
        shape: (C, h, w) of the latents.
        guidance_scale: the teacher's.
        rank: of the LoRA.
        steps: the student's.
        log: called with each line of the log.

    Returns:
        The LoRA.

    Raises:
        CheckpointError: if the checkpoint in the folder is of another run.
        TrainingError: if a loss or gradient is not finite.
        WriteError: if the folder cannot be written.
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
    def compute_pool(pool: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        x, ends, context, order = compute_pool(pool)
        chosen = order[place * stage.batch : (place + 1) * stage.batch].to(ids.device)
        row, level = chosen // steps, chosen % steps
        return distill_losses(lora, teacher, x[row, level], levels[level], ends[row], context[row])

    torch.manual_seed(stage.seed)
    lora = LoraLayers(model.unet, rank)
    train(lora, losses, stage, folder, adamw_only=("conv_in", "conv_out"), log=log)
    return lora.requires_grad_(False).pairs()
