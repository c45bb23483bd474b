"""Run a bulk plan on the workers of a Ray cluster. It writes the same files as `bulk.run`, byte for byte.

Ray Data distributes the indices of windows and parts. Each actor holds a `bulk.Worker`, which reads the file and writes
the pictures itself, so every node must see the file, the folder and the model under the same path. Without RAY_ADDRESS,
Ray starts a cluster on this machine. If an actor dies, another one repeats its part and generates the missing pictures.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

from mezzotint.bulk import local
from mezzotint.errors import MezzotintError, MissingExtraError, RequestError, WriteError

PARTS = 8  # per window: small enough to keep all workers busy to the end


def check() -> None:
    """Raise MissingExtraError if Ray is not installed."""
    try:
        import ray.data  # noqa: F401
    except ImportError:
        raise MissingExtraError("--engine ray needs Ray: pip install 'mezzotint[scale]'") from None


def run(plan: local.BulkPlan) -> Iterator[local.Outcome]:
    """Run a whole plan on the cluster.

    Yields:
        The outcome of each part, in the order of the file.

    Raises:
        MissingExtraError: If Ray is not installed.
        RequestError: If no node has room for a worker, or a worker raises it.
        WriteError: If a worker cannot write a picture.
    """
    check()
    import ray
    import ray.data

    start_ray = not ray.is_initialized()
    if start_ray:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context.execution_options.preserve_order = True
        workers, on_gpu = _count_workers(plan, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        parts = plan.windows * PARTS
        # not ray.data.range: its read tasks would wait for a CPU forever, since the workers take all of them
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
        if start_ray:
            ray.shutdown()


def _count_workers(plan: local.BulkPlan, nodes: list[dict[str, float]]) -> tuple[int, bool]:
    """Return how many workers fit on the nodes with these resources, and whether they use GPUs."""
    on_gpu = any(node.get("GPU", 0) >= 1 for node in nodes) if plan.device is None else plan.device.startswith("cuda")
    workers = 0
    for node in nodes:  # a worker runs on a single node
        cpu_workers = int(node.get("CPU", 0)) // plan.threads
        workers += min(cpu_workers, int(node.get("GPU", 0))) if on_gpu else cpu_workers
    if not workers:
        needs = f"{plan.threads} CPUs{' and a GPU' if on_gpu else ''}"
        raise RequestError(f"threads is {plan.threads}, but no node of the cluster has {needs} for a worker")
    return workers, on_gpu


class _Actor:
    """A worker on its node. It returns errors as rows, since Ray would wrap an exception in one of its own."""

    def __init__(self, plan: local.BulkPlan) -> None:
        self._plan = plan
        self._worker: local.Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        number = int(batch["item"][0])
        total = local.Outcome(number // PARTS)
        try:
            if self._worker is None:
                if not (self._plan.file.exists() and self._plan.folder.is_dir()):
                    raise RequestError(
                        f"a worker cannot see {str(self._plan.file)!r} or {str(self._plan.folder)!r}; every node must "
                        "see both under the same path"
                    )
                self._worker = local.Worker.start(self._plan)
            for outcome in self._worker.work(number // PARTS, number % PARTS, PARTS):
                total.drawn += outcome.drawn
                total.existing += outcome.existing
                total.failures += outcome.failures
        except MezzotintError as error:
            return {"outcome": [""], "error": [str(error)], "write": [isinstance(error, WriteError)]}
        return {"outcome": [local.to_json(total)], "error": [""], "write": [False]}
