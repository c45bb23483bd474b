"""Several processes as one: two processes over gloo against one process that accumulates twice as much.

Run as a script (`test_processes.py MODEL FOLDER ACCUMULATE [METHOD STEPS]...`) this file is what the launcher starts.
The short form forks the two processes of the tests' own, so that nothing is imported again.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from test_finetune import Made, model_of, recipe_of, state
from torch.distributed.fsdp import FSDPModule

from mezzotint.errors import RequestError
from mezzotint.train import finetune, sharding
from mezzotint.train.saving import save_results
from mezzotint.weights import open_model

pytestmark = pytest.mark.timeout(900)  # each of the launched processes imports everything again

ACCELERATE = "-m accelerate.commands.accelerate_cli launch --num_processes 2 --num_machines 1 --mixed_precision no"
TWO = f"{ACCELERATE} --dynamo_backend no --main_process_port 0 --multi_gpu"
SPLIT = f"{ACCELERATE} --dynamo_backend no --main_process_port 0 --use_fsdp --fsdp_version 2"


def whole_run(model: Path, folder: Path, accumulate: int, method: str, steps: int) -> None:
    """A run with all that a step may have: averages, a validation loss, samples, a text encoder that learns."""
    folder = folder / method
    more: dict[str, Any] = {} if method == "full" else {"lora_dropout": 0.1, "text_encoder": True}
    recipe = recipe_of(
        method, steps=steps, save_every=3, ema=0.9, log_every=1, accumulate=accumulate, lr=1e-3, validation="y",
        validate_every=2, sample_every=2, sample_prompts=["a lemon"], **more,
    )  # fmt: skip
    trainable = model_of(model, recipe)
    accelerator = finetune.make_accelerator(find_unused=recipe.text_encoder)
    seen: list[int] = []
    finetune.finetune(
        trainable,
        Made(),
        folder,
        validation=Made(),
        accelerator=accelerator,
        on_sample=lambda _, step: seen.append(step),
    )
    assert isinstance(trainable.unet, FSDPModule) == (method == "full" and accelerator.num_processes == 2)
    if accelerator.is_main_process:
        assert seen
        save_results(trainable, folder, steps, torch.float32)


def launched(how: str, *arguments: object) -> None:
    command = [sys.executable, "-W", "ignore", *how.split(), __file__, *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)


def assert_same_run(two: Path, one: Path) -> None:
    a, b = state(two), state(one)
    assert (a["together"], a["step"]) == (b["together"], b["step"]) == (2, b["step"])
    for kind in ("trained", "averages"):
        assert a[kind].keys() == b[kind].keys()
        for name, value in b[kind].items():
            torch.testing.assert_close(a[kind][name], value, rtol=1e-5, atol=1e-5)
    for number, moments in b["optimiser"]["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(a["optimiser"]["state"][number][name], value, rtol=1e-4, atol=1e-5)


def forked(*run: Any) -> None:
    """Run twice at once, with what the launcher tells its processes in their environment."""
    for name in ("peft", "torch._dynamo", "torch.distributed.tensor"):  # what a run would import, once for both
        importlib.import_module(name)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def start(rank: int) -> None:
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier test
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1")
        runs_in_turn(*map(str, run))

    processes = [multiprocessing.get_context("fork").Process(target=start, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


def runs_in_turn(model: str, folder: str, accumulate: str, *runs: str) -> None:
    for method, steps in zip(runs[::2], runs[1::2], strict=True):
        if method == "full":
            os.environ["ACCELERATE_USE_FSDP"] = "true"
        whole_run(Path(model), Path(folder), int(accumulate), method, int(steps))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the forked processes start no threads of their own
@pytest.mark.parametrize(
    ("start", "runs"),
    [
        pytest.param(forked, (("lora", 3), ("full", 2)), id="forked"),
        pytest.param(partial(launched, TWO), (("lora", 6), ("full", 3)), id="launched", marks=pytest.mark.slow),
    ],
)
def test_two_processes_are_one(
    start: Callable[..., None], runs: tuple[tuple[str, int], ...], sd1_folder: Path, tmp_path: Path
) -> None:
    """A LoRA over two; then, in the same processes, a full training split over them as --use_fsdp asks."""
    start(sd1_folder, tmp_path / "two", 1, *(part for run in runs for part in run))
    for method, steps in runs:
        whole_run(sd1_folder, tmp_path / "one", 2, method, steps)
        assert_same_run(tmp_path / "two" / method, tmp_path / "one" / method)


@pytest.mark.slow
def test_fsdp_is_one_process_too_and_goes_on(sd1_folder: Path, tmp_path: Path) -> None:
    """Split over two, stopped, gone on with, saved whole; and gone on with by one process."""
    launched(SPLIT, sd1_folder, tmp_path / "two", 1, "full", 3)
    launched(SPLIT, sd1_folder, tmp_path / "two", 1, "full", 5)
    whole_run(sd1_folder, tmp_path / "one", 2, "full", 5)
    assert_same_run(tmp_path / "two" / "full", tmp_path / "one" / "full")
    two, one = (open_model(tmp_path / name / "full" / "model", dtype=torch.float32) for name in ("two", "one"))
    for name, value in one.unet.state_dict().items():
        torch.testing.assert_close(two.unet.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    whole_run(sd1_folder, tmp_path / "two", 2, "full", 6)
    assert state(tmp_path / "two" / "full")["step"] == 6


def test_fsdp_is_refused_where_little_learns(sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for method, fields, sentence in (
        ("lora", {}, "FSDP supports only full"),
        ("full", {"optimiser": "adafactor"}, "with FSDP it must be adamw"),
        ("full", {"text_encoder": True}, "text_encoder is True; with FSDP it must not be set"),
    ):
        with pytest.raises(RequestError, match=sentence):
            model = model_of(sd1_folder, recipe_of(method, **fields))
            sharding.shard(model, torch.device("cpu"))


if __name__ == "__main__":
    runs_in_turn(*sys.argv[1:])
