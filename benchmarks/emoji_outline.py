"""Judge a ControlNet for outlines: `python benchmarks/emoji_outline.py --control FOLDER [--scenes 256]`.

Held-out scenes of recipes/emoji/outlines.py: one core object of any size anywhere on a background of one colour, in
combinations that no training scene shows; the prompt names neither size nor place. Each is drawn with its outline and
without, from the same seed. Prints and writes JSON:

- object: share of pictures in which the judge's top-1 object of 120 is the prompt's. It looks at the place of the
  outline, and without control at the middle, where the model draws; the real scenes give its own accuracy;
- iou: mean intersection over union of what was drawn (pixels more than 32 of 255 from the border's median colour, holes
  filled) with the outline's inside; `real` and `vae` are the scenes themselves and through the VAE.

Needs the emoji font (recipes/emoji/README.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "emoji"))

import mezzotint
from evaluate import reconstruct, to_pixels, wilson
from judge import Judge, judge_loss, roughen, view
from outlines import HELD_OUT_SEED, Outlines, outline_image
from scenes import PLAIN, SIDE, Scenes, build_atlas, to_images
from words import CORE_NAMES, NAMES

DISTANCE = 32  # of 255, from the border's median colour
JUDGE_SEED, JUDGE_BATCH = 7007, 64


def drawn_mask(picture: np.ndarray) -> np.ndarray:
    """Return where something was drawn on the background, (H, W) boolean, of uint8 (H, W, 3)."""
    border = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]])
    distance = np.abs(picture.astype(float) - np.median(border, axis=0)).max(-1)
    mask: np.ndarray = ndimage.binary_fill_holes(distance > DISTANCE)
    return mask


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max((one | other).sum(), 1))


def look_at(pixels: Tensor, inside: np.ndarray) -> Tensor:
    """Bring an object to the place and size of the judge's scenes: (3, H, W) and its silhouette -> (1, 3, 128, 128)."""
    rows, columns = np.nonzero(inside.any(1))[0], np.nonzero(inside.any(0))[0]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    scale = float(max(bottom - top, right - left) / PLAIN)
    across, down = float(left + right) / SIDE - 1, float(top + bottom) / SIDE - 1
    affine = torch.tensor([[[scale, 0.0, across], [0.0, scale, down]]], dtype=torch.float32)
    grid = F.affine_grid(affine, [1, 3, SIDE, SIDE], align_corners=False)
    return F.grid_sample(pixels[None], grid, padding_mode="border", align_corners=False)


def train_judge(path: Path, steps: int) -> Judge:
    """Load the judge of single core objects, or train it as recipes/emoji/judge.py does and save it."""
    judge = Judge()
    if path.exists():
        judge.load_state_dict(torch.load(path, weights_only=True))
        return judge.eval().requires_grad_(False)
    torch.manual_seed(JUDGE_SEED)
    scenes = Scenes(JUDGE_SEED, shares={"single": 1.0}, core_share=1.0, atlas=build_atlas())
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    judge.train()
    for step in range(steps):
        pixels, _, specs = scenes.batch(range(step * JUDGE_BATCH, (step + 1) * JUDGE_BATCH))
        loss = judge_loss(judge, roughen(pixels, torch.Generator().manual_seed(step)), specs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"judge: step {step + 1} of {steps}, loss {loss.item():.3f}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(judge.state_dict(), path)
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def share_right(judge: Judge, crops: Sequence[Tensor], names: Sequence[str]) -> dict[str, float]:
    """Return the share of pictures that show their object, with its 95 % interval."""
    looks = judge.look(judge.trunk(view(torch.cat(list(crops)), 0)))
    found = judge.name(looks)[:, : len(CORE_NAMES)].argmax(-1).tolist()
    right = sum(number == NAMES.index(name) for number, name in zip(found, names, strict=True))
    low, high = wilson(right, len(names))
    return {"share": right / len(names), "low": low, "high": high}


def sheet(rows: Sequence[Sequence[Image.Image]], texts: Sequence[str], columns: int = 4, side: int = 96) -> Image.Image:
    """Arrange (outline, without, with) in columns, each with its prompt underneath."""
    width, height = 3 * (side + 2) + 14, side + 20
    made = Image.new("RGB", (columns * width, -(-len(rows) // columns) * height), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(size=11)
    for n, (row, text) in enumerate(zip(rows, texts, strict=True)):
        left, top = n % columns * width + 6, n // columns * height + 3
        for k, image in enumerate(row):
            made.paste(image.resize((side, side), Image.Resampling.LANCZOS), (left + k * (side + 2), top))
        draw.text((left + 1.5 * side, top + side + 2), text, "black", font, anchor="ma")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the bundled ControlNet on held-out scenes.")
    parser.add_argument("--control", required=True, help="folder of the ControlNet")
    parser.add_argument("--scenes", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--judge", type=Path, default=Path("build/outline-judge.pt"))
    parser.add_argument("--judge-steps", type=int, default=800)
    parser.add_argument("--judge-only", action="store_true", help="train the judge and judge the real scenes")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--sheet", type=Path, help="PNG of the first 32 scenes")
    options = parser.parse_args()

    judge = train_judge(options.judge, options.judge_steps)
    outlines = Outlines(HELD_OUT_SEED, held_out=True)
    scenes = [outlines.scene(index) for index in range(options.scenes)]
    real, insides = outlines.compose(scenes)
    names, prompts = [scene.name for scene in scenes], [scene.caption for scene in scenes]
    conditions = [outline_image(inside) for inside in insides]
    record: dict[str, Any] = {
        "scenes": options.scenes,
        "seed": HELD_OUT_SEED,
        "steps": options.steps,
        "scale": options.scale,
        "control": Path(options.control).name,
        "judge_steps": options.judge_steps,
        "object": {},
        "iou": {},
    }

    def add(name: str, pixels: Tensor, *, at_outline: bool = True) -> None:
        masks = [drawn_mask(np.array(image)) for image in to_images(pixels)]
        ious = [iou(mask, inside) for mask, inside in zip(masks, insides, strict=True)]
        crops = [look_at(one, inside) if at_outline else one[None] for one, inside in zip(pixels, insides, strict=True)]
        record["object"][name] = share_right(judge, crops, names)
        tenth, half = np.percentile(ious, [10, 50])
        record["iou"][name] = {"mean": float(np.mean(ious)), "tenth": float(tenth), "median": float(half)}
        print(json.dumps({name: {"object": record["object"][name], "iou": record["iou"][name]}}), flush=True)

    add("real", real)
    if options.judge_only:
        return
    pipe = mezzotint.load(dtype=torch.float32)
    add("vae", reconstruct(pipe.vae, real))
    requests = [mezzotint.Request(prompt=text, seed=k, steps=options.steps) for k, text in enumerate(prompts)]
    start = time.process_time()
    without = [result.images[0] for result in pipe.generate(requests)]
    record["seconds_without"] = (time.process_time() - start) / options.scenes
    add("without", to_pixels(without), at_outline=False)
    start, controlled = time.process_time(), []
    for k, (request, image) in enumerate(zip(requests, conditions, strict=True)):
        control = {"file": options.control, "image": image, "scale": options.scale}
        controlled += pipe.generate(request.replace(control=[control])).images
        if k % 32 == 31:
            print(f"{k + 1} of {options.scenes}", file=sys.stderr, flush=True)
    record["seconds_with"] = (time.process_time() - start) / options.scenes
    add("with", to_pixels(controlled))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.sheet:
        rows = list(zip(conditions, without, controlled, strict=True))[:32]
        sheet(rows, prompts[:32]).quantize(256, dither=Image.Dither.NONE).save(options.sheet, optimize=True)


if __name__ == "__main__":
    main()
