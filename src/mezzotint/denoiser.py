"""Where network and mathematics meet: a UNet, a schedule and a prediction become `denoise(x, sigma) -> denoised`.

Solvers think in x = x0 + sigma * noise; the UNet was trained on x / sqrt(sigma^2 + 1) and a timestep. Input scaling,
timesteps and dtypes are here and nowhere else. One Denoiser belongs to one run: it holds the run's conditions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mezzotint.diffusion.guidance import step_index
from mezzotint.diffusion.prediction import Prediction
from mezzotint.diffusion.schedule import Schedule
from mezzotint.models.unet import Condition, UNet
from mezzotint.samplers.diffusers_classes import TimestepKind

Timeline = Sequence[tuple[int, Condition]]  # (last step that it holds for, counted from 0; the condition)
KeysValues = list[tuple[Tensor, Tensor]]  # of each cross-attention


class Denoiser:
    """The network's view of one run.

    conditions: each of batch B or 1; with guidance (conditional, unconditional). One that changes in the course of the
    run is a timeline, and `levels` then are the run's, by which its steps are counted. timestep: what the network is
    told of a level between two of the table: the timestep "interpolated" in log sigma, or the "nearest" there, or log
    sigma / 4 for EDM's ("edm", Karras et al. 2022 table 1); or, as diffusers does on the run's own `levels` (on all,
    where none are given), "linear" in sigma, "rounded" or "truncated". What a solver asks for in between is
    interpolated. inpaint_channels (B, C', h, w): what an inpainting network is given beside x at each call,
    the mask and the latents of the masked picture. split: the network is given one condition at a time.
    """

    def __init__(
        self,
        unet: UNet,
        schedule: Schedule,
        prediction: Prediction,
        conditions: Sequence[Condition | Timeline],
        timestep: TimestepKind = "interpolated",
        levels: Sequence[float] | None = None,
        inpaint_channels: Tensor | None = None,
        split: bool = False,
    ) -> None:
        parameter = next(unet.parameters())
        self.unet, self.schedule, self.prediction, self.kind = unet, schedule, prediction, timestep
        self.levels, self.split = levels, split
        self.inpaint_channels = (
            None if inpaint_channels is None else inpaint_channels.to(parameter.device, parameter.dtype)
        )
        self.dtype = parameter.dtype
        self.timelines = [[(0, c)] if isinstance(c, Condition) else list(c) for c in conditions]
        self._projected: dict[Condition, tuple[Condition, KeysValues]] = {}  # placed, each made once
        self._batched: dict[tuple[object, ...], tuple[Condition, KeysValues]] = {}

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """denoised, like x (B, C, h, w), under the first condition."""
        return self.prediction.denoised(self.outputs(x, sigma, 1)[0], x, sigma)

    def outputs(self, x: Tensor, sigma: float, count: int | None = None) -> tuple[Tensor, ...]:
        """Return the network's outputs for x (B, C, h, w), in x's dtype, one per condition (or the first `count`).

        All of them come from one call of the UNet on a batch of count * B; those of other lengths from another, and
        each from its own where they are split.
        """
        conditions = self.conditions(sigma)[:count]
        sample = (x / math.sqrt(sigma * sigma + self.prediction.sigma_data**2)).to(self.dtype)
        sample = sample if self.inpaint_channels is None else torch.cat([sample, self.inpaint_channels], dim=1)
        outputs: dict[int, Tensor] = {}
        calls = [k if self.split else c.context.shape[1] for k, c in enumerate(conditions)]
        for call in dict.fromkeys(calls):
            alike = [k for k, own in enumerate(calls) if own == call]
            condition, keys_values = self._batch(len(x), [conditions[k] for k in alike])
            samples = torch.cat([sample] * len(alike))  # (len(alike) * B, C, h, w)
            output: Tensor = self.unet(samples, self.timestep(sigma), condition, keys_values=keys_values)
            outputs |= zip(alike, output.to(x.dtype).chunk(len(alike)), strict=True)
        return tuple(outputs[k] for k in range(len(conditions)))

    def conditions(self, sigma: float) -> list[Condition]:
        """Those of the step that a call at sigma belongs to."""
        step = step_index(sigma, self.levels or ()) if any(len(timeline) > 1 for timeline in self.timelines) else 0
        return [next((c for until, c in timeline if step <= until), timeline[-1][1]) for timeline in self.timelines]

    def timestep(self, sigma: float) -> float:
        """Return the timestep that the UNet is given."""
        if self.kind == "edm":
            return math.log(sigma) / 4
        own = self.levels is None or sigma in self.levels
        timestep = self.schedule.timestep(sigma, log=not (self.kind == "linear" and own))
        if self.kind == "nearest" or (self.kind == "rounded" and own):
            return float(round(timestep))
        if self.kind == "truncated" and own:
            # as diffusers, where float32 leaves the level of a whole timestep a hair below it: 999 becomes 998
            return float(max(math.floor(timestep - 1e-4), 0))
        return timestep

    def _batch(self, batch: int, conditions: Sequence[Condition]) -> tuple[Condition, KeysValues]:
        """Concatenate the conditions, each `batch` times, with their keys and values; computed once."""
        key = (batch, *conditions)
        if key not in self._batched:
            placed = [self._placed(condition) for condition in conditions]
            used = [c if len(c.context) == batch else c.repeat(batch) for c, _ in placed]
            # for each layer its (keys, values) of each condition
            layers = zip(*(keys_values for _, keys_values in placed), strict=True)
            joined = [(_stack([k for k, _ in layer], batch), _stack([v for _, v in layer], batch)) for layer in layers]
            self._batched[key] = Condition.cat(used), joined
        return self._batched[key]

    def _placed(self, condition: Condition) -> tuple[Condition, KeysValues]:
        """Return the condition on the network's device, and its keys and values; computed once."""
        if condition not in self._projected:
            placed = condition.to(next(self.unet.parameters()).device, self.dtype)
            self._projected[condition] = placed, self.unet.keys_values(placed)
        return self._projected[condition]


def _stack(parts: Sequence[Tensor], batch: int) -> Tensor:
    """Tensors of batch 1 or `batch` after one another, (len(parts) * batch, ...)."""
    return torch.cat([part.expand(batch, *part.shape[1:]) for part in parts])
