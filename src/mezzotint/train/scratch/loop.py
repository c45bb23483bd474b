"""One training loop for every stage. A step is a function of (seed, step), so a killed run resumes bit for bit."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from statistics import mean

import torch
from torch import Tensor, nn

from mezzotint.errors import CheckpointError
from mezzotint.train.scratch.optim import Optimiser

Losses = dict[str, Tensor]  # "loss" is the one that is minimised; the others are logged


@dataclass(frozen=True)
class Plan:
    """How long and how fast. The learning rate warms up, stays, and falls to 0 over the last `decay` steps, so a run
    may be lengthened by resuming it with more `steps` before its decay has begun."""

    steps: int
    batch: int
    lr: float = 1e-3
    warmup: int = 100
    decay: int = 1000
    ema: float = 0.999
    clip: float = 1.0
    seed: int = 0
    save_every: int = 200
    log_every: int = 20

    def scale(self, step: int) -> float:
        """The fraction of `lr` at this step."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / self.decay)


def train(
    module: nn.Module,
    losses: Callable[[int, torch.Generator], Losses],
    plan: Plan,
    folder: Path,
    *,
    plain: tuple[str, ...] = (),
    log: Callable[[str], None] = print,
) -> nn.Module:
    """Minimise losses(step, generator)["loss"] over the module's parameters; returns it holding the EMA weights.

    The generator (CPU) is seeded by (plan.seed, step). `folder` holds checkpoint.pt (always whole) and log.jsonl.
    Raises CheckpointError where the one that is there cannot be resumed, FloatingPointError where a gradient is not
    finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimiser = Optimiser(module, plan.lr, plain)
    parameters: list[Tensor] = list(module.parameters())
    averages = [p.detach().clone() for p in parameters]
    start = _resume(folder / "checkpoint.pt", module, optimiser, averages)
    clock, seen = time.monotonic(), defaultdict[str, list[float]](list)
    for step in range(start, plan.steps):
        values = losses(step, torch.Generator().manual_seed(plan.seed * 1_000_003 + step))
        values["loss"].backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(parameters, plan.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {step}: the gradient is not finite")
        optimiser.step(plan.scale(step))
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(plan.ema, (step + 1) / (step + 10)))
        for name, value in values.items():
            seen[name].append(value.item())
        if (step + 1) % plan.log_every == 0:
            rate = plan.log_every * plan.batch / (time.monotonic() - clock)
            line = {"step": step + 1, "rate": round(rate, 1), **{k: round(mean(v), 5) for k, v in seen.items()}}
            with (folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            log(json.dumps(line))
            clock = time.monotonic()
            seen.clear()
        if (step + 1) % plan.save_every == 0 or step + 1 == plan.steps:
            _save(folder / "checkpoint.pt", step + 1, module, optimiser, averages)
    with torch.no_grad():
        torch._foreach_copy_(parameters, averages)
    return module


def _save(path: Path, step: int, module: nn.Module, optimiser: Optimiser, averages: list[Tensor]) -> None:
    state = {"step": step, "module": module.state_dict(), "optimiser": optimiser.state_dict(), "averages": averages}
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _resume(path: Path, module: nn.Module, optimiser: Optimiser, averages: list[Tensor]) -> int:
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        torch._foreach_copy_(averages, state["averages"])
        return int(state["step"])
    except (RuntimeError, UnpicklingError, EOFError, KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(f"{path} is damaged, or of another model ({reason}); delete it to begin anew") from error
