"""The judge: figures for the model card, on combinations of words that were never trained on.

A small classifier, trained only on rendered scenes of the training split and then frozen, says what a picture shows.
Its own accuracy on real held-out scenes stands beside the model's figures, as does that of the VAE's reconstructions,
and the chance floor: the model's pictures judged by another prompt of the same kind. Intervals are Wilson's, 95 %.

    python recipes/emoji/evaluate.py --model src/mezzotint/data/emoji --prompts 240 --steps 20 --out figures.json
    python recipes/emoji/evaluate.py --judge-only          # train the judge (once; kept in ~/.cache) and show its row

What each column asks (n in brackets: the share of the prompts that ask it):
- object (3/4): the object of a single or recoloured scene is the likeliest of all 120;
- background (all): the named one is the likeliest of 12;
- both objects (1/4): the likeliest object in each place is one of the two wanted, in either order;
- relation (1/4): side by side or stacked as asked, and the wanted order is likelier than the opposite one;
- recolour (1/4): the named colour is the likeliest of six and "as it is".
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from scenes import BACKGROUNDS, NAMES, RECOLOURS, Scenes, Spec

COLUMNS = ("object", "background", "both objects", "relation", "recolour")
LAYOUTS = ("one", "side by side", "stacked")
JUDGE_SEED, PROMPT_SEED = 1001, 2002  # neither is the trainer's
JUDGE_SHARES = {"single": 0.35, "sized": 0.10, "recoloured": 0.20, "pair": 0.35}
JUDGE_STEPS, JUDGE_BATCH = 800, 64  # 51,000 scenes, about five minutes on one core
JUDGE_SAVE_EVERY = 100  # steps
JUDGE_FILE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mezzotint" / "emoji-judge.pt"

# ---- the judge -----------------------------------------------------------------------------------------------------


class Judge(nn.Module):
    """What does a picture show? One classifier of objects reads five windows: the whole, and each half.

    forward(pixels (B, 3, 128, 128) in [-1, 1]) -> objects (B, 5, 120) for whole, left, right, top, bottom;
    background (B, 12); layout (B, 3); recolour (B, 7), the last being "as it is". All are logits.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for into, out, kernel, stride in (
            (3, 24, 5, 2),
            (24, 64, 3, 2),
            (64, 96, 3, 2),
            (96, 128, 3, 1),
            (128, 128, 3, 1),
        ):
            # Batch norm, since group norm would take each picture's own colour away.
            layers += [nn.Conv2d(into, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)  # (B, 3, 64, 64) -> (B, 128, 8, 8)
        self.objects = nn.Linear(256, len(NAMES))
        self.background = nn.Linear(256, len(BACKGROUNDS))
        self.layout = nn.Linear(5 * 256, len(LAYOUTS))
        self.recolour = nn.Linear(256, len(RECOLOURS) + 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grid = self.trunk(F.avg_pool2d(pixels, 2))
        windows = (grid, grid[..., :4], grid[..., 4:], grid[..., :4, :], grid[..., 4:, :])
        pooled = torch.stack([torch.cat([w.mean((2, 3)), w.amax((2, 3))], 1) for w in windows], 1)  # (B, 5, 256)
        whole = pooled[:, 0]
        return self.objects(pooled), self.background(whole), self.layout(pooled.flatten(1)), self.recolour(whole)


def layout_of(spec: Spec) -> int:
    return {None: 0, "left of": 1, "right of": 1, "above": 2, "below": 2}[spec.relation]


def in_place(spec: Spec) -> list[int]:
    """The objects' numbers as the picture is read: left to right, or top to bottom."""
    numbers = [NAMES.index(name) for name in spec.objects]
    return numbers[::-1] if spec.relation in ("right of", "below") else numbers


def places(layout: int) -> slice:
    """The windows in which a layout's objects stand."""
    return (slice(0, 1), slice(1, 3), slice(3, 5))[layout]


def recolour_of(spec: Spec) -> int:
    return list(RECOLOURS).index(spec.recolour) if spec.recolour else len(RECOLOURS)


def soften(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Training pictures as a decoder might draw them: some blurred, with noise, a little lighter or darker."""
    batch = len(pixels)
    blurred = F.interpolate(F.avg_pool2d(pixels, 4), scale_factor=4, mode="bilinear", align_corners=False)
    amounts = torch.rand(3, batch, 1, 1, 1, generator=generator)
    pixels = torch.lerp(pixels, blurred, (2 * amounts[0] - 1).clamp(min=0).to(pixels.device))
    noise = torch.randn(batch, 3, 64, 64, generator=generator) * 0.2 * amounts[1]
    noise = F.interpolate(noise.to(pixels.device), scale_factor=2)
    return pixels * (0.9 + 0.2 * amounts[2]).to(pixels.device) + noise


def judge_loss(judge: Judge, pixels: Tensor, specs: Sequence[Spec]) -> Tensor:
    """Cross-entropy of every head, summed; objects are asked only in the windows where they stand."""
    device = pixels.device
    objects, background, layout, recolour = judge(pixels)
    asked = [
        (b, window, number)
        for b, spec in enumerate(specs)
        for window, number in zip(range(5)[places(layout_of(spec))], in_place(spec), strict=True)
    ]
    row, window, number = torch.tensor(asked, device=device).T
    single = [b for b, spec in enumerate(specs) if spec.relation is None]

    def targets(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device)

    return (
        F.cross_entropy(objects[row, window], number)
        + F.cross_entropy(background, targets([list(BACKGROUNDS).index(spec.background) for spec in specs]))
        + F.cross_entropy(layout, targets([layout_of(spec) for spec in specs]))
        + F.cross_entropy(recolour[single], targets([recolour_of(specs[b]) for b in single]))
    )


def fingerprint(steps: int) -> str:
    """What a judge depends on: this file, the scenes, the objects, the steps. A judge of another one is not used."""
    here = Path(__file__).parent
    parts = [(here / name).read_bytes() for name in ("evaluate.py", "scenes.py", "objects.txt")]
    return hashlib.sha256(b"\0".join([*parts, str(steps).encode()])).hexdigest()[:16]


def train_judge(path: Path, device: str, steps: int = JUDGE_STEPS, report: Callable[[str], None] = print) -> Judge:
    """The frozen judge: read from `path`, or trained on training scenes and written there; goes on after a kill."""
    torch.manual_seed(JUDGE_SEED)
    judge = Judge().to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    parts: dict[str, Any] = {"judge": judge, "optimizer": optimizer, "schedule": schedule}
    mark, done = fingerprint(steps), 0
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved["fingerprint"] == mark:
            done = saved["done"]
            for name, part in parts.items():
                part.load_state_dict(saved[name])
    scenes = Scenes(JUDGE_SEED, device, shares=JUDGE_SHARES)
    start, first = time.monotonic(), done
    judge.train()
    while done < steps:
        pixels, _, specs = scenes.batch(range(done * JUDGE_BATCH, (done + 1) * JUDGE_BATCH))
        loss = judge_loss(judge, soften(pixels, torch.Generator().manual_seed(done)), specs)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        done += 1
        if done % JUDGE_SAVE_EVERY == 0 or done == steps:
            state = {name: part.state_dict() for name, part in parts.items()} | {"fingerprint": mark, "done": done}
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
            left = (time.monotonic() - start) / (done - first) * (steps - done)
            report(f"judge: step {done} of {steps}, loss {loss.item():.3f}, {left:.0f} s left")
    return judge.eval().requires_grad_(False)


# ---- figures -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def verdicts(judge: Judge, pixels: Tensor, specs: Sequence[Spec]) -> dict[str, list[bool]]:
    """For each column, one answer for each scene that asks it; pixels (B, 3, 128, 128) in [-1, 1]."""
    heads = [torch.cat(parts) for parts in zip(*(judge(chunk) for chunk in torch.split(pixels, 64)), strict=True)]
    objects, background, layout, recolour = heads
    answers: dict[str, list[bool]] = {column: [] for column in COLUMNS}
    for b, spec in enumerate(specs):
        answers["background"].append(int(background[b].argmax()) == list(BACKGROUNDS).index(spec.background))
        wanted = in_place(spec)
        seen = int(layout[b].argmax())
        if spec.relation is None:
            answers["object"].append(int(objects[b, 0].argmax()) == wanted[0])
        else:
            found = objects[b, places(seen)].argmax(-1).tolist()
            answers["both objects"].append(sorted(found) == sorted(wanted))
            near, far = objects[b, places(layout_of(spec))].log_softmax(-1)
            in_order = near[wanted[0]] + far[wanted[1]] > near[wanted[1]] + far[wanted[0]]
            answers["relation"].append(seen == layout_of(spec) and bool(in_order))
        if spec.recolour:
            answers["recolour"].append(int(recolour[b].argmax()) == recolour_of(spec))
    return answers


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def figures(answers: dict[str, list[bool]]) -> dict[str, dict[str, float]]:
    """Share, interval and n of every column that was asked."""
    row = {}
    for column, given in answers.items():
        if given:
            low, high = wilson(sum(given), len(given))
            row[column] = {"share": sum(given) / len(given), "low": low, "high": high, "n": len(given)}
    return row


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Decibels for each picture, (B,); pixels in [-1, 1], so the peak is 2."""
    return 10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)).clamp(min=1e-10))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity for each picture, (B,) (Wang et al. 2004): Gaussian window of 11, sigma 1.5, by channel."""
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
    """Each spec replaced by another one of its kind: half a turn round the list of that kind."""
    other = list(specs)
    for kind in {spec.kind for spec in specs}:
        where = [i for i, spec in enumerate(specs) if spec.kind == kind]
        for k, i in enumerate(where):
            other[i] = specs[where[(k + len(where) // 2) % len(where)]]
    return other


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """The rows in Markdown: "93 % (89-96)" in each cell, n in the heading."""
    counts = {column: int(cell["n"]) for row in rows.values() for column, cell in row.items()}
    heads = [f"{column} (n={counts[column]})" for column in COLUMNS if column in counts]
    lines = [f"| on held-out combinations | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for name, row in rows.items():
        cells = [
            f"{100 * cell['share']:.0f} % ({100 * cell['low']:.0f}-{100 * cell['high']:.0f})"
            for cell in (row[column] for column in COLUMNS if column in row)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- the model -----------------------------------------------------------------------------------------------------


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """PIL pictures of one size -> (B, 3, H, W) in [-1, 1]."""
    flat = [torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8) for image in images]
    width, height = images[0].size
    return torch.stack(flat).view(-1, height, width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw(pipe: Any, prompts: Sequence[str], steps: int, report: Callable[[str], None] = print) -> Tensor:
    """The model's own pictures, once each, with seed = the prompt's number: (B, 3, 128, 128) in [-1, 1]."""
    import mezzotint

    requests = [mezzotint.Request(prompt=prompt, seed=i, steps=steps) for i, prompt in enumerate(prompts)]
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
    """Through the VAE and back, by the posterior's mean: (B, 3, H, W) in [-1, 1], float32."""
    weight = next(vae.parameters())
    parts = [vae.decode(vae.encode(chunk.to(weight)).mean) for chunk in torch.split(pixels, 8)]
    return torch.cat(parts).float().clamp(-1, 1).to(pixels.device)


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the emoji model on combinations that it never saw.")
    parser.add_argument("--model", default=None, help="a folder (the bundled model unless given)")
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--judge", type=Path, default=JUDGE_FILE, help="where the judge is kept")
    parser.add_argument("--judge-steps", type=int, default=JUDGE_STEPS)
    parser.add_argument("--judge-only", action="store_true", help="no model: only the judge on real scenes")
    parser.add_argument("--out", type=Path, help="the figures as JSON")
    options = parser.parse_args()

    judge = train_judge(options.judge, options.device, options.judge_steps)
    captions, specs = map(list, zip(*Scenes.prompts(options.prompts, PROMPT_SEED), strict=True))
    real = Scenes(PROMPT_SEED, options.device).compose(specs)
    rows: dict[str, dict[str, dict[str, float]]] = {}
    record: dict[str, Any] = {
        "prompts": options.prompts,
        "prompt_seed": PROMPT_SEED,
        "judge": {"steps": options.judge_steps, "fingerprint": fingerprint(options.judge_steps)},
        "torch": torch.__version__,
        "rows": rows,
    }
    if not options.judge_only:
        import mezzotint

        which = (options.model,) if options.model else ()
        pipe = mezzotint.load(*which, device=options.device)
        drawn = draw(pipe, captions, options.steps).to(real)
        rebuilt = reconstruct(pipe.vae, real)
        rows["the model's pictures"] = figures(verdicts(judge, drawn, specs))
        rows["real scenes through the VAE"] = figures(verdicts(judge, rebuilt, specs))
        record |= {"model": options.model or "bundled", "steps": options.steps}
        record["vae"] = {"psnr_db": psnr(real, rebuilt).mean().item(), "ssim": ssim(real, rebuilt).mean().item()}
    rows["real scenes (the judge's own accuracy)"] = figures(verdicts(judge, real, specs))
    if not options.judge_only:
        rows["the model's pictures, prompts shuffled"] = figures(verdicts(judge, drawn, shuffled(specs)))
    print(table(rows))
    if "vae" in record:
        print(
            f"\nVAE on real held-out scenes: PSNR {record['vae']['psnr_db']:.1f} dB, SSIM {record['vae']['ssim']:.3f}"
        )
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"figures written to {options.out}")


if __name__ == "__main__":
    main()
