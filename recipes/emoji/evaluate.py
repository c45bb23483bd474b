"""Compute the figures of the model card on combinations of words that were held out of training.

A judge (judge.py), trained only on rendered scenes of the training split and then frozen, classifies what a picture
shows. There are two tables: one for prompts of the core objects and one for prompts of all objects. Their rows:

- the model's pictures, one for each prompt, with the prompt's index as the seed;
- real scenes through the VAE: the scenes that the prompts describe, rendered, encoded and decoded;
- nearest training scenes: each of the model's pictures replaced by its nearest neighbour (in pixels) among 10,000
  rendered training scenes. A model that copies its training data would match this row;
- real scenes: the judge's own accuracy;
- the model's pictures judged against another prompt of the same kind: the chance level.

Columns (intervals are Wilson's, 95 %):

- object: the top-1 object of a single or recoloured scene is the requested one;
- background: the top-1 background of 38 is the requested one; ground colour: its colour matches, whatever its pattern;
- both objects: the top-1 objects in the two places of a pair are the requested ones, in either order;
- relation: the layout is the requested one, and the requested order is likelier than the opposite one ("next to" has
  no order);
- recolour: the top-1 colour, of six and "unchanged", is the requested one;
- count: the number of places is the requested one, and the top-1 object in each is the requested one;
- everything: all of the above that apply to the prompt. No training scene can satisfy this for a held-out prompt;
- Fréchet: the distance in the judge's feature space to 2,000 other real held-out scenes (the row of real scenes is
  therefore the lower bound for this number of pictures).

    python recipes/emoji/evaluate.py --model src/mezzotint/data/emoji --prompts 240 --out figures.json
    python recipes/emoji/evaluate.py --judge-only          # train the judge (once; cached) and print its row
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from judge import JUDGE_FILE, JUDGE_STEPS, PLACES, Judge, fingerprint, in_place, layout_of, recolour_of, train_judge
from scenes import PROMPT_KINDS, Scenes, build_atlas
from words import CORE_NAMES, GROUNDS, NAMES, Spec

COLUMNS = ("object", "background", "ground colour", "both objects", "relation", "recolour", "count", "everything")
PROMPT_SEED, REFERENCE_SEED, POOL_SEED = 2002, 3003, 4004  # neither the trainer's nor the judge's
REFERENCE, POOL = 2_000, 10_000  # scenes
DRAWN, REAL = "the model's pictures", "real scenes (the judge's own accuracy)"
Row = dict[str, dict[str, float]]

# ---- figures -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def verdicts(judge: Judge, pixels: Tensor, specs: Sequence[Spec]) -> dict[str, list[bool]]:
    """Return, for each column, one answer for each scene it applies to; pixels (B, 3, 128, 128) in [-1, 1]."""
    heads = [torch.cat(parts) for parts in zip(*(judge(chunk) for chunk in torch.split(pixels, 64)), strict=True)]
    objects, background, layout, recolour = heads
    answers: dict[str, list[bool]] = {column: [] for column in COLUMNS}
    for b, spec in enumerate(specs):
        ground = GROUNDS[int(background[b].argmax())]
        seen, wanted = int(layout[b].argmax()), in_place(spec)
        found = objects[b, list(PLACES[seen])].argmax(-1).tolist()
        given = {
            "background": ground == spec.background,
            "ground colour": ground.split()[0] == spec.background.split()[0],
        }
        if spec.number:
            given["count"] = found == wanted
        elif spec.relation:
            given["both objects"] = sorted(found) == sorted(wanted)
            near, far = objects[b, list(PLACES[layout_of(spec)])].log_softmax(-1)
            in_order = bool(near[wanted[0]] + far[wanted[1]] > near[wanted[1]] + far[wanted[0]])
            given["relation"] = seen == layout_of(spec) and (in_order or spec.relation == "next to")
        else:
            given["object"] = int(objects[b, 0].argmax()) == wanted[0]
        if spec.recolour:
            given["recolour"] = int(recolour[b].argmax()) == recolour_of(spec)
        for column, answer in (given | {"everything": all(given.values())}).items():
            answers[column].append(answer)
    return answers


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def figures(answers: dict[str, list[bool]]) -> Row:
    """Return share, interval and n of every column with answers."""
    row = {}
    for column, given in answers.items():
        if given:
            low, high = wilson(sum(given), len(given))
            row[column] = {"share": sum(given) / len(given), "low": low, "high": high, "n": len(given)}
    return row


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the PSNR of each picture in dB, (B,); pixels are in [-1, 1], so the peak is 2."""
    return 10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)).clamp(min=1e-10))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the SSIM of each picture, (B,) (Wang et al. 2004): Gaussian window of 11, sigma 1.5, per channel."""
    ramp = torch.arange(11, dtype=a.dtype, device=a.device) - 5
    bell = torch.exp(-ramp.square() / (2 * 1.5**2))
    window = torch.outer(bell, bell) / bell.sum() ** 2
    kernel = window.expand(a.shape[1], 1, 11, 11)

    def local(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, groups=x.shape[1])

    a, b = (a + 1) / 2, (b + 1) / 2
    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    both = local(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.mean((1, 2, 3))


def shuffled(specs: Sequence[Spec]) -> list[Spec]:
    """Replace each spec by another of its kind, by rotating the list of each kind by half its length."""
    other = list(specs)
    for kind in {spec.kind for spec in specs}:
        where = [i for i, spec in enumerate(specs) if spec.kind == kind]
        for k, i in enumerate(where):
            other[i] = specs[where[(k + len(where) // 2) % len(where)]]
    return other


@torch.no_grad()
def features(judge: Judge, pixels: Tensor) -> Tensor:
    """Return the judge's features (B, 192), float64, on the CPU."""
    return torch.cat([judge.features(chunk) for chunk in torch.split(pixels, 64)]).double().cpu()


def frechet(a: Tensor, b: Tensor) -> float:
    """Return the Fréchet distance of Gaussians fitted to a (n, d) and b (m, d) (Heusel et al. 2017, eq. 6).

    |mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)), with the trace of the symmetric (A^.5 B A^.5)^.5.
    """
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared)


def nearest(pixels: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of each picture's nearest neighbour in the pool (N, 3, H, W), and the RMS difference."""
    distance, number = torch.cdist(pixels.flatten(1), pool.flatten(1)).min(1)
    return number, distance / math.sqrt(pixels[0].numel())


def table(rows: Mapping[str, Row], distances: Mapping[str, float]) -> str:
    """Format rows as a Markdown table: "93 % (89-96)" in each cell, n in the heading, Fréchet distances last."""
    counts = {column: int(cell["n"]) for row in rows.values() for column, cell in row.items()}
    heads = [*(f"{column} (n={counts[column]})" for column in COLUMNS if column in counts), "Fréchet"]
    lines = [f"| on held-out combinations | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for name, row in rows.items():
        cells = [
            f"{100 * cell['share']:.0f} % ({100 * cell['low']:.0f}-{100 * cell['high']:.0f})"
            for cell in (row[column] for column in COLUMNS if column in row)
        ]
        distance = f"{distances[name]:.2f}" if name in distances else ""
        lines.append(f"| {name} | {' | '.join([*cells, distance])} |")
    return "\n".join(lines)


# ---- the model -----------------------------------------------------------------------------------------------------


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Convert PIL images of equal size to pixels (B, 3, H, W) in [-1, 1]."""
    flat = [torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8) for image in images]
    width, height = images[0].size
    return torch.stack(flat).view(-1, height, width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw(pipe: Any, prompts: Sequence[str], settings: dict[str, Any], report: Callable[[str], None] = print) -> Tensor:
    """Generate one picture for each prompt, with its index as the seed: (B, 3, 128, 128) in [-1, 1]."""
    import mezzotint

    requests = [mezzotint.Request(prompt=prompt, seed=i, **settings) for i, prompt in enumerate(prompts)]
    images: list[Image.Image] = []
    start = time.monotonic()
    for first in range(0, len(requests), 20):
        for result in pipe.generate(requests[first : first + 20]):
            images += result.images
        left = (time.monotonic() - start) / len(images) * (len(requests) - len(images))
        report(f"drawn {len(images)} of {len(requests)}, {left:.0f} s left")
    return to_pixels(images)


@torch.no_grad()
def reconstruct(vae: Any, pixels: Tensor) -> Tensor:
    """Encode pixels to the posterior's mean and decode it: (B, 3, H, W) in [-1, 1], float32."""
    weight = next(vae.parameters())
    parts = [vae.decode(vae.encode(chunk.to(weight)).mean) for chunk in torch.split(pixels, 8)]
    return torch.cat(parts).float().clamp(-1, 1).to(pixels.device)


def in_chunks(scenes: Scenes, specs: Sequence[Spec], function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to the pixels of many scenes, 64 at a time."""
    return torch.cat([function(scenes.compose(specs[k : k + 64])) for k in range(0, len(specs), 64)])


def judge_model(
    judge: Judge, pipe: Any, count: int, settings: dict[str, Any], atlas: Mapping[int, Tensor], *, core: bool
) -> dict[str, Any]:
    """Return one table's figures for `count` held-out prompts; without a pipeline, only the judge's own accuracy."""
    device = next(judge.parameters()).device
    captions, specs = (list(part) for part in zip(*Scenes.prompts(count, PROMPT_SEED, core=core), strict=True))
    scenes = Scenes(PROMPT_SEED, device, atlas=atlas)
    real = scenes.compose(specs)
    others = [spec for _, spec in Scenes.prompts(REFERENCE, REFERENCE_SEED, core=core)]
    reference = in_chunks(scenes, others, lambda pixels: features(judge, pixels))
    record: dict[str, Any] = {}
    pictures = {REAL: real}
    if pipe:
        drawn = draw(pipe, captions, settings).to(real)
        rebuilt = reconstruct(pipe.vae, real)
        record["vae"] = {"psnr_db": psnr(real, rebuilt).mean().item(), "ssim": ssim(real, rebuilt).mean().item()}
        shares = {kind: PROMPT_KINDS.count(kind) / len(PROMPT_KINDS) for kind in PROMPT_KINDS}
        _, pool = Scenes(POOL_SEED, shares=shares, core_share=1.0 if core else len(CORE_NAMES) / len(NAMES)).specs(
            range(POOL)
        )
        small = in_chunks(scenes, pool, lambda pixels: F.avg_pool2d(pixels, 4))
        numbers, apart = nearest(F.avg_pool2d(drawn, 4), small)
        _, real_apart = nearest(F.avg_pool2d(real, 4), small)
        record["nearest"] = {"pool": POOL, "rms": apart.mean().item(), "rms_of_real": real_apart.mean().item()}
        near = scenes.compose([pool[n] for n in numbers.tolist()])
        pictures = {DRAWN: drawn, "real scenes through the VAE": rebuilt, "nearest training scenes": near} | pictures
    record["rows"] = {name: figures(verdicts(judge, pixels, specs)) for name, pixels in pictures.items()}
    record["frechet"] = {name: frechet(features(judge, pixels), reference) for name, pixels in pictures.items()}
    if pipe:
        record["rows"][f"{DRAWN}, prompts shuffled"] = figures(verdicts(judge, drawn, shuffled(specs)))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate the emoji model on held-out combinations.")
    parser.add_argument("--model", default=None, help="model folder [default: the bundled model]")
    parser.add_argument("--prompts", type=int, default=1000, help="number of prompts for each table")
    parser.add_argument("--objects", choices=("core", "all", "both"), default="both")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", default=None, help="sampler [default: the model's own]")
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--judge", type=Path, default=JUDGE_FILE, help="file of the judge's weights")
    parser.add_argument("--judge-steps", type=int, default=JUDGE_STEPS)
    parser.add_argument("--judge-only", action="store_true", help="evaluate only the judge, on real scenes")
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    options = parser.parse_args()

    atlas = build_atlas()
    judge = train_judge(options.judge, options.device, atlas, options.judge_steps)
    settings = {"steps": options.steps, "sampler": options.sampler, "guidance_scale": options.guidance}
    record: dict[str, Any] = {
        "prompts": options.prompts,
        "prompt_seed": PROMPT_SEED,
        "judge": {"steps": options.judge_steps, "fingerprint": fingerprint(options.judge_steps, atlas)},
        "torch": torch.__version__,
    }
    pipe = None
    if not options.judge_only:
        import mezzotint

        pipe = mezzotint.load(*([options.model] if options.model else []), device=options.device)
        record |= {"model": options.model or "bundled", **settings}
    for part in ("core", "all") if options.objects == "both" else (options.objects,):
        found = judge_model(judge, pipe, options.prompts, settings, atlas, core=part == "core")
        record[part] = found
        print(f"\n{len(CORE_NAMES if part == 'core' else NAMES)} objects\n\n{table(found['rows'], found['frechet'])}")
        if pipe:
            vae, near = found["vae"], found["nearest"]
            print(
                f"\nVAE on real held-out scenes: PSNR {vae['psnr_db']:.1f} dB, SSIM {vae['ssim']:.3f}. RMS difference"
                f" from the nearest training scene: pictures {near['rms']:.3f}, real held-out scenes"
                f" {near['rms_of_real']:.3f}"
            )
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(f"figures written to {options.out}")


if __name__ == "__main__":
    main()
