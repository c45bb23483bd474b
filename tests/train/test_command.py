"""`mezzotint train` where something is wrong: one sentence, the exit code, and nothing lost. Tiny models."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mezzotint import cli
from mezzotint.train import checkpoints
from mezzotint.train.loop import LOG
from mezzotint.train.saving import KOHYA, PEFT
from mezzotint.train.trainable import TrainableModel

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures with captions."""
    made = tmp_path / "pictures"
    made.mkdir()
    for k in range(3):
        Image.new("RGB", (32, 32), (80 * k, 200, 30)).save(made / f"{k}.png")
        (made / f"{k}.txt").write_text("a lemon")
    return made


@pytest.fixture
def train(
    sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Said:
    """`mezzotint train lora ...` on a tiny model, in this process: (code, output, errors)."""
    monkeypatch.chdir(tmp_path)
    small = ["resolution=32", "bucket_step=8", "tensorboard=false", "save_every=2", "steps=4"]

    def run(*arguments: str, method: str = "lora") -> tuple[int, str, str]:
        options = [word for value in small for word in ("--set", value)]
        common = ["--out", "run", "--model", str(sd1_folder), "--device", "cpu", *options]
        monkeypatch.setattr(sys, "argv", ["mezzotint", "train", method, *common, *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return (int(done.value.code or 0), *capsys.readouterr())

    return run


def sentence(errors: str) -> str:
    """The error, which is the last line and the only one of its kind."""
    *_, last = errors.splitlines()
    assert last.startswith("Error: ") and errors.count("Error: ") == 1 and "Traceback" not in errors
    return last


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rank", "0"), "rank is '0'; it must be a whole number from 1"),
        (("--set", "rnak=4"), "a recipe has no field 'rnak'; the nearest are rank"),
        (("--set", "rank"), "it must be NAME=VALUE"),
        (("--lr", "0"), "lr is"),
        (("--set", "lr=1e9"), r"lr is 1e\+09; it must be a number above 0 and at most 10"),
        (("--set", "rank=5000"), "rank is '5000'; it must be a whole number from 1 to 4096"),
        (("--recipe", "none.toml"), "'none.toml' cannot be read"),
        (("--recipe", "deep.toml"), "deep.toml is not valid TOML"),
        (("--recipe", "digits.toml"), "digits.toml is not valid TOML"),
        (("--set", f"rank={'9' * 5000}"), "rank is"),
        (("--recipe", "wrong.toml"), "a recipe has no field 'stepz'; the nearest are steps"),
        (("--memory", "4 gigs"), "memory is '4 gigs'"),
        (("--memory", "0"), "memory is '0'"),
        (("--set", 'memory="10EiB"'), "memory is '10EiB'"),
        (("--memory", "10MiB"), r"memory is 10.00 MiB, but this training needs at least \d+MiB"),
        (("--set", 'targets=["nothing"]'), "targets are nothing"),
    ],
)
def test_what_is_wrong_in_a_recipe(
    train: Said, folder: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "wrong.toml").write_text("stepz = 3\n")
    (tmp_path / "deep.toml").write_text(f"steps = {'[' * 5000}")
    (tmp_path / "digits.toml").write_text(f"steps = {'9' * 5000}")
    code, out, err = train(str(folder), *arguments)
    assert code == 2 and not out
    assert re.search(said, sentence(err))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_what_is_wrong_with_the_pictures(train: Said, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        code, out, err = train(name)
        assert code == 2 and not out and name in sentence(err)
    (folder / "late.txt").write_text("a caption of nothing")
    code, _, err = train(str(folder))
    assert code == 2 and "late.txt" in sentence(err)
    (folder / "late.txt").unlink()
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    code, _, err = train(str(folder))
    assert code == 2 and "1.png" in sentence(err)
    code, out, err = train(str(folder), "--set", "broken=skip")
    assert code == 0 and "Skipped: " in err and "1.png" in err and "Wrote" in out
    assert (tmp_path / "run" / PEFT).exists() and (tmp_path / "run" / KOHYA).exists()


def test_a_loss_that_is_no_number(train: Said, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the third step: the checkpoint of the second is kept, and the same command goes on from it."""
    losses, calls = TrainableModel.losses, 0

    def bad(self: TrainableModel, *arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return losses(self, *arguments) * (float("nan") if calls == 3 else 1.0)

    monkeypatch.setattr(TrainableModel, "losses", bad)
    code, out, err = train(str(folder))
    assert code == 1 and not out
    assert "step 3: the loss is not finite, in the batch of" in sentence(err) and ".png" in sentence(err)
    assert "the last good checkpoint is run/checkpoint-00000002" in sentence(err)
    assert not (tmp_path / "run" / PEFT).exists()
    code, out, _ = train(str(folder))
    found = checkpoints.load_newest(tmp_path / "run")
    assert code == 0 and found and found[1]["step"] == 4
    assert all(tensor.isfinite().all() for tensor in found[1]["trained"].values())


@pytest.mark.parametrize("where", ["checkpoint", "log", "lora"])
def test_a_full_disk(train: Said, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """At the second checkpoint, a line of the log or the file at the end: what was there before is there still."""
    train(str(folder), "--steps", "2")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "checkpoint":
            patch.setattr(checkpoints.torch, "save", full)
        elif where == "log":
            real = Path.open

            def no_room(path: Path, *mode: Any, **options: Any) -> Any:
                return full() if path.name == LOG else real(path, *mode, **options)

            patch.setattr(Path, "open", no_room)
        else:
            patch.setattr("mezzotint.weights.save_tensors.save_file", full)
        code, out, err = train(str(folder))
    assert code == 1 and not out and "No space left on device" in sentence(err)
    found = checkpoints.load_newest(tmp_path / "run")
    assert found and found[1]["step"] >= 2
    assert not [name for name in os.listdir(tmp_path / "run") if name.endswith((".new", ".part"))]
    assert train(str(folder))[0] == 0, "with room it goes on"


def test_a_lora_of_another_family(
    sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Says which it is for."""
    layer = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    save_file(
        {f"{layer}.lora_down.weight": torch.zeros(4, 2048), f"{layer}.lora_up.weight": torch.zeros(640, 4),
         "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 1280),
         "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(5120, 4)},
        tmp_path / "xl.safetensors",
    )  # fmt: skip
    arguments = ["a", "--model", str(sd1_folder), "--lora", str(tmp_path / "xl.safetensors"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["mezzotint", "generate", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    out, err = capsys.readouterr()
    assert done.value.code == 2 and not out and "is not a LoRA for this model: it is for " in sentence(err)
    assert "XL" in sentence(err)
