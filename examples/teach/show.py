"""Reproduce docs/teach.md: draw pictures, train a LoRA, DreamBooth and a textual inversion, and score the results.

An interrupted run resumes.

    python examples/teach/show.py --model src/mezzotint/data/emoji --out build/teach --docs docs

A picture is *recognised* if its embedding by recipes/emoji/judge.py is nearest to the mean embedding of the requested
object, among 1,192: the model's 1,190 objects and the two of drawings.py, each averaged over the same four renderings.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import mezzotint

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "emoji"))
from drawings import GHOST_GROUNDS, LIGHTHOUSE_GROUNDS, corner, draw_pictures, ghost, lighthouse, picture
from evaluate import PROMPT_SEED, draw, figures, reconstruct, to_pixels, verdicts
from judge import JUDGE_FILE, JUDGE_STEPS, Judge, roughen, train_judge, view
from scenes import PLAIN, Scenes, build_atlas, contact_sheet, to_images
from words import GROUNDS, NAMES, Spec, ground_words

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUNS = {  # name, of its pictures too: method, recipe
    "lighthouse": ("lora", "lora.toml"),
    "sks": ("dreambooth", "dreambooth.toml"),
    "boo": ("textual-inversion", "word.toml"),
}
LIGHTHOUSE, SKS = len(NAMES), len(NAMES) + 1  # their numbers, after the model's own objects
UNSEEN = tuple(ground for ground in GROUNDS if ground not in {*LIGHTHOUSE_GROUNDS, *GHOST_GROUNDS})  # 24
RENDERED_ON = ("blue", "orange stripes", "grey gradient", "white")  # for the means, each in another corner
KEPT, KEPT_SEED = 24, 5005  # pictures of the model's own, of captions of the training split
COLUMNS = 6
MARKS = "<!-- figures, by examples/teach/show.py -->", "<!-- end of figures -->"
Settings = dict[str, Any]
Rows = dict[str, dict[str, float]]

OLD = (
    "a castle on a blue background",
    "a house on a grey background",
    "a rocket on a black background",
    "a lemon on a teal background",
    "a heart above a penguin on a green background",
    "a purple bell on a yellow background",
)
SHOWN = {
    "lighthouse": (
        "a lighthouse on a purple background",
        "a lighthouse on a white background",
        "a lighthouse on an orange striped background",
        "a lighthouse on a blue gradient background",
        "a lighthouse left of a whale on a blue background",
        "a small lighthouse on a brown background",
        *OLD,
    ),
    "sks": (
        "a sks ghost on a purple background",
        "a sks ghost on a white background",
        "a sks ghost on an orange striped background",
        "a sks ghost on a blue gradient background",
        "a sks ghost left of a whale on a blue background",
        "a small sks ghost on a brown background",
        "a ghost on a purple background",
        "a ghost on a red background",
        "a ghost on a blue background",
        *OLD[:3],
    ),
    "boo": (
        "<boo> on a purple background",
        "<boo> on a white background",
        "<boo> on an orange striped background",
        "<boo> on a blue gradient background",
        "<boo> left of a whale on a blue background",
        "a small <boo> on a brown background",
    ),
}


class Looks:
    """The judge's embedding of a picture's centre, compared with the mean embeddings of all objects."""

    def __init__(self, judge: Judge, scenes: Scenes) -> None:
        self.judge = judge
        rng = torch.Generator().manual_seed(0)
        looks = []
        for number, ground in enumerate(RENDERED_ON):
            at = corner(number)
            specs = [Spec("single", (name,), ground, (PLAIN,), (at,)) for name in NAMES]
            parts = [scenes.compose(specs[k : k + 70]) for k in range(0, len(specs), 70)]
            parts.append(to_pixels([picture(thing, ground, at) for thing in (lighthouse(), ghost())]))
            looks.append(torch.cat([self.of(roughen(part, rng)) for part in parts]))
        self.means = F.normalize(torch.stack(looks).mean(0), dim=-1)  # (1192, 256)

    @torch.no_grad()
    def of(self, pixels: Tensor) -> Tensor:
        """Embed pixels (B, 3, 128, 128) in [-1, 1] as unit vectors (B, 256)."""
        return F.normalize(self.judge.look(self.judge.trunk(view(pixels, 0))), dim=-1)

    @torch.no_grad()
    def score(self, pixels: Tensor, thing: int) -> dict[str, float]:
        """Return the shares of pictures, on UNSEEN in order, with the right object and with the right background."""
        named = (self.of(pixels) @ self.means.T).argmax(-1) == thing
        grounds = torch.tensor([GROUNDS.index(ground) for ground in UNSEEN])
        right = self.judge.see(pixels)[1].argmax(-1) == grounds
        return {"recognised": named.float().mean().item(), "background": right.float().mean().item()}


def draw_kept(pipe: mezzotint.Pipeline, folder: Path) -> None:
    """Generate pictures of KEPT other captions to train on against forgetting; existing files stay."""
    folder.mkdir(parents=True, exist_ok=True)
    captions, _ = Scenes(KEPT_SEED, core_share=1.0).specs(range(KEPT))
    for number, caption in enumerate(captions):
        path = folder / f"kept-{number:02}.png"
        if not path.exists():
            path.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
            pipe(caption, seed=KEPT_SEED + number).save(path.with_suffix(".part"), format="PNG")
            path.with_suffix(".part").replace(path)


def train(name: str, model: Path, folder: Path) -> Settings:
    """Run or resume `mezzotint train`; return the request settings that use its result."""
    method, recipe = RUNS[name]
    pictures = folder / "pictures" / name
    command = ["train", method, pictures, "--model", model, "--recipe", HERE / recipe]
    if method == "lora":  # learnt among the kept pictures
        for path in (folder / "pictures" / "kept").glob("kept-*"):
            shutil.copy(path, pictures)
    elif method == "dreambooth":  # the class's pictures are these and ghosts, up to class_count
        command += ["--set", f"class_folder={folder / 'pictures' / 'kept'}"]
    subprocess.run([sys.executable, "-m", "mezzotint", *map(str, command), "--out", str(folder / name)], check=True)
    if method == "textual-inversion":
        return {"embeddings": (str(folder / name / "boo.safetensors"),)}
    return {"loras": ((str(folder / name / "pytorch_lora_weights.safetensors"), 1.0),)}


def before_and_after(pipe: mezzotint.Pipeline, name: str, taught: Settings) -> Image.Image:
    """Draw the prompts of SHOWN as a sheet: a row before training and one after, with the same seeds."""
    prompts = SHOWN[name]
    old, new = (to_images(draw(pipe, prompts, settings)) for settings in ({}, taught))
    images: list[Image.Image] = []
    texts: list[str] = []
    for k in range(0, len(prompts), COLUMNS):
        row = prompts[k : k + COLUMNS]
        images += [*old[k : k + COLUMNS], *new[k : k + COLUMNS]]
        texts += [*(f"before: {text}" for text in row), *(f"after: {text}" for text in row)]
    return contact_sheet(images, texts, COLUMNS)


def new_scores(pipe: mezzotint.Pipeline, looks: Looks, name: str, taught: Settings) -> Rows:
    """Score the new object on every unseen background: before training, after it, and the drawings themselves."""

    def asked(thing: str, settings: Settings) -> Tensor:
        return draw(pipe, [f"{thing} on {ground_words(ground)['ground']}" for ground in UNSEEN], settings)

    number, glyph = (LIGHTHOUSE, lighthouse()) if name == "lighthouse" else (SKS, ghost())
    thing = {"lighthouse": "a lighthouse", "sks": "a sks ghost", "boo": "<boo>"}[name]
    drawings = to_pixels([picture(glyph, ground, corner(n)) for n, ground in enumerate(UNSEEN)])
    rows = {
        # before textual inversion the word does not exist
        f"{thing}: before": looks.score(asked("a ghost" if name == "boo" else thing, {}), number),
        f"{thing}: after": looks.score(asked(thing, taught), number),
        f"{thing}: the drawings through the VAE": looks.score(reconstruct(pipe.vae, drawings), number),
    }
    if name == "sks":
        ghosts = NAMES.index("ghost")
        rows["a ghost: before"] = looks.score(asked("a ghost", {}), ghosts)
        rows["a ghost: after"] = looks.score(asked("a ghost", taught), ghosts)
    return rows


def old_scores(pipe: mezzotint.Pipeline, judge: Judge, count: int, settings: Settings) -> dict[str, float]:
    """Return the shares of evaluate.py on its first held-out prompts."""
    prompts, specs = zip(*Scenes.prompts(count, PROMPT_SEED), strict=True)
    row = figures(verdicts(judge, draw(pipe, prompts, settings), specs))
    return {column: cell["share"] for column, cell in row.items()}


def table(rows: Rows, heading: str) -> str:
    """Format rows as a Markdown table, shares in percent."""
    columns = list(next(iter(rows.values())))
    lines = [f"| {heading} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(f'{100 * row[c]:.0f} %' for c in columns)} |" for name, row in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach emoji a lighthouse, one ghost and a word; show and score them.")
    parser.add_argument("--model", type=Path, default=ROOT / "src" / "mezzotint" / "data" / "emoji")
    parser.add_argument("--out", type=Path, default=Path("build/teach"), help="output folder, one per model")
    parser.add_argument("--prompts", type=int, default=100, help="number of old prompts to score before and after")
    parser.add_argument("--only", choices=RUNS, action="append", help="run only this one; may be repeated")
    parser.add_argument("--docs", type=Path, help="docs folder whose teach.md to update")
    options = parser.parse_args()

    draw_pictures(options.out / "pictures")
    pipe = mezzotint.load(options.model, device="cpu")
    draw_kept(pipe, options.out / "pictures" / "kept")
    taught, seconds = {}, {}
    for name in options.only or RUNS:
        start = time.monotonic()
        taught[name] = train(name, options.model, options.out)
        seconds[name] = time.monotonic() - start

    atlas = build_atlas()
    judge = train_judge(JUDGE_FILE, "cpu", atlas, JUDGE_STEPS)
    looks = Looks(judge, Scenes(PROMPT_SEED, atlas=atlas))
    sheets = {name: before_and_after(pipe, name, settings) for name, settings in taught.items()}
    pictures = [path for name in taught for path in sorted((options.out / "pictures" / name).glob("[0-9]*.png"))]
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in pictures]
    sheets["pictures"] = contact_sheet([Image.open(path) for path in pictures], captions, COLUMNS + 2)
    new: Rows = {}
    for name, settings in taught.items():
        new |= new_scores(pipe, looks, name, settings)
    changed = {f"after the run `{name}`": settings for name, settings in taught.items() if "loras" in settings}
    old = {name: old_scores(pipe, judge, options.prompts, settings) for name, settings in
           ({"before": {}} | changed).items()}  # fmt: skip

    times = ", ".join(f"`{name}` {value / 60:.1f} minutes" for name, value in seconds.items())
    found = "\n\n".join(
        [
            table(new, f"{len(UNSEEN)} backgrounds that no picture had"),
            table(old, f"{options.prompts} old prompts, of combinations never trained on"),
            f"Training took, with {torch.get_num_threads()} thread(s): {times}.",
        ]
    )
    print(f"\n{found}")
    record = {"new": new, "old": old, "prompts": options.prompts, "seconds": seconds, "torch": torch.__version__}
    (options.out / "figures.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, image in sheets.items():
        image.save(options.out / f"{name}.png", optimize=True)
    if options.docs:
        write_docs(options.docs, sheets, found)


def write_docs(folder: Path, sheets: Mapping[str, Image.Image], found: str) -> None:
    """Write the sheets to images/teach and the figures between the markers in teach.md."""
    place = folder / "images" / "teach"
    place.mkdir(parents=True, exist_ok=True)
    for name, image in sheets.items():
        image.save(place / f"{name}.png", optimize=True)
    page = folder / "teach.md"
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n\n{found}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
