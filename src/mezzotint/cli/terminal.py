"""What the commands share: their common options, what they say, and how long work shows itself and is stopped."""

from __future__ import annotations

import gc
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.placement import bytes_of

if TYPE_CHECKING:
    from mezzotint.memory.planner import Plan
    from mezzotint.pipeline import OnStep, Pipeline
    from mezzotint.request import Request

Model = Annotated[
    str | None,
    typer.Option(help="A model folder, a .safetensors or .ckpt file, or a hub id; else the bundled model."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; else the best there is.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; else the device's natural one.")]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE|auto",
        help="What the process may take, such as 4GiB, or what is free: does what is needed for that, and says it.",
    ),
]
Syntax = Annotated[
    str | None, typer.Option(help="How the prompt is written: a1111 (unless said), comfy, compel or plain.")
]
Embedding = Annotated[
    list[str] | None,
    typer.Option(help="A textual inversion, named in the prompt: a file, folder or hub id. May be repeated."),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH[:SCALE[:TEXT]]",
        help="A LoRA file and how much of it, else 1; of its text encoder's part TEXT. May be repeated.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for a program to read.")]


def say(text: str) -> None:
    """One line on standard error."""
    typer.echo(text, err=True)


def print_json(record: Any) -> None:
    """One line on standard output."""
    typer.echo(json.dumps(record))


def load(model: str | None, device: str | None, dtype: str | None, **options: Any) -> Pipeline:
    """`mezzotint.load`. What it imports and makes lasts until the process ends: Python searches it for garbage neither
    now nor at the end, which would take longer than reading the bundled model.
    """
    import mezzotint  # torch comes with load()

    gc.disable()
    try:
        return mezzotint.load(model, device=device, dtype=dtype, **options)
    finally:
        gc.enable()
        gc.freeze()


def check_memory(memory: str | None) -> None:
    """Raises BudgetError for what is no size, before torch is imported."""
    if memory is not None and memory != "auto":
        bytes_of(memory)


def fitted(
    model: str | None, memory: str | None, request: Request | Sequence[Request], device: str | None, dtype: str | None
) -> Plan | None:
    """The plan for a budget, if there is one, which it says."""
    if memory is None:
        return None
    from mezzotint.memory.planner import plan

    made = plan(model, memory, request, device=device, dtype=dtype)
    say(made.table())
    return made


@contextmanager
def long_work(what: str, kept: Callable[[], str]) -> Iterator[OnStep]:
    """Yields what the work inside calls after each step: it moves a bar, and after Ctrl-C ends the work.

    Then what is `kept` is said, and the command's code is 1.
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
    """A bar with step and time left on standard error where that is a terminal, else nothing: no noise in a pipe."""
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
    """Yields a function that says whether Ctrl-C was pressed, so that the step under way ends and a finished picture is
    saved. The second Ctrl-C interrupts at once.
    """
    presses = 0

    def press(*_: object) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored, as under nohup, and stays so
        signal.signal(signal.SIGINT, press)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)
