"""The commands, and how what goes wrong in one of them is answered."""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from mezzotint import __version__
from mezzotint.cli import INTERRUPTED
from mezzotint.cli.again import again
from mezzotint.cli.bulk import bulk
from mezzotint.cli.defaults import defaults_of
from mezzotint.cli.draw import generate
from mezzotint.cli.embed import embed
from mezzotint.cli.explain import explain
from mezzotint.cli.grid import grid
from mezzotint.cli.info import info
from mezzotint.cli.measure import report
from mezzotint.cli.options import (
    HINTS,
    Command,
    Group,
    LogLevel,
    Quiet,
    Verbose,
    log_level_of,
    request_option,
    takes_log_level,
)
from mezzotint.cli.plan import plan
from mezzotint.cli.serve import serve
from mezzotint.cli.shell import shell
from mezzotint.cli.show import env, inspect, models, samplers
from mezzotint.cli.terminal import (
    StoppedError,
    discard_unwritten,
    print_json,
    reset_log_level,
    say,
    set_log_level,
    show,
)
from mezzotint.cli.train import train
from mezzotint.cli.upscale import upscale
from mezzotint.cli.words import tokens
from mezzotint.errors import MezzotintError, TrainingError, WriteError, printable
from mezzotint.files import DISK_ERRORS

# click's class, of which newer versions of typer have a copy of their own
ClickException: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="mezzotint",
    help="Text to image with latent diffusion models (Stable Diffusion 1, 2, XL).",
    epilog='\b\nExample: mezzotint generate "a lemon on a blue background"',
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    cls=Group,
    rich_markup_mode=None,  # importing rich would double the time that --help takes
    pretty_exceptions_enable=False,
)

EXAMPLES: dict[Callable[..., None], str] = {  # in the order of --help
    generate: 'generate "a lemon left of a whale" --steps 20 -o lemon.png',
    shell: "shell --model model.safetensors",
    plan: "plan --model MODEL --size 1024x1024 --count 4 --memory 6GiB",
    again: "again lemon.png --verify",
    upscale: "upscale lemon.png --model 4x.safetensors -o large.png",
    embed: "embed face.png --ip-adapter ip-adapter_sd15.safetensors -o face.safetensors",
    info: "info lemon.png",
    explain: 'explain "a lemon left of a whale" --seed 7 --out page.png',
    tokens: 'tokens "a (lemon:1.3) left of a whale"',
    inspect: "inspect model.safetensors",
    samplers: "samplers",
    models: "models",
    env: "env",
    bulk: "bulk prompts.txt --out pictures",
    grid: 'grid "a lemon" --x steps=10,20 --y sampler=euler,dpmpp_2m',
    train: "train lora pictures --out hats --set rank=16",
    serve: "serve --model model.safetensors --data pictures",
    report: "report --prompts prompts.txt --samplers dpmpp_2m,ddpm",
}
for command, example in EXAMPLES.items():
    app.command(cls=Command, epilog=f"\b\nExample: mezzotint {example}")(takes_log_level(command))


@functools.cache
def _command() -> Callable[..., int | None]:
    """Build click's commands from the functions: once in a process, since it takes as long as a small picture."""
    return typer.main.get_command(app)


def run() -> int:
    """Run the command in sys.argv and return its exit code."""
    try:
        return _run()
    finally:
        reset_log_level()  # tests run several commands in one process


def _run() -> int:
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    warnings.showwarning = lambda message, *_, **__: say(f"Warning: {message}")
    try:
        code: int = _command()(prog_name="mezzotint", standalone_mode=False) or 0
        if code == INTERRUPTED:  # what newer versions of typer make of Ctrl-C
            raise KeyboardInterrupt
        return code
    except ClickException as error:
        return _fail_usage(error)
    except (KeyboardInterrupt, typer.Abort):  # Abort is what older versions of typer make of Ctrl-C
        return _fail("Interrupted", "Stopped", INTERRUPTED, text="")
    except StoppedError as stop:
        return _fail("Interrupted", str(stop), INTERRUPTED, text=str(stop))
    except MezzotintError as error:
        if os.environ.get("MEZZOTINT_DEBUG"):
            raise
        return _fail(type(error).__name__, str(error), 1 if isinstance(error, WriteError | TrainingError) else 2)
    except Exception as error:
        if os.environ.get("MEZZOTINT_DEBUG"):
            raise
        if isinstance(error, OSError) and error.errno in (*DISK_ERRORS, errno.EBADF):  # --help is printed by typer
            discard_unwritten()
            return _fail("WriteError", f"the output cannot be written ({error.strerror})", 1)
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return _fail(
            "InternalError", f"this is a bug in mezzotint ({what}). Set MEZZOTINT_DEBUG=1 to see the traceback.", 1
        )


def _fail(kind: str, message: str, code: int, text: str | None = None) -> int:
    """Report a failure: with --json as an object on standard output, otherwise as a sentence on standard error.

    Args:
        kind: The type of error.
        message: What is wrong.
        code: The exit code.
        text: The text on standard error, if it is not "Error: message".

    Returns:
        The exit code.
    """
    if _given("--json"):
        with suppress(WriteError, typer.Exit):
            print_json({"error": {"type": kind, "message": printable(message), "code": code}})
            return code
    if text != "":
        say(*(text or f"Error: {message}").split("\n"), level=logging.ERROR)
    return code


def _given(*names: str) -> bool:
    """Return whether an option is among the arguments, of which those after -- are none."""
    return not {*names}.isdisjoint(itertools.takewhile(lambda argument: argument != "--", sys.argv[1:]))


def _fail_usage(error: Any) -> int:
    """Report what is wrong with the command line, or print the help where it is empty."""
    message = error.format_message()
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", "")
    hint = HINTS.get(option)
    if context and context.info_name == "bulk":
        hint = request_option(option)
    if hint:
        message = f"No such option: {option}. Did you mean {hint}?"
    usage = ""
    if context:
        usage = f"{context.get_usage()}\nTry '{context.command_path} --help' for help.\n\n"
    text = f"{usage}Error: {message}" if sys.argv[1:] else message
    return _fail("UsageError", message, int(error.exit_code), text=text)


def _version(asked: bool) -> None:
    if asked:
        show(f"mezzotint {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_level: LogLevel = None,
) -> None:
    configured = os.environ.get("MEZZOTINT_LOG_LEVEL") or "warning"
    set_log_level(log_level_of(quiet, verbose, log_level) or configured)
    command = context.invoked_subcommand or ""
    if not _given("--help", "-h"):  # which a wrong configuration does not prevent
        context.default_map = {command: defaults_of(command)}
