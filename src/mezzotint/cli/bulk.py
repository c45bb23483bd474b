"""`mezzotint bulk`: a file of requests -> a folder of pictures."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mezzotint.cli.terminal import Device, Dtype, Json, Memory, Model, check_memory, print_json, say, stoppable
from mezzotint.errors import RequestError, WriteError

if TYPE_CHECKING:
    from mezzotint.bulk.local import Outcome, Plan

EVERY = 60.0  # seconds between lines where there is no terminal to show a bar

Progress = Callable[[int, int], None]  # pictures done; of them drawn now


def bulk(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=".jsonl, .csv or .parquet: a row is a Request.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="What it holds already is not drawn again.")],
    fields: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="For rows that do not say, as steps=20. May be repeated."),
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: on all workers of a cluster.")] = "local",
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of a worker; else what FOLDER was begun with, or all, or 1 with ray."),
    ] = None,
    memory: Memory = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Draw the pictures of a file; once stopped it goes on."""
    from mezzotint import rows
    from mezzotint.bulk import local as work
    from mezzotint.bulk import ray

    check_memory(memory)
    if engine not in ("local", "ray"):
        raise RequestError(f"engine is {engine[:60]!r}; it must be local or ray")
    if engine == "ray":
        ray.check()
    cores = 1 if engine == "ray" else _cores()
    start = time.perf_counter()
    drawn = found = 0
    given = rows.assignments("set", fields or ())
    try:
        with work.prepared(
            file, out, given, model=model, device=device, dtype=dtype, threads=threads, cores=cores, memory=memory
        ) as plan:
            outcomes = ray.run(plan) if engine == "ray" else _local(plan)
            failures = work.Failures(out)
            with _progress(plan.pictures) as progress:
                for outcome in outcomes:
                    drawn += outcome.drawn
                    found += outcome.found
                    failures.add(outcome)
                    progress(drawn + found, drawn)
            failures.write()
    except KeyboardInterrupt:
        say(f"Stopped; what is finished is in {out}, and the same command goes on from there")
        raise typer.Exit(1) from None
    except WriteError as error:
        say(f"Error: {error}. What is finished is in {out}, and the same command goes on from there")
        raise typer.Exit(1) from None
    seconds = time.perf_counter() - start
    if as_json:
        record = {"folder": str(out), "drawn": drawn, "found": found, "failed_rows": failures.rows}
        print_json(record | {"rows": plan.rows, "threads": plan.threads, "seconds": round(seconds, 3)})
    else:
        before = f", {found:,} were there" if found else ""
        typer.echo(f"Wrote {drawn:,} pictures into {out}{before} ({_rate(drawn, seconds)})")
    if failures.rows:
        say(f"{failures.rows:,} of {plan.rows:,} rows failed; {out / work.FAILURES} says why")
        raise typer.Exit(1)


def _local(plan: Plan) -> Iterator[Outcome]:
    """This process's work; Ctrl-C ends it after the step under way."""
    from mezzotint.bulk import local as work

    made = work.fit(plan)
    if made is not None:
        say(made.table())
    gc.disable()  # as in terminal.load
    try:
        worker = work.Worker.start(plan, made)
    finally:
        gc.enable()
        gc.freeze()
    with stoppable() as stopped:

        def on_step(done: int, total: int) -> None:
            if stopped():
                raise KeyboardInterrupt

        yield from work.run(plan, worker, on_step)


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _rate(drawn: int, seconds: float) -> str:
    return f"{60 * drawn / seconds:,.3g} pictures a minute"


def _left(pictures: int, drawn: int, seconds: float) -> str:
    """How long `pictures` more will take, as "2 h 05 min"."""
    if not drawn:
        return "?"
    minutes = round(pictures * seconds / drawn / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    """A bar with pictures a minute and time left; where standard error is no terminal, a line a minute."""
    start = time.perf_counter()
    if not sys.stderr.isatty():
        said = start

        def line(done: int, drawn: int) -> None:
            nonlocal said
            now = time.perf_counter()
            if now - said >= EVERY:
                said, passed = now, now - start
                left = _left(total - done, drawn, passed)
                say(f"{done:,} of {total:,} pictures, {_rate(drawn, passed)}, {left} left")

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
            bar.update(task, completed=done, description=f"{_rate(drawn, passed)}, {left} left")

        yield move
