"""Predicted against measured peaks, each in a fresh process, and budgets kept.

    python benchmarks/memory.py table FILE.json [--models DIR]     the combinations below, but for those that FILE has
    python benchmarks/memory.py budgets FILE.json [--models DIR]   the same with a budget each, under /usr/bin/time -v
    python benchmarks/memory.py show FILE.json                     the file as a table in Markdown
    python benchmarks/memory.py predict FILE.json                  predicted peaks alone, without running a model

The models are the bundled one and those that benchmarks/random_model.py writes into DIR: half, sd15, controlnet, sdxl.
A child (`draw`) prints one JSON object: the peak of each stage (VmHWM, reset between them) with what was predicted
before the model was opened, and seconds. Linux only.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODELS = Path.home() / ".cache" / "mezzotint" / "big"
STREAM, OFFLOAD = {"weights": "stream"}, {"weights": "offload"}
STRIPS, SPLIT = {"vae": "strips"}, {"guidance": "split"}
HALF, FLOAT8, INT8 = {"storage": "float16"}, {"storage": "float8"}, {"storage": "int8"}


def combination(model: str, side: int | tuple[int, int], placement: dict[str, Any] | None = None, **more: Any) -> Any:
    """Return one row; `more` holds request fields and dtype."""
    width, height = (side, side) if isinstance(side, int) else side
    return {"model": model, "width": width, "height": height, "placement": placement or {}, **more}


TABLE = [  # short ones first
    combination("emoji", 128),
    combination("emoji", 128, count=8, batch=8),
    combination("emoji", 256, guidance_scale=1.0),
    combination("emoji", 512),
    combination("emoji", 512, STRIPS),
    combination("emoji", (512, 384), count=4, batch=2),
    combination("emoji", 768, SPLIT | STRIPS),
    combination("emoji", 512, {"attention": "math"}, steps=1),
    combination("emoji", 512, {"attention": "sliced:16MiB"}, steps=1),
    combination("emoji", 256, STREAM),
    combination("emoji", 256, OFFLOAD | HALF),
    combination("emoji", 256, dtype="bfloat16", steps=1),
    combination("half", 256),
    combination("half", 256, guidance_scale=1.0),
    combination("half", 256, STREAM | STRIPS),
    combination("half", 256, OFFLOAD),
    combination("half", 256, OFFLOAD | HALF),
    combination("half", 256, HALF),
    combination("half", 256, FLOAT8),
    combination("half", 256, INT8 | SPLIT),
    combination("half", (384, 256), count=2, batch=2, steps=1),
    combination("half", 512, STRIPS, steps=1),
    combination("half", 512, {"attention": "math"}, steps=1, guidance_scale=1.0),
    combination("sd15", 256, STREAM | STRIPS, steps=1),
    combination("sd15", 256, HALF, steps=1),
    combination("sd15", 256, OFFLOAD, steps=1),
    combination("sd15", 256, steps=1),
    combination("sd15", 512, STREAM | STRIPS, steps=1, guidance_scale=1.0),
    combination("sd15", 512, OFFLOAD | STRIPS, steps=1),
    combination("sd15", 512, steps=1, guidance_scale=1.0),
    combination("sd15", 256, steps=1, control=True),
    combination("sd15", 512, STREAM | STRIPS, steps=1, control=True),
    combination("sdxl", 256, STREAM | STRIPS, steps=1, guidance_scale=1.0),
    combination("sdxl", 512, OFFLOAD | HALF | STRIPS, steps=1, guidance_scale=1.0),
    combination("sdxl", 1024, OFFLOAD | HALF | STRIPS, steps=1, guidance_scale=1.0),
]

BUDGETS = [
    combination("emoji", 128, memory="400MiB"),
    combination("emoji", 128, memory="360MiB"),
    combination("emoji", 512, memory="600MiB"),
    combination("emoji", 512, memory="450MiB"),
    combination("emoji", 512, memory="400MiB"),
    combination("emoji", 512, memory="1GiB", count=4, batch=4),
    combination("half", 256, memory="1600MiB"),
    combination("half", 256, memory="1GiB"),
    combination("half", 256, memory="800MiB"),
    combination("half", 256, memory="450MiB"),
    combination("half", 512, memory="700MiB", steps=1, guidance_scale=1.0),
    combination("sd15", 256, memory="2GiB", steps=1),
    combination("sd15", 512, memory="2GiB", steps=1),
    combination("sd15", 512, memory="1GiB", steps=1, guidance_scale=1.0),
    combination("sdxl", 1024, memory="6GiB", steps=2),
    combination("sd15", 512, memory="3GiB", steps=1, control=True),
]


def status(name: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def draw(row: dict[str, Any]) -> dict[str, Any]:
    """Generate one combination in this process."""
    import mezzotint
    import mezzotint.images.io
    import mezzotint.pipeline
    from mezzotint.memory import system
    from mezzotint.memory.footprint import predict
    from mezzotint.memory.headers import ModelHeaders
    from mezzotint.memory.planner import plan
    from mezzotint.placement import Placement

    if "memory" not in row:  # else the plan does it where it is needed
        system.return_freed()
    folder, dtype, memory = row.pop("model"), row.pop("dtype", "float32"), row.pop("memory", None)
    placement = Placement(**row.pop("placement"))
    request = as_request(folder, row)
    measured: dict[str, int] = {}
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def mark(stage: str) -> None:
        nonlocal last
        measured[stage] = max(measured.get(stage, 0), status("VmHWM"))
        now = time.perf_counter()
        seconds[stage], last = round(seconds.get(stage, 0.0) + now - last, 2), now
        if memory is None:  # under a budget it is /usr/bin/time that measures, and would see what was reset
            Path("/proc/self/clear_refs").write_text("5")

    planned: dict[str, Any] = {}
    if memory is None:
        estimate = predict(ModelHeaders.of(folder, device="cpu", dtype=dtype), request, placement)
        foreseen = time.perf_counter() - last
        last = time.perf_counter()
        pipe = mezzotint.load(folder, device="cpu", dtype=dtype, placement=placement)
    else:
        made = plan(folder, memory, request, device="cpu", dtype=dtype)
        foreseen, estimate = time.perf_counter() - last, made.estimate
        planned = {"placement": made.placement.changes(), "limit": made.limit, "slower": round(made.slowdown, 3)}
        last = time.perf_counter()
        pipe = mezzotint.load(folder, device="cpu", dtype=dtype, memory=made)
    mark("load")
    request = pipe.resolve(request)
    for text in {request.prompt, request.negative_prompt or ""}:
        pipe.encode(text, request)
    mark("encode")
    result = pipe.generate(request, on_step=lambda *_: mark("step"), on_image=lambda *_: mark("decode"))
    for image in result.images:
        mezzotint.images.io.encode_file(image, "PNG")
    mark("png")
    most = max(measured.values())
    return planned | {
        "predicted": estimate.peak,
        "measured": most,
        "predicted_over_measured": round(estimate.peak / most, 4),
        "stages": {stage: [estimate.stages.get(stage, 0), count] for stage, count in measured.items()},
        "seconds": seconds,
        "foreseen_s": round(foreseen, 3),
    }


def as_request(folder: str, row: dict[str, Any]) -> Any:
    """Return the request of a row's fields; with control, a ControlNet beside the model reads a grey picture."""
    from PIL import Image

    import mezzotint

    if row.pop("control", False):
        grey = Image.new("RGB", (row["width"], row["height"]), "grey")
        row["control"] = [{"file": str(Path(folder).with_name("controlnet")), "image": grey}]
    return mezzotint.Request(prompt="a lemon on a blue background", seed=1, **{"steps": 2, **row})


def predict_only(row: dict[str, Any]) -> dict[str, Any]:
    """Predict the peak of a combination in this process, from headers; a budget's placement is planned."""
    from mezzotint.memory.footprint import predict
    from mezzotint.memory.headers import ModelHeaders
    from mezzotint.memory.planner import plan
    from mezzotint.placement import Placement

    folder, dtype, memory = row.pop("model"), row.pop("dtype", "float32"), row.pop("memory", None)
    placement = Placement(**row.pop("placement"))
    request = as_request(folder, row)
    if memory is None:
        return {"predicted": predict(ModelHeaders.of(folder, device="cpu", dtype=dtype), request, placement).peak}
    made = plan(folder, memory, request, device="cpu", dtype=dtype)
    return {"predicted": made.estimate.peak, "placement": made.placement.changes(), "table": made.table()}


def predict_all(path: Path) -> None:
    """Predict every combination, each in a fresh process, with sparse files in the place of the models."""
    with tempfile.TemporaryDirectory() as name:
        models = Path(name)
        for model in ("half", "sd15", "controlnet", "sdxl"):
            script = Path(__file__).with_name("random_model.py")
            subprocess.run([sys.executable, str(script), model, str(models / model), "--sparse"], check=True)
        done = []
        for row in [*TABLE, *BUDGETS]:
            folder = row["model"] if row["model"] == "emoji" else str(models / row["model"])
            command = [sys.executable, __file__, "predict-one", json.dumps(row | {"model": folder})]
            child = subprocess.run(command, capture_output=True, text=True, check=True)
            done.append({"row": row, **json.loads(child.stdout)})
            path.write_text(json.dumps(done, indent=1) + "\n")


def run(rows: list[dict[str, Any]], path: Path, models: Path, timed: bool) -> None:
    """Run the rows that are missing in the file, each in a new process."""
    done = json.loads(path.read_text()) if path.exists() else []
    for row in rows:
        if any(old["row"] == row for old in done):
            continue
        folder = row["model"] if row["model"] == "emoji" else str(models / row["model"])
        command = [sys.executable, __file__, "draw", json.dumps(row | {"model": folder})]
        child = subprocess.run([*(["/usr/bin/time", "-v"] if timed else []), *command], capture_output=True, text=True)
        if child.returncode:
            print(f"{row}: failed: {child.stderr.strip()[-600:]}", flush=True)
            continue
        record = {"row": row, **json.loads(child.stdout.strip().splitlines()[-1])}
        if timed and (found := re.search(r"Maximum resident set size \(kbytes\): (\d+)", child.stderr)):
            record["measured"] = int(found[1]) * 1024
            record["kept"] = record["measured"] <= record["limit"]
        done.append(record)
        path.write_text(json.dumps(done, indent=1) + "\n")
        print(line(record), flush=True)


def line(record: dict[str, Any]) -> str:
    """Format a record as a row of the table."""
    row = dict(record["row"])
    model, side, memory = row.pop("model"), f"{row.pop('width')}x{row.pop('height')}", row.pop("memory", "")
    placement = record.get("placement", {}) | row.pop("placement")
    done = ", ".join(f"{name} {value}" for name, value in placement.items()) or "the fast way"
    more = ", ".join(f"{name} {value}" for name, value in row.items())
    predicted, measured = (f"{record[name] / 2**20:,.0f}" for name in ("predicted", "measured"))
    off = f"{100 * (record['predicted'] / record['measured'] - 1):+.1f} %"
    cells = [model, side, more, memory, done, predicted, measured, off]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table", "budgets", "show", "draw", "predict", "predict-one"))
    parser.add_argument("file")
    parser.add_argument("--models", type=Path, default=MODELS)
    options = parser.parse_args()
    if options.what == "draw":
        print(json.dumps(draw(json.loads(options.file))))
        return
    if options.what == "predict-one":
        print(json.dumps(predict_only(json.loads(options.file))))
        return
    if options.what == "predict":
        predict_all(Path(options.file))
        return
    if options.what == "show":
        print("| model | size | request | budget | measures | predicted, MiB | measured, MiB | error |")
        print("|---|---|---|---|---|---|---|---|")
        for record in json.loads(Path(options.file).read_text()):
            print(line(record))
        return
    rows = TABLE if options.what == "table" else BUDGETS
    run(rows, Path(options.file), options.models, options.what == "budgets")


if __name__ == "__main__":
    main()
