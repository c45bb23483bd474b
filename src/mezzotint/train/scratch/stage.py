"""A stage of training from scratch: the loop of train/loop.py with Muon, and a log of averaged losses."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from mezzotint.train.loop import MetricsLog, TrainingLoop
from mezzotint.train.scratch.optim import MuonAdamW

Losses = dict[str, Tensor]  # "loss" is minimised; the others are logged


@dataclass(frozen=True)
class Stage:
    """Length and learning rate of a stage.

    The rate warms up, stays constant, and falls to 0 over the last `decay` steps. So a run may be extended by resuming
    it with more `steps` before its decay starts.
    """

    steps: int
    batch: int
    lr: float = 1e-3
    warmup: int = 100
    decay: int = 1000
    ema: float = 0.999
    clip: float = 1.0
    seed: int = 0
    save_every: int = 200
    keep: int = 2
    log_every: int = 20

    def lr_scale(self, step: int) -> float:
        """Return the fraction of `lr` at a step, counted from 0."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / self.decay)


def train(
    module: nn.Module,
    losses: Callable[[int, torch.Generator], Losses],
    stage: Stage,
    folder: Path,
    *,
    adamw_only: tuple[str, ...] = (),
    log: Callable[[str], None] = print,
) -> nn.Module:
    """Minimise losses(step, generator)["loss"] over the module's parameters.

    Args:
        module: trained in place.
        losses: the losses of a step, counted from 0. Its CPU generator is seeded by (stage.seed, step).
        stage: length, learning rate, averaging and checkpoints.
        folder: for checkpoints, from the newest of which the stage resumes, and log.jsonl.
        adamw_only: parts of names of parameters that AdamW trains, whatever their shape.
        log: called with each line of the log.

    Returns:
        The module, holding the averaged weights.

    Raises:
        CheckpointError: if the checkpoint in the folder is of another module.
        TrainingError: if a loss or gradient is not finite.
        WriteError: if the folder cannot be written.
    """

    def backward(step: int) -> Losses:
        values = losses(step, torch.Generator().manual_seed(stage.seed * 1_000_003 + step))
        values["loss"].backward()  # type: ignore[no-untyped-call]
        return values

    optimiser = MuonAdamW(module, stage.lr, adamw_only)
    loop = TrainingLoop(dict(module.named_parameters()), optimiser, folder, stage, stage.lr_scale)
    metrics_log, recent, clock = MetricsLog(folder, loop.step), defaultdict[str, list[float]](list), time.monotonic()
    for done in loop.run(backward):
        for name, value in done.losses.items():
            recent[name].append(value)
        if done.step % stage.log_every == 0:
            rate = stage.log_every * stage.batch / (time.monotonic() - clock)
            log(metrics_log.write(done.step, {"rate": rate} | {name: mean(v) for name, v in recent.items()}))
            clock = time.monotonic()
            recent.clear()
    loop.use_averages()
    return module
