"""What people type: other programs' names of options, sizes, seeds, names of samplers; failures as JSON; completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mezzotint
from mezzotint.cli import fields, options, preview
from mezzotint.errors import WriteError
from mezzotint.images.io import read_metadata, read_picture
from mezzotint.request import Request

Run = Callable[..., Any]


class PlannedError(Exception):
    """Holds the request that a command made."""


@pytest.fixture
def request_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Request]:
    """The request that `generate` makes of its options."""
    made: list[Request] = []

    class Pipe:
        notices = ()

        def plan(self, request: Request) -> None:
            made.append(request)
            raise PlannedError

    monkeypatch.setattr(mezzotint, "load", lambda *_, **__: Pipe(), raising=False)

    def request_of(*arguments: str) -> Request:
        ran = run("generate", "a lemon", *arguments)
        assert "PlannedError" in ran.err, ran.err
        return made.pop()

    return request_of


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--negative-prompt dark", "--negative dark"),
        ("--cfg-scale 3", "--guidance 3"),
        ("--cfg 3", "--guidance 3"),
        ("--guidance-scale 9,3", "--guidance 9,3"),
        ("--num-inference-steps 9", "--steps 9"),
        ("--image a.png --denoising-strength 0.5", "--image a.png --strength 0.5"),
        ("-n 3", "--count 3"),
        ("--size 64", "--size 64x64"),
        ("--seed-size 64", "--seed-size 64x64"),
        ("--original-size 64 --target-size 72", "--original-size 64x64 --target-size 72x72"),
        ("--sampler DPM++_2m_karras", "--sampler dpm++-2M-Karras"),
        ("--sampler EulerA --spacing SGM-Uniform", "--sampler euler_a --spacing sgm_uniform"),
    ],
)
def test_other_names_mean_the_same(request_of: Callable[..., Request], theirs: str, ours: str) -> None:
    made = request_of(*theirs.split())
    assert made == request_of(*ours.split()) != request_of()


def test_seed_minus_one_is_a_random_seed(request_of: Callable[..., Request], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields.secrets, "randbelow", lambda bound: bound - 5)
    assert request_of("--seed", "-1").seed == 2**32 - 5


def test_again_with_a_random_seed_prints_it(run: Run, sd1_folder: Path) -> None:
    model = ("--model", str(sd1_folder))
    assert run("generate", "a", "--steps", "2", "--seed", "7", "-o", "a.png", *model).code == 0
    ran = run("again", "a.png", "--seed", "-1", "-o", "b.png", *model)
    (seed,) = {json.loads(read_metadata("b.png")["mezzotint"])["seed"]} - {7}
    assert ran.out == f"a.png: Wrote b.png; seed {seed}\n"


def test_help_shows_short_names_and_leaves_out_those_of_other_programs(run: Run) -> None:
    for command in ("generate", "again", "plan", "report"):
        out = run(command, "--help").out
        for names in options.OTHER_NAMES.values():
            assert not any(f"{name} " in out or f"{name}," in out for name in names)
    out = run("generate", "--help").out
    assert "\n  -n, --count N " in out and "\n  -o, --out FILE|FOLDER|PATTERN\n" in out.replace(
        "PATTERN  ", "PATTERN\n"
    )


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--steps", "--set steps=VALUE"),
        ("--num-inference-steps", "--set steps=VALUE"),
        ("--cfg-scale", "--set guidance_scale=VALUE"),
        ("--negative-prompt", "--set negative_prompt=VALUE"),
        ("--width", "--set width=VALUE"),
        ("--size", "--set width=512 --set height=512"),
    ],
)
def test_bulk_answers_an_option_of_generate_with_the_field(run: Run, option: str, meant: str) -> None:
    ran = run("bulk", "p.txt", "--out", "out", option, "2")
    assert ran.code == 2 and ran.err.endswith(f"Error: No such option: {option}. Did you mean {meant}?\n")


@pytest.mark.parametrize(
    ("typed", "meant"), [("gen", "'generate'"), ("g", "'generate' or 'grid'"), ("sampelrs", "'samplers'")]
)
def test_the_beginning_of_a_command_is_answered_with_it(run: Run, typed: str, meant: str) -> None:
    ran = run(typed)
    assert ran.code == 2 and ran.err.endswith(f"No such command '{typed}'. Did you mean {meant}?\n")


# ---- failures as JSON ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message", "code"),
    [
        ("generate x --size 100x8 --json", "RequestError", "width is 100; it must be", 2),
        ("generate x --json --foo", "UsageError", "No such option: --foo", 2),
        ("samplers --json --width 3", "UsageError", "Did you mean --size WxH?", 2),
        ("generate x --model no/such --json", "CheckpointError", "no/such", 2),
        ("generate x --memory much --json", "BudgetError", "much", 2),
        ("bulk none.jsonl --out out --json", "RequestError", "cannot be read", 2),
        ("info none.png --json", "RequestError", "none.png", 2),
        ("inspect none\x1b --json", "CheckpointError", "none\\x1b", 2),
    ],
)
def test_with_json_a_failure_is_json(run: Run, arguments: str, kind: str, message: str, code: int) -> None:
    ran = run(*arguments.split(" "))
    error = json.loads(ran.out)["error"]
    assert (ran.code, error["code"], error["type"], ran.err) == (code, code, kind, "")
    assert message in error["message"]


@pytest.mark.parametrize(
    ("raised", "kind", "message", "code"),
    [
        (WriteError("the disk is full"), "WriteError", "the disk is full", 1),
        (ZeroDivisionError("by zero"), "InternalError", "a bug in mezzotint (ZeroDivisionError: by zero)", 1),
        (KeyboardInterrupt(), "Interrupted", "Stopped", 130),
    ],
)
def test_with_json_the_exit_code_stays(
    run: Run, monkeypatch: pytest.MonkeyPatch, raised: BaseException, kind: str, message: str, code: int
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(mezzotint, "load", load, raising=False)
    plain, ran = run("generate", "x"), run("generate", "x", "--json")
    error = json.loads(ran.out)["error"]
    assert (plain.code, ran.code, error["code"], error["type"], plain.out) == (code, code, code, kind, "")
    assert message in error["message"]


def test_ctrl_c_while_drawing_says_in_json_what_was_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mezzotint.cli import terminal

    def load(*_: Any, **__: Any) -> None:
        with terminal.long_work("drawing", lambda: "Wrote a.png"):
            raise KeyboardInterrupt

    monkeypatch.setattr(mezzotint, "load", load, raising=False)
    assert run("generate", "x") == (130, "", "Stopped; Wrote a.png\n")
    ran = run("generate", "x", "--json")
    assert json.loads(ran.out) == {"error": {"type": "Interrupted", "message": "Stopped; Wrote a.png", "code": 130}}
    assert (ran.code, ran.err) == (130, "")


def test_a_prompt_that_is_json_is_a_prompt(run: Run) -> None:
    ran = run("tokens", "--syntax", "none", "--", "--json")
    assert ran.code == 2 and ran.out == "" and ran.err.startswith("Error: prompt_syntax is 'none'")


# ---- completion ------------------------------------------------------------------------------------------------------


def test_names_are_completed_without_torch(tmp_path: Path) -> None:
    """By typer's own protocol, in one process: samplers, spacings, options and commands."""
    code = """
import os, sys
from mezzotint.cli import main
for typed in ("mezzotint generate x --sampler dpmpp_2m_", "mezzotint generate x --spacing k", "mezzotint gen"):
    os.environ |= {"_MEZZOTINT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    sys.argv = ["mezzotint"]
    try:
        main()
    except SystemExit:
        print("|")
print({"torch", "numpy", "rich"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    samplers, spacings, commands, heavy = done.stdout.split("|\n")
    assert {"dpmpp_2m_sde", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde_heun_gpu"} <= set(samplers.split())
    assert (set(spacings.split()), commands.split(), heavy) == ({"karras", "kl_optimal"}, ["generate"], "set()\n")


def test_the_script_of_a_shell_is_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "zsh")
    ran = run("--show-completion")
    assert ran.code == 0 and "#compdef mezzotint" in ran.out
    assert "--install-completion" in run("--help").out


# ---- --preview and --open --------------------------------------------------------------------------------------------


def test_a_preview_is_written_while_it_draws(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each step, whole at any time, of the picture's size; at last it is the picture, whose pixels are the same."""
    from mezzotint.images import io

    writes: list[tuple[str, Image.Image]] = []
    save = io.save

    def spy(image: Image.Image, path: Any, **options: Any) -> None:
        save(image, path, **options)
        writes.append((str(path), read_picture(path)))

    options = ("a lemon", "--steps", "3", "--seed", "7", "--size", "64")
    assert run("generate", *options, "-o", "plain.png").code == 0
    monkeypatch.setattr(io, "save", spy)
    ran = run("generate", *options, "-o", "lemon.png", "--preview", "now.png")
    assert (ran.code, ran.err) == (0, "")
    assert [name for name, _ in writes] == ["now.png"] * 3 + ["lemon.png", "now.png"]
    assert {image.size for _, image in writes} == {(64, 64)}
    assert len({image.tobytes() for _, image in writes}) == 4  # the last two are the picture
    assert read_picture("plain.png").tobytes() == read_picture("now.png").tobytes()
    assert sorted(os.listdir()) == ["lemon.png", "now.png", "plain.png"]


def test_a_preview_that_cannot_be_written_ends_no_drawing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shown = preview.Preview.__new__(preview.Preview)
    shown._path = tmp_path / "gone" / "now.png"
    for _ in range(2):
        shown.show(Image.new("RGB", (1, 1)))
    assert capsys.readouterr().err.count("no more previews: ") == 1


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_open(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The viewer gets the whole path; without a viewer there is a sentence."""
    opened: list[list[str]] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(preview.subprocess, "Popen", lambda command, **_: opened.append(command))
    monkeypatch.setattr(preview.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.chdir(tmp_path)
    preview.open_picture(Path("-a.png"))
    assert opened == [[f"/bin/{'open' if system == 'darwin' else 'xdg-open'}", str(tmp_path / "-a.png")]]
    monkeypatch.setattr(preview.shutil, "which", lambda name: None)
    preview.open_picture(Path("-a.png"))
    assert len(opened) == 1 and "-a.png is not opened: this system has no " in capsys.readouterr().err


def test_open_comes_after_the_picture(run: Run, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr("mezzotint.cli.draw.open_picture", lambda path: seen.append(path.is_file()))
    ran = run("generate", "x", "--model", str(sd1_folder), "--steps", "1", "--open", "-n", "2")
    assert ran.code == 0 and seen == [True]
