"""The judge that evaluate.py asks: what does a picture show? Trained only on rendered scenes, then frozen.

About half an hour on one core, once; kept in ~/.cache/mezzotint/emoji-judge.pt, and trained again whenever the judge's
code or the scenes change. Killed, it goes on where it last saved.

    python recipes/emoji/judge.py
"""

from __future__ import annotations

import hashlib
import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scenes import Scenes, build_atlas
from words import GROUNDS, NAMES, NUMBERS, RECOLOURS, Spec

SEED = 1001  # not the trainer's, nor evaluate.py's
SHARES = {"single": 0.30, "sized": 0.07, "recoloured": 0.27, "pair": 0.29, "counted": 0.07}
CORE_SHARE = 0.3
JUDGE_STEPS, BATCH = 4000, 64  # 256,000 scenes, about half an hour on one core
SAVE_EVERY = 100  # steps
JUDGE_FILE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mezzotint" / "emoji-judge.pt"

# ---- what is read where ---------------------------------------------------------------------------------------------

SHIFT = 4  # pixels: a drawing may stand that far from its scene's grid
WINDOWS = (  # (left, top, side) in pixels, with SHIFT to spare around the places of scenes.layout
    (0, 0, 128),  # whole
    (-4, 28, 72),  # left
    (60, 28, 72),  # right
    (28, -4, 72),  # top
    (28, 60, 72),  # bottom
    (36, 36, 56),  # middle: of three, and what is inside
    (-4, 36, 56),  # first of three
    (76, 36, 56),  # third
)
PLACES = ((0,), (1, 2), (3, 4), (5, 0), (6, 5, 7))  # by layout, the windows: one, side by side, stacked, inside, three

LAYOUT_WEIGHTS = (1.0, 1.0, 1.0, 4.0, 2.0)  # in the loss: the last two are rare, and look like the first two


def layout_of(spec: Spec) -> int:
    """The row of PLACES that a scene has."""
    if spec.number:
        return {2: 1, 3: 4}[NUMBERS[spec.number]]
    return {"left of": 1, "right of": 1, "next to": 1, "above": 2, "below": 2, "inside": 3}.get(spec.relation or "", 0)


def in_place(spec: Spec) -> list[int]:
    """The objects' numbers in the order of the layout's windows: left to right, top to bottom, inner to outer."""
    numbers = [NAMES.index(name) for name in spec.objects]
    return numbers[::-1] if spec.relation in ("right of", "below") else numbers


def recolour_of(spec: Spec) -> int:
    return list(RECOLOURS).index(spec.recolour) if spec.recolour else len(RECOLOURS)


def view(pixels: Tensor, window: int) -> Tensor:
    """What stands in one of WINDOWS: (B, 3, 128, 128) -> (B, 3, 64, 64); beyond the edge, the edge's pixels."""
    left, top, side = WINDOWS[window]
    if side < pixels.shape[-1]:
        pixels = F.pad(pixels, (SHIFT,) * 4, mode="replicate")
        pixels = pixels[..., top + SHIFT : top + SHIFT + side, left + SHIFT : left + SHIFT + side]
    return F.interpolate(pixels, size=64, mode="bilinear", align_corners=False)


# ---- the judge -----------------------------------------------------------------------------------------------------


def convolutions(*widths: int) -> nn.Sequential:
    """Each halves the picture. Batch norm, since group norm would take each picture's own colour away."""
    layers: list[nn.Module] = []
    for n, (into, out) in enumerate(zip((3, *widths), widths, strict=False)):
        kernel = 3 if n else 5
        layers += [nn.Conv2d(into, out, kernel, 2, kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers)


def funnel(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs))


class Judge(nn.Module):
    """What does a picture show? One net names the object in a window; a smaller one sees the scene.

    forward(pixels (B, 3, 128, 128) in [-1, 1]) -> objects (B, 8, len(NAMES)) by window; background (B, 38);
    layout (B, 5), of PLACES; recolour (B, 7), the last being "as it is". All are logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = convolutions(32, 64, 128, 192)  # (B, 3, 64, 64) -> (B, 192, 4, 4)
        self.look = funnel(192 * 16, 256)
        self.objects = nn.Linear(256, len(NAMES), bias=False)
        self.scene = nn.Sequential(convolutions(16, 48, 64, 96), funnel(96 * 16, 128), nn.ReLU())
        self.background = nn.Linear(128, len(GROUNDS))
        self.layout = nn.Linear(128, len(PLACES))
        self.recolour = nn.Sequential(nn.Linear(256 + 128, 128), nn.ReLU(), nn.Linear(128, len(RECOLOURS) + 1))

    def name(self, looks: Tensor) -> Tensor:
        """Looks (B, 256) -> logits of objects: 20 times the cosine, so that rarely seen objects stand as tall."""
        return 20 * F.linear(F.normalize(looks, dim=-1), F.normalize(self.objects.weight, dim=-1))

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(scene (B, 128), background, layout) of whole pictures."""
        scene = self.scene(view(pixels, 0))
        return scene, self.background(scene), self.layout(scene)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 192): the trunk's mean over the whole picture, for the Fréchet distance."""
        grid: Tensor = self.trunk(view(pixels, 0))
        return grid.mean((2, 3))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        looks = [self.look(self.trunk(view(pixels, window))) for window in range(len(WINDOWS))]
        scene, background, layout = self.see(pixels)
        recolour = self.recolour(torch.cat([looks[0], scene], 1))
        return torch.stack([self.name(look) for look in looks], 1), background, layout, recolour


def roughen(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Training pictures as a decoder might draw them: shifted, some blurred, with noise, a little lighter or darker."""
    batch, side = len(pixels), pixels.shape[-1]
    padded = F.pad(pixels, (SHIFT,) * 4, mode="replicate")
    moves = torch.randint(2 * SHIFT + 1, (batch, 2), generator=generator).tolist()
    pixels = torch.stack([one[:, y : y + side, x : x + side] for one, (x, y) in zip(padded, moves, strict=True)])
    amounts = torch.rand(3, batch, 1, 1, 1, generator=generator).to(pixels.device)
    blurred = (amounts[0] > 0.5).flatten()
    some = F.interpolate(F.avg_pool2d(pixels[blurred], 4), size=side, mode="bilinear", align_corners=False)
    pixels[blurred] = pixels[blurred].lerp(some, 2 * amounts[0, blurred] - 1)
    noise = torch.randn(batch, 3, side // 2, side // 2, generator=generator).to(pixels.device) * (0.2 * amounts[1])
    return pixels.mul_(0.9 + 0.2 * amounts[2]).add_(F.interpolate(noise, scale_factor=2))


def judge_loss(judge: Judge, pixels: Tensor, specs: Sequence[Spec]) -> Tensor:
    """Cross-entropy of every head, summed; objects are asked only in the windows where they stand."""
    asked = [[(b, n) for b, spec in enumerate(specs) for w, n in standing(spec) if w == k] for k in range(len(WINDOWS))]
    views = torch.cat([view(pixels[[b for b, _ in rows]], window) for window, rows in enumerate(asked) if rows])
    looks = judge.look(judge.trunk(views))
    scene, background, layout = judge.see(pixels)
    single = [k for k, (b, _) in enumerate(asked[0]) if layout_of(specs[b]) == 0]  # rows of `looks`: whole comes first
    where = [asked[0][k][0] for k in single]
    recolour = judge.recolour(torch.cat([looks[single], scene[where]], 1))

    def loss(logits: Tensor, targets: list[int], weights: Sequence[float] | None = None) -> Tensor:
        weight = logits.new_tensor(weights) if weights else None
        return F.cross_entropy(logits, torch.tensor(targets, device=logits.device), weight)

    return (
        loss(judge.name(looks), [number for rows in asked for _, number in rows])
        + loss(background, [GROUNDS.index(spec.background) for spec in specs])
        + loss(layout, [layout_of(spec) for spec in specs], LAYOUT_WEIGHTS)
        + loss(recolour, [recolour_of(specs[b]) for b in where])
    )


def standing(spec: Spec) -> list[tuple[int, int]]:
    """(window, object's number) for each object."""
    return list(zip(PLACES[layout_of(spec)], in_place(spec), strict=True))


def fingerprint(steps: int, atlas: Mapping[int, Tensor]) -> str:
    """Hash what a judge depends on: its code, scenes and steps. A judge with another fingerprint is not used."""
    pixels, _, specs = judge_scenes("cpu", atlas).batch(range(BATCH))
    parts = (Judge, convolutions, funnel, view, standing, layout_of, in_place, recolour_of, roughen, judge_loss)
    settings = (WINDOWS, PLACES, LAYOUT_WEIGHTS, SHIFT, NAMES, GROUNDS, BATCH, steps, specs)
    drawn = ((pixels + 1) * 127.5).round().byte().numpy().tobytes()
    text = "".join(inspect.getsource(part) for part in parts) + repr(settings)
    return hashlib.sha256(text.encode() + drawn).hexdigest()[:16]


def judge_scenes(device: str, atlas: Mapping[int, Tensor]) -> Scenes:
    return Scenes(SEED, device, shares=SHARES, core_share=CORE_SHARE, atlas=atlas)


def train_judge(
    path: Path, device: str, atlas: Mapping[int, Tensor], steps: int, report: Callable[[str], None] = print
) -> Judge:
    """Load the frozen judge from `path`, or train it and save it there; an interrupted training resumes."""
    torch.manual_seed(SEED)
    judge = Judge().to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    parts: dict[str, Any] = {"judge": judge, "optimizer": optimizer, "schedule": schedule}
    mark, done = fingerprint(steps, atlas), 0
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved["fingerprint"] == mark:
            done = saved["done"]
            for name, part in parts.items():
                part.load_state_dict(saved[name])
    scenes = judge_scenes(device, atlas)
    start, first = time.monotonic(), done
    judge.train()
    while done < steps:
        pixels, _, specs = scenes.batch(range(done * BATCH, (done + 1) * BATCH))
        loss = judge_loss(judge, roughen(pixels, torch.Generator().manual_seed(done)), specs)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        done += 1
        if done % SAVE_EVERY == 0 or done == steps:
            state = {name: part.state_dict() for name, part in parts.items()} | {"fingerprint": mark, "done": done}
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
            left = (time.monotonic() - start) / (done - first) * (steps - done)
            report(f"judge: step {done} of {steps}, loss {loss.item():.3f}, {left:.0f} s left")
    return judge.eval().requires_grad_(False)


if __name__ == "__main__":
    train_judge(JUDGE_FILE, "cuda" if torch.cuda.is_available() else "cpu", build_atlas(), JUDGE_STEPS)
