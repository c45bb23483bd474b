"""Measure how well the attention maps of `mezzotint explain` locate the objects.

Twenty prompts of two objects are generated once each, with the index as the seed; the same twenty scenes are also
rendered, noised and denoised, so that the true place of each object is known. For each object's word, the share of its
map is measured

- in the half of the picture where the prompt puts the object (chance: 50 %);
- in the box of 64x64 pixels around the centre of that half (chance: 25 %); for rendered scenes, in the glyph's own box
  of 56x56 pixels (19 %).

A map cannot lie in the place named by the prompt if the object does not: --judge adds a row for the pictures in which
the judge finds both objects in their places.

    python recipes/emoji/maps.py --model src/mezzotint/data/emoji [--judge FILE] [--out figures.json]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mezzotint
from evaluate import to_pixels, verdicts
from judge import JUDGE_STEPS, train_judge
from mezzotint import samplers
from mezzotint.explain.maps import Explanation, explain
from scenes import PAIR, SIDE, Scenes, build_atlas
from words import Spec, with_article

PAIRS = (
    *(("lemon", "whale"), ("owl", "rose"), ("camel", "cake"), ("skull", "rocket"), ("mouse", "bus")),
    *(("tractor", "heart"), ("frog", "pizza"), ("fox", "tent"), ("lion", "zebra"), ("train", "cactus")),
    *(("castle", "guitar"), ("hamburger", "lollipop"), ("giraffe", "tree"), ("shirt", "pear"), ("cat", "camera")),
    *(("watermelon", "pig"), ("penguin", "car"), ("banana", "snail"), ("turtle", "strawberry"), ("dog", "mushroom")),
)
RELATIONS = ("left of", "right of", "above", "below")
COLOURS = ("blue", "pink", "white", "green", "grey")
NOISED = (1.0, 0.6, 0.3, 0.1, 0.0)  # noise levels of the rendered scenes: the objects stay what and where they are
Box = tuple[int, int, int, int]  # left, top, right, bottom


def spec_of(number: int) -> Spec:
    """Return one of the twenty scenes."""
    relation = RELATIONS[number % 4]
    near, far = (0, SIDE // 2) if relation in ("left of", "above") else (SIDE // 2, 0)
    gap, across = (SIDE // 2 - PAIR) // 2, (SIDE - PAIR) // 2
    along = [place + gap for place in (near, far)]
    stacked = relation in ("above", "below")
    corners = tuple((across, a) if stacked else (a, across) for a in along)
    return Spec("pair", PAIRS[number], COLOURS[number % 5], (PAIR, PAIR), corners, relation)


def prompt_of(spec: Spec) -> str:
    first, second = (with_article(name, name) for name in spec.objects)
    return f"{first} {spec.relation} {second} on {with_article(spec.background, '')} background"


def boxes(spec: Spec, k: int) -> tuple[Box, Box]:
    """Return the half that should hold object k, and the box around its centre."""
    first = (spec.relation in ("left of", "above")) == (k == 0)
    low, high = (0, SIDE // 2) if first else (SIDE // 2, SIDE)
    middle = SIDE // 4, 3 * SIDE // 4
    if spec.relation in ("above", "below"):
        return (0, low, SIDE, high), (middle[0], low, middle[1], high)
    return (low, 0, high, SIDE), (low, middle[0], high, middle[1])


def inside(heat: Tensor, box: Box) -> float:
    """Return the share of a map (H, W) inside the box; 0 for an empty map."""
    left, top, right, bottom = box
    return float(heat[top:bottom, left:right].sum() / heat.sum().clamp(min=1e-12))


def shares(explanation: Explanation, spec: Spec, glyphs: bool = False, **options: Any) -> list[tuple[float, float]]:
    """Return (share in the half, share in the box) for each of the two words."""
    found = []
    for k, name in enumerate(spec.objects):
        heat = explanation.map(name, **options)
        half, box = boxes(spec, k)
        if glyphs:
            (x, y), size = spec.corners[k], spec.sizes[k]
            box = x, y, x + size, y + size
        found.append((inside(heat, half), inside(heat, box)))
    return found


def summary(found: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return means over the words, and the fraction of maps that lie mostly in the right half."""
    halves, squares = zip(*found, strict=True)
    return {
        "half": sum(halves) / len(found),
        "box": sum(squares) / len(found),
        "right half": sum(half > 0.5 for half in halves) / len(found),
        "words": len(found),
    }


def explain_scene(pipe: mezzotint.Pipeline, pixels: Tensor, request: mezzotint.Request) -> Explanation:
    """Explain a rendered scene, noised to the first level of NOISED and denoised from there."""
    with torch.inference_mode():
        z = pipe.vae.scale(pipe.vae.encode(pixels).mean).float()
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(request.seed or 0))
    request = request.replace(sampler="euler", sigmas=NOISED)
    vp = samplers.resolve("euler", pipe.scheduler_config).start == "vp"
    start = math.sqrt(NOISED[0] ** 2 + 1) if vp else NOISED[0]  # what the pipeline multiplies latents by
    return explain(pipe, request, (z + NOISED[0] * noise) / start)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how well attention maps locate the objects.")
    parser.add_argument("--model", type=Path, default=None, help="model folder [default: the bundled model]")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--judge", type=Path, help="file of the judge; trained first if missing")
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    options = parser.parse_args()

    pipe = mezzotint.load(options.model, device="cpu")
    specs = [spec_of(number) for number in range(len(PAIRS))]
    requests = [mezzotint.Request(prompt=prompt_of(spec), seed=k, steps=options.steps) for k, spec in enumerate(specs)]
    drawn = [explain(pipe, request) for request in requests]
    pixels = Scenes(0).compose(specs)
    real = [explain_scene(pipe, pixels[k : k + 1], request) for k, request in enumerate(requests)]

    rows: dict[str, dict[str, float]] = {}

    def add(name: str, chosen: Sequence[int], explanations: Sequence[Explanation], **how: Any) -> None:
        found = [pair for k in chosen for pair in shares(explanations[k], specs[k], **how)]
        if found:
            rows[name] = summary(found)

    everything = range(len(specs))
    add("drawn", everything, drawn)
    if options.judge:
        judge = train_judge(options.judge, "cpu", build_atlas(), JUDGE_STEPS)
        answers = verdicts(judge, to_pixels([e.result.images[0] for e in drawn]), specs)
        as_asked = [k for k in everything if answers["both objects"][k] and answers["relation"][k]]
        add("drawn, both objects in their places", as_asked, drawn)
    add("rendered", everything, real, glyphs=True)
    add("drawn, plain shares of attention", everything, drawn, relative=False)
    add("rendered, plain shares of attention", everything, real, glyphs=True, relative=False)
    names = [name.removesuffix(".transformer_blocks.0.attn2") for name in drawn[0].layers]
    add("rendered, all layers", everything, real, glyphs=True, layers=range(len(names)))
    for layer, name in enumerate(names):
        add(f"rendered, {name}", everything, real, glyphs=True, layers=[layer])

    print(f"{'':48}{'half':>8}{'box':>8}{'right half':>12}{'words':>7}")
    for name, row in rows.items():
        print(f"{name:48}{row['half']:8.1%}{row['box']:8.1%}{row['right half']:12.1%}{row['words']:7}")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
