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
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rows import BUNDLED, HERE, PEERS, ROOT, ROWS, Row, Setup, environment

PACKAGES = ("mezzotint", "torch", "diffusers", "transformers", "numpy", "safetensors", "tokenizers", "typer")

Measures = dict[str, float]


# Running


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
        if len(runs[name]) < row.at_most.get(name, row.runs):
            runs[name].append(run_once(row.commands[name], row.pictures.get(name), threads))
    sides = {name: summary(measured) for name, measured in runs.items()}
    record: dict[str, Any] = {
        "row": row.name,
        "about": row.about,
        "date": datetime.date.today().isoformat(),
        "machine": machine(threads) | row.versions | {"load_before": round(load, 2)},
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
    return record | {"not_run": row.not_run, "checks": row.check()}


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
    places = {str(ROOT) + os.sep: "", tempfile.gettempdir() + os.sep: "TMP/"}
    for place, name in places.items():
        command = [command[0], *(word.replace(place, name) for word in command[1:])]
    return ["python", *command[1:]]


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
    lines += [f"  {name}: {value}" for name, value in (record["not_run"] | record["checks"]).items()]
    return "\n".join(lines)


def markdown(record: dict[str, Any]) -> str:
    """Format a record as a table for the documentation: medians, and in brackets what is ours of it."""
    measures = [record["measure"], *(key.removeprefix("ratios_") for key in record if key.startswith("ratios_"))]
    ours = next(iter(record["sides"].values()))
    lines = [f"| {record['row']} | {' | '.join(measures)} | runs |", "|---" * (len(measures) + 2) + "|"]
    for name, side in record["sides"].items():
        cells = []
        for measure in measures:
            median, own = side[measure]["median"], ours[measure]["median"]
            cells.append(f"{median:.4g}" + (f" ({own / median:.2f})" if side is not ours else ""))
        lines.append(f"| {name} | {' | '.join(cells)} | {len(side[measures[0]]['runs'])} |")
    lines += [f"| {name} | {' | '.join([why] + [''] * len(measures))} |" for name, why in record["not_run"].items()]
    return "\n".join(lines)


def save(record: dict[str, Any], folder: Path) -> Path:
    """Write the record as YYYY-MM-DD-<row>.json; a second one of the same day replaces the first."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['date']}-{record['row']}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def peer_python(text: str) -> tuple[str, str]:
    """Parse PEER=PYTHON."""
    peer, _, python = text.partition("=")
    if peer not in PEERS or not python:
        raise argparse.ArgumentTypeError(f"{text!r} is not PEER=PYTHON, with {' or '.join(PEERS)} as PEER")
    return peer, python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(ROWS)
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--runs", type=int, help="runs of each command, besides warm-ups")
    parser.add_argument("--quick", action="store_true", help="smoke test: one warm-up, two runs")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of every child process")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="diffusers folder [default: the bundled model]")
    parser.add_argument(
        "--models", type=Path, help="folder that keeps models with random weights [default: none is kept]"
    )
    parser.add_argument("--dtype", default="float32", help="of step, decode, picture and train [default: float32]")
    parser.add_argument("--size", type=int, help="pixels of a side, of the same rows [default: 512, SDXL 1024]")
    parser.add_argument("--steps", type=int, help="of picture and picture_xl [default: 20, SDXL 4]")
    parser.add_argument(
        "--peer-python",
        action="append",
        type=peer_python,
        default=[],
        metavar="PEER=PYTHON",
        help=f"interpreter of {' or '.join(PEERS)}, where it is not in this environment; may be repeated",
    )
    parser.add_argument("--markdown", action="store_true", help="also print each record as a table for the documents")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the JSON records")
    options = parser.parse_args()
    for name in options.rows:
        with tempfile.TemporaryDirectory(prefix="mezzotint-bench-") as folder:
            setup = Setup(
                Path(folder),
                options.models.resolve() if options.models else Path(folder),
                options.model.resolve(),
                options.dtype,
                options.size,
                options.steps,
                dict(options.peer_python),
            )
            row = ROWS[name](setup)
            if row.missing:
                print(f"{name}: not run, {row.missing}", flush=True)
                continue
            if options.quick:
                row.runs, row.warmups = min(row.runs, 2), min(row.warmups, 1)
            row.runs = options.runs or row.runs
            record = run_row(row, options.threads)
            print(f"{table(record)}\n  written to {os.path.relpath(save(record, options.out))}", flush=True)
            if options.markdown:
                print(markdown(record), flush=True)


if __name__ == "__main__":
    main()
