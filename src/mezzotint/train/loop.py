"""The training loop of fine-tuning and of the from-scratch stages.

A step is: losses, backward, clip, optimiser, average of the weights. It is a function of the step's number, so a run
that was killed resumes from its newest checkpoint with the same bits, on one process, several, or with FSDP.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mezzotint.errors import CheckpointError, TrainingError, WriteError
from mezzotint.files import report_write_errors, write_atomically
from mezzotint.train import checkpoints, sharding

LOG = "log.jsonl"


class LoopOptions(Protocol):
    """What the loop reads of a Recipe or a Stage. ema and clip: 0 turns them off; keep: number of checkpoints."""

    @property
    def steps(self) -> int: ...
    @property
    def ema(self) -> float: ...
    @property
    def clip(self) -> float: ...
    @property
    def save_every(self) -> int: ...
    @property
    def keep(self) -> int: ...


class Optimiser(Protocol):
    """torch.optim.Optimizer, or several of them behind its methods."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    def step(self) -> object: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """A finished step: its number from 1, its losses ("loss" is the one minimised), and the gradient's norm."""

    step: int
    losses: dict[str, float]
    norm: float


@dataclass
class TrainingLoop:
    """Parameters with their optimiser and averages, in a folder of checkpoints.

    Args:
        parameters: what is trained, by name.
        optimiser: of these parameters; its groups' learning rates are multiplied by `lr_scale`.
        folder: the run's folder.
        options: number of steps, averaging, clipping and checkpoints.
        lr_scale: fraction of the learning rate at a step, counted from 0.
        extra: fields to store in each checkpoint.
        check: raises CheckpointError(path, state) for a checkpoint that this run must not resume from.
        accelerator: accelerate's, if there are several processes; one of them writes.
    """

    parameters: Mapping[str, nn.Parameter]
    optimiser: Optimiser
    folder: Path
    options: LoopOptions
    lr_scale: Callable[[int], float]
    extra: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Path, dict[str, Any]], None] = lambda path, state: None
    accelerator: Any = None

    def __post_init__(self) -> None:
        """Resume from the newest checkpoint, if there is one. Raises CheckpointError."""
        ema = self.options.ema
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()} if ema else {}
        self._rates = [group["lr"] for group in self.optimiser.param_groups]
        self._saved = self.step = self._resume()

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator is None or bool(self.accelerator.is_main_process)

    def run(
        self, backward: Callable[[int], Mapping[str, Tensor]], culprit: Callable[[], str] = lambda: ""
    ) -> Iterator[StepResult]:
        """Train to the last step, yielding after each; a checkpoint that was due is written by then.

        Args:
            backward: adds the gradients of a step, counted from 0, and returns its losses.
            culprit: called in every process if a loss is not finite; returns where, as a clause for the error.

        Raises:
            TrainingError: if a loss or gradient is not finite; the weights are then still those of the step before.
            WriteError: if a checkpoint cannot be written.
        """
        parameters = list(self.parameters.values())
        while self.step < self.options.steps:
            self.optimiser.zero_grad(set_to_none=True)
            values = backward(self.step)
            total_norm = nn.utils.clip_grad_norm_(parameters, self.options.clip or math.inf)
            norm = float(sharding.full_tensors(total_norm))
            losses = {name: float(value.detach()) for name, value in values.items()}
            if not (math.isfinite(losses["loss"]) and math.isfinite(norm)):
                what = "gradient" if math.isfinite(losses["loss"]) else "loss"
                raise TrainingError(self._not_finite(what, culprit()))
            for group, rate in zip(self.optimiser.param_groups, self._rates, strict=True):
                group["lr"] = rate * self.lr_scale(self.step)
            self.optimiser.step()
            self.step += 1
            weight = 1 - min(self.options.ema, self.step / (self.step + 9))
            with torch.no_grad():
                for name, average in self.averages.items():
                    average.lerp_(self.parameters[name], weight)
            if self.step % self.options.save_every == 0 or self.step == self.options.steps:
                self.save()
            yield StepResult(self.step, losses, norm)
        self.optimiser.zero_grad(set_to_none=True)

    def save(self) -> None:
        """Write a checkpoint, unless this step has one. A collective: all processes must call it. Raises WriteError."""
        if self._saved == self.step:
            return
        state = {
            "trained": {name: sharding.full_tensors(p.detach()).cpu() for name, p in self.parameters.items()},
            "averages": {name: sharding.full_tensors(average).cpu() for name, average in self.averages.items()},
            "optimiser": sharding.full_tensors(self.optimiser.state_dict()),
            **self.extra,
            "step": self.step,
        }
        if self.is_main:
            checkpoints.save(self.folder, self.step, state, self.options.keep)
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
        self._saved = self.step

    def use_averages(self) -> None:
        """Copy the averages, if there are any, into the parameters."""
        with torch.no_grad():
            for name, average in self.averages.items():
                self.parameters[name].copy_(average)

    def _resume(self) -> int:
        """Load the newest checkpoint. Return the number of steps done."""
        found = checkpoints.load_newest(self.folder)
        if found is None:
            return 0
        path, state = found
        try:
            self.check(path, state)
            with torch.no_grad():
                for values, targets in ((state["trained"], self.parameters), (state["averages"], self.averages)):
                    if values.keys() != targets.keys():
                        raise KeyError("other parameters")
                    for name, value in values.items():
                        targets[name].copy_(sharding.shard_like(value, targets[name]))
            self.optimiser.load_state_dict(_shard_moments(state["optimiser"], self.optimiser))
            return int(state["step"])
        except (KeyError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0][:200] or type(error).__name__
            raise CheckpointError(f"{path} is of another model ({reason}); use another folder for this run") from error

    def _not_finite(self, what: str, where: str) -> str:
        paths = checkpoints.list_all(self.folder)
        kept = f"the last good checkpoint is {paths[0]}" if paths else "there is no checkpoint yet"
        return f"step {self.step + 1}: the {what} is not finite{where}; {kept}. Try a lower lr or a longer warmup"


class MetricsLog:
    """A file of one JSON object per line, each with its "step"."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open the log of a run that has done `step` steps: lines of later ones, which will be repeated, are dropped.

        Raises:
            WriteError: if the folder cannot be written.
        """
        self.path = folder / LOG
        with report_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
            write_atomically(self.path, "".join(line for line in lines if _is_done(line, step)).encode())

    def write(self, step: int, metrics: Mapping[str, float]) -> str:
        """Append a line, numbers with six significant digits, and return it. Raises WriteError."""
        line = json.dumps({"step": step} | {name: float(f"{value:.6g}") for name, value in metrics.items()})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise WriteError(f"{self.path} cannot be written: {error.strerror}") from error
        return line


def _is_done(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except ValueError:  # a kill cut the line off
        return False


def _shard_moments(state: dict[str, Any], optimiser: Optimiser) -> dict[str, Any]:
    """Return an optimiser's state with its moments sharded as its parameters are."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    if not any(hasattr(parameter, "full_tensor") for parameter in parameters):
        return state
    moments = {
        number: {
            name: sharding.shard_like(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}
