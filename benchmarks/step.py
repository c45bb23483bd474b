"""Time guided steps: `python benchmarks/step.py SIDE FOLDER [OPTIONS]`.

Each side draws latents with the model of FOLDER, from the same noise, at guidance 7.5 by Euler; the first step is not
counted. diffusers_best has what its documents name as faster on a CPU without compiling: channels_last, fused
projections, inference mode. openvino takes --converted (openvino_engine.py), sdcpp a single file as FOLDER, and its own
noise. It prints one JSON object: the medians of a step's wall and CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PROMPT, SEED, GUIDANCE = "a lemon on a blue background", 1, 7.5
Report = Callable[[], None]
Draw = Callable[[argparse.Namespace, Report], Any]  # returns the latents, or None


def main() -> None:
    """Draw, and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--converted", type=Path, help="folder of OpenVINO's files for this size")
    parser.add_argument("--controlnet", type=Path, help="folder of a ControlNet, which is given a picture of noise")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side [default: 512]")
    parser.add_argument("--steps", type=int, default=3, help="steps, the first of which is not counted [default: 3]")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="file for the latents, .npy")
    options = parser.parse_args()
    marks: list[tuple[float, float]] = []

    def report() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    latents = SIDES[options.side](options, report)
    if options.out and latents is not None:
        np.save(options.out, np.asarray(latents, np.float32))
    steps = [[after - before for before, after in zip(*pair, strict=True)] for pair in pairwise(marks)]
    wall, cpu = (statistics.median(column) for column in zip(*steps, strict=True))
    json.dump({"step_s": round(wall, 4), "step_cpu_s": round(cpu, 4)}, sys.stdout)
    print()


def noise(size: int) -> Any:
    """Return the noise that all sides begin with."""
    return np.random.default_rng(SEED).standard_normal((1, 4, size // 8, size // 8), np.float32)


def hint(size: int) -> Image.Image:
    """Return the picture for a ControlNet."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def mezzotint(options: argparse.Namespace, report: Report) -> Any:
    """Draw with mezzotint."""
    import torch

    import mezzotint
    from mezzotint.memory import system

    system.keep_freed()  # as the commands and the server do
    control: dict[str, Any] = {}
    if options.controlnet:
        control = {"control": [{"file": str(options.controlnet), "image": hint(options.size)}]}
    pipe = mezzotint.load(options.folder, device="cpu", dtype=options.dtype)
    size = {"width": options.size, "height": options.size}
    request = mezzotint.Request(
        prompt=PROMPT, seed=SEED, steps=options.steps, sampler="euler", guidance_scale=GUIDANCE, **size, **control
    )
    latents = None
    for step in pipe.stream(request, torch.from_numpy(noise(options.size))):
        report()
        latents = step.x
    return latents


def diffusers(options: argparse.Namespace, report: Report) -> Any:
    """Draw with diffusers."""
    import torch
    from diffusers import (
        ControlNetModel,
        EulerDiscreteScheduler,
        StableDiffusionControlNetPipeline,
        StableDiffusionPipeline,
    )

    def on_step(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        report()
        return values

    dtype, best = getattr(torch, options.dtype), options.side == "diffusers_best"
    given: dict[str, Any] = {"safety_checker": None, "dtype": dtype}
    call: dict[str, Any] = {}
    kind = StableDiffusionPipeline
    if options.controlnet:
        kind = StableDiffusionControlNetPipeline
        given["controlnet"] = ControlNetModel.from_pretrained(options.controlnet, dtype=dtype)
        call["image"] = hint(options.size)
    pipe = kind.from_pretrained(options.folder, **given)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    if best:
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.to(memory_format=torch.channels_last)
        if options.controlnet:
            pipe.controlnet.to(memory_format=torch.channels_last)
        pipe.fuse_qkv_projections()
    with torch.inference_mode(best):
        latents = pipe(
            PROMPT,
            width=options.size,
            height=options.size,
            guidance_scale=GUIDANCE,
            num_inference_steps=options.steps,
            latents=torch.from_numpy(noise(options.size)).to(dtype),
            callback_on_step_end=on_step,
            output_type="latent",
            **call,
        ).images
    return latents.float()


def openvino(options: argparse.Namespace, report: Report) -> Any:
    """Draw with OpenVINO."""
    from openvino_engine import ENCODERS, Engine

    engine = Engine(options.folder, options.converted, options.dtype, (*ENCODERS, "unet", "vae"))
    condition = engine.encode(PROMPT, options.size)
    latents = None
    for latents in engine.denoise(noise(options.size), condition, options.steps, GUIDANCE):  # noqa: B007
        report()
    return latents


def sdcpp(options: argparse.Namespace, report: Report) -> None:
    """Draw with stable-diffusion.cpp."""
    from stable_diffusion_cpp import StableDiffusion

    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    engine = StableDiffusion(model_path=str(options.folder), n_threads=threads, verbose=False)
    engine.generate_image(
        prompt=PROMPT,
        width=options.size,
        height=options.size,
        cfg_scale=GUIDANCE,
        sample_steps=options.steps,
        sample_method="euler",
        seed=SEED,
        progress_callback=lambda step, steps, seconds: report() if steps == options.steps else None,
    )


SIDES: dict[str, Draw] = {
    "mezzotint": mezzotint,
    "diffusers": diffusers,
    "diffusers_best": diffusers,
    "openvino": openvino,
    "sdcpp": sdcpp,
}

if __name__ == "__main__":
    main()
