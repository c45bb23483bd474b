"""Where network and mathematics meet: a UNet, a schedule and a prediction become `denoise(x, sigma) -> denoised`.

Solvers think in x = x0 + sigma * noise; the UNet was trained on x / sqrt(sigma^2 + 1) and a timestep. Input scaling,
timesteps and dtypes are here and nowhere else. One Denoiser belongs to one run: it holds the run's conditions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from mezzotint.diffusion.prediction import Prediction
from mezzotint.diffusion.schedule import Schedule
from mezzotint.models.unet import Condition, UNet
from mezzotint.schedulers import TimestepKind


class Denoiser:
    """The network's view of one run.

    conditions: each of batch B or 1; with guidance (conditional, unconditional). timestep: what the network is told of
    a level between two of the table: the timestep "interpolated" in log sigma, or the "nearest" there, or log sigma / 4
    for EDM's ("edm", Karras et al. 2022 table 1); or, as diffusers does on the run's own `levels` (on all, where none
    are given), "linear" in sigma, "rounded" or "truncated". What a solver asks for in between is interpolated.
    """

    def __init__(
        self,
        unet: UNet,
        schedule: Schedule,
        prediction: Prediction,
        conditions: Sequence[Condition],
        timestep: TimestepKind = "interpolated",
        levels: Collection[float] | None = None,
    ) -> None:
        parameter = next(unet.parameters())
        self.unet, self.schedule, self.prediction, self.kind = unet, schedule, prediction, timestep
        self.levels = levels
        self.dtype = parameter.dtype
        self.conditions = [condition.to(parameter.device, parameter.dtype) for condition in conditions]
        self.keys_values = [unet.keys_values(condition) for condition in self.conditions]
        self._batched: dict[tuple[int, int], tuple[Condition, list[tuple[Tensor, Tensor]]]] = {}

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """denoised, like x (B, C, h, w), under the first condition."""
        return self.prediction.denoised(self.outputs(x, sigma, 1)[0], x, sigma)

    def outputs(self, x: Tensor, sigma: float, count: int | None = None) -> tuple[Tensor, ...]:
        """The network's own outputs for x (B, C, h, w), in x's dtype, one for each condition (or the first `count`).

        All of them come from one call of the UNet on a batch of count * B.
        """
        count = len(self.conditions) if count is None else count
        condition, keys_values = self._batch(len(x), count)
        sample = (x / math.sqrt(sigma * sigma + self.prediction.sigma_data**2)).to(self.dtype)
        sample = torch.cat([sample] * count)  # (count * B, C, h, w)
        output: Tensor = self.unet(sample, self.timestep(sigma), condition, keys_values=keys_values)
        return output.to(x.dtype).chunk(count)

    def timestep(self, sigma: float) -> float:
        """The timestep that the UNet is told."""
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

    def _batch(self, batch: int, count: int) -> tuple[Condition, list[tuple[Tensor, Tensor]]]:
        """The first `count` conditions one after another, each `batch` times, with their keys and values; made once."""
        if (batch, count) not in self._batched:
            used = [c if len(c.context) == batch else c.repeat(batch) for c in self.conditions[:count]]
            layers = zip(*self.keys_values[:count], strict=True)  # for each layer its (keys, values) of each condition
            joined = [(_stack([k for k, _ in layer], batch), _stack([v for _, v in layer], batch)) for layer in layers]
            self._batched[batch, count] = Condition.cat(used), joined
        return self._batched[batch, count]


def _stack(parts: Sequence[Tensor], batch: int) -> Tensor:
    """Tensors of batch 1 or `batch` after one another, (len(parts) * batch, ...)."""
    return torch.cat([part.expand(batch, *part.shape[1:]) for part in parts])
