"""Whole pictures by both: a folder that diffusers wrote, loaded by diffusers and by us, the same request.

One small random model of each family, with the scheduler_config.json that the hub has. The tests hold the two against
each other, and table.py and the tests as scripts print how far apart they are.
"""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

import mezzotint
import tiny
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.samplers.diffusers_classes import CLASSES

FAMILIES = tuple(tiny.SCHEDULER_CONFIGS)
PROMPT = "a red lemon, left of a whale!"
NEGATIVE = "blurry"
SIZE = (40, 56)  # latents of 5x7: odd, so that a level down is rounded up

Theirs = StableDiffusionPipeline | StableDiffusionXLPipeline


@dataclass
class Pair:
    """One model, loaded twice."""

    theirs: Theirs
    ours: mezzotint.Pipeline
    scheduler: Any  # their own; runs replace it


@dataclass
class Drawn:
    """Final latents (count, C, h, w) and pictures (count, H, W, 3), 0 to 255."""

    latents: Tensor
    pixels: np.ndarray[Any, np.dtype[np.int16]]


Both = Callable[[dict[str, Pair], str, str, Path], tuple[Drawn, Drawn] | None]


def save(folder: Path, family: str, tokenizer: Tokenizer, encoders: list[Any], unet: Any, vae: Any) -> None:
    """Write the model as diffusers does, then the scheduler's file as the hub has it."""
    tokenizer.save(folder / "cut")
    config = tiny.SCHEDULER_CONFIGS[family]
    parts = {
        "unet": unet,
        "vae": vae,
        "scheduler": getattr(diffusers, str(config["_class_name"])).from_config(config),
        "text_encoder": encoders[0],
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "cut"),
    }
    if family == "sdxl":
        parts |= {
            "text_encoder_2": encoders[1],
            "tokenizer_2": CLIPTokenizer.from_pretrained(folder / "cut", pad_token="!"),
        }
        StableDiffusionXLPipeline(**parts).save_pretrained(folder)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        StableDiffusionPipeline(**parts).save_pretrained(folder)
    shutil.rmtree(folder / "cut")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


def load(folder: Path, family: str) -> Pair:
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    theirs = kind.from_pretrained(folder, low_cpu_mem_usage=False)
    theirs.set_progress_bar_config(disable=True)
    return Pair(theirs, mezzotint.load(folder, device="cpu"), theirs.scheduler)


def build(place: Path) -> dict[str, Pair]:
    """One model of each family, in folders under `place`."""
    tokenizer = Tokenizer.subset([PROMPT, NEGATIVE])
    ids = {"vocab_size": len(tokenizer.vocab), "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    loaded = {}
    for family in FAMILIES:
        folder = place / family
        folder.mkdir()
        encoders = [tiny.clip(family, **ids)]
        if family == "sdxl":
            encoders.append(tiny.clip(family, seed=3, projection=True, **ids))
        factor = {"scaling_factor": 0.13025} if family == "sdxl" else {}
        save(folder, family, tokenizer, encoders, tiny.unet(family), tiny.vae(**factor))
        loaded[family] = load(folder, family)
    return loaded


def fields(**changes: Any) -> dict[str, Any]:
    """A request: one picture of SIZE, guided."""
    usual = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "width": SIZE[0],
        "height": SIZE[1],
        "steps": 5,
        "guidance_scale": 7.5,
        "seed": 7,
        "count": 1,
    }
    return usual | changes


def theirs(pair: Pair, request: dict[str, Any], latents: Tensor | None = None, **flags: Any) -> Drawn:
    """What their pipeline draws: the scheduler of `request["sampler"]`, with `flags`, made from the model's own."""
    return draw(pair.theirs, pair.scheduler, request, flags, latents=latents)


NAMES = {
    "steps": "num_inference_steps",
    "count": "num_images_per_prompt",
    "mask": "mask_image",
    "only_masked": "padding_mask_crop",
    "crop": "crops_coords_top_left",
}


def draw(pipe: Any, own: Any, request: dict[str, Any], flags: dict[str, Any] | None = None, **options: Any) -> Drawn:
    """What a pipeline of theirs draws for a request.

    Args:
        pipe: The pipeline.
        own: The model's scheduler, from whose configuration that of `request["sampler"]` is made.
        request: Fields of a Request that it has arguments for.
        flags: Other values of the scheduler's configuration.
        options: Further arguments of the pipeline.
    """
    pipe.set_progress_bar_config(disable=True)
    given = {NAMES.get(name, name): value for name, value in request.items()}
    seed, sampler = given.pop("seed"), given.pop("sampler", None)
    pipe.scheduler = own
    if sampler is not None:
        row = CLASSES[sampler]
        pipe.scheduler = getattr(diffusers, row.name).from_config(own.config, **(flags or {}) | row.flags)
        if hasattr(pipe.scheduler, "noise_sampler_seed"):  # it draws nothing from the generators
            pipe.scheduler.noise_sampler_seed = [seed + k for k in range(request["count"])]
    generators = [torch.Generator().manual_seed(seed + k) for k in range(request["count"])]
    final: list[Tensor] = []

    def keep(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        final[:] = [tensors["latents"]]
        return {}

    def keep_last(_index: int, _timestep: Any, latents: Tensor) -> None:
        final[:] = [latents]

    new = "callback_on_step_end" in inspect.signature(pipe.__call__).parameters
    hook = {"callback_on_step_end": keep} if new else {"callback": keep_last}
    images = pipe(**{**given, "generator": generators, **hook, **options}).images
    return Drawn(final[0], pixels(images))


def ours(pair: Pair, request: dict[str, Any], latents: Tensor | None = None, batch: int | None = 2) -> Drawn:
    result = pair.ours.generate(mezzotint.Request(**request, batch=batch), latents=latents)
    return Drawn(result.latents, pixels(result.images))


def kind_of(request: dict[str, Any]) -> str:
    """Which pipeline of theirs a request needs: of a mask, a picture or text."""
    return "mask" if "mask" in request else "picture" if "image" in request else "text"


def unsized(request: dict[str, Any]) -> dict[str, Any]:
    """A request for a pipeline that takes the size of its picture."""
    return {name: value for name, value in request.items() if name not in ("width", "height")}


def only_inside(mask: Image.Image, *drawn: Drawn) -> tuple[Drawn, ...]:
    """Pictures without their pixels outside a mask, where diffusers keeps none of the original."""
    inside = np.asarray(mask) > 127
    for each in drawn:
        each.pixels[:, ~inside] = 0
    return drawn


def print_table(title: str, columns: Sequence[str], cases: Iterable[str], both: Both) -> None:
    """Print how far apart pictures are, a row for each case and a column for each family.

    `both(pairs, family, case, place)` returns a case's picture by both, or None where there is none.
    """
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        pairs = build(Path(folder))
        print(f"| {title} | " + " | ".join(f"{family}: latents, pixels" for family in columns) + " |")
        for case in cases:
            cells = []
            for family in columns:
                drawn = both(pairs, family, case, Path(folder, "files", case, family))
                latents, greatest, _ = apart(*drawn) if drawn else (0.0, 0, 0.0)
                cells.append(f"{latents:.1e}, {greatest}" if drawn else "")
            print(f"| {case} | {' | '.join(cells)} |")


def pixels(images: list[Image.Image]) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def apart(a: Drawn, b: Drawn) -> tuple[float, int, float]:
    """Greatest difference of the latents, relative to the greatest value; of the pixels, greatest and mean."""
    assert a.latents.shape == b.latents.shape and a.pixels.shape == b.pixels.shape
    assert a.latents.isfinite().all() and b.latents.isfinite().all()
    levels = np.abs(a.pixels - b.pixels)
    return float((a.latents - b.latents).abs().max() / b.latents.abs().max()), int(levels.max()), float(levels.mean())


def same(a: Drawn, b: Drawn) -> None:
    latents, greatest, mean = apart(a, b)
    assert latents < 1e-4
    assert greatest <= 1
    assert mean < 0.01


def different(a: Drawn, b: Drawn) -> None:
    assert apart(a, b)[1] > 5
