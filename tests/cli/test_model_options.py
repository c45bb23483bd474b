"""The options that overrule a model's files: on every command that takes a model, and all the way to it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import mezzotint
from mezzotint import cli

Run = Callable[..., tuple[int, str, str]]

COMMANDS = {
    "generate": "generate lemon",
    "plan": "plan",
    "explain": "explain lemon --out page.png",
    "tokens": "tokens lemon",
    "inspect": "inspect MODEL",
    "bulk": "bulk rows.jsonl --out pictures",
    "grid": "grid lemon --x steps=1,2",
    "report": "report --prompts prompts.txt --out report",
    "again": "again lemon.png",
    "train": "train lora pictures --out run --set steps=1",
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The command line in this process, in a folder with something for each command to read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEZZOTINT_DEBUG", raising=False)
    Path("rows.jsonl").write_text('{"prompt": "lemon"}\n')
    Path("prompts.txt").write_text("lemon\n")
    Path("pictures").mkdir()
    Image.new("RGB", (32, 32), "yellow").save("pictures/lemon.png")
    Path("pictures/lemon.txt").write_text("lemon")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mezzotint", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return int(done.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def drawn(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture with a record, drawn with all options but --vae."""
    path = tmp_path_factory.mktemp("drawn") / "lemon.png"
    config = {"scheduler": {"rescale_betas_zero_snr": True}}
    mezzotint.load(sd1_folder, prediction="v_prediction", config=config, family="sd2")("lemon").save(path)
    return path


@pytest.fixture
def picture(run: Run, drawn: Path) -> None:
    shutil.copy(drawn, "lemon.png")


@pytest.mark.parametrize("name", COMMANDS)
def test_they_reach_the_model(name: str, run: Run, sd1_folder: Path, picture: None) -> None:
    """The VAE is looked for when the model is opened, before anything is read or drawn."""
    command = COMMANDS[name].replace("MODEL", str(sd1_folder)).split()
    model = [] if name == "inspect" else ["--model", str(sd1_folder)]
    code, out, errors = run(*command, *model, "--vae", "nowhere.safetensors")
    assert code == 2
    assert "the VAE 'nowhere.safetensors' does not exist" in out + errors
    for option, value, sentence in (
        ("--family", "sd4", "family is 'sd4'; it must be one of sd1, sd2, sdxl"),
        ("--prediction", "noise", "prediction is 'noise'; it must be one of epsilon, v_prediction, sample"),
        ("--config", "unet=4", "config is 'unet=4'; it must be PART.FIELD=VALUE"),
    ):
        code, out, errors = run(*command, *model, option, value)
        assert code == 2 and sentence in errors, errors


def test_again_takes_them_from_the_record(run: Run, sd1_folder: Path, picture: None) -> None:
    code, out, _ = run("again", "lemon.png", "--verify", "--model", str(sd1_folder))
    assert (code, out) == (0, "lemon.png: identical\n")
    code, out, _ = run("again", "lemon.png", "--verify", "--model", str(sd1_folder), "--prediction", "epsilon")
    assert code == 1 and 'the option prediction was "v_prediction" and is now "epsilon"' in out


def test_a_guess_is_said_once_before_drawing(run: Run, sd1_folder: Path) -> None:
    """Of a result's notices, those on the model are printed when it is loaded, the others after the run."""
    given = ("--config", "scheduler.rescale_betas_zero_snr=true")
    code, _, errors = run("generate", "lemon", "--model", str(sd1_folder), *given, "--out", "lemon.png")
    assert code == 0 and errors.count("zero terminal SNR") == 1
