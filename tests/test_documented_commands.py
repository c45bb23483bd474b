"""Every command and every Python block that the README and docs/ show runs, shortened, on a tiny model.

New lines are found by themselves. One that cannot run here is named in SKIPPED or SKIPPED_PYTHON, with the reason; what
it is given stands in `workspace` and in REPLACED.
"""

from __future__ import annotations

import copy
import glob
import inspect
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from tests.conftest import SCHEDULER, WIDTH, tiny_clip, tiny_unet, tiny_vae
from typer.core import TyperCommand

import mezzotint
from mezzotint import Pipeline, cli
from mezzotint.config import TinyVAEConfig
from mezzotint.model_options import ModelOptions
from mezzotint.models.tiny_vae import TinyVAE
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.weights import save_folder
from mezzotint.weights.save_lora import save_lora

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("mezzotint", "pip", "python", "make", "git")

SKIPPED = {  # a regular expression of commands that are not run, and why
    r"^(pip|git|make) ": "installs or downloads",
    r"^python -m build|&& python -m build": "builds the package",
    r"^python tests/parity/table.py": "takes minutes; tests/parity/test_samplers.py runs its rows",
    r"^python examples/teach/show.py": "takes minutes; tests/test_teach.py runs it short",
    r"--engine ray": "starts a Ray cluster; tests/bulk/test_ray.py does",
    r"^mezzotint serve": "serves until it is stopped; tests/server does",
    r"--safety blur": "the tiny model has no safety checker; tests/run/test_safety.py has one",
    r"^mezzotint upscale .*--model": "needs spandrel; tests/models/test_upscaler.py has it",
    r"--safety-checker": "downloads a safety checker",
    r"sd_xl_": "the tiny model is not SDXL; tests/run/test_refiner.py has a refiner",
    r"--ip-adapter |mezzotint embed ": "the tiny model has no IP-Adapter; tests/run/test_ip_adapters.py has one",
    r"--control ": "the tiny model has no ControlNet; tests/run/test_controls.py has one",
}  # those of mezzotint are parsed all the same: their options exist and their values are valid
SKIPPED_PYTHON = {
    "from_pretrained": "a pipeline of diffusers; tests/parity/test_teach.py reads the same files",
    "pipe.load_textual_inversion": "a pipeline of diffusers; tests/parity/test_teach.py reads the same files",
    "openai": "needs a running server; tests/server/test_openai.py has one",
}
REPLACED = {  # what a page names, and what stands for it here
    "sd-concepts-library/cat-toy": "badhands.pt",
    "~/loras": "loras",
    "vae-ft-mse-840000.safetensors": "tiny/vae",
    "madebyollin/taesd": "taesd_decoder.pth",
    "whale.png@2": "ramp.png@2",
    "/shared/pictures": "pictures-of-bulk",
    "layers=[6], steps=range(10, 20)": "layers=[0], steps=range(2)",
    "maps[picture][layer]": "maps[0][0]",
    "steps=10,20,30": "steps=1,2",
    "steps=1,3,8": "steps=1",
    "steps=20 ": "steps=2 ",
    "--strength 0.3": "--strength 0.5",
}
LONGEST = {"--steps": 2, "--count": 2, "--threads": 1, "--batch": 2}
SHORT = {"--size": "64x64", "--model": "tiny"}
ADDED = {  # by command
    "report": ["--samplers", "euler", "--steps", "1", "--reference-steps", "2", "--seeds", "2"],
    "train": ["--steps", "1", "--batch", "1", "--resolution", "64"],
    "dreambooth": ["--set", "class_count=1"],
    "textual-inversion": ["--set", "start=lemon"],  # which is one token of the tiny model
}
WITHOUT_MODEL = ("samplers", "models", "env", "info", "inspect", "upscale")
WITHOUT_RECORD = ("corner.png", "ramp.png")  # masks


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def code_lines(text: str) -> Iterator[str]:
    """Yield the lines of fenced and of indented blocks that are not Python, each with its continuation."""
    language: str | None = None
    held = ""
    for line in text.splitlines():
        if fence := re.match(r"\s*```(\w*)", line):
            language = fence[1] if language is None else None
        elif language != "python" and (language is not None or line.startswith("    ")):
            held += line.strip()
            if held.endswith("\\"):
                held = held.removesuffix("\\")
                continue
            yield held
            held = ""


def commands(page: Path) -> list[str]:
    """Return the commands that a page shows, in order."""
    lines = (line.removeprefix("$ ") for line in code_lines(page.read_text(encoding="utf-8")))
    return [line for line in lines if line.startswith(tuple(f"{program} " for program in PROGRAMS))]


def python_blocks(page: Path) -> list[str]:
    """Return the Python blocks of a page, in order."""
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in blocks]


def replaced(text: str) -> str:
    for theirs, ours in REPLACED.items():
        text = text.replace(theirs, ours)
    return text


def shorten(line: str) -> list[str]:
    """Return the arguments of a command, with the tiny model and few steps, pictures and pixels."""
    words = shlex.split(replaced(line), comments=True)[1:]
    command, arguments = words[0], []
    for word in words:
        before = arguments[-1] if arguments else ""
        if command == "bulk" and before == "--out":  # a folder belongs to one file of prompts
            arguments.append(f"{arguments[1]}-pictures")
        elif before in LONGEST and word.isdigit():
            arguments.append(str(min(int(word), LONGEST[before])))
        else:
            found = sorted({*glob.glob(word)} - {*WITHOUT_RECORD}) if "*" in word else [word]
            arguments += [SHORT[before]] if before in SHORT else found
    if command not in WITHOUT_MODEL and "--model" not in arguments:
        arguments += ["--model", "tiny"]
    for name in words[:2]:
        arguments += ADDED.get(name, [])
    return arguments


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows every word of the documentation."""
    folder = tmp_path_factory.mktemp("documented") / "tiny"
    with torch.random.fork_rng():
        tokenizer = Tokenizer.subset([line for page in PAGES for line in [*commands(page), *python_blocks(page)]])
        networks = {"unet": tiny_unet(0), "vae": tiny_vae(1), "text_encoder": tiny_clip(2, tokenizer)}
    settings = {"steps": 2, "guidance_scale": 3.0}
    save_folder(
        folder, **networks, tokenizer=tokenizer, scheduler_config=SCHEDULER, settings=settings, dtype=torch.float32
    )
    return folder


@pytest.fixture(scope="session")
def tiny_pipe(tiny: Path) -> Pipeline:
    return mezzotint.load(tiny, device="cpu")


@pytest.fixture(scope="session")
def files(tiny: Path, tiny_pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages take for given."""
    place = tmp_path_factory.mktemp("files")
    (place / "tiny").symlink_to(tiny)
    (place / "examples").symlink_to(ROOT / "examples")
    lemon = tiny_pipe("a lemon", seed=7, width=64, height=64)
    lemon.save(place / "lemon.png")
    corner = Image.new("L", lemon.size)
    ImageDraw.Draw(corner).rectangle((36, 36, 64, 64), 255)
    corner.save(place / "corner.png")
    Image.linear_gradient("L").resize(lemon.size).save(place / "ramp.png")
    (place / "prompts.txt").write_text("a lemon\na whale\n")
    for name in ("prompts.jsonl", "rows.jsonl"):
        (place / name).write_text(json.dumps({"prompt": "a lemon", "seed": 7}) + "\n")
    (place / "prompts.csv").write_text("prompt,seed\na lemon,7\n")
    for folder in ("pictures", *(f"pictures/{name}" for name in ("lighthouse", "sks", "boo"))):
        (place / folder).mkdir()
        for k in (1, 2):
            Image.effect_noise((32, 32), 90).convert("RGB").save(place / folder / f"hat-{k}.png")
            (place / folder / f"hat-{k}.txt").write_text("a red <hat> <boo>")
    shutil.copytree(place / "pictures", place / "edges")  # conditioning pictures
    lora = {"unet": {"conv_in": (torch.ones(1, 4, 3, 3), torch.ones(16, 1, 1, 1))}}
    for name in ("watercolour", "sharper", "loras/watercolour", "model"):
        save_lora(place / f"{name}.safetensors", lora)
    torch.save(TinyVAE(TinyVAEConfig()).state_dict(), place / "taesd_decoder.pth")
    (place / "folder").mkdir()
    torch.save({"string_to_param": {"*": torch.randn(2, WIDTH)}}, place / "badhands.pt")
    shutil.copy(place / "badhands.pt", place / "folder/other.pt")
    return place


@pytest.fixture
def workspace(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of these files, where the commands run."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(files, tmp_path, symlinks=True, dirs_exist_ok=True)


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """Run the command line in this process; return the exit code and the output."""
    monkeypatch.setattr(sys, "argv", ["mezzotint", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(SystemExit) as done:
        cli.main()
    captured = capsys.readouterr()
    return done.value.code or 0, captured.out + captured.err


@pytest.fixture
def no_command_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command line end where its options and arguments have been read."""
    monkeypatch.setattr(TyperCommand.__mro__[1], "invoke", lambda *_: None)  # click's Command


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=page_name)
def test_every_command_runs(
    page: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = []
    for line in commands(page):
        if not any(re.search(pattern, line) for pattern in SKIPPED):
            arguments = shorten(line)
            code, output = run(arguments, monkeypatch, capsys)
            if code:
                failures.append(f"{line}\n  as {shlex.join(arguments)}\n  exit code {code}: {output[-600:]}")
    assert not failures, f"{page_name(page)}:\n" + "\n".join(failures)


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=page_name)
def test_every_python_block_runs(
    page: Path, workspace: Path, tiny_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = inspect.signature(mezzotint.load)

    def load(*arguments: Any, **options: Any) -> Pipeline:
        ModelOptions.of(signature.bind(*arguments, **options).arguments.get("options", {}))
        return copy.deepcopy(tiny_pipe)

    monkeypatch.setattr("mezzotint.pipeline.load", load)
    Path("hats").mkdir()  # what training writes
    shutil.copy("watercolour.safetensors", "hats/pytorch_lora_weights.safetensors")
    names: dict[str, Any] = {"mezzotint": mezzotint, "pipe": copy.deepcopy(tiny_pipe)}
    for k, block in enumerate(python_blocks(page)):
        if not any(word in block for word in SKIPPED_PYTHON):
            exec(compile(replaced(block), f"{page_name(page)}, Python block {k + 1}", "exec"), names)


def test_the_options_of_commands_that_do_not_run_exist(
    no_command_is_called: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line for page in PAGES for line in commands(page) if line.startswith("mezzotint ")]
    skipped = [line for line in lines if any(re.search(pattern, line) for pattern in SKIPPED)]
    assert skipped and run(["generate", "a lemon", "--stepz", "3"], monkeypatch, capsys)[0] == 2
    for line in skipped:
        code, output = run(shlex.split(line, comments=True)[1:], monkeypatch, capsys)
        assert code == 0, f"{line}: {output}"


def test_the_tables_name_nothing_that_is_gone() -> None:
    lines = [line for page in PAGES for line in commands(page)]
    blocks = [block for page in PAGES for block in python_blocks(page)]
    assert len(lines) > 40 and len(blocks) > 15
    for pattern in SKIPPED:
        assert any(re.search(pattern, line) for line in lines), pattern
    for word in SKIPPED_PYTHON:
        assert any(word in block for block in blocks), word
    for theirs in REPLACED:
        assert any(theirs in text for text in (*lines, *blocks)), theirs
