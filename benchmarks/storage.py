"""Measure the cost of each weight storage: `python benchmarks/storage.py [--model M] [--size WxH] [--steps N]`.

Draws the same pictures with each storage of a Placement and prints one JSON object each: the PSNR of the pictures
against those of weights as they are (mean and least, dB), the largest difference of the final latents relative to their
largest, the processor's seconds of a step (median, one thread), and the bytes of weights held.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch

import mezzotint
from mezzotint import Request, Result
from mezzotint.models.offload import OffloadedLayer, StoredWeight
from mezzotint.placement import Placement

WAYS: list[dict[str, Any]] = [
    {},
    {"storage": "float16"},
    {"storage": "bfloat16"},
    {"storage": "int8"},
    {"storage": "int8_dynamic"},
    {"storage": "float8"},
    {"weights": "offload"},
    {"weights": "stream"},
    {"guidance": "split"},
]
PROMPTS = (
    "a lemon on a blue background",
    "a whale left of a small tree",
    "two red apples",
    "a cat",
    "a green car on a yellow background",
    "a large star",
    "an umbrella right of a pizza",
    "a purple flower on a white background",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--size")
    parser.add_argument("--ways", default="", help="only run variants whose name contains this, and the exact one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=len(PROMPTS))
    given = parser.parse_args()
    size = dict(zip(("width", "height"), map(int, given.size.split("x")), strict=True)) if given.size else {}
    requests = [Request(prompt=words, seed=k, steps=given.steps, **size) for k, words in enumerate(PROMPTS)]
    exact: list[Result] = []
    for way in [WAYS[0], *(way for way in WAYS[1:] if given.ways in str(way))]:
        pipe = mezzotint.load(given.model, device="cpu", placement=Placement.of(**way))
        times: list[float] = []
        drawn = []
        for request in requests[: given.pictures]:
            marks = [time.process_time()]
            drawn.append(pipe.generate(request, on_step=lambda *_, marks=marks: marks.append(time.process_time())))
            times += [after - before for before, after in pairwise(marks[1:])] or [marks[1] - marks[0]]
        exact = exact or drawn
        errors = [_psnr(a, b) for a, b in zip(drawn, exact, strict=True)]
        moved = max(
            float((a.latents - b.latents).abs().max() / b.latents.abs().max())
            for a, b in zip(drawn, exact, strict=True)
        )
        record = {
            "way": way,
            "psnr_mean": round(statistics.mean(errors), 1),
            "psnr_least": round(min(errors), 1),
            "latents": moved,
            "step_seconds": round(statistics.median(times), 4),
            "held_bytes": _held(pipe),
        }
        print(json.dumps(record), flush=True)
        del pipe


def _psnr(a: Result, b: Result) -> float:
    """Return the PSNR of the pictures in dB; 100 if they are equal."""
    pixels = [np.asarray(result.images[0], dtype=np.float64) for result in (a, b)]
    error = float(((pixels[0] - pixels[1]) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else 100.0


def _held(pipe: mezzotint.Pipeline) -> int:
    """Return the bytes of weights in memory between runs."""
    total = 0
    for network in (pipe.unet, pipe.vae, *pipe.text_encoders):
        total += sum(parameter.nbytes for parameter in network.parameters())
        for layer in network.modules():
            if isinstance(layer, OffloadedLayer) and isinstance(layer.weight_source, StoredWeight):
                scale = layer.weight_source.scale
                total += layer.weight_source.data.nbytes + (0 if scale is None else scale.nbytes)
    return total


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
