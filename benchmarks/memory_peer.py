"""Peak memory of diffusers on the same folder: `python benchmarks/memory_peer.py FOLDER WxH STEPS [MEASURE ...]`.

Without a measure it is diffusers as it comes. MEASURE: slicing (enable_attention_slicing), vae_slicing, vae_tiling.
What it has beyond these, offloading and group offloading, moves weights between a GPU and the CPU and saves nothing
here. Prints one JSON object: peak RSS in MiB, seconds of loading and of drawing. The other side is memory.py.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import torch
from diffusers import StableDiffusionPipeline

folder, size, steps, *measures = sys.argv[1:]
width, height = map(int, size.split("x"))
start = time.perf_counter()
pipe = StableDiffusionPipeline.from_pretrained(
    folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
)
pipe.set_progress_bar_config(disable=True)
for measure, enable in {
    "slicing": pipe.enable_attention_slicing,
    "vae_slicing": pipe.vae.enable_slicing,
    "vae_tiling": pipe.vae.enable_tiling,
}.items():
    if measure in measures:
        enable()
loaded = time.perf_counter()
pipe("a lemon on a blue background", width=width, height=height, num_inference_steps=int(steps))
drawn = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
record = {"dtype": str(pipe.unet.dtype), "measures": measures, "peak_mib": round(peak)}
seconds = {"load_s": round(loaded - start, 1), "draw_s": round(drawn - loaded, 1)}
print(json.dumps({**record, **seconds, "threads": torch.get_num_threads()}))
