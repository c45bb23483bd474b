"""Choose how to run a model so that it fits a memory budget.

    plan("model", "4GiB", request)   ->  MemoryPlan: the fastest Placement whose predicted peak fits, or BudgetError
    mezzotint.load("model", memory="4GiB", request=request)   # makes that plan, and keeps the budget

Exact measures are tried before approximate ones, and of those that fit the one that takes the least time is chosen.
Time is estimated from counts: the multiply-accumulates of the run, and the bytes of weights that a measure reads or
converts again, each of which takes as long as MACS_PER_BYTE multiply-accumulates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mezzotint.errors import BudgetError, RequestError
from mezzotint.memory import system
from mezzotint.memory.footprint import MACS_PER_BYTE, MemoryEstimate, predict
from mezzotint.memory.headers import ModelHeaders
from mezzotint.placement import Placement, format_size, parse_size
from mezzotint.request import MAX_COUNT, Request
from mezzotint.run.plan import RunPlan

SAFETY = 1.03  # the prediction may be 3 % too low
AUTO_SHARE = 0.9  # of the free memory
HEAP_FACTOR = 2  # times a stage's workspace, that glibc's heap may keep unless it returns freed memory; measured 1.1
STAGES = {  # the stage that each field of a Placement affects most
    "weights": "load",
    "storage": "load",
    "attention": "step",
    "guidance": "step",
    "vae": "decode",
}
DESCRIPTIONS = {
    ("weights", "offload"): "each network is read from its files when it runs",
    ("weights", "stream"): "each layer's weights are read from the files when it runs",
    ("guidance", "split"): "one condition at a time",
    ("vae", "strips"): "the VAE runs layer by layer in strips",
    ("vae", "tiles"): "the VAE runs in overlapping tiles (approximate)",
}


@dataclass(frozen=True)
class Budget:
    """The memory that a pipeline may use.

    Attributes:
        model: The model of the pipeline.
        limit: The budget in bytes.
        base: Bytes of it that the process used before the model was loaded.
    """

    model: ModelHeaders
    limit: int
    base: int

    def spare(self, request: Request | RunPlan, placement: Placement) -> int:
        """Return the bytes of the budget that drawing the request leaves; negative if it needs more."""
        return int(self.limit - predict(self.model, request, placement, base=self.base).peak * SAFETY)

    def check(self, request: Request | RunPlan, placement: Placement) -> None:
        """Check that drawing the request fits the budget.

        Raises:
            BudgetError: If it does not.
        """
        estimate = predict(self.model, request, placement, base=self.base)
        if estimate.peak * SAFETY > self.limit:
            stage = max(estimate.stages, key=lambda name: estimate.stages[name])
            raise BudgetError(
                f"this request needs {format_size(estimate.peak * SAFETY)} ({stage}), but the model was loaded with a "
                f"budget of {format_size(self.limit)}; make the request smaller, or load the model with more memory"
            )

    def fit_batch(self, run: RunPlan, placement: Placement, pictures: int) -> RunPlan:
        """Halve the batch of a run until it fits the budget.

        Args:
            run: The planned run.
            placement: The placement of the pipeline.
            pictures: Number of pictures that may share a batch with this run's.

        Returns:
            The plan with a batch that fits.

        Raises:
            BudgetError: If one picture at a time does not fit.
        """
        request = run.request
        batch = request.batch or 1
        try:
            self.check(run.with_batch(batch, max(request.count, min(batch, pictures))), placement)
        except BudgetError:
            if batch == 1:
                raise
            return self.fit_batch(run.with_batch(batch // 2), placement, pictures)
        return run


@dataclass(frozen=True)
class MemoryPlan:
    """A placement with which requests fit a budget, and the memory that they are predicted to need.

    Attributes:
        model: The model.
        requests: The requests, resolved, with the batch that was planned.
        placement: The placement that was chosen.
        estimate: The prediction for the request that needs the most memory.
        baseline: The same without any measure.
        limit: The budget in bytes.
        base: Bytes that the process used before the model was loaded.
        costs: For each measure the time that it adds, as a share of the baseline's.
    """

    model: ModelHeaders
    requests: tuple[Request, ...]
    placement: Placement
    estimate: MemoryEstimate
    baseline: MemoryEstimate
    limit: int
    base: int
    costs: dict[str, float]

    @property
    def request(self) -> Request:
        """The first request, with the batch that was planned."""
        return self.requests[0]

    @property
    def budget(self) -> Budget:
        """The budget that the pipeline keeps."""
        return Budget(self.model, self.limit, self.base)

    @property
    def slowdown(self) -> float:
        """The time that the measures add, as a share of the baseline's."""
        return _cost(self.estimate) / _cost(self.baseline) - 1.0

    @property
    def heap(self) -> int:
        """Bytes beyond the peak that glibc may keep after they were freed, unless it is told to return them."""
        return HEAP_FACTOR * self.estimate.workspace if self.model.device.type == "cpu" else 0

    @property
    def returns_freed(self) -> bool:
        """Whether freed memory must return to the system at once, which costs time, to keep the budget."""
        return bool(self.heap) and self.estimate.peak * SAFETY + self.heap > self.limit

    def prepare(self) -> None:
        """Set up the process; call this before the model is loaded."""
        if self.returns_freed:
            system.return_freed()

    def table(self) -> str:
        """Format the plan for people: the peak of each stage, the measures and what they cost, and the sum."""
        rows = [("stage", "peak", "measures", "time")]
        measures = {stage: list[tuple[str, float]]() for stage in self.estimate.stages}
        for name, cost in self.costs.items():
            measures[STAGES.get(name, "step")].append((self._describe(name), cost))
        for stage, count in self.estimate.stages.items():
            first, *more = measures[stage] or [("", 0.0)]
            rows.append((stage, format_size(count), first[0], _percent(first[1]) if first[0] else ""))
            rows += [("", "", measure, _percent(cost)) for measure, cost in more]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        total = f"peak {format_size(self.estimate.peak)} of {format_size(self.limit)}"
        lines.append(
            f"{total}, {_percent(self.slowdown)} time; without measures the peak would be "
            f"{format_size(self.baseline.peak)}"
            if self.costs
            else f"{total}; no measures are needed"
        )
        if self.returns_freed:
            lines.append("freed memory returns to the system at once, which makes small pictures up to 50 % slower")
        elif self.heap:
            lines.append(f"the allocator may keep up to {format_size(self.heap)} of freed memory; the budget allows it")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values: sizes in bytes, costs as shares of the baseline's time."""
        return {
            "memory": self.limit,
            "peak": self.estimate.peak,
            "stages": dict(self.estimate.stages),
            "placement": self.placement.changes(),
            "batch": self.request.batch,
            "heap": 0 if self.returns_freed else self.heap,
            "slower": round(self.slowdown, 4),
            "costs": {name: round(cost, 4) for name, cost in self.costs.items()},
            "fast_peak": self.baseline.peak,
        }

    def _describe(self, name: str) -> str:
        if name == "batch":
            return f"{self.request.batch} at a time"
        value = getattr(self.placement, name)
        if name == "storage":
            exact = value in self.model.file_dtypes
            return f"weights are stored as {value}{', as in the files' if exact else ' (approximate)'}"
        return DESCRIPTIONS.get((name, value), f"{name} {value}")


def plan(
    model: ModelHeaders | str | Path | None,
    memory: int | str | MemoryPlan,
    request: Request | Sequence[Request] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> MemoryPlan:
    """Plan the fastest way to draw one or several requests within a memory budget.

    Args:
        model: A model, as in `mezzotint.load`.
        memory: The budget: bytes, a size such as "4GiB", or "auto" for 90 % of the free memory. On the CPU it counts
            the whole process, on a GPU torch's memory. A MemoryPlan is returned as it is.
        request: What will be drawn; None for one picture of the model's native size. The batch of a single request
            may be made smaller.
        device: As in `mezzotint.load`.
        dtype: As in `mezzotint.load`.
        options: More arguments of `mezzotint.load`.

    Returns:
        The plan, which `mezzotint.load` accepts as `memory`.

    Raises:
        BudgetError: If no placement fits; the message has the smallest budget that would.
        RequestError: If a request does not fit the model, or `memory` is a plan for another model.
        CheckpointError: If the model's files are not valid.
    """
    if isinstance(memory, MemoryPlan):
        _check_same_model(memory.model, model, device, dtype, options)
        return memory
    if memory != "auto":
        parse_size(memory)  # an invalid size is reported before files are opened
    if not isinstance(model, ModelHeaders):
        model = ModelHeaders.of(model, device=device, dtype=dtype, **options)
    base = system.resident() if model.device.type == "cpu" else 0
    limit = _auto_limit(model, base) if memory == "auto" else parse_size(memory)
    asked = [request] if isinstance(request, Request) else list(request or [Request(prompt="")])
    runs = [model.plan(one) for one in asked]
    requests = tuple(run.request for run in runs)
    distinct = _distinct(runs)
    asked_batch = max(min(run.request.batch or 1, run.request.count) for run in distinct)
    batches = [asked_batch]
    if isinstance(request, Request):
        batches = sorted({max(asked_batch >> shift, 1) for shift in range(14)}, reverse=True)
    best: tuple[MemoryEstimate, Placement, int] | None = None
    smallest: tuple[MemoryEstimate, Placement, int] | None = None
    for rank in range(4):
        for placement, batch in product(_placements(model, rank), batches):
            candidate = _estimate(model, distinct, placement, batch, base), placement, batch
            if smallest is None or candidate[0].peak < smallest[0].peak:
                smallest = candidate
            if candidate[0].peak * SAFETY <= limit and (best is None or _cost(candidate[0]) < _cost(best[0])):
                best = candidate
        if best:
            break
    if best is None:
        assert smallest
        needed = math.ceil(smallest[0].peak * SAFETY / 2**20)
        largest = max(requests, key=lambda r: (r.width or 0) * (r.height or 0))
        raise BudgetError(
            f"memory is {format_size(limit)}, but a picture of {largest.width}x{largest.height} with this model needs "
            f"at least {needed}MiB"
        )
    estimate, placement, batch = best
    baseline = _estimate(model, distinct, Placement(), asked_batch, base)
    costs = {}
    for name in placement.changes():
        without = placement.model_copy(update={name: Placement.model_fields[name].default})
        costs[name] = (_cost(estimate) - _cost(_estimate(model, distinct, without, batch, base))) / _cost(baseline)
    if batch < asked_batch:
        whole = _estimate(model, distinct, placement, asked_batch, base)
        costs["batch"] = (_cost(estimate) - _cost(whole)) / _cost(baseline)
    smaller = tuple(r.replace(batch=min(r.batch or 1, batch)) for r in requests)
    return MemoryPlan(model, smaller, placement, estimate, baseline, limit, base, costs)


def _check_same_model(
    planned: ModelHeaders, model: ModelHeaders | str | Path | None, device: Any, dtype: Any, options: Any
) -> None:
    asked = model if isinstance(model, ModelHeaders) else ModelHeaders.of(model, device=device, dtype=dtype, **options)
    now = planned if device is None and not isinstance(model, ModelHeaders) else asked  # no device or dtype was given
    ours, theirs = ((found.files, found.options, found.given_files) for found in (asked.found, planned.found))
    if ours != theirs or (now.device, now.dtype) != (planned.device, planned.dtype):
        raise RequestError(
            f"memory is a plan for {planned.found.path} ({planned}), but the model is {asked.found.path} ({now}); "
            "make a plan for this one"
        )


def _placements(model: ModelHeaders, rank: int) -> Iterator[Placement]:
    """Yield placements: rank 0 exact, 1 weights rounded to 16 bits, 2 the VAE in tiles, 3 weights in 8 bits."""
    wide = model.dtype == torch.float32
    exact = [name for name in ("float16", "bfloat16") if wide and model.file_dtypes == {name}]
    storages: list[str | None] = [None, *exact]
    if rank == 1:
        storages = ["float16"] if wide and not exact else []
    elif rank == 3:
        storages = ["int8"] if model.device.type == "cpu" else ["int8", "float8"]  # the better and faster first
    vae_modes = ("tiles",) if rank == 2 else ("whole", "strips")
    for weights, storage, guidance, vae in product(
        ("resident", "offload", "stream"), storages, ("batched", "split"), vae_modes
    ):
        if weights == "stream" and storage and model.device.type == "cpu":
            continue
        yield Placement.of(weights=weights, storage=storage, guidance=guidance, vae=vae)


def _estimate(
    model: ModelHeaders, runs: Sequence[RunPlan], placement: Placement, batch: int, base: int
) -> MemoryEstimate:
    """Return the largest peak of each stage over all runs, and the work of the longest run."""
    every = [predict(model, run.with_batch(min(run.request.batch or 1, batch)), placement, base=base) for run in runs]
    stages = {stage: max(one.stages.get(stage, 0) for one in every) for one in every for stage in one.stages}
    longest = max(every, key=_cost)
    return MemoryEstimate(stages, max(one.workspace for one in every), longest.macs, longest.bytes_moved)


def _distinct(runs: Sequence[RunPlan]) -> list[RunPlan]:
    """Merge runs that need the same memory: one run with the longest prompt and all pictures, which share batches."""
    kinds: dict[Any, RunPlan] = {}
    for run in sorted(runs, key=lambda run: len(run.request.prompt)):
        one = run.request
        kind = one.replace(prompt="", seed=0, negative_prompt=one.negative_prompt and "", count=1)
        before = kinds[kind].request.count if kind in kinds else 0
        kinds[kind] = run.with_batch(one.batch or 1, min(before + one.count, MAX_COUNT))
    return list(kinds.values())


def _auto_limit(model: ModelHeaders, base: int) -> int:
    """Return the bytes that "auto" stands for."""
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        return int(AUTO_SHARE * (free + torch.cuda.memory_reserved(model.device)))
    free_now = system.available()
    if model.device.type != "cpu" or free_now is None:
        raise BudgetError("memory is 'auto', but the free memory is not known here; give a size such as 4GiB")
    return int(base + AUTO_SHARE * free_now)


def _cost(estimate: MemoryEstimate) -> float:
    """Return the estimated time in multiply-accumulates."""
    return estimate.macs + MACS_PER_BYTE * estimate.bytes_moved


def _percent(share: float) -> str:
    """Format a share as a signed percentage, such as "+12 %"."""
    return f"{100 * share:+.0f} %"
