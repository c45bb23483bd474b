"""What reaches the terminal: no control characters of a file's, and no traceback where a stream or a disk is gone."""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

from mezzotint import CheckpointError, WriteError, cli
from mezzotint.cli import terminal
from mezzotint.images import io as pictures
from mezzotint.images.io import save, save_png
from mezzotint.weights.checkpoint import scan_model

# clears the screen, sets the clipboard (OSC 52), begins another line, reorders what follows, is a C1 control
HOSTILE = "a\x1b[2J\x1b]52;c;aGk=\x07\r\nError: b\u202ec\x9bd\x7f"
ESCAPED = r"a\x1b[2J\x1b]52;c;aGk=\x07\x0d\x0aError: b\u202ec\x9bd\x7f"


Run = Callable[..., Any]


# ---- control characters ----------------------------------------------------------------------------------------------


def test_every_control_character_is_escaped_and_nothing_else() -> None:
    """Unicode's general category Cc, its property Bidi_Control, and its own line ends."""
    bidi = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    for mark in map(chr, range(0x3000)):
        if unicodedata.category(mark) == "Cc":
            assert terminal.printable(mark) == f"\\x{ord(mark):02x}"
        elif mark in bidi or unicodedata.category(mark) in ("Zl", "Zp"):
            assert terminal.printable(mark) == f"\\u{ord(mark):04x}"
        else:
            assert terminal.printable(mark) == mark
    assert terminal.printable(HOSTILE) == ESCAPED
    assert terminal.printable("柠檬 🍋 👩\u200d🍳 e\u0301 \\x1b") == "柠檬 🍋 👩\u200d🍳 e\u0301 \\x1b"


def test_a_line_is_bounded() -> None:
    """Both ends stay: the file at the beginning, and what would be right at the end."""
    said = str(CheckpointError(f"a.pt: {'x' * 3_000_000} is not right; it must be a number"))
    assert len(said) < 4100 and said.startswith("a.pt: xx") and said.endswith("it must be a number")
    assert terminal.printable("x" * 4000) == "x" * 4000


def test_a_tensors_name(run: Run, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header[HOSTILE] = header.pop("weight")
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[-8:])
    with pytest.raises(CheckpointError) as error:  # the library's own sentence is one line too
        scan_model(tmp_path / "model.safetensors")
    assert ESCAPED in str(error.value)
    ran = run("inspect", "model.safetensors")
    assert ran.code == 0 and "\x1b" not in ran.out
    ran = run("generate", "x", "--model", "model.safetensors")
    assert ran.code == 2 and terminal.printable(ran.err.rstrip("\n")) == ran.err.rstrip("\n")
    assert json.loads(run("inspect", "model.safetensors", "--json").out)["keys"] == 1


def test_the_name_and_the_texts_of_a_picture(run: Run, tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    image.info["parameters"] = f"a lemon\nSteps: 2, Sampler: Euler a, Seed: 1, Model: {json.dumps(HOSTILE)}"
    name = "[red]" + HOSTILE.replace("/", "")
    save_png(image, tmp_path / name)
    ran = run("again", name)
    assert ran.code == 2 and ran.err.count("\n") == 1 and "\x1b" not in ran.err and "\u202e" not in ran.err
    assert ran.err.startswith("[red]" + ESCAPED) and "it was generated with the model" in ran.err


@pytest.mark.parametrize("arguments", [[f"--{HOSTILE}"], [HOSTILE], ["again", HOSTILE], ["samplers", HOSTILE]])
def test_the_command_line_itself(run: Run, arguments: list[str]) -> None:
    """Names come from a folder too: mezzotint again *."""
    ran = run(*arguments)
    assert ran.code == 2
    assert not {*ran.err} & {"\x1b", "\x07", "\r", "\x9b", "\u202e", "\x7f"} and "\nError: b" not in ran.err


def test_a_progress_bar_reads_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with terminal.long_work(f"drawing [red]{HOSTILE}", lambda: "") as on_step:
        on_step(1, 2)
    assert f"drawing [red]{ESCAPED}" in screen.getvalue()


def test_json_is_ascii_without_controls(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({HOSTILE: HOSTILE})
    out = capsys.readouterr().out
    assert out.isascii() and out[:-1].isprintable() and json.loads(out) == {HOSTILE: HOSTILE}


def test_only_terminal_prints() -> None:
    for file in Path(terminal.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "id", getattr(called, "attr", ""))
            assert name not in ("print", "echo", "secho") or file.name == "terminal.py", (file.name, name)


# ---- streams that cannot be written ----------------------------------------------------------------------------------

CASES = """
import io, os, sys
sys.path.insert(0, {folder!r})
import mezzotint, test_cli
from mezzotint.cli import main
pipe = test_cli.FakePipeline()
pipe.remarks = ("a notice",)
mezzotint.load = lambda *_, **__: pipe
for name, descriptor, target in (
    ("no stderr", 2, None), ("no stdout", 1, None), ("full stderr", 2, "/dev/full"), ("full stdout", 1, "/dev/full")
):
    if child := os.fork():
        print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for stream in (1, 2):
        os.dup2(os.open(f"{{name}} {{stream}}.txt", os.O_CREAT | os.O_WRONLY), stream)
    os.close(descriptor)
    if target:
        assert os.open(target, os.O_WRONLY) == descriptor
    else:  # as Python does at its start
        setattr(sys, {{1: "stdout", 2: "stderr"}}[descriptor], None)
    sys.argv = ["mezzotint", "generate", "a lemon", "--out", f"{{name}}.png"]
    main()
"""


def test_a_picture_is_written_whatever_becomes_of_the_streams(tmp_path: Path) -> None:
    code = CASES.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("no stderr 0\nno stdout 1\nfull stderr 0\nfull stdout 1\n", "")
    for name in ("no stderr", "full stderr"):
        assert (tmp_path / f"{name} 1.txt").read_text() == f"Wrote {name}.png (16x8, 3 steps, seed 40)\n"
    for name, reason in (("no stdout", "Bad file descriptor"), ("full stdout", "No space left on device")):
        err = (tmp_path / f"{name} 2.txt").read_text().splitlines()
        assert err == ["a notice", f"Error: standard output cannot be written ({reason})"]
    for name in ("no stderr", "no stdout", "full stderr", "full stdout"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (16, 8) and "mezzotint" in image.info


@pytest.mark.parametrize(
    ("command", "code", "err"),
    [
        ("samplers 2>&-", 0, ""),
        ("generate 2>&-", 2, ""),
        ("samplers >/dev/full", 1, "Error: standard output cannot be written (No space left on device)\n"),
        ("--help >/dev/full", 1, "Error: the output cannot be written (No space left on device)\n"),
        ("generate - <&-", 2, "Error: prompt on standard input cannot be read (Bad file descriptor)\n"),
    ],
)
def test_streams_that_a_shell_closes(command: str, code: int, err: str, tmp_path: Path) -> None:
    line = f"exec '{sys.executable}' -m mezzotint {command}"
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, err)


def test_a_reader_that_wants_no_more_hears_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(typer.Exit) as done:
            terminal.show("x")
    assert done.value.exit_code == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_full_disk_has_code_1(run: Run, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(path: Path, data: bytes, overwrite: bool) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pictures, "write_atomically", fail)
    with pytest.raises(WriteError, match=f"'x.png' cannot be written: {os.strerror(number)}"):
        save(Image.new("RGB", (8, 8)), "x.png")


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------

PRESS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts its children with it ignored

class Press:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            print("pressed", flush=True)
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException:  # what packages do with their optional imports
                pass

sys.meta_path.insert(0, Press())
sys.argv = ["mezzotint", "env"]
from mezzotint.cli import main
main()
"""


@pytest.mark.parametrize("name", ["mezzotint.cli.commands", "typer", "torch"])
def test_ctrl_c_during_an_import_ends_the_process(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", PRESS.format(name=name)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "pressed\n", "")


def test_ctrl_c_outside_an_import_is_an_exception() -> None:
    before = signal.signal(signal.SIGINT, cli._interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with terminal.stoppable() as stopped:
            signal.raise_signal(signal.SIGINT)
            assert stopped()
    finally:
        signal.signal(signal.SIGINT, before)
