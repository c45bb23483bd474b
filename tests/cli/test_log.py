"""--quiet, --verbose and --log-level, before and after the command, and the Python logger."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mezzotint
from mezzotint.cli import terminal

Run = Callable[..., Any]
PROMPT = "a <lora:none:1> lemon"  # which is a remark
REMARK = "<lora:none:1> is ignored: give lora_folder (--lora-folder) to load it"


@pytest.mark.parametrize("first", [True, False])
def test_quiet_leaves_the_result_and_errors(run: Run, sd1_folder: Path, first: bool) -> None:
    command = ["generate", PROMPT, "--model", str(sd1_folder), "--seed", "1"]
    place = (lambda option: [option, *command]) if first else (lambda option: [*command, option])
    ran = run(*place("-q"))
    assert (ran.out, ran.err) == ("Wrote mezzotint-1.png (32x32, 4 steps, seed 1)\n", "")
    assert REMARK in run(*command).err  # the next command is not quiet
    ran = run(*place("--quiet"), "--steps", "0")
    assert ran.code == 2 and ran.err.startswith("Error: steps is 0")


def test_verbose_says_what_is_loaded_planned_and_measured(
    run: Run, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", "a lemon", "--model", str(sd1_folder), "--sampler", "euler"]
    assert run(*command).err == ""
    err = run(*command, "-v").err
    assert f"read {sd1_folder}/unet/" in err
    assert f"loaded {sd1_folder} (sd1), torch.float32 on cpu, in " in err
    assert "memory: all weights on the device" in err
    assert "plan: 1 of 32x32, euler, linspace, 4 steps, guidance 3.0, levels " in err
    assert "denoised in " in err and "decoded in " in err
    assert "levels: " not in err.replace("plan: ", "")
    monkeypatch.setenv("MEZZOTINT_LOG_LEVEL", "debug")
    assert "\nlevels: " in run(*command).err
    assert run(*command, "--log-level", "error").err == ""


@pytest.mark.parametrize("arguments", [["--log-level", "loud", "samplers"], ["samplers", "--log-level", "loud"]])
def test_a_level_that_does_not_exist(run: Run, arguments: list[str]) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.err == "Error: log-level is 'loud'; it must be one of debug, info, warning, error\n"


def test_the_logger_is_pythons(sd1: mezzotint.Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mezzotint"):
        sd1("a lemon", steps=2)
    assert [record.message.split()[0] for record in caplog.records] == ["plan:", "denoised"]
    assert terminal.log.handlers == []  # a library adds none


def test_what_is_logged_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.set_log_level("info")
    terminal.log.info("a\x1b[2J")
    terminal.reset_log_level()
    assert capsys.readouterr().err == "a\\x1b[2J\n"


def test_no_bar_when_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert terminal.shows_progress()
    terminal.set_log_level("error")
    shown = terminal.shows_progress()
    terminal.reset_log_level()
    assert not shown
