"""A bulk file on the workers of a Ray cluster: the same files as `bulk.run` makes, byte for byte.

Ray Data hands out the numbers of windows and parts; each actor is a `bulk.Worker`, which reads the file and writes the
pictures itself. So file, folder and model must be seen by every node under the same path. Where no cluster is named
(RAY_ADDRESS) Ray starts one on this machine. A part whose actor dies is given to another, which draws what is missing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

from mezzotint.bulk import local
from mezzotint.errors import MezzotintError, MissingExtraError, RequestError, WriteError

PARTS = 8  # of a window: pieces small enough to keep all workers busy to the end


def check() -> None:
    """Raises MissingExtraError where Ray is not installed."""
    try:
        import ray.data  # noqa: F401
    except ImportError:
        raise MissingExtraError("--engine ray needs Ray: pip install 'mezzotint[scale]'") from None


def run(plan: local.BulkPlan) -> Iterator[local.Outcome]:
    """All of a plan's work, in the order of the file. Raises RequestError, WriteError as a worker met it."""
    check()
    import ray
    import ray.data

    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what it says of its own workings
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context.execution_options.preserve_order = True
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        on_gpu = gpus > 0 if plan.device is None else plan.device.startswith("cuda")
        fits = [int(node.get("CPU", 0)) // plan.threads for node in nodes]  # a worker is on one node
        if on_gpu:
            fits = [min(fit, int(node.get("GPU", 0))) for fit, node in zip(fits, nodes, strict=True)]
        workers = sum(fits)
        if not workers:
            right = f"{plan.threads} CPUs{' and a GPU' if on_gpu else ''}"
            raise RequestError(f"threads is {plan.threads}, and no node of the cluster has {right} for a worker")
        parts = plan.windows * PARTS
        # items, since the tasks that ray.data.range reads with wait for a CPU, and the workers take all of them
        outcomes = ray.data.from_items(list(range(parts)), override_num_blocks=parts).map_batches(
            _Actor,
            fn_constructor_args=(plan,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=plan.threads,
            num_gpus=1 if on_gpu else 0,
        )
        for row in outcomes.iter_rows():
            if row["error"]:
                raise (WriteError if row["write"] else RequestError)(row["error"])
            yield local.from_json(row["outcome"])
    finally:
        if ours:
            ray.shutdown()


class _Actor:
    """A worker on its node. What stops it travels back as a row, since Ray would wrap an exception in its own."""

    def __init__(self, plan: local.BulkPlan) -> None:
        self._plan = plan
        self._worker: local.Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        number = int(batch["item"][0])
        whole = local.Outcome(number // PARTS)
        try:
            if self._worker is None:
                if not (self._plan.file.exists() and self._plan.folder.is_dir()):
                    raise RequestError(f"a worker does not see {self._plan.file} and {self._plan.folder}; share them")
                self._worker = local.Worker.start(self._plan)
            for outcome in self._worker.work(number // PARTS, number % PARTS, PARTS):
                whole.drawn += outcome.drawn
                whole.found += outcome.found
                whole.failures += outcome.failures
        except MezzotintError as error:
            return {"outcome": [""], "error": [str(error)], "write": [isinstance(error, WriteError)]}
        return {"outcome": [local.to_json(whole)], "error": [""], "write": [False]}
