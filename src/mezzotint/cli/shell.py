r"""`mezzotint shell`: one loaded model, and prompts line by line.

A line is a prompt, or a command that starts with a backslash. From a terminal lines are edited, completed and kept by
readline; from a pipe they are read as they come, and the pictures are drawn one after another.
"""

from __future__ import annotations

import difflib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.draw import report_result, say_notices, wrote
from mezzotint.cli.fields import pair
from mezzotint.cli.inline import protocol_of, sequences
from mezzotint.cli.naming import SUFFIXES, check_out, names_several, save_one
from mezzotint.cli.options import (
    FIELDS,
    OUTPUT,
    Device,
    Dtype,
    Memory,
    Model,
    Sampler,
    add_options_of,
    complete_sampler,
    complete_spacing,
    model_options,
    option,
    take_model_options,
)
from mezzotint.cli.terminal import StoppedError, check_memory, load, long_work, print_json, say, show, show_raw
from mezzotint.errors import MezzotintError, RequestError, WriteError

if TYPE_CHECKING:
    from PIL import Image

    from mezzotint.pipeline import Pipeline

HELP = {
    "set": "FIELD VALUE    set a field of the request, such as: \\set steps 30",
    "unset": "[FIELD]        the model's own value again; without a FIELD, of all fields",
    "show": "               the model, the fields that are set, and where pictures go",
    "seed": "[N]            the same as \\set seed N; without N each picture has a random one",
    "negative": "[TEXT]     the same as \\set negative_prompt TEXT; without TEXT there is none",
    "again": "              draw the last prompt again, with another seed unless one is set",
    "out": "[WHERE]         the folder or pattern for the next pictures, as --out of generate",
    "save": "FILE           save the last picture there, too",
    "model": "[MODEL]       load another model",
    "help": "               this text",
    "quit": "               end the shell, as Ctrl-D does; Ctrl-C stops the picture being drawn",
}
HISTORY = 1000  # lines that are kept
PROMPT = "mezzotint> "


@add_options_of(model_options)
def shell(
    model: Model = None,
    sampler: Sampler = None,
    memory: Memory = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        str | None,
        option(
            "Where pictures are written: a folder, or a pattern as for generate. No file is replaced.",
            "FOLDER|PATTERN",
            OUTPUT,
            default="the current folder",
            name="--out -o",
        ),
    ] = None,
    as_json: Annotated[
        bool, option("Print one JSON object for each picture or failure.", None, OUTPUT, name="--json")
    ] = False,
    **overrides: Any,
) -> None:
    """Load a model once and draw prompts line by line."""
    check_memory(memory)
    budget = {"memory": memory} if memory else {}
    session = Session(partial(load, device=device, dtype=dtype, **take_model_options(overrides), **budget), as_json)
    session.set_out(out or "")
    if sampler is not None:
        session.set_field(f"sampler {sampler}")
    session.load_model(model or "")
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        show("A line is a prompt; \\help lists the commands. Ctrl-C stops a picture, Ctrl-D ends the shell.")
        session.protocol = None if as_json else protocol_of(os.environ)
        with _readline():
            session.run(_typed_lines())
    else:
        session.run(_piped_lines())
    if session.code and not interactive:
        raise typer.Exit(session.code)


class Session:
    """The model, the settings and the last picture.

    Args:
        load: Loads a model by its name.
        as_json: Whether results and failures are printed as JSON.
    """

    def __init__(self, load: Any, as_json: bool) -> None:
        self._load, self._json = load, as_json
        self._pipe: Pipeline | None = None
        self._model = ""
        self._fields: dict[str, Any] = {}
        self._out: str | None = None
        self._prompt = ""
        self._image: Image.Image | None = None
        self.protocol: str | None = None
        self.code = 0  # the highest exit code of a line

    def run(self, lines: Iterator[str]) -> None:
        r"""Run lines until the last one or `\quit`; a line that fails is answered with a sentence."""
        for line in lines:
            text = line.strip()
            if text in ("\\quit", "\\q"):
                return
            try:
                if text:
                    self._run_line(text)
            except StoppedError as stop:
                self._fail("Interrupted", str(stop), 130)
            except KeyboardInterrupt:
                self._fail("Interrupted", "Stopped", 130)
            except MezzotintError as error:
                self._fail(type(error).__name__, str(error), 1 if isinstance(error, WriteError) else 2)
                if isinstance(error, WriteError) and "standard output" in str(error):
                    return

    def _fail(self, kind: str, message: str, code: int) -> None:
        self.code = max(self.code, code)
        if self._json:
            print_json({"error": {"type": kind, "message": message, "code": code}})
        else:
            say(message if code == 130 else f"Error: {message}", level=logging.ERROR)

    def _run_line(self, text: str) -> None:
        """Draw a prompt, or run a command."""
        if not text.startswith("\\"):
            self._draw(text)
            return
        name, _, value = text[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "set": self.set_field,
            "unset": self._unset,
            "show": self._show,
            "seed": lambda value: self.set_field(f"seed {value}") if value else self._unset("seed"),
            "negative": lambda value: self.set_field(f"negative {value}") if value else self._unset("negative"),
            "again": self._again,
            "out": self.set_out,
            "save": self._save,
            "model": self.load_model,
            "help": lambda _: show(*(f"\\{name} {text}" for name, text in HELP.items())),
        }
        if name not in commands:
            raise RequestError(f"\\{name} is no command; {_meant(name, value.strip())}")
        commands[name](value.strip())

    def load_model(self, name: str) -> None:
        """Load a model; if that fails, the one before is kept."""
        name = os.path.expanduser(name)
        self._pipe = self._load(name or None)
        self._model = name

    def set_out(self, out: str) -> None:
        """Set where pictures are written; empty is the current folder."""
        from mezzotint.request import Request

        out = os.path.expanduser(out)
        if out and not names_several(out):
            raise RequestError(f"out is {out!r}; it must be a folder, such as pictures/, or a pattern")
        check_out(out or None, Request(prompt="", seed=0), SUFFIXES)
        self._out = out or None

    def set_field(self, text: str) -> None:
        """Set a field, from "steps 30" or "steps=30"."""
        from mezzotint.rows import assignments

        head = text.split(None, 1)[0] if text else ""
        name, mark, value = text.partition("=" if "=" in head else " ")
        name, value = name.strip(), value.strip()
        if not mark or not value:
            raise RequestError("\\set needs a field and a value, such as: \\set steps 30")
        if name == "prompt":
            raise RequestError("prompt is not set: a line without a backslash is the prompt")
        if (name, value) == ("seed", "-1"):  # which means a random one elsewhere
            self._unset("seed")
            return
        if name == "size":
            both = value if "x" in value.lower() else f"{value}x{value}"
            width, height = pair("size", both, "x", int, "WxH in pixels, such as 512x768") or (0, 0)
            made = assignments("set", [f"width={width}", f"height={height}"])
        else:
            made = assignments("set", [f"{FIELDS.get(name, name)}={value}"])
        self._fields |= made

    def _unset(self, name: str) -> None:
        if not name:
            self._fields.clear()
        for field in ("width", "height") if name == "size" else (FIELDS.get(name, name),):
            self._fields.pop(field, None)

    def _show(self, _: str) -> None:
        facts = {"model": self._model or "emoji", **self._fields, "out": self._out or "the current folder"}
        show(*(f"{name}: {value}" for name, value in facts.items()))

    def _again(self, _: str) -> None:
        if not self._prompt:
            raise RequestError("nothing has been drawn yet; a line without a backslash is a prompt")
        self._draw(self._prompt)

    def _save(self, path: str) -> None:
        from mezzotint.images.io import save

        if self._image is None or not path:
            raise RequestError("\\save needs a picture that was drawn, and a file name, such as: \\save lemon.png")
        path = os.path.expanduser(path)
        try:
            save(self._image, path, overwrite=False)
        except FileExistsError:
            raise RequestError(f"{path} exists; \\save replaces no file") from None
        show(f"Wrote {path}")

    def _draw(self, prompt: str) -> None:
        """Draw a prompt with the fields that are set, and show the last picture where the terminal can."""
        from mezzotint.request import Request

        assert self._pipe is not None  # loaded before the first line
        self._prompt = prompt
        run = self._pipe.plan(Request.model_validate({**self._fields, "prompt": prompt}))
        check_out(self._out, run.request, SUFFIXES)
        say_notices(self._pipe, run)
        written: list[Path] = []
        with long_work("drawing", lambda: wrote(written) if written else "no picture was finished") as on_step:
            result = self._pipe.generate(
                run,
                on_step=on_step,
                on_image=lambda k, image: written.append(save_one(image, self._out, run.request, k)),
            )
        self._image = result.images[-1]
        if self.protocol:
            columns = shutil.get_terminal_size().columns
            true_color = os.environ.get("COLORTERM") in ("truecolor", "24bit")
            show_raw(sequences(self._image.copy(), self.protocol, columns=columns, true_color=true_color))
        report_result(self._pipe, run, result, written, self._json)


def _meant(name: str, value: str) -> str:
    """Return a suggestion for a command that does not exist."""
    from mezzotint.request import Request

    field = FIELDS.get(name, name)
    if field == "size" or (field in Request.model_fields and field != "prompt"):
        return f"did you mean \\set {name} {value or 'VALUE'}?"
    near = difflib.get_close_matches(name, HELP, n=1)
    return f"did you mean \\{near[0]}?" if near else "\\help lists them"


def _typed_lines() -> Iterator[str]:
    """Yield the lines that are typed; Ctrl-C discards a line."""
    # what ends other shells would otherwise be drawn
    words = {"exit": "\\quit", "quit": "\\quit", "help": "\\help"}
    while True:
        try:
            line = input(PROMPT)
            yield words.get(line.strip(), line)
        except KeyboardInterrupt:
            show("")
        except EOFError:
            show("")
            return


def _piped_lines() -> Iterator[str]:
    """Yield the lines of standard input, of which bytes that are not UTF-8 are replaced."""
    try:
        for line in iter(sys.stdin.buffer.readline, b""):
            yield line.decode("utf-8-sig", "replace")
    except OSError as error:  # it is closed
        raise RequestError(f"standard input cannot be read ({error.strerror})") from None


def _complete(line: str, word: str) -> list[str]:
    """Return what the last word of a line may be completed to."""
    from mezzotint.request import Request

    before = line[: len(line) - len(word)].split()
    if not before:
        return [f"\\{name} " for name in HELP if word.startswith("\\") and name.startswith(word[1:])]
    if before in (["\\set"], ["\\unset"]):
        names = sorted({*Request.model_fields, *FIELDS, "size"} - {"prompt"})
        return [f"{name} " for name in names if name.startswith(word)]
    if before == ["\\set", "sampler"]:
        return complete_sampler(word)
    return complete_spacing(word) if before == ["\\set", "spacing"] else []


@contextmanager
def _readline() -> Iterator[None]:
    """Edit and complete what is typed, and keep it in a file of the user's that no one else can read."""
    try:
        import readline
    except ImportError:  # not built into this Python
        yield
        return
    import platformdirs

    path = Path(platformdirs.user_state_dir("mezzotint", appauthor=False)) / "history"
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        path.chmod(0o600)
        readline.read_history_file(path)
    readline.set_history_length(HISTORY)
    readline.set_completer_delims(" ")
    readline.set_completer(
        lambda word, k: dict(enumerate(_complete(readline.get_line_buffer()[: readline.get_endidx()], word))).get(k)
    )
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    try:
        yield
    finally:
        with suppress(OSError):
            readline.write_history_file(path)
            path.chmod(0o600)
