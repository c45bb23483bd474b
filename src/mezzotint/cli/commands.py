"""The commands, and how what goes wrong in one of them is answered."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from mezzotint import __version__
from mezzotint.cli import INTERRUPTED
from mezzotint.cli.again import again
from mezzotint.cli.bulk import bulk
from mezzotint.cli.draw import generate
from mezzotint.cli.explain import explain
from mezzotint.cli.grid import grid
from mezzotint.cli.measure import report
from mezzotint.cli.options import Command
from mezzotint.cli.plan import plan
from mezzotint.cli.show import env, inspect, models, samplers
from mezzotint.cli.terminal import discard_unwritten, say, show
from mezzotint.cli.train import train
from mezzotint.cli.words import tokens
from mezzotint.errors import MezzotintError, TrainingError, WriteError
from mezzotint.files import DISK_ERRORS

# click's class, of which newer versions of typer have a copy of their own
ClickException: type[Exception] = typer.BadParameter.__mro__[2]

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


def run() -> int:
    """Run the command in sys.argv and return its exit code."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    warnings.showwarning = lambda message, *_, **__: say(f"Warning: {message}")
    try:
        return app(standalone_mode=False) or 0
    except ClickException as error:
        _say_usage(error)
        return int(error.exit_code)  # type: ignore[attr-defined]
    except typer.Abort:  # what older versions of typer make of Ctrl-C
        return INTERRUPTED
    except MezzotintError as error:
        if os.environ.get("MEZZOTINT_DEBUG"):
            raise
        say(f"Error: {error}")
        return 1 if isinstance(error, WriteError | TrainingError) else 2
    except Exception as error:
        if os.environ.get("MEZZOTINT_DEBUG"):
            raise
        if isinstance(error, OSError) and error.errno in (*DISK_ERRORS, errno.EBADF):  # --help is printed by typer
            discard_unwritten()
            say(f"Error: the output cannot be written ({error.strerror})")
            return 1
        what = " ".join(f"{type(error).__name__}: {error}".split())
        say(f"Error: this is a bug in mezzotint ({what}). Set MEZZOTINT_DEBUG=1 to see the traceback.")
        return 1


def _say_usage(error: Any) -> None:
    """Print what is wrong with the command line, or the help where it is empty."""
    message = error.format_message()
    if not sys.argv[1:]:
        say(*message.split("\n"))
        return
    if context := getattr(error, "ctx", None):
        say(*context.get_usage().split("\n"), f"Try '{context.command_path} --help' for help.", "")
    say(f"Error: {message}")


def _version(asked: bool) -> None:
    if asked:
        show(f"mezzotint {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass
