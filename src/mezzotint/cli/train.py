"""`mezzotint train lora|full|dreambooth|textual-inversion|controlnet`: train on pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.options import (
    MEMORY,
    OUTPUT,
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
    limit_threads,
    print_json,
    say,
    show,
    shows_progress,
    stoppable,
)
from mezzotint.errors import RequestError

if TYPE_CHECKING:
    from mezzotint.train.finetune import Report

EVERY = 50  # steps between lines where there is no terminal to show a bar

METHODS = {
    "lora": "a small file of low-rank changes",
    "full": "all weights of the model",
    "dreambooth": "one subject, named by a rare word",
    "textual-inversion": "the embedding of a new word",
    "controlnet": "a network that makes pictures follow a conditioning picture",
}


@add_options_of(model_options)
def train(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help=f"{'; '.join(f'{n}: {t}' for n, t in METHODS.items())}.")
    ],
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help="Pictures: a folder, a .parquet file or WebDataset shards."),
    ] = None,
    out: Annotated[
        Path | None,
        option(
            "Folder for checkpoints and results; a run that was started there is resumed.",
            "FOLDER",
            OUTPUT,
            name="--out -o",
        ),
    ] = None,
    recipe: Annotated[Path | None, option("TOML file with the settings; options override it.", "FILE")] = (None),
    given: Annotated[
        list[str] | None,
        option(
            "Any setting of the recipe, such as lr=1e-5; the run prints all of them first. May be repeated.",
            "NAME=VALUE",
            name="--set",
        ),
    ] = None,
    steps: Annotated[int | None, option("Number of optimizer steps.", "N", default="1000, dreambooth 400")] = None,
    batch: Annotated[int | None, option("Number of pictures per step.", "N", default="1")] = None,
    lr: Annotated[
        float | None, option("Learning rate.", "X", default="1e-4, full and controlnet 1e-5, textual-inversion 5e-3")
    ] = None,
    rank: Annotated[int | None, option("Rank of the LoRA.", "N", default="8")] = None,
    seed: Annotated[int | None, option("Seed of all random draws.", "N", default="0")] = None,
    resolution: Annotated[int | None, option("Size of the training pictures.", "PIXELS", default="native")] = None,
    memory: Memory = None,
    model: Model = None,
    device: Annotated[
        str | None, option("cpu, or the device that accelerate chooses.", "cpu", MEMORY, default="the best available")
    ] = None,
    as_json: Json = False,
    **overrides: Any,
) -> None:
    """Train a model on pictures; a stopped run can be resumed."""
    config = overrides["config"]
    opened = take_model_options(overrides)
    from mezzotint.train.recipe import Recipe, assignments

    if method not in METHODS:
        raise RequestError(f"method is {method[:60]!r}; it must be one of {', '.join(METHODS)}")
    if out is None:
        raise RequestError("--out is missing; it must be the folder of the run")
    sizes = {"steps": steps, "batch": batch, "lr": lr, "rank": rank, "seed": seed, "resolution": resolution}
    given_here = {"data": data, "model": model, "memory": memory, **opened, "config": config, **sizes}
    named = {name: value for name, value in given_here.items() if value is not None}
    made = Recipe.of(method, recipe, assignments(given or ()) | named)
    check_memory(made.memory)
    from mezzotint.train.run import run

    limit_threads()
    try:
        with stoppable() as stopped, _progress(made.steps) as progress:

            def on_step(report: Report) -> None:
                progress(report)
                if stopped():
                    raise KeyboardInterrupt

            paths = run(made, out, device=device, say=lambda text: say(*text.split("\n")), on_step=on_step)
    except KeyboardInterrupt:
        raise StoppedError(f"Stopped; the same command continues from the newest checkpoint in {out}") from None
    if as_json:
        print_json({"folder": str(out), "files": [str(path) for path in paths], "steps": made.steps})
    elif paths:
        show(f"Wrote {' and '.join(map(str, paths))}")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Report], None]]:
    """Show a bar with loss, pictures per second and time left, or a line every 50 steps where there is no terminal."""
    if not shows_progress():

        def line(report: Report) -> None:
            if report.step % EVERY == 0 or report.validation is not None:
                say(f"{report.step:,} of {total:,} steps, {_describe(report)}")

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda report: bar.update(task, completed=report.step, description=_describe(report))


def _describe(report: Report) -> str:
    validation = "" if report.validation is None else f", validation {report.validation:.4f}"
    return f"loss {report.loss:.4f}{validation}, {report.rate:.3g} pictures/s"
