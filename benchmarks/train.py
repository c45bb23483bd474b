"""Measure LoRA training steps in one process: `python benchmarks/train.py SIDE MODEL [--size 512] [--steps 3] ...`.

mezzotint is what `mezzotint train lora` runs. diffusers is the recipe of its train_text_to_image_lora.py, written here
with the same libraries (peft, accelerate): the VAE and the text encoder run in each step. diffusers_cached encodes
beforehand and lets both go, as some of its scripts do with --cache_latents and --pre_compute_text_embeddings. All have
the same pictures (of random pixels), LoRA, optimiser, dtype and attention (torch's sdpa).

Prints one JSON object: seconds of a step (`step_s`) and of the processor within it (`step_cpu_s`), medians of all steps
but the first where there are several; numbers that learn (`learn`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RANK, RATE, TARGETS = 8, 1e-4, ("to_q", "to_k", "to_v", "to_out.0")
CAPTION = "a lemon on a blue background"


class Clock:
    """Times of the start and of each step."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def start(self, *_: Any) -> None:
        """Record the start; the last call before the first step counts."""
        self.times = []
        self.step()

    def step(self, *_: Any) -> None:
        """Record the end of a step."""
        self.times.append((time.perf_counter(), time.process_time()))

    def measures(self) -> dict[str, float]:
        """Return medians over the steps."""
        steps = list(zip(self.times, self.times[1:], strict=False))
        walls, processor = ([b[k] - a[k] for a, b in steps[1:] or steps] for k in (0, 1))
        return {"step_s": statistics.median(walls), "step_cpu_s": statistics.median(processor)}


def mezzotint(pictures: Path, options: argparse.Namespace, clock: Clock) -> int:
    """Train with mezzotint's own loop, files and cache."""
    from safetensors import safe_open

    from mezzotint.train.recipe import Recipe
    from mezzotint.train.run import run

    fields = {
        "model": str(options.model),
        "data": str(pictures),
        "resolution": options.size,
        "caption_dropout": 0.0,
        "steps": options.steps,
        "batch": options.batch,
        "lr": RATE,
        "rank": RANK,
        "targets": TARGETS,
        "precision": options.dtype,
        "checkpointing": options.checkpointing,
        "memory": options.memory,
    }
    made = run(
        Recipe.of("lora", None, fields),
        pictures.parent / "run",
        device=options.device,
        say=clock.start,
        on_step=clock.step,
    )
    with safe_open(made[0], "pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118  # it is no mapping


def diffusers(pictures: Path, options: argparse.Namespace, clock: Clock, *, cached: bool = False) -> int:
    """Train as examples/text_to_image/train_text_to_image_lora.py does."""
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from peft import LoraConfig
    from transformers import CLIPTextModel, CLIPTokenizer

    half = options.dtype == "bfloat16"
    accelerator = Accelerator(mixed_precision="bf16" if half else "no", cpu=options.device == "cpu")
    device, dtype = accelerator.device, torch.bfloat16 if half else torch.float32
    scheduler = DDPMScheduler.from_pretrained(options.model, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(options.model, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(options.model, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(options.model, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(options.model, subfolder="unet")
    for network in (unet, vae, text_encoder):
        network.requires_grad_(False)
        network.to(device, dtype)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=[*TARGETS]))
    if options.checkpointing:
        unet.enable_gradient_checkpointing()
    learning = [p for p in unet.parameters() if p.requires_grad]
    count = sum(p.numel() for p in learning)
    optimiser = torch.optim.AdamW(learning, lr=RATE, weight_decay=1e-2)
    rate = get_scheduler("constant", optimiser)

    def pixels(path: Path) -> torch.Tensor:
        array = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
        return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)

    words = {"max_length": tokenizer.model_max_length, "padding": "max_length", "truncation": True}
    ids = tokenizer(CAPTION, return_tensors="pt", **words).input_ids
    dataset = [{"pixels": pixels(path), "ids": ids[0]} for path in sorted(pictures.glob("*.png"))]
    loader = torch.utils.data.DataLoader(dataset, batch_size=options.batch, shuffle=True)  # type: ignore[arg-type]
    unet, optimiser, loader, rate = accelerator.prepare(unet, optimiser, loader, rate)

    def posterior(batch: Any) -> Any:
        return vae.encode(batch["pixels"].to(device, dtype)).latent_dist

    def context(batch: Any) -> torch.Tensor:
        return text_encoder(batch["ids"].to(device), return_dict=False)[0]  # type: ignore[no-any-return]

    kept, scaling = [], vae.config.scaling_factor
    if cached:
        with torch.no_grad():
            kept = [(posterior(batch), context(batch)) for batch in loader]
        del vae, text_encoder
    clock.start()
    for step in range(options.steps):
        if cached:
            distribution, hidden = kept[step % len(kept)]
        else:
            batch = next(iter(loader))
            distribution, hidden = posterior(batch), context(batch)
        latents = distribution.sample() * scaling
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, hidden, return_dict=False)[0]
        accelerator.backward(F.mse_loss(predicted.float(), noise.float()))
        accelerator.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        rate.step()
        optimiser.zero_grad()
        clock.step()
    return count


def write_pictures(folder: Path, size: int, count: int) -> Path:
    """Write pictures of random pixels, each with a caption."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CAPTION)
    return folder


SIDES = {"mezzotint": mezzotint, "diffusers": diffusers, "diffusers_cached": partial(diffusers, cached=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("model", type=Path, help="diffusers folder, such as one by random_model.py")
    parser.add_argument("--size", type=int, default=512, help="picture size in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="steps to run; the first of several is not counted")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--memory", metavar="SIZE", help="memory budget of mezzotint, such as 4GiB")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mezzotint-bench-") as folder:
        pictures, clock = write_pictures(Path(folder) / "pictures", options.size, options.batch), Clock()
        learns = SIDES[options.side](pictures, options, clock)
    print(json.dumps({**clock.measures(), "learn": learns}))


if __name__ == "__main__":
    main()
