"""The peer: `python benchmarks/diffusers_picture.py FOLDER PROMPT SEED OUT.png [OPTIONS]`.

diffusers draws with a model folder what mezzotint draws: the sampler of its scheduler config, a CPU generator; size and
guidance as given, or those of the folder's mezzotint.json. `--few-step`: LCMScheduler, and the LoRA, steps and guidance
that mezzotint.json names for it. `--best` adds what diffusers documents as faster on a CPU and does not cost more than
it saves in one picture (compiling does): channels_last, fused projections, inference mode, no bars.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, LCMScheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("seed", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--few-step", action="store_true")
    parser.add_argument("--size", type=int)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    file = options.folder / "mezzotint.json"
    settings: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    xl = (options.folder / "text_encoder_2").is_dir()
    unchecked = {} if xl else {"safety_checker": None}
    pipe = DiffusionPipeline.from_pretrained(options.folder, dtype=getattr(torch, options.dtype), **unchecked)
    steps, guidance_scale = options.steps, options.guidance or settings["guidance_scale"]
    if options.few_step:
        few_step = settings["few_step"]
        steps, guidance_scale = few_step["steps"], few_step["guidance_scale"]
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        pipe.load_lora_weights(options.folder, weight_name=few_step["lora"])
        pipe.fuse_lora()
    if options.best:
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        pipe.fuse_qkv_projections()
    with torch.inference_mode() if options.best else nullcontext():
        picture = pipe(
            options.prompt,
            width=options.size or settings["width"],
            height=options.size or settings["height"],
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(options.seed),
        ).images[0]
    picture.save(options.out)


if __name__ == "__main__":
    main()
