"""`mezzotint train lora|full|dreambooth|textual-inversion`: pictures -> a LoRA, a model or a word."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mezzotint.cli.terminal import Json, Memory, Model, check_memory, print_json, say, stoppable
from mezzotint.errors import RequestError, TrainingError, WriteError

if TYPE_CHECKING:
    from mezzotint.train.finetune import Report

EVERY = 50  # steps between lines where there is no terminal to show a bar

METHODS = {
    "lora": "a small file beside the model",
    "full": "the model itself",
    "dreambooth": "one subject by a rare word",
    "textual-inversion": "a word alone",
}


def train(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help=f"{'; '.join(f'{n}: {t}' for n, t in METHODS.items())}.")
    ],
    data: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="Pictures: a folder, a .parquet file or WebDataset shards."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="For checkpoints and what is learnt; a run that was begun there goes on."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="A TOML file; the command line overrides it.")] = (
        None
    ),
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any value of the recipe, as lr=1e-5; the run begins by printing all. May be repeated.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Changes of the weights, of --batch pictures each; else 1000, dreambooth 400.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures in a step; else 1.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate; else 1e-4, full 1e-5, textual-inversion 5e-3.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of a LoRA: how much it can hold; else 8.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is drawn by chance.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels; else the model's native.")] = None,
    memory: Memory = None,
    model: Model = None,
    device: Annotated[str | None, typer.Option(help="cpu; else what `accelerate launch` gives, or the best.")] = None,
    as_json: Json = False,
) -> None:
    """Teach a model what pictures show; once stopped it goes on."""
    from mezzotint.train.recipe import Recipe, assignments

    if method not in METHODS:
        raise RequestError(f"method is {method[:60]!r}; it must be one of {', '.join(METHODS)}")
    if out is None:
        raise RequestError("--out is missing; it must be the run's folder")
    sizes = {"steps": steps, "batch": batch, "lr": lr, "rank": rank, "seed": seed, "resolution": resolution}
    given_here = {"data": data, "model": model, "memory": memory, **sizes}
    named = {name: value for name, value in given_here.items() if value is not None}
    made = Recipe.of(method, recipe, assignments(given or ()) | named)
    check_memory(made.memory)
    from mezzotint.train.run import run

    try:
        with stoppable() as stopped, _progress(made.steps) as progress:

            def on_step(report: Report) -> None:
                progress(report)
                if stopped():
                    raise KeyboardInterrupt

            paths = run(made, out, device=device, say=say, on_step=on_step)
    except KeyboardInterrupt:
        say(f"Stopped; the same command goes on from the newest checkpoint in {out}")
        raise typer.Exit(1) from None
    except (WriteError, TrainingError) as error:
        say(f"Error: {error}")
        raise typer.Exit(1) from None
    if as_json:
        print_json({"folder": str(out), "files": [str(path) for path in paths], "steps": made.steps})
    elif paths:
        typer.echo(f"Wrote {' and '.join(map(str, paths))}")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Report], None]]:
    """A bar with loss, pictures a second and time left; where standard error is no terminal, a line now and then."""
    if not sys.stderr.isatty():

        def line(report: Report) -> None:
            if report.step % EVERY == 0 or report.validation is not None:
                say(f"{report.step:,} of {total:,} steps, {_told(report)}")

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda report: bar.update(task, completed=report.step, description=_told(report))


def _told(report: Report) -> str:
    held = "" if report.validation is None else f", held out {report.validation:.4f}"
    return f"loss {report.loss:.4f}{held}, {report.rate:.3g} pictures/s"
