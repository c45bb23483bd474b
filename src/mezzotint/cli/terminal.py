"""What the commands share: output, loading, progress bars and Ctrl-C."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import typer

from mezzotint.errors import RequestError, WriteError, printable
from mezzotint.placement import parse_size

if TYPE_CHECKING:
    from mezzotint.memory.planner import MemoryPlan
    from mezzotint.pipeline import Pipeline
    from mezzotint.request import Request
    from mezzotint.run.runner import OnStep


log = logging.getLogger("mezzotint")
LEVELS = ("debug", "info", "warning", "error")


class LogHandler(logging.Handler):
    """Prints what is logged as the command line prints everything: escaped, on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        say(*self.format(record).split("\n"), level=record.levelno)


def set_log_level(level: str) -> None:
    """Set which lines are printed on standard error.

    Raises:
        RequestError: If it is not one of LEVELS.
    """
    if level.lower() not in LEVELS:
        raise RequestError(f"log-level is {level[:60]!r}; it must be one of {', '.join(LEVELS)}")
    if not any(isinstance(handler, LogHandler) for handler in log.handlers):
        log.addHandler(LogHandler())
    log.setLevel(level.upper())


def reset_log_level() -> None:
    """Undo `set_log_level`."""
    log.handlers[:] = [handler for handler in log.handlers if not isinstance(handler, LogHandler)]
    log.setLevel(logging.NOTSET)


def shows_progress() -> bool:
    """Return whether a bar is shown: standard error is a terminal, and remarks are wanted."""
    return sys.stderr.isatty() and log.isEnabledFor(logging.WARNING)


class StoppedError(Exception):
    """Ctrl-C ended the work; the message says what was kept. The exit code is 130."""


def show(*lines: str) -> None:
    """Print lines of the result on standard output.

    Raises:
        WriteError: If standard output cannot be written.
    """
    _print("\n".join(map(printable, lines)))


def print_json(record: Any) -> None:
    """Print one line of JSON, in ASCII, on standard output. Raises WriteError as `show` does."""
    _print(json.dumps(record).replace("\x7f", "\\u007f"))


def show_raw(sequences: str) -> None:
    """Print escape sequences of our own making on standard output, such as a picture. Raises WriteError as `show`."""
    _print(sequences)


def say(*lines: str, level: int = logging.WARNING) -> None:
    """Print lines on standard error, unless the log level is higher. What cannot be written there is lost."""
    if not lines or not log.isEnabledFor(level):
        return
    try:
        print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader wants no more, as in `mezzotint samplers | head -1`
        _discard(sys.stdout)
        raise typer.Exit(1) from None
    except OSError as error:
        _discard(sys.stdout)
        raise WriteError(f"standard output cannot be written ({error.strerror})") from None


def discard_unwritten() -> None:
    """Discard what standard output still holds if it cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard(sys.stdout)


def _discard(stream: TextIO) -> None:
    """Lead a stream that cannot be written to nowhere, since Python would try to write the rest of it at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def load(model: str | None, device: str | None, dtype: str | None, **options: Any) -> Pipeline:
    """Load a model as `mezzotint.load` does, without garbage collection, and print what should be known of it.

    What is imported and built here lasts until the process ends; collecting it would take longer than reading the
    bundled model.
    """
    import mezzotint  # torch comes with load()
    from mezzotint.memory import system

    system.keep_freed()
    gc.disable()
    try:
        limit_threads()
        pipe = mezzotint.load(model, device=device, dtype=dtype, **options)
    finally:
        gc.enable()
        gc.freeze()
    for notice in pipe.notices:
        say(notice)
    return pipe


def default_threads() -> int:
    """Return the number of threads that a command runs with where none is given: torch's, within the CPU quota."""
    import torch

    from mezzotint.memory import system

    return system.default_threads(torch.get_num_threads())


def in_threads(number: int) -> str:
    """Return a number of threads in words."""
    return "1 thread" if number == 1 else f"{number} threads"


def limit_threads() -> None:
    """Set torch's number of threads to `default_threads`."""
    import torch

    threads = default_threads()
    if threads < torch.get_num_threads():
        torch.set_num_threads(threads)


def check_memory(memory: str | None) -> None:
    """Check the form of --memory before torch is imported.

    Raises:
        BudgetError: If it is not a size.
    """
    if memory is not None and memory != "auto":
        parse_size(memory)


def fitted(
    model: str | None,
    memory: str | None,
    request: Request | Sequence[Request],
    device: str | None,
    dtype: str | None,
    **options: Any,
) -> MemoryPlan | None:
    """Return the plan for a memory budget and print it; None without a budget."""
    if memory is None:
        return None
    from mezzotint.memory.planner import plan

    made = plan(model, memory, request, device=device, dtype=dtype, **options)
    say(*made.table().split("\n"))
    return made


@contextmanager
def long_work(what: str, kept: Callable[[], str]) -> Iterator[OnStep]:
    """Show a progress bar, and stop cleanly on Ctrl-C.

    Yields a function (done, total) to call after each step.

    Raises:
        StoppedError: After Ctrl-C, at the end of the step; with what was `kept`.
    """
    with stoppable() as stopped, _progress(what) as progress:

        def on_step(done: int, total: int) -> None:
            progress(done, total)
            if stopped():
                raise KeyboardInterrupt

        try:
            yield on_step
        except KeyboardInterrupt:
            raise StoppedError(f"Stopped; {kept()}") from None


@contextmanager
def _progress(what: str) -> Iterator[OnStep]:
    """Show a bar with step and time left where standard error is a terminal."""
    if not shows_progress():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(what), total=None)
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
    if callable(before):  # under nohup it is ignored, and stays so
        signal.signal(signal.SIGINT, press)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)
