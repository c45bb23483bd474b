"""The benchmarks: `python benchmarks/run.py [--rows NAME...] [--runs N] [--quick]`. The rules are in README.md.

A row is a few commands, ours first. Each run is a fresh process; runs are interleaved (A B C, C B A, A B C ...) after
warm-ups that are not counted, and ratios are of medians within this one session. The parent measures seconds from spawn
to exit, seconds until the command's picture was saved (its file's time), and peak memory (ru_maxrss); a child may print
more as one JSON object. No torch is imported here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUNDLED = ROOT / "src" / "mezzotint" / "data" / "emoji"
PYTHON = sys.executable
PACKAGES = ("mezzotint", "torch", "diffusers", "transformers", "numpy", "safetensors", "tokenizers", "typer")

Measures = dict[str, float]


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
    warmups: int = 2
    prepare: Callable[[], None] = lambda: None
    check: Callable[[], dict[str, Any]] = dict  # called after the runs; its result is reported
    missing: str = ""  # why this row cannot run


# Rows


def first_picture(folder: Path, model: Path) -> Row:
    """Time the first picture from process start, bundled model, 20 steps, against diffusers on the same folder."""
    about = "emoji, 20 steps, CPU, float32: from process start to the first picture saved as PNG"
    return _picture("first_picture", about, folder, model, ["--steps", "20"], [])


def few_steps(folder: Path, model: Path) -> Row:
    """Time the few-step form: 4 steps of lcm without guidance, with the LoRA merged on both sides."""
    about = "emoji distilled, 4 steps of lcm, CPU, float32: from process start to the first picture saved as PNG"
    return _picture("few_steps", about, folder, model, ["--sampler", "lcm"], ["--few-step"], "few_step")


def _picture(
    name: str, about: str, folder: Path, model: Path, options: list[str], peers: list[str], needs: str = "steps"
) -> Row:
    """Compare one picture with diffusers; the folder's mezzotint.json must have `needs`."""
    pictures = {side: folder / f"{name}-{side}.png" for side in ("mezzotint", "diffusers", "diffusers_best")}
    prompt, seed = "a lemon on a blue background", "7"
    ours = [PYTHON, "-m", "mezzotint", "generate", prompt, "--seed", seed, *options, "--device", "cpu"]
    peer = [PYTHON, str(HERE / "diffusers_picture.py"), str(model), prompt, seed]
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
        check=lambda: {
            f"levels_apart_{side}": _max_diff(pictures["mezzotint"], pictures[side]) for side in list(pictures)[1:]
        },
        missing="" if there else f"its model is missing (or mezzotint.json says no {needs}): give --model FOLDER",
    )


def load_memory(folder: Path, model: Path) -> Row:
    """Measure peak memory of loading a 2.13 GB single file of SD 1.5's shape, in three dtypes."""
    file = folder / "sd15.safetensors"
    child = [PYTHON, str(HERE / "load_memory.py"), str(file)]
    return Row(
        "load_memory",
        "mezzotint.load of a 2.13 GB fp16 single file: peak above `import torch` over the bytes then held",
        "peak_over_held",
        {dtype: [*child, dtype] for dtype in ("float16", "float32", "bfloat16")},
        limit=1.15,
        runs=3,
        warmups=0,
        prepare=lambda: _prepare([PYTHON, str(HERE / "sd15_file.py"), str(file)]),
    )


def help_(folder: Path, model: Path) -> Row:
    """Time `mezzotint --help`, and check that it does not import torch."""
    command = [PYTHON, "-m", "mezzotint", "--help"]

    def check() -> dict[str, Any]:
        traced = [PYTHON, "-X", "importtime", *command[1:]]
        log = subprocess.run(traced, env=environment(), capture_output=True, text=True, check=True).stderr
        modules = {line.rpartition("|")[2].strip() for line in log.splitlines() if line.startswith("import time:")}
        return {"modules": len(modules), "imports_torch": "torch" in modules}

    return Row("help", "mezzotint --help", "wall_s", {"mezzotint": command}, limit=0.4, runs=15, check=check)


def memory(folder: Path, model: Path) -> Row:
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
        {name: [*child, json.dumps({"model": str(model), "steps": 1, **row})] for name, row in rows.items()},
        limit=1.10,
        runs=3,
        warmups=0,
    )


def train(folder: Path, model: Path) -> Row:
    """Measure time and peak memory of LoRA training on an SD 1.5 UNet, against diffusers' recipe."""
    random = folder / "sd15"
    child, sides = [PYTHON, str(HERE / "train.py")], ("mezzotint", "diffusers", "diffusers_cached")
    return Row(
        "train",
        "a LoRA's step (rank 8), SD 1.5's shape with random weights, 512x512, batch 1, CPU, float32",
        "step_s",
        {side: [*child, side, str(random), "--steps", "3"] for side in sides},
        also=("step_cpu_s", "peak_mb"),
        runs=2,
        warmups=0,
        prepare=lambda: _prepare([PYTHON, str(HERE / "random_model.py"), "sd15", str(random)]),
    )


ROWS = {
    "first_picture": first_picture,
    "few_steps": few_steps,
    "load_memory": load_memory,
    "memory": memory,
    "train": train,
    "help": help_,
}


def _max_diff(one: Path, other: Path) -> int:
    """Return the largest difference between two pictures, in levels of 255."""
    from PIL import Image, ImageChops

    with Image.open(one) as a, Image.open(other) as b:
        extrema: Any = ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getextrema()
    return int(max(high for _, high in extrema))


def _prepare(command: list[str]) -> None:
    subprocess.run(command, env=environment(), check=True)


# Running


def environment(threads: int | None = None) -> dict[str, str]:
    """Return the environment of child processes: offline, with bytecode caching and a number of threads."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    variables |= {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    return variables | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})


def run_once(command: list[str], picture: Path | None, threads: int | None) -> Measures:
    """Run a command in a new process; raise RuntimeError with the end of its output if it fails or saves no picture."""
    if picture:
        picture.unlink(missing_ok=True)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        clock, start = time.time(), time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment(threads))
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read().decode(errors="replace"), err.read().decode(errors="replace")
    if process.returncode or (picture and not picture.exists()):
        what = (stderr or stdout).strip()[-600:]
        raise RuntimeError(f"{shlex.join(shown(command))} failed with exit code {process.returncode}: {what}")
    measures = {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss * 1024 / 1e6}
    if picture:
        measures["saved_s"] = picture.stat().st_mtime - clock
    last = stdout.strip().splitlines()[-1:] or [""]
    if last[0].startswith("{"):
        measures |= {name: value for name, value in json.loads(last[0]).items() if isinstance(value, int | float)}
    return measures


def order(names: list[str], rounds: int) -> Iterator[str]:
    """Yield A B C, C B A, A B C ..., so that drift of the machine affects all alike."""
    for number in range(rounds):
        yield from names[::-1] if number % 2 else names


def run_row(row: Row, threads: int | None = None) -> dict[str, Any]:
    """Run all commands of a row and return its record."""
    row.prepare()
    load = os.getloadavg()[0]
    names = list(row.commands)
    for name in order(names, row.warmups):
        run_once(row.commands[name], row.pictures.get(name), threads)
    runs: dict[str, list[Measures]] = {name: [] for name in names}
    for name in order(names, row.runs):
        runs[name].append(run_once(row.commands[name], row.pictures.get(name), threads))
    sides = {name: summary(measured) for name, measured in runs.items()}
    record: dict[str, Any] = {
        "row": row.name,
        "about": row.about,
        "date": datetime.date.today().isoformat(),
        "machine": machine(threads) | {"load_before": round(load, 2)},
        "warmups": row.warmups,
        "commands": {name: shlex.join(shown(command)) for name, command in row.commands.items()},
        "measure": row.measure,
        "sides": sides,
    }
    if row.limit is None:
        record["ratios"] = ratios(sides, row.measure)
        record |= {f"ratios_{measure}": ratios(sides, measure) for measure in row.also}
    else:
        worst = max(side[row.measure]["median"] for side in sides.values())
        record |= {"limit": row.limit, "within_limit": worst < row.limit}
    return record | {"checks": row.check()}


def summary(runs: list[Measures]) -> dict[str, dict[str, Any]]:
    """Return median, quartiles, extremes and all values of each measure that all runs have."""
    table: dict[str, dict[str, Any]] = {}
    for name in runs[0]:
        values = [run[name] for run in runs if name in run]
        if len(values) < len(runs):
            continue
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        numbers = {
            "median": statistics.median(values),
            "q1": low,
            "q3": high,
            "min": min(values),
            "max": max(values),
        }
        rounded = {key: round(value, 4) for key, value in numbers.items()}
        table[name] = {**rounded, "runs": [round(value, 4) for value in values]}
    return table


def ratios(sides: dict[str, Any], measure: str) -> dict[str, float]:
    """Return the first side's median divided by each other side's."""
    ours, *peers = sides
    medians = {name: side[measure]["median"] for name, side in sides.items()}
    return {f"{ours}/{peer}": round(medians[ours] / medians[peer], 4) for peer in peers}


def machine(threads: int | None) -> dict[str, Any]:
    """Describe the machine and the versions."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads or os.environ.get("OMP_NUM_THREADS", "torch's default"),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    features = next((line.split() for line in lines if line.startswith("flags")), [])
    known = [name for name in ("avx2", "avx512f", "amx_tile") if name in features]
    return " ".join([next(named, platform.processor() or "unknown"), *known])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def shown(command: list[str]) -> list[str]:
    """Return a command without paths of this machine."""
    places = {PYTHON: "python", str(ROOT) + os.sep: "", tempfile.gettempdir() + os.sep: "TMP/"}
    for place, name in places.items():
        command = [word.replace(place, name) for word in command]
    return command


# Reporting


def table(record: dict[str, Any]) -> str:
    """Format a record as text: one line of medians for each side, the main measure first, then ratios and checks."""
    lines = [f"{record['row']}: {record['about']}"]
    main = record["measure"]
    for name, side in record["sides"].items():
        numbers = side[main]
        first = f"{main} {numbers['median']:.3f} ({numbers['q1']:.3f} to {numbers['q3']:.3f}, n={len(numbers['runs'])})"
        others = [f"{measure} {side[measure]['median']:.4g}" for measure in side if measure != main]
        lines.append(f"  {name:<16}{first:<44}" + "  ".join(others))
    for key in (key for key in record if key.startswith("ratios")):
        measure = key.removeprefix("ratios").lstrip("_") or main
        lines += [f"  {pair} of {measure}: {ratio:.3f}" for pair, ratio in record[key].items()]
    if "limit" in record:
        lines.append(f"  {main} is {'within' if record['within_limit'] else 'OVER'} its limit {record['limit']}")
    lines += [f"  {name}: {value}" for name, value in record["checks"].items()]
    return "\n".join(lines)


def save(record: dict[str, Any], folder: Path) -> Path:
    """Write the record as YYYY-MM-DD-<row>.json; a second one of the same day replaces the first."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['date']}-{record['row']}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(ROWS)
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--runs", type=int, help="runs of each command, besides warm-ups")
    parser.add_argument("--quick", action="store_true", help="smoke test: one warm-up, two runs")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of every child process")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="diffusers folder [default: the bundled model]")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the JSON records")
    options = parser.parse_args()
    for name in options.rows:
        with tempfile.TemporaryDirectory(prefix="mezzotint-bench-") as folder:
            row = ROWS[name](Path(folder), options.model.resolve())
            if row.missing:
                print(f"{name}: not run, {row.missing}", flush=True)
                continue
            if options.quick:
                row.runs, row.warmups = min(row.runs, 2), min(row.warmups, 1)
            row.runs = options.runs or row.runs
            record = run_row(row, options.threads)
            print(f"{table(record)}\n  written to {os.path.relpath(save(record, options.out))}", flush=True)


if __name__ == "__main__":
    main()
