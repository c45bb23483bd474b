"""`mezzotint bulk`: a file of requests to a folder of pictures."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.options import (
    OUTPUT,
    Device,
    Dtype,
    Json,
    Memory,
    Model,
    add_options_of,
    model_options,
    option,
    take_model_options,
)
from mezzotint.cli.terminal import (
    StoppedError,
    check_memory,
    default_threads,
    in_threads,
    print_json,
    say,
    show,
    shows_progress,
    stoppable,
)
from mezzotint.errors import RequestError, WriteError

if TYPE_CHECKING:
    from mezzotint.bulk.local import BulkPlan, Outcome

MAX_NOTICES = 20  # that are printed; the records of the pictures have all of them
EVERY = 60.0  # seconds between lines where there is no terminal to show a bar

Progress = Callable[[int, int], None]  # pictures done; of them drawn now


@add_options_of(model_options)
def bulk(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help=".jsonl, .csv or .parquet file of Requests, or .txt file with one prompt per line."
        ),
    ],
    out: Annotated[
        Path,
        option("Folder for the pictures; those already in it are not drawn again.", "FOLDER", OUTPUT, name="--out -o"),
    ],
    fields: Annotated[
        list[str] | None,
        option("Value for rows without this field, such as steps=20. May be repeated.", "FIELD=VALUE", name="--set"),
    ] = None,
    engine: Annotated[
        str, option("local, or ray: all workers of a Ray cluster.", "local|ray", default="local")
    ] = "local",
    threads: Annotated[
        int | None,
        option(
            "CPU threads of each worker.",
            "N",
            default="those that FOLDER was started with, or OMP_NUM_THREADS, or all CPUs it may use; 1 with ray",
        ),
    ] = None,
    memory: Memory = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    **overrides: Any,
) -> None:
    """Draw a file of requests; a stopped run can be resumed."""
    model_given = take_model_options(overrides)
    from mezzotint import rows
    from mezzotint.bulk import folder, ray
    from mezzotint.bulk import local as work

    check_memory(memory)
    if engine not in ("local", "ray"):
        raise RequestError(f"engine is {engine[:60]!r}; it must be local or ray")
    if engine == "ray":
        ray.check()
    kept = f"pictures are in {out}, and the same command continues from there"
    start = time.perf_counter()
    drawn = found = 0
    given = rows.assignments("set", fields or ())
    try:
        with work.prepare(
            file,
            out,
            given,
            model=model,
            device=device,
            dtype=dtype,
            threads=threads,
            default_threads=(lambda: 1) if engine == "ray" else default_threads,
            memory=memory,
            options=model_given,
        ) as plan:
            told: dict[str, int] = {}  # sentence -> the row that it was first on
            outcomes = ray.run(plan) if engine == "ray" else _local(plan, told)
            failures = folder.Failures(out)
            with _progress(plan.pictures, plan.threads) as progress:
                for outcome in outcomes:
                    drawn += outcome.drawn
                    found += outcome.existing
                    failures.add(outcome)
                    _tell(outcome, told)
                    progress(drawn + found, drawn)
            failures.write()
    except KeyboardInterrupt:
        raise StoppedError(f"Stopped; finished {kept}") from None
    except WriteError as error:
        raise WriteError(f"{error}. Finished {kept}") from None
    seconds = time.perf_counter() - start
    if as_json:
        record = {"folder": str(out), "drawn": drawn, "found": found, "failed_rows": failures.rows}
        record["notices"] = [{"row": row or None, "notice": sentence} for sentence, row in told.items()]
        print_json(record | {"rows": plan.rows, "threads": plan.threads, "seconds": round(seconds, 3)})
    else:
        before = f"; {found:,} were there already" if found else ""
        show(f"Wrote {drawn:,} pictures into {out}{before} ({_rate(drawn, seconds)}, {in_threads(plan.threads)})")
    if failures.rows:
        say(f"{failures.rows:,} of {plan.rows:,} rows failed; the reasons are in {out / folder.FAILURES}")
        raise typer.Exit(1)


def _tell(outcome: Outcome, told: dict[str, int]) -> None:
    """Print the notices of an outcome that were not printed before."""
    for row, sentence in outcome.notices:
        if sentence not in told and len(told) <= MAX_NOTICES:
            told[sentence] = row
            more = "further notices are in the records of the pictures"
            say(f"row {row}: {sentence}" if len(told) <= MAX_NOTICES else more)


def _local(plan: BulkPlan, told: dict[str, int]) -> Iterator[Outcome]:
    """Draw in this process; Ctrl-C stops after the current step. The notices on the model are added to `told`."""
    from mezzotint.bulk import local as work

    made = work.plan_memory(plan)
    if made is not None:
        say(*made.table().split("\n"))
    gc.disable()  # as in terminal.load
    try:
        worker = work.Worker.start(plan, made)
    finally:
        gc.enable()
        gc.freeze()
    told |= dict.fromkeys(worker.pipe.notices, 0)
    say(*told)
    with stoppable() as stopped:

        def on_step(done: int, total: int) -> None:
            if stopped():
                raise KeyboardInterrupt

        yield from work.run(plan, worker, on_step)


def _rate(drawn: int, seconds: float) -> str:
    return f"{60 * drawn / seconds:,.3g} pictures a minute"


def _left(pictures: int, drawn: int, seconds: float) -> str:
    """Return how long `pictures` more will take, as in "2 h 05 min"."""
    if not drawn:
        return "?"
    minutes = round(pictures * seconds / drawn / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


@contextmanager
def _progress(total: int, threads: int) -> Iterator[Progress]:
    """Show a bar with pictures per minute, time left and threads, or a line per minute where there is no terminal."""
    start = time.perf_counter()
    if not shows_progress():
        printed = start

        def line(done: int, drawn: int) -> None:
            nonlocal printed
            now = time.perf_counter()
            if now - printed >= EVERY:
                printed, passed = now, now - start
                left = _left(total - done, drawn, passed)
                say(f"{done:,} of {total:,} pictures, {_rate(drawn, passed)}, {left} left, {in_threads(threads)}")

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def move(done: int, drawn: int) -> None:
            passed = time.perf_counter() - start
            left = _left(total - done, drawn, passed)
            bar.update(task, completed=done, description=f"{_rate(drawn, passed)}, {left} left, {in_threads(threads)}")

        yield move
