"""Draw the README's contact sheet: sixteen written prompts, each drawn once with its index as seed, none picked.

Nothing is picked: the list and the seeds are fixed. A star marks combinations that were never trained on.

    python recipes/emoji/sheet.py --model src/mezzotint/data/emoji --out docs/images/emoji-sheet.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mezzotint
from scenes import contact_sheet

PROMPTS = (
    "a lemon on a blue background",
    "a dog on a green background *",
    "a house on a grey background *",
    "a panda on a yellow background",
    "a castle on a blue background *",
    "a blue banana on a white background *",
    "a purple pumpkin on a black background *",
    "a yellow car on a teal background *",
    "a lion left of a zebra on a green background *",
    "a rocket above a rabbit on a black background *",
    "a monkey right of a banana on a pink background *",
    "a butterfly on a purple background *",
    "a rocket on an orange background",
    "a large penguin on a red background",
    "a small strawberry on a white background",
    "an owl below a crown on a teal background *",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the sixteen fixed prompts, once each, on one sheet.")
    parser.add_argument("--model", default=None, help="a folder (the bundled model unless given)")
    parser.add_argument("--out", type=Path, default=Path("docs/images/emoji-sheet.png"))
    parser.add_argument("--steps", type=int, default=None, help="the model's own unless given")
    options = parser.parse_args()
    pipe = mezzotint.load(options.model) if options.model else mezzotint.load()
    images = []
    for seed, prompt in enumerate(PROMPTS):
        request = mezzotint.Request(prompt=prompt.removesuffix(" *"), seed=seed, steps=options.steps)
        images += pipe.generate(request).images
    options.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(images, PROMPTS, columns=4).save(options.out)
    print(f"{len(images)} pictures written to {options.out}")


if __name__ == "__main__":
    main()
