"""What the commands share: output, loading, progress bars and Ctrl-C."""

from __future__ import annotations

import gc
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from mezzotint.placement import parse_size

if TYPE_CHECKING:
    from mezzotint.memory.planner import MemoryPlan
    from mezzotint.pipeline import OnStep, Pipeline
    from mezzotint.request import Request


def say(text: str) -> None:
    """Print one line on standard error."""
    typer.echo(text, err=True)


def print_json(record: Any) -> None:
    """Print one line of JSON on standard output."""
    typer.echo(json.dumps(record))


def load(model: str | None, device: str | None, dtype: str | None, **options: Any) -> Pipeline:
    """Load a model as `mezzotint.load` does, without garbage collection.

    What is imported and built here lasts until the process ends; collecting it would take longer than reading the
    bundled model.
    """
    import mezzotint  # torch comes with load()

    gc.disable()
    try:
        return mezzotint.load(model, device=device, dtype=dtype, **options)
    finally:
        gc.enable()
        gc.freeze()


def check_memory(memory: str | None) -> None:
    """Check the form of --memory before torch is imported.

    Raises:
        BudgetError: If it is not a size.
    """
    if memory is not None and memory != "auto":
        parse_size(memory)


def fitted(
    model: str | None, memory: str | None, request: Request | Sequence[Request], device: str | None, dtype: str | None
) -> MemoryPlan | None:
    """Return the plan for a memory budget and print it; None without a budget."""
    if memory is None:
        return None
    from mezzotint.memory.planner import plan

    made = plan(model, memory, request, device=device, dtype=dtype)
    say(made.table())
    return made


@contextmanager
def long_work(what: str, kept: Callable[[], str]) -> Iterator[OnStep]:
    """Show a progress bar, and stop cleanly on Ctrl-C.

    Yields a function (done, total) to call after each step. After Ctrl-C it ends the work; then what was `kept` is
    printed, and the exit code is 1.
    """
    with stoppable() as stopped, _progress(what) as progress:

        def on_step(done: int, total: int) -> None:
            progress(done, total)
            if stopped():
                raise KeyboardInterrupt

        try:
            yield on_step
        except KeyboardInterrupt:
            say(f"Stopped; {kept()}")
            raise typer.Exit(1) from None


@contextmanager
def _progress(what: str) -> Iterator[OnStep]:
    """Show a bar with step and time left where standard error is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed, so that the current step can finish.

    The second Ctrl-C interrupts at once.
    """
    presses = 0

    def press(*_: object) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # under nohup it is ignored, and stays so
        signal.signal(signal.SIGINT, press)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)
