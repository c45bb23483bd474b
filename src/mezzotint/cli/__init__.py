"""The command line. Exit codes: 0 success, 2 the request was wrong, 1 anything else, Ctrl-C included.

Progress and remarks go to standard error, the result to standard output: one line, or one JSON object with --json.
Tracebacks are shown only if MEZZOTINT_DEBUG is set. Slow imports (torch, pillow, rich) are made by the command that
needs them, after everything that can be checked without them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import Annotated

import typer

from mezzotint import __version__
from mezzotint.cli.again import again
from mezzotint.cli.bulk import bulk
from mezzotint.cli.draw import generate
from mezzotint.cli.explain import explain
from mezzotint.cli.grid import grid
from mezzotint.cli.measure import report
from mezzotint.cli.options import Command
from mezzotint.cli.plan import plan
from mezzotint.cli.show import env, inspect, models, samplers
from mezzotint.cli.terminal import say
from mezzotint.cli.train import train
from mezzotint.cli.words import tokens
from mezzotint.errors import MezzotintError

app = typer.Typer(
    name="mezzotint",
    help="Text to image with latent diffusion models (Stable Diffusion 1, 2, XL).",
    epilog='\b\nExample: mezzotint generate "a lemon on a blue background"',
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    add_completion=False,
    rich_markup_mode=None,  # importing rich would double the time that --help takes
    pretty_exceptions_enable=False,
)

EXAMPLES: dict[Callable[..., None], str] = {  # in the order of --help
    generate: 'generate "a lemon left of a whale" --steps 20 --out lemon.png',
    plan: "plan --model MODEL --size 1024x1024 --count 4 --memory 6GiB",
    again: "again lemon.png --verify",
    explain: 'explain "a lemon left of a whale" --seed 7 --out page.png',
    tokens: 'tokens "a (lemon:1.3) left of a whale"',
    inspect: "inspect model.safetensors",
    samplers: "samplers",
    models: "models",
    env: "env",
    bulk: "bulk prompts.jsonl --out pictures",
    grid: 'grid "a lemon" --x steps=10,20,30 --y sampler=euler,dpmpp_2m --out grid.png',
    train: "train lora pictures --out hats --set rank=16",
    report: "report --prompts prompts.txt --samplers dpmpp_2m,ddpm --out report",
}
for command, example in EXAMPLES.items():
    app.command(cls=Command, epilog=f"\b\nExample: mezzotint {example}")(command)


def main() -> None:
    """Run the command in sys.argv and exit with its code."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    try:
        app()
    except SystemExit as done:
        sys.exit(1 if done.code == 130 else done.code)  # typer answers Ctrl-C with 130
    except MezzotintError as error:
        if os.environ.get("MEZZOTINT_DEBUG"):
            raise
        say(f"Error: {error}")
        sys.exit(2)
    except Exception as error:
        if os.environ.get("MEZZOTINT_DEBUG"):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        say(f"Error: this is a bug in mezzotint ({what}). Set MEZZOTINT_DEBUG=1 to see the traceback.")
        sys.exit(1)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mezzotint {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass
