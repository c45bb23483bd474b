"""Time the VAE's decoding: `python benchmarks/decode.py SIDE FOLDER [OPTIONS]`.

Each side decodes the same latents to a picture of 8 bits; the first decoding is not counted. diffusers_best has
channels_last and inference mode; openvino takes --converted (openvino_engine.py). It prints one JSON object: the
medians of wall and CPU seconds, and by how much decoding raises the process's peak memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Decode = Callable[[], Image.Image]


def main() -> None:
    """Decode, and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--converted", type=Path, help="folder of OpenVINO's files for this size")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side [default: 512]")
    parser.add_argument("--times", type=int, default=1, help="decodings that are counted [default: 1]")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="file for the picture")
    options = parser.parse_args()
    decode = SIDES[options.side](options)
    before = memory("VmRSS")
    picture = decode()
    rise = memory("VmHWM") - before
    walls, cpus = [], []
    for _ in range(options.times):
        wall, cpu = time.perf_counter(), time.process_time()
        picture = decode()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    if options.out:
        picture.save(options.out)
    times = {"decode_s": statistics.median(walls), "decode_cpu_s": statistics.median(cpus), "rise_mb": rise}
    json.dump({name: round(value, 4) for name, value in times.items()}, sys.stdout)
    print()


def memory(field: str) -> float:
    """Return a field of /proc/self/status in MB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024 / 1e6


def latents(size: int) -> Any:
    """Return the latents that all sides decode, of the variance that a model's have."""
    return np.random.default_rng(1).standard_normal((1, 4, size // 8, size // 8), np.float32)


def mezzotint(options: argparse.Namespace) -> Decode:
    """Load with mezzotint."""
    import torch

    import mezzotint
    from mezzotint.memory import system

    system.keep_freed()  # as the commands and the server do
    pipe = mezzotint.load(options.folder, device="cpu", dtype=options.dtype)
    return lambda: pipe.decode(torch.from_numpy(latents(options.size)))[0]


def diffusers(options: argparse.Namespace) -> Decode:
    """Load with diffusers."""
    import torch
    from diffusers import DiffusionPipeline

    best, dtype = options.side == "diffusers_best", getattr(torch, options.dtype)
    pipe = DiffusionPipeline.from_pretrained(options.folder, dtype=dtype)
    if best:
        pipe.vae.to(memory_format=torch.channels_last)
        pipe.fuse_qkv_projections()

    def decode() -> Image.Image:
        with torch.inference_mode() if best else torch.no_grad():
            scaled = torch.from_numpy(latents(options.size)).to(dtype) / pipe.vae.config.scaling_factor
            pixels = pipe.vae.decode(scaled, return_dict=False)[0]
        picture: Image.Image = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
        return picture

    return decode


def openvino(options: argparse.Namespace) -> Decode:
    """Compile the decoder with OpenVINO."""
    from openvino_engine import Engine

    engine = Engine(options.folder, options.converted, options.dtype, ("vae",))
    return lambda: Image.fromarray(engine.decode(latents(options.size)))


SIDES = {"mezzotint": mezzotint, "diffusers": diffusers, "diffusers_best": diffusers, "openvino": openvino}

if __name__ == "__main__":
    main()
