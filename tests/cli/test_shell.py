"""The shell: lines from a pipe and from a terminal, its commands, and pictures in the terminal."""

from __future__ import annotations

import base64
import codecs
import io
import json
import os
import pty
import re
import select
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mezzotint.cli import shell as module
from mezzotint.cli.inline import protocol_of, sequences
from mezzotint.images.io import read_metadata

Run = Callable[..., Any]


def lines_of(*lines: str) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


# ---- lines from a pipe -----------------------------------------------------------------------------------------------


def test_each_line_is_a_picture_and_errors_do_not_end_it(
    run: Run, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = module.load
    monkeypatch.setattr(module, "load", lambda *given, **options: loads.append(given) or load(*given, **options))
    script = lines_of(
        "\\set steps 2",
        "\\set sampler=euler",
        "\\seed 5",
        "\\negative a blue lemon",
        "a lemon",
        "",
        "\\set stesp 3",
        "\\set steps",
        "\\set prompt x",
        "\\nothing",
        "\\model nowhere/model",
        "\\out one.png",
        "\\again",
        "\\show",
        "\\unset",
        "\\out new/{seed}-{prompt}.png",
        "\\seed 6",
        "a lemon",
        "\\save last.png",
        "\\save last.png",
        "\\quit",
        "never drawn",
    )
    ran = run("shell", "--model", str(sd1_folder), stdin=script)
    assert ran.out.splitlines() == [
        "Wrote mezzotint-5.png (32x32, 2 steps, seed 5)",
        "Wrote mezzotint-5-2.png (32x32, 2 steps, seed 5)",
        f"model: {sd1_folder}",
        "steps: 2",
        "sampler: euler",
        "seed: 5",
        "negative_prompt: a blue lemon",
        "out: the current folder",
        "Wrote new/6-a lemon.png (32x32, 4 steps, seed 6)",
        "Wrote last.png",
    ]
    errors = ran.err.splitlines()
    assert len(errors) == 7 and all(line.startswith("Error: ") for line in errors)
    for line, words in zip(
        errors,
        ("'stesp'; the nearest is steps", "\\set steps 30", "without a backslash", "\\nothing", "nowhere/model",
         "'one.png'", "last.png exists"),
        strict=True,
    ):  # fmt: skip
        assert words in line
    assert ran.code == 2
    assert loads == [(str(sd1_folder),), ("nowhere/model",)]  # one load served all pictures
    request = json.loads(read_metadata("mezzotint-5.png")["mezzotint"])["request"]
    assert (request["negative_prompt"], request["sampler"]) == ("a blue lemon", "euler")
    assert Path("mezzotint-5.png").read_bytes() == Path("mezzotint-5-2.png").read_bytes()
    assert "\x1b" not in ran.out + ran.err and module.PROMPT not in ran.out + ran.err


def test_json(run: Run, sd1_folder: Path) -> None:
    script = lines_of("\\seed 1", "a lemon", "\\x \x1b[2J", "a lemon")
    ran = run("shell", "--model", str(sd1_folder), "--json", "--sampler", "ddim", "--out", "p/", stdin=script)
    first, error, second = map(json.loads, ran.out.splitlines())
    assert [image["images"][0]["path"] for image in (first, second)] == ["p/mezzotint-1.png", "p/mezzotint-1-2.png"]
    assert first["request"]["sampler"] == "ddim"
    assert error["error"]["type"] == "RequestError" and (ran.err, ran.code) == ("", 2)


def test_the_first_mistakes_are_found_before_a_model_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    for option in (["--out", "x.png"], ["--out", "{bogus}"], ["--sampler", "bogus"], ["--memory", "much"]):
        assert run("shell", *option).code == 2


def test_ctrl_c_stops_the_picture_and_keeps_the_shell(
    run: Run, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, pressed = module.save_one, []

    def press(*given: Any) -> Path:
        if not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        return save(*given)

    monkeypatch.setattr(module, "save_one", press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
    script = lines_of("\\set count 2", "\\set batch 1", "\\seed 1", "a lemon", "\\set count 1", "a lemon")
    ran = run("shell", "--model", str(sd1_folder), stdin=script)
    signal.signal(signal.SIGINT, before)
    assert (ran.err, ran.code) == ("Stopped; Wrote mezzotint-1.png\n", 130)
    assert ran.out == "Wrote mezzotint-1-2.png (32x32, 4 steps, seed 1)\n"


def test_completion() -> None:
    assert module._complete("\\s", "\\s") == ["\\set ", "\\show ", "\\seed ", "\\save "]
    assert module._complete("\\set st", "st") == ["steps ", "strength "]
    assert {"dpmpp_2m", "dpmpp_sde"} <= {*module._complete("\\set sampler dpmpp", "dpmpp")}
    assert module._complete("\\set spacing kar", "kar") == ["karras"]
    assert module._complete("a le", "le") == []


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("\\steps 30", "\\steps is no command; did you mean \\set steps 30?"),
        ("\\size 64", "did you mean \\set size 64?"),
        ("\\guidance", "did you mean \\set guidance VALUE?"),
        ("\\sett steps 30", "\\sett is no command; did you mean \\set?"),
        ("\\zzz", "\\zzz is no command; \\help lists them"),
    ],
)
def test_a_command_that_does_not_exist(line: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    module.Session(None, False).run(iter([line]))
    assert capsys.readouterr().err.endswith(f"{meant}\n")


def test_a_seed_of_minus_one_is_random(capsys: pytest.CaptureFixture[str]) -> None:
    session = module.Session(None, False)
    session.run(iter(["\\seed 7", "\\show", "\\set seed -1", "\\show", "\\seed 7", "\\seed -1", "\\show"]))
    assert capsys.readouterr().out.count("seed: 7") == 1 and session.code == 0


@pytest.mark.parametrize(
    ("typed", "line"), [("exit", "\\quit"), (" quit ", "\\quit"), ("help", "\\help"), ("exit sign", "exit sign")]
)
def test_words_that_end_other_shells(typed: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: typed)
    assert next(module._typed_lines()) == line


# ---- a terminal ------------------------------------------------------------------------------------------------------


def test_in_a_terminal(sd1_folder: Path, tmp_path: Path) -> None:
    """The prompt, Tab, a picture of coloured cells, Ctrl-C in a line, the history's file, and Ctrl-D."""
    environ = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "HOME": str(tmp_path), "XDG_STATE_HOME": ""}
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell ignores in the background
        os.chdir(tmp_path)
        os.environ.update(environ)
        os.environ.pop("TERM_PROGRAM", None)
        os.environ.pop("NO_COLOR", None)
        command = [sys.executable, "-m", "mezzotint", "shell", "--model", str(sd1_folder)]
        os.execv(sys.executable, command)
    seen, decode = "", codecs.getincrementaldecoder("utf-8")("replace").decode

    def expect(text: str, again: bytes = b"") -> str:
        """Read until the text comes; after 10 s of silence type `again`."""
        nonlocal seen
        end = time.monotonic() + 120
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([terminal], [], [], 10)[0]:
                seen += decode(os.read(terminal, 65536))
            elif again:
                os.write(terminal, again)
        found, seen = seen.split(text, 1)
        return found

    expect(module.PROMPT)
    os.write(terminal, b"half a li")
    expect("half a li")
    os.write(terminal, b"\x03")
    expect(module.PROMPT, b"\x03")  # readline sees the first one only if it is waiting for a key by then
    os.write(terminal, b"\\set ste\t3\n")
    expect("steps 3")
    expect(module.PROMPT)
    os.write(terminal, b"a lemon\n")
    picture = expect("Wrote mezzotint-")
    assert picture.count("▀") == 40 * 20
    assert "3 steps" in expect(module.PROMPT)
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(terminal)
    history = next((tmp_path / ".local").rglob("history"))
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "a lemon" in history.read_text().splitlines()


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "protocol"),
    [
        ({}, None),
        ({"TERM": "dumb"}, None),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-sixel"}, "sixel"),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "iTerm.app"}, "cells"),
        ({"TERM": "xterm"}, "cells"),
        ({"TERM": "xterm", "NO_COLOR": "1"}, None),
    ],
)
def test_what_the_terminal_can(environ: dict[str, str], protocol: str | None) -> None:
    assert protocol_of(environ) == protocol


@pytest.fixture
def image() -> Image.Image:
    """A red, a green, a blue and a white quarter."""
    image = Image.new("RGB", (80, 80), "red")
    for box, color in (((40, 0, 80, 40), "lime"), ((0, 40, 40, 80), "blue"), ((40, 40, 80, 80), "white")):
        image.paste(color, box)
    return image


def test_cells(image: Image.Image) -> None:
    lines = sequences(image, "cells").split("\n")
    cells = [re.findall(r"\x1b\[38;2;(\d+;\d+;\d+);48;2;(\d+;\d+;\d+)m▀", line) for line in lines]
    assert [len(row) for row in cells] == [40] * 20
    assert cells[0][0] == ("255;0;0",) * 2 and cells[0][-1] == ("0;255;0",) * 2
    assert cells[-1][0] == ("0;0;255",) * 2 and cells[-1][-1] == ("255;255;255",) * 2
    few = sequences(image, "cells", columns=10, true_color=False).split("\n")
    assert len(few) == 5 and few[0].startswith("\x1b[38;5;196;48;5;196m▀")


def test_kitty_and_iterm2(image: Image.Image) -> None:
    noisy = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
    text = sequences(noisy, "kitty")
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert len(parts) > 2 and all(len(data) <= 4096 for _, data in parts)
    assert parts[0][0] == "a=T,f=100,q=2,m=1" and {head for head, _ in parts[1:-1]} == {"m=1"} and parts[-1][0] == "m=0"
    shown = Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in parts))))
    assert shown.tobytes() == noisy.tobytes()
    found = re.fullmatch(
        r"\x1b\]1337;File=inline=1;size=(\d+);preserveAspectRatio=1:(.*)\x07", sequences(image, "iterm2")
    )
    assert found and len(data := base64.b64decode(found[2])) == int(found[1])
    assert Image.open(io.BytesIO(data)).tobytes() == image.tobytes()


def test_sixel(image: Image.Image) -> None:
    """Decoded by the protocol's rules, it is the picture."""
    text = sequences(image, "sixel")
    assert text.startswith('\x1bPq"1;1;80;80') and text.endswith("\x1b\\")
    palette: dict[str, tuple[int, ...]] = {}
    shown, x, y, color = Image.new("RGB", (80, 84)), 0, 0, "0"
    for token in re.finditer(r"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|!(\d+)([?-~])|([$-])", text.split("80;80", 1)[1][:-2]):
        number, r, g, b, times, sixel, move = token.groups()
        if number and r:
            palette[number] = tuple(round(int(value) * 2.55) for value in (r, g, b))
        elif number:
            color = number
        elif move:
            x, y = 0, y + 6 * (move == "-")
        else:
            for bit in range(6):
                if (ord(sixel) - 63) >> bit & 1:
                    shown.paste(palette[color], (x, y + bit, x + int(times), y + bit + 1))
            x += int(times)
    assert shown.crop((0, 0, 80, 80)).tobytes() == image.tobytes()
