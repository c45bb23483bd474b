"""A byte budget, and what to do so that it is kept.

    plan("model", "4GiB", request)   ->  Plan: the cheapest Placement whose predicted peak fits, or BudgetError
    mezzotint.load("model", memory="4GiB", request=request)   # which makes that plan, and keeps to it

Exact measures come before approximate ones, and of those that fit the one that costs least time. What a measure costs
is estimated from counts: the multiplications of the run, and the bytes of weights that it reads again or makes anew,
each of which takes as long as MOVED multiplications.
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
from mezzotint.memory.footprint import MOVED, Model, Peak, predict
from mezzotint.placement import Placement, bytes_of, size
from mezzotint.request import MAX_COUNT, Request
from mezzotint.run.plan import RunPlan

SAFETY = 1.03  # what is predicted may be so much too low
AUTO = 0.9  # of what is free
HEAP = 2  # times what a stage works in, that glibc's heap may keep of it where nothing is done about it; measured 1.1
STAGES = {  # of a Placement's fields: where they matter most
    "weights": "load",
    "storage": "load",
    "attention": "step",
    "guidance": "step",
    "vae": "decode",
}
DONE = {
    ("weights", "offload"): "each network read from its files when its turn comes",
    ("weights", "stream"): "each layer's weights read from the files when it runs",
    ("guidance", "split"): "the conditions one after another",
    ("vae", "strips"): "the VAE layer by layer, in strips",
    ("vae", "tiles"): "the VAE in overlapping tiles: approximate",
}


@dataclass(frozen=True)
class Budget:
    """What a pipeline that was loaded for a budget may take: `limit` bytes, of which `base` were there before it."""

    model: Model
    limit: int
    base: int

    def spare(self, request: Request | RunPlan, placement: Placement) -> int:
        """Bytes that are left beside drawing the request so; below 0 where it takes more."""
        return int(self.limit - predict(self.model, request, placement, base=self.base).most * SAFETY)

    def check(self, request: Request | RunPlan, placement: Placement) -> None:
        """Raises BudgetError where drawing the request so would take more."""
        peak = predict(self.model, request, placement, base=self.base)
        if peak.most * SAFETY > self.limit:
            stage = max(peak.stages, key=lambda name: peak.stages[name])
            raise BudgetError(
                f"this request takes {size(peak.most * SAFETY)} ({stage}), and the model was loaded for "
                f"{size(self.limit)}; ask for less, or load it with memory for this request"
            )

    def fitted(self, run: RunPlan, placement: Placement, pictures: int) -> RunPlan:
        """Return the plan of a run with its batch halved until it fits; `pictures` like it may share one.

        Raises BudgetError where one picture at a time takes more.
        """
        request = run.request
        batch = request.batch or 1
        try:
            self.check(run.with_batch(batch, max(request.count, min(batch, pictures))), placement)
        except BudgetError:
            if batch == 1:
                raise
            return self.fitted(run.with_batch(batch // 2), placement, pictures)
        return run


@dataclass(frozen=True)
class Plan:
    """What is done so that `requests`, resolved, take no more than `limit` bytes, and what is then predicted.

    peak: of the one that takes most. fast: the same without any measure. costs: of each measure its share of the fast
    way's time, in the placement's order.
    """

    model: Model
    requests: tuple[Request, ...]
    placement: Placement
    peak: Peak
    fast: Peak
    limit: int
    base: int
    costs: dict[str, float]

    @property
    def request(self) -> Request:
        """The first one, with the batch that was planned."""
        return self.requests[0]

    @property
    def budget(self) -> Budget:
        """For the pipeline to keep."""
        return Budget(self.model, self.limit, self.base)

    @property
    def slower(self) -> float:
        """How much longer than the fast way, as a share of it."""
        return _cost(self.peak) / _cost(self.fast) - 1.0

    @property
    def heap(self) -> int:
        """Bytes beyond the peak that glibc may keep of what was freed, unless it is made to return it."""
        return HEAP * self.peak.working if self.model.device.type == "cpu" else 0

    @property
    def tight(self) -> bool:
        """Whether freed memory must go back to the system at once, which costs time, for the budget to be kept."""
        return bool(self.heap) and self.peak.most * SAFETY + self.heap > self.limit

    def keep(self) -> None:
        """To be called before loading."""
        if self.tight:
            system.return_freed()

    def table(self) -> str:
        """For a person: a line a stage, with what was done and what it costs in time; and the sum."""
        rows = [("stage", "peak", "what is done", "time")]
        said = {stage: list[tuple[str, float]]() for stage in self.peak.stages}
        for name, cost in self.costs.items():
            said[STAGES.get(name, "step")].append((self._done(name), cost))
        for stage, count in self.peak.stages.items():
            first, *more = said[stage] or [("", 0.0)]
            rows.append((stage, size(count), first[0], _share(first[1]) if first[0] else ""))
            rows += [("", "", done, _share(cost)) for done, cost in more]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.append(
            f"at most {size(self.peak.most)} of {size(self.limit)}, {_share(self.slower)} in time against the fast "
            f"way, which takes {size(self.fast.most)}"
            if self.costs
            else f"at most {size(self.peak.most)} of {size(self.limit)}; nothing needs to be done"
        )
        if self.tight:
            lines.append("freed memory goes back to the system at once, which makes small pictures up to half slower")
        elif self.heap:
            lines.append(f"the allocator may keep up to {size(self.heap)} of what is freed; there is room for it")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For a program."""
        return {
            "memory": self.limit,
            "peak": self.peak.most,
            "stages": dict(self.peak.stages),
            "placement": self.placement.changes(),
            "batch": self.request.batch,
            "heap": 0 if self.tight else self.heap,
            "slower": round(self.slower, 4),
            "costs": {name: round(cost, 4) for name, cost in self.costs.items()},
            "fast_peak": self.fast.most,
        }

    def _done(self, name: str) -> str:
        if name == "batch":
            return f"{self.request.batch} at a time"
        value = getattr(self.placement, name)
        if name == "storage":
            exact = value in self.model.file_dtypes
            return f"weights kept as {value}{', as in the files' if exact else ': approximate'}"
        return DONE.get((name, value), f"{name} {value}")


def plan(
    model: Model | str | Path | None,
    memory: int | str | Plan,
    request: Request | Sequence[Request] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> Plan:
    """The cheapest way to draw a request, or each of several, within `memory`: bytes, "4GiB", or "auto", what is free.

    A budget counts the whole process on the CPU, and torch's memory on a GPU. model, device, dtype, options: as in
    `mezzotint.load`. request: None is the model's own picture; the batch of a single one may be made smaller. A Plan
    in the place of `memory` is returned as it is.

    Raises BudgetError, with the least that would do, where there is no way; RequestError where a request does not fit
    the model, or a Plan is for another one; CheckpointError.
    """
    if isinstance(memory, Plan):
        _check_same(memory.model, model, device, dtype, options)
        return memory
    if memory != "auto":
        bytes_of(memory)  # what is no size is said before files are opened
    if not isinstance(model, Model):
        model = Model.of(model, device=device, dtype=dtype, **options)
    base = system.resident() if model.device.type == "cpu" else 0
    limit = _free(model, base) if memory == "auto" else bytes_of(memory)
    asked = [request] if isinstance(request, Request) else list(request or [Request(prompt="")])
    runs = [model.plan(one) for one in asked]
    requests = tuple(run.request for run in runs)
    unlike = _unlike(runs)
    asked_batch = max(min(run.request.batch or 1, run.request.count) for run in unlike)
    batches = [asked_batch]
    if isinstance(request, Request):
        batches = sorted({max(asked_batch >> shift, 1) for shift in range(14)}, reverse=True)
    best: tuple[Peak, Placement, int] | None = None
    least: tuple[Peak, Placement, int] | None = None
    for rank in range(4):
        for placement, batch in product(_ways(model, rank), batches):
            found = _peak(model, unlike, placement, batch, base), placement, batch
            if least is None or found[0].most < least[0].most:
                least = found
            if found[0].most * SAFETY <= limit and (best is None or _cost(found[0]) < _cost(best[0])):
                best = found
        if best:
            break
    if best is None:
        assert least
        needed = math.ceil(least[0].most * SAFETY / 2**20)
        largest = max(requests, key=lambda r: (r.width or 0) * (r.height or 0))
        raise BudgetError(
            f"memory is {size(limit)}, and a picture of {largest.width}x{largest.height} with this model takes at "
            f"least {needed}MiB"
        )
    peak, placement, batch = best
    fast = _peak(model, unlike, Placement(), asked_batch, base)
    costs = {}
    for name in placement.changes():
        without = placement.model_copy(update={name: Placement.model_fields[name].default})
        costs[name] = (_cost(peak) - _cost(_peak(model, unlike, without, batch, base))) / _cost(fast)
    if batch < asked_batch:
        costs["batch"] = (_cost(peak) - _cost(_peak(model, unlike, placement, asked_batch, base))) / _cost(fast)
    smaller = tuple(r.replace(batch=min(r.batch or 1, batch)) for r in requests)
    return Plan(model, smaller, placement, peak, fast, limit, base, costs)


def _check_same(planned: Model, model: Model | str | Path | None, device: Any, dtype: Any, options: Any) -> None:
    """Raises RequestError where a plan's model is not the one that is asked for now."""
    asked = model if isinstance(model, Model) else Model.of(model, device=device, dtype=dtype, **options)
    now = planned if device is None and not isinstance(model, Model) else asked  # nothing is said of where
    if asked.found.files != planned.found.files or (now.device, now.dtype) != (planned.device, planned.dtype):
        raise RequestError(
            f"memory is a plan for {planned.found.path} ({planned}), and the model is {asked.found.path} ({now}); "
            "make a plan for this one"
        )


def _ways(model: Model, rank: int) -> Iterator[Placement]:
    """Placements: rank 0 exact, 1 weights rounded to 16 bits, 2 the VAE in tiles, 3 weights in 8 bits."""
    wide = model.dtype == torch.float32
    exact = [name for name in ("float16", "bfloat16") if wide and model.file_dtypes == {name}]
    storages: list[str | None] = [None, *exact]
    if rank == 1:
        storages = ["float16"] if wide and not exact else []
    elif rank == 3:
        storages = ["int8"] if model.device.type == "cpu" else ["int8", "float8"]  # the better and the quicker first
    vaes = ("tiles",) if rank == 2 else ("whole", "strips")
    for weights, storage, guidance, vae in product(
        ("resident", "offload", "stream"), storages, ("batched", "split"), vaes
    ):
        if weights == "stream" and storage and model.device.type == "cpu":
            continue
        yield Placement.of(weights=weights, storage=storage, guidance=guidance, vae=vae)


def _peak(model: Model, runs: Sequence[RunPlan], placement: Placement, batch: int, base: int) -> Peak:
    """Of all of them: stage by stage the largest, and the work of the longest."""
    peaks = [predict(model, run.with_batch(min(run.request.batch or 1, batch)), placement, base=base) for run in runs]
    stages = {stage: max(peak.stages.get(stage, 0) for peak in peaks) for peak in peaks for stage in peak.stages}
    longest = max(peaks, key=_cost)
    return Peak(stages, max(peak.working for peak in peaks), longest.work, longest.moved)


def _unlike(runs: Sequence[RunPlan]) -> list[RunPlan]:
    """One of each kind, where they differ in nothing that takes memory, with the pictures of all, which may share a
    batch; of their prompts the longest.
    """
    kinds: dict[Any, RunPlan] = {}
    for run in sorted(runs, key=lambda run: len(run.request.prompt)):
        one = run.request
        kind = one.replace(prompt="", seed=0, negative_prompt=one.negative_prompt and "", count=1)
        before = kinds[kind].request.count if kind in kinds else 0
        kinds[kind] = run.with_batch(one.batch or 1, min(before + one.count, MAX_COUNT))
    return list(kinds.values())


def _free(model: Model, base: int) -> int:
    """The bytes that "auto" is. Raises BudgetError where the system does not say."""
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        return int(AUTO * (free + torch.cuda.memory_reserved(model.device)))
    free_now = system.available()
    if model.device.type != "cpu" or free_now is None:
        raise BudgetError("memory is 'auto', and what is free is not known here; name a size such as 4GiB")
    return int(base + AUTO * free_now)


def _cost(peak: Peak) -> float:
    """In multiplications."""
    return peak.work + MOVED * peak.moved


def _share(share: float) -> str:
    """+12 %"""
    return f"{100 * share:+.0f} %"
