"""Time guided steps: `python benchmarks/step.py mezzotint|diffusers|diffusers_best FOLDER [OPTIONS]`.

Each side draws latents with the model of FOLDER at guidance 7.5 by Euler; the first step is not counted. diffusers_best
has what its documents name as faster on a CPU without compiling: channels_last, fused projections, inference mode. It
prints one JSON object: the medians of a step's wall and CPU seconds, and the process's largest resident set.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PROMPT = "a lemon on a blue background"
Report = Callable[[], None]


def main() -> None:
    """Draw, and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("mezzotint", "diffusers", "diffusers_best"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--controlnet", type=Path, help="folder of a ControlNet, which is given a picture of noise")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side [default: 512]")
    parser.add_argument("--steps", type=int, default=3, help="steps, the first of which is not counted [default: 3]")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    marks: list[tuple[float, float]] = []

    def report() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    hint = Image.fromarray(np.random.default_rng(0).integers(0, 256, (options.size, options.size, 3), dtype=np.uint8))
    draw = draw_here if options.side == "mezzotint" else draw_there
    draw(options, hint, report)
    steps = [[after - before for before, after in zip(*pair, strict=True)] for pair in pairwise(marks)]
    wall, cpu = (statistics.median(column) for column in zip(*steps, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    json.dump({"wall_s": round(wall, 3), "cpu_s": round(cpu, 3), "peak_bytes": peak}, sys.stdout)
    print()


def draw_here(options: argparse.Namespace, hint: Image.Image, report: Report) -> None:
    """Draw with mezzotint."""
    import mezzotint

    control: dict[str, Any] = {}
    if options.controlnet:
        control = {"control": [{"file": str(options.controlnet), "image": hint}]}
    pipe = mezzotint.load(options.folder, device="cpu", dtype=options.dtype)
    size = {"width": options.size, "height": options.size}
    request = mezzotint.Request(
        prompt=PROMPT, seed=1, steps=options.steps, sampler="euler", guidance_scale=7.5, **size, **control
    )
    stream = pipe.stream(request)
    for _ in range(options.steps):
        next(stream)
        report()


def draw_there(options: argparse.Namespace, hint: Image.Image, report: Report) -> None:
    """Draw with diffusers."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

    def on_step(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        report()
        return values

    dtype = getattr(torch, options.dtype)
    given: dict[str, Any] = {"safety_checker": None, "dtype": dtype}
    call: dict[str, Any] = {}
    kind = StableDiffusionPipeline
    if options.controlnet:
        kind = StableDiffusionControlNetPipeline
        given["controlnet"] = ControlNetModel.from_pretrained(options.controlnet, dtype=dtype)
        call["image"] = hint
    pipe = kind.from_pretrained(options.folder, **given)
    if options.side == "diffusers_best":
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.to(memory_format=torch.channels_last)
        if options.controlnet:
            pipe.controlnet.to(memory_format=torch.channels_last)
        pipe.fuse_qkv_projections()
    with torch.inference_mode(options.side == "diffusers_best"):
        pipe(
            PROMPT,
            width=options.size,
            height=options.size,
            guidance_scale=7.5,
            num_inference_steps=options.steps,
            generator=torch.Generator("cpu").manual_seed(1),
            callback_on_step_end=on_step,
            output_type="latent",
            **call,
        )


if __name__ == "__main__":
    main()
