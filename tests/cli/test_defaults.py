"""Defaults from the configuration file and from variables: precedence, which commands have them, and wrong files."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import typer.main

import mezzotint
from mezzotint.cli.commands import app
from mezzotint.cli.defaults import COMMANDS, KEYS, config_path, defaults_of, read_defaults
from mezzotint.errors import RequestError

Run = Any


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEZZOTINT_CONFIG", str(path := tmp_path / "user.toml"))
    return path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `mezzotint.load` is called with; it loads nothing."""
    calls: list[Any] = []

    def load(model: Any = None, *, device: Any = None, dtype: Any = None, **_: Any) -> None:
        calls.append((model, device, dtype))
        raise RequestError("enough")

    monkeypatch.setattr(mezzotint, "load", load, raising=False)
    return calls


def test_option_before_variable_before_file(
    run: Run, config: Path, loaded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text('model = "of-file"\ndevice = "cpu"\ndtype = "float32"\n')
    run("generate", "x")
    monkeypatch.setenv("MEZZOTINT_MODEL", "of-variable")
    monkeypatch.setenv("MEZZOTINT_DEVICE", "")  # as if it were not set
    run("generate", "x")
    run("generate", "x", "--model", "of-option")
    run("grid", "x", "--x", "steps=1,2")
    assert [call[0] for call in loaded] == ["of-file", "of-variable", "of-option", "of-variable"]
    assert {call[1:] for call in loaded} == {("cpu", "float32")}


def test_sampler_and_out_are_generates(run: Run, config: Path, sd1_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures/{sampler}-{seed}.png"
    config.write_text(f'model = "{sd1_folder}"\nsampler = "euler"\nout = "{out}"\n')
    ran = run("generate", "a lemon", "--seed", "3", "--json")
    record = json.loads(ran.out)
    assert record["request"]["sampler"] == "euler"
    assert record["images"][0]["path"] == str(tmp_path / "pictures/euler-3.png")
    # `again` takes everything from the record
    config.write_text('model = "none"\nsampler = "heun"\ndtype = "float16"\nout = "/nowhere/"\n')
    ran = run("again", record["images"][0]["path"], "--model", str(sd1_folder), "--verify")
    assert ran.code == 0 and "identical" in ran.out


def test_each_key_is_an_option_of_its_commands() -> None:
    commands: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    for name, keys in COMMANDS.items():
        if name in commands:
            assert set(keys) <= {parameter.name for parameter in commands[name].params}, name
            assert set(keys) <= set(KEYS)


@pytest.mark.parametrize("command", ["again", "train", "inspect", "env", "samplers"])
def test_other_commands_do_not_read_it(command: str, config: Path) -> None:
    config.write_text("not TOML")
    assert defaults_of(command) == {}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('modle = "x"', "user.toml has the key 'modle'; the keys are model, device, dtype, out, sampler"),
        ("device = 3", 'user.toml: device is 3; it must be text, such as device = "cuda"'),
        ("= 3", "user.toml is not a TOML file"),
        ("\udcff", "user.toml is not a TOML file"),
        ('out = "one.png"', "user.toml: out is 'one.png'; it must be a folder"),
        ('sampler = "eulr"', "user.toml: sampler is 'eulr'; did you mean euler"),
        ('dtype = "fp16"', "user.toml: dtype is 'fp16'; it can be float32, bfloat16, float16, auto"),
        (None, "MEZZOTINT_CONFIG is"),
    ],
)
def test_wrong_files(text: str | None, sentence: str, run: Run, config: Path) -> None:
    if text is not None:
        config.write_bytes(text.encode("utf-8", "surrogateescape"))
    ran = run("generate", "x")
    assert ran.code == 2 and sentence in ran.err and ran.err.count("\n") == 1
    assert sentence in json.loads(run("env", "--json").out)["config"]["error"]
    assert run("generate", "--help").code == 0


def test_env_says_where_each_value_is_from(run: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text('model = "a"\nsampler = "euler"\n')
    monkeypatch.setenv("MEZZOTINT_SAMPLER", "heun")
    lines = run("env").out.splitlines()
    assert f"configuration: {config} (read)" in lines
    assert f"default model: a (from {config})" in lines
    assert "default sampler: heun (from MEZZOTINT_SAMPLER)" in lines
    found = json.loads(run("env", "--json").out)["config"]
    assert found["exists"] and found["values"]["sampler"] == {"value": "heun", "source": "MEZZOTINT_SAMPLER"}


def test_the_file_is_in_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Never in the working directory; an empty MEZZOTINT_CONFIG turns it off."""
    assert config_path() is None and read_defaults() == {}
    platformdirs = importlib.import_module("platformdirs")
    monkeypatch.delenv("MEZZOTINT_CONFIG")
    monkeypatch.setattr(platformdirs, "user_config_dir", lambda name, appauthor: str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.toml").write_text('model = "x"')
    assert config_path() == tmp_path / "mezzotint" / "config.toml" and read_defaults() == {}


def test_home_is_expanded(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config.write_text('model = "~/m.safetensors"\nout = "~/{seed}.png"\n')
    assert defaults_of("generate") == {"model": "/home/ada/m.safetensors", "out": "/home/ada/{seed}.png"}
