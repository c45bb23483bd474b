"""The rows of run.py: what each runs, and what it is compared with. No torch is imported here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUNDLED = ROOT / "src" / "mezzotint" / "data" / "emoji"
PYTHON = sys.executable
PROMPT, SEED = "a lemon on a blue background", 7
PEERS = {"openvino": "openvino", "sdcpp": "stable-diffusion-cpp-python"}  # optional ones, and their distributions


@dataclass(frozen=True)
class Setup:
    """What the command line says of all rows."""

    folder: Path  # for files of one session
    models: Path  # for models with random weights, which later sessions may use again
    model: Path = BUNDLED
    dtype: str = "float32"
    size: int | None = None  # pixels of a side
    steps: int | None = None  # of a picture
    pythons: dict[str, str] = field(default_factory=dict)  # interpreters of peers, by name

    def python(self, peer: str) -> str:
        """Return the interpreter that runs a peer."""
        return self.pythons.get(peer, PYTHON)


@dataclass
class Row:
    """One comparison: `commands` by name, mezzotint first, and the `pictures` they write, by the same names."""

    name: str
    about: str
    measure: str  # measure that ratios and the limit refer to
    commands: dict[str, list[str]]
    pictures: dict[str, Path] = field(default_factory=dict)
    also: tuple[str, ...] = ()  # further measures with ratios
    limit: float | None = None  # upper bound for mezzotint's measure
    runs: int = 7
    at_most: dict[str, int] = field(default_factory=dict)  # runs of sides that have fewer
    warmups: int = 2
    prepare: Callable[[], object] = lambda: None
    check: Callable[[], dict[str, Any]] = dict  # called after the runs; its result is reported
    missing: str = ""  # why this row cannot run
    not_run: dict[str, str] = field(default_factory=dict)  # sides that cannot run, and why
    versions: dict[str, str] = field(default_factory=dict)  # of optional peers


def first_picture(setup: Setup) -> Row:
    """Time the first picture from process start, bundled model, 20 steps, against diffusers on the same folder."""
    about = "emoji, 20 steps, CPU, float32: from process start to the first picture saved as PNG"
    return _bundled("first_picture", about, setup, ["--steps", "20"], [])


def few_steps(setup: Setup) -> Row:
    """Time the few-step form: 4 steps of lcm without guidance, with the LoRA merged on both sides."""
    about = "emoji distilled, 4 steps of lcm, CPU, float32: from process start to the first picture saved as PNG"
    return _bundled("few_steps", about, setup, ["--sampler", "lcm"], ["--few-step"], "few_step")


def _bundled(name: str, about: str, setup: Setup, options: list[str], peers: list[str], needs: str = "steps") -> Row:
    """Compare one picture with diffusers; the folder's mezzotint.json must have `needs`."""
    model = setup.model
    pictures = {side: setup.folder / f"{name}-{side}.png" for side in ("mezzotint", "diffusers", "diffusers_best")}
    ours = [PYTHON, "-m", "mezzotint", "generate", PROMPT, "--seed", str(SEED), *options, "--device", "cpu"]
    peer = [PYTHON, str(HERE / "diffusers_picture.py"), str(model), PROMPT, str(SEED)]
    commands = {
        "mezzotint": [*ours, "--dtype", "float32", "--model", str(model), "--out", str(pictures["mezzotint"])],
        "diffusers": [*peer, str(pictures["diffusers"]), *peers],
        "diffusers_best": [*peer, str(pictures["diffusers_best"]), *peers, "--best"],
    }
    settings = model / "mezzotint.json"
    there = settings.exists() and needs in json.loads(settings.read_text())
    return Row(
        name,
        about,
        "saved_s",
        commands,
        pictures,
        check=partial(levels_apart, pictures),
        missing="" if there else f"its model is missing (or mezzotint.json says no {needs}): give --model FOLDER",
    )


def step(setup: Setup) -> Row:
    """Measure a guided step of SD 1.5's shape."""
    size = setup.size or 512
    folder, converted = setup.models / "sd15", setup.models / "sd15-openvino" / str(size)
    file = setup.models / "sd15.safetensors"
    common = ["--size", str(size), "--dtype", setup.dtype, "--steps", "2"]
    sides = ("mezzotint", "diffusers", "diffusers_best", "openvino")
    arrays = {side: setup.folder / f"step-{side}.npy" for side in sides}
    commands = {
        side: [setup.python(side), str(HERE / "step.py"), side, str(folder), *common, "--out", str(array)]
        for side, array in arrays.items()
    }
    commands["openvino"] += ["--converted", str(converted)]
    commands["sdcpp"] = [setup.python("sdcpp"), str(HERE / "step.py"), "sdcpp", str(file), *common]
    not_run = {} if size == 256 else {"sdcpp": "measured with --size 256 only"}
    row = Row(
        f"step{_suffix(setup, 512)}",
        f"a guided step, SD 1.5's shape with random weights, {size}x{size}, CPU, {setup.dtype}",
        "step_cpu_s",
        commands,
        also=("step_s", "peak_mb"),
        runs=5,
        warmups=0,
        not_run=not_run,
        check=partial(distances, arrays),
    )
    return _prepared(row, setup, "sd15", converted, file)


def decode(setup: Setup) -> Row:
    """Measure decoding a picture with a VAE of SD 1.5's shape."""
    size = setup.size or 512
    folder, converted = setup.models / "sd15", setup.models / "sd15-openvino" / str(size)
    sides = ("mezzotint", "diffusers", "diffusers_best", "openvino")
    pictures = {side: setup.folder / f"decode-{side}.png" for side in sides}
    common = [str(folder), "--size", str(size), "--dtype", setup.dtype]
    commands = {
        side: [setup.python(side), str(HERE / "decode.py"), side, *common, "--out", str(picture)]
        for side, picture in pictures.items()
    }
    commands["openvino"] += ["--converted", str(converted)]
    row = Row(
        f"decode{_suffix(setup, 512)}",
        f"decoding a picture, SD 1.5's VAE with random weights, {size}x{size}, CPU, {setup.dtype}",
        "decode_cpu_s",
        commands,
        pictures,
        also=("decode_s", "rise_mb"),
        runs=5,
        warmups=0,
        check=partial(levels_apart, pictures),
    )
    return _prepared(row, setup, "sd15", converted)


def picture(setup: Setup) -> Row:
    """Time a whole picture of SD 1.5's shape from process start: Euler, guidance 7.5."""
    return _picture("picture", setup, "sd15", size=512, steps=20, guidance=7.5, runs=3)


def picture_xl(setup: Setup) -> Row:
    """Time a whole picture of SDXL's shape from process start: Euler, guidance 5."""
    return _picture("picture_xl", setup, "sdxl", size=1024, steps=4, guidance=5.0, runs=1)


def _picture(name: str, setup: Setup, shape: str, size: int, steps: int, guidance: float, runs: int) -> Row:
    """Compare one picture from process start with diffusers and OpenVINO."""
    row_name = f"{name}{_suffix(setup, size)}"
    size, steps = setup.size or size, setup.steps or steps
    folder, converted = setup.models / shape, setup.models / f"{shape}-openvino" / str(size)
    sides = ("mezzotint", "diffusers", "diffusers_best", "openvino")
    pictures = {side: setup.folder / f"{name}-{side}.png" for side in sides}
    common = ["--steps", str(steps), "--guidance", str(guidance), "--dtype", setup.dtype]
    ours = [PYTHON, "-m", "mezzotint", "generate", PROMPT, "--seed", str(SEED), "--model", str(folder), *common]
    theirs = [PYTHON, str(HERE / "diffusers_picture.py"), str(folder), PROMPT, str(SEED)]
    openvino = [setup.python("openvino"), str(HERE / "openvino_picture.py"), str(folder), str(converted), PROMPT]
    commands = {
        "mezzotint": [*ours, "--size", str(size), "--device", "cpu", "--out", str(pictures["mezzotint"])],
        "diffusers": [*theirs, str(pictures["diffusers"]), *common, "--size", str(size)],
        "diffusers_best": [*theirs, str(pictures["diffusers_best"]), *common, "--size", str(size), "--best"],
        "openvino": [*openvino, str(converted / "noise.npy"), str(pictures["openvino"]), *common],
    }
    row = Row(
        row_name,
        f"a picture of {shape}'s shape with random weights, {size}x{size}, {steps} steps, guidance {guidance}, CPU, "
        f"{setup.dtype}: from process start to the picture saved as PNG",
        "saved_s",
        commands,
        pictures,
        also=("cpu_s", "peak_mb"),
        runs=runs,
        at_most={"diffusers": 1},
        warmups=0,
        check=partial(levels_apart, pictures),
    )
    return _prepared(row, setup, shape, converted)


def _suffix(setup: Setup, size: int) -> str:
    """Return what a record's name says of settings that are not the row's own."""
    parts = [] if setup.size in (None, size) else [str(setup.size)]
    return "".join(f"_{part}" for part in parts + ([] if setup.dtype == "float32" else [setup.dtype]))


def _write_model(setup: Setup, shape: str) -> Path:
    """Write a model with random weights, unless it is there, and return its folder."""
    folder = setup.models / shape
    if not (folder / "model_index.json").exists():  # which is written last
        _run([PYTHON, str(HERE / "random_model.py"), shape, str(folder)])
    return folder


def _prepared(row: Row, setup: Setup, shape: str, converted: Path, file: Path | None = None) -> Row:
    """Leave out the peers that are not installed, and write what the others need before the runs."""
    for peer in PEERS:
        if peer in row.commands and peer not in row.not_run:
            if found := peer_version(peer, setup.python(peer)):
                row.versions[peer] = found
            else:
                row.not_run[peer] = "not installed"
    for side in row.not_run:
        row.commands.pop(side, None)
        row.pictures.pop(side, None)

    def prepare() -> None:
        folder = _write_model(setup, shape)
        if "openvino" in row.commands:
            convert = [setup.python("openvino"), str(HERE / "openvino_engine.py"), str(folder), str(converted.parent)]
            _run([*convert, "--size", converted.name, "--seed", str(SEED)])
        if "sdcpp" in row.commands and file and not file.exists():
            _run([PYTHON, str(HERE / "sd15_file.py"), str(file), str(folder)])

    row.prepare = prepare
    return row


def peer_version(peer: str, python: str) -> str:
    """Return the version of a peer that an interpreter has, or nothing."""
    find = f"from importlib.metadata import version; print(version({PEERS[peer]!r}))"
    found = subprocess.run([python, "-c", find], capture_output=True, text=True)
    return "" if found.returncode else found.stdout.strip()


def load_memory(setup: Setup) -> Row:
    """Measure peak memory of loading a 2.13 GB single file of SD 1.5's shape, in three dtypes."""
    file = setup.folder / "sd15.safetensors"
    child = [PYTHON, str(HERE / "load_memory.py"), str(file)]
    return Row(
        "load_memory",
        "mezzotint.load of a 2.13 GB fp16 single file: peak above `import torch` over the bytes then held",
        "peak_over_held",
        {dtype: [*child, dtype] for dtype in ("float16", "float32", "bfloat16")},
        limit=1.15,
        runs=3,
        warmups=0,
        prepare=lambda: _run([PYTHON, str(HERE / "sd15_file.py"), str(file)]),
    )


def help_(setup: Setup) -> Row:
    """Time `mezzotint --help`, and check that it does not import torch."""
    command = [PYTHON, "-m", "mezzotint", "--help"]

    def check() -> dict[str, Any]:
        traced = [PYTHON, "-X", "importtime", *command[1:]]
        log = subprocess.run(traced, env=environment(), capture_output=True, text=True, check=True).stderr
        modules = {line.rpartition("|")[2].strip() for line in log.splitlines() if line.startswith("import time:")}
        return {"modules": len(modules), "imports_torch": "torch" in modules}

    return Row("help", "mezzotint --help", "wall_s", {"mezzotint": command}, limit=0.4, runs=15, check=check)


def memory(setup: Setup) -> Row:
    """Compare predicted and measured peak memory with the bundled model; memory.py has many more rows."""
    rows = {
        "fast": {"width": 512, "height": 512, "placement": {}},
        "strips": {"width": 512, "height": 512, "placement": {"vae": "strips"}},
        "streamed": {"width": 256, "height": 256, "placement": {"weights": "stream", "vae": "strips"}},
    }
    child = [PYTHON, str(HERE / "memory.py"), "draw"]
    return Row(
        "memory",
        "a drawing's predicted peak over the measured one (VmHWM of the whole process)",
        "predicted_over_measured",
        {name: [*child, json.dumps({"model": str(setup.model), "steps": 1, **row})] for name, row in rows.items()},
        limit=1.10,
        runs=3,
        warmups=0,
    )


def train(setup: Setup) -> Row:
    """Measure time and peak memory of LoRA training on an SD 1.5 UNet, against diffusers' recipe."""
    size, sides = setup.size or 512, ("mezzotint", "diffusers", "diffusers_cached")
    options = [str(setup.models / "sd15"), "--size", str(size), "--dtype", setup.dtype, "--steps", "3"]
    return Row(
        f"train{_suffix(setup, 512)}",
        f"a LoRA's step (rank 8), SD 1.5's shape with random weights, {size}x{size}, batch 1, CPU, {setup.dtype}",
        "step_s",
        {side: [PYTHON, str(HERE / "train.py"), side, *options] for side in sides},
        also=("step_cpu_s", "peak_mb"),
        runs=2,
        warmups=0,
        prepare=lambda: _write_model(setup, "sd15"),
    )


ROWS = {
    "first_picture": first_picture,
    "few_steps": few_steps,
    "step": step,
    "decode": decode,
    "picture": picture,
    "picture_xl": picture_xl,
    "load_memory": load_memory,
    "memory": memory,
    "train": train,
    "help": help_,
}


# What rows need


def environment(threads: int | None = None) -> dict[str, str]:
    """Return the environment of child processes: offline, with bytecode caching and a number of threads."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    variables |= {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    return variables | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})


def _run(command: list[str]) -> None:
    subprocess.run(command, env=environment(), check=True)


def levels_apart(pictures: dict[str, Path]) -> dict[str, int]:
    """Return the largest difference of each picture from the first, in levels of 255."""
    from PIL import Image, ImageChops

    ours, *peers = pictures
    apart = {}
    with Image.open(pictures[ours]) as picture:
        for side in peers:
            with Image.open(pictures[side]) as peer:
                extrema: Any = ImageChops.difference(picture.convert("RGB"), peer.convert("RGB")).getextrema()
            apart[f"levels_apart_{side}"] = int(max(high for _, high in extrema))
    return apart


def distances(arrays: dict[str, Path]) -> dict[str, float]:
    """Return the largest difference of each array that was written from the first, over the first's largest number."""
    import numpy as np

    loaded = {name: np.load(path) for name, path in arrays.items() if path.exists()}
    ours, *peers = loaded
    scale = np.abs(loaded[ours]).max()
    return {f"distance_{peer}": float(np.abs(loaded[peer] - loaded[ours]).max() / scale) for peer in peers}
