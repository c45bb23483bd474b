"""The peer: `python benchmarks/diffusers_picture.py FOLDER PROMPT SEED OUT.png [--few-step] [--best]`.

diffusers draws with a model folder what mezzotint draws: the sampler of its scheduler config, size and guidance of its
mezzotint.json, 20 steps, float32, a CPU generator. `--few-step`: LCMScheduler, and the LoRA, steps and guidance that
mezzotint.json names for it. `--best` adds what diffusers documents as faster on a CPU and does not cost more than it
saves in one picture (compiling does): channels_last, fused projections, inference mode, no bars.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline


def main() -> None:
    folder, prompt, seed, out = sys.argv[1:5]
    best = "--best" in sys.argv
    settings = json.loads((Path(folder) / "mezzotint.json").read_text())
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    steps, guidance_scale = 20, settings["guidance_scale"]
    if "--few-step" in sys.argv:
        few_step = settings["few_step"]
        steps, guidance_scale = few_step["steps"], few_step["guidance_scale"]
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        pipe.load_lora_weights(folder, weight_name=few_step["lora"])
        pipe.fuse_lora()
    if best:
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        pipe.fuse_qkv_projections()
    with torch.inference_mode() if best else nullcontext():
        picture = pipe(
            prompt,
            width=settings["width"],
            height=settings["height"],
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(int(seed)),
        ).images[0]
    picture.save(out)


if __name__ == "__main__":
    main()
