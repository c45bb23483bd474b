"""SIGKILL at random moments: a resumed run ends with the same bits as an uninterrupted one.

Each run is a fork of the tests' own process, so that a kill costs a second and not the import of torch.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch
from test_finetune import assert_equal, recipe_of, run, state

from mezzotint.train import keyed_rng, loop


def whole_run(model: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    run(model, folder, recipe_of(steps=8, save_every=2, ema=0.9, log_every=1, lora_dropout=0.1))


def start_training(model: Path, folder: Path) -> ForkProcess:
    process = multiprocessing.get_context("fork").Process(target=whole_run, args=(model, folder))
    process.start()
    return process


def killed_runs(model: Path, folder: Path, kills: int) -> list[int]:
    """One run to its end, in folder/unbroken; then each of folder/0, folder/1, ... is killed at any time within what
    that took, and goes on to its end. One that was over before its time came is none. Returns the steps each had done.
    """
    for name in ("accelerate", "peft", "torch._dynamo"):  # what a run would import
        importlib.import_module(name)
    start = time.monotonic()
    start_training(model, folder / "unbroken").join()
    lasted, tries, steps = time.monotonic() - start, 0, list[int]()
    while len(steps) < kills:
        place = folder / str(len(steps))
        process = start_training(model, place)
        process.join(lasted * keyed_rng.uniform("kill", tries))
        process.kill()
        process.join()
        tries += 1
        if process.exitcode == -signal.SIGKILL:
            log = place / loop.LOG
            steps.append(len(log.read_text().splitlines()) if log.exists() else 0)
            start_training(model, place).join()
        else:
            place.rename(folder / f"over {tries}")
    return steps


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the forked processes start no threads of their own
@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_killed_at_any_moment_it_ends_the_same(sd1_folder: Path, tmp_path: Path, kills: int) -> None:
    print("steps done when killed:", killed_runs(sd1_folder, tmp_path, kills))
    unbroken = state(tmp_path / "unbroken")
    assert unbroken["step"] == 8
    for number in range(kills):
        assert_equal(state(tmp_path / str(number)), unbroken)
