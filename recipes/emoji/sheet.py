"""Draw the README's contact sheet: sixty-four written prompts, each drawn once with its index as seed, none picked.

Nothing is picked: the list and the seeds are fixed. A star marks combinations that were never trained on.

    python recipes/emoji/sheet.py --model src/mezzotint/data/emoji --out docs/images/emoji-sheet.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from scenes import contact_sheet

COLUMNS = 8
LIMIT = 1_000_000  # bytes
PROMPTS = (
    # the core set
    "a dog on a green background *",
    "a castle on a blue background *",
    "a pineapple on an orange background *",
    "a panda on a black background *",
    "a sun on a white background *",
    "a house on a grey background *",
    "a diamond on a pink background *",
    "a giraffe on a yellow background *",
    # backgrounds that are more than a colour
    "a star on a night sky *",
    "a penguin on grass *",
    "a cow on a blue striped background *",
    "a lemon on a green striped background *",
    "a snowman on a red striped background *",
    "a rocket on a blue gradient background *",
    "an apple on a green gradient background *",
    "a butterfly on a night sky *",
    # recoloured
    "a blue banana on a white background *",
    "a purple pumpkin on a black background *",
    "a yellow car on a teal background *",
    "a pink rocket on a blue background *",
    "a purple crown on a yellow background *",
    "a blue cactus on an orange background *",
    "a green gift on a pink background *",
    "a blue zebra on a green background *",
    # sizes and numbers
    "a small strawberry on a white background",
    "a large penguin on a red background",
    "a small ghost on a purple background",
    "a large hamburger on a teal background",
    "two ducks on a blue background *",
    "three trees on a white background *",
    "two stars on a night sky *",
    "three unicorns on a pink background *",
    # left of, right of
    "a lion left of a zebra on a green background *",
    "a fox left of a tent on an orange background *",
    "a cat left of a lemon on a blue background *",
    "a chicken to the left of a carrot on a yellow background *",
    "a monkey right of a banana on a pink background *",
    "a bus right of a snowflake on a grey background *",
    "a pig right of a book on a teal background *",
    "a robot to the right of a key on a white background *",
    # above, below
    "a rocket above a rabbit on a black background *",
    "a crown above a rose on a blue background *",
    "a helicopter above a train on a yellow background *",
    "a smiley on top of a cloud on a purple background *",
    "an owl below a crown on a teal background *",
    "a cow below a heart on a white background *",
    "a snowman under a shoe on a green background *",
    "a snake below a moon on an orange background *",
    # inside, next to; two of the other objects, each next to one of the core set
    "a key inside a heart on a white background *",
    "a bee inside a house on a blue background *",
    "a fish inside a balloon on a yellow background *",
    "an alien inside a clover on a pink background *",
    "a frog next to a car on a grey background *",
    "an elephant and a banana on a red background *",
    "a dragon right of a castle on a grey background",
    "a koala left of a cat on a green background *",
    # the other 1,070 objects
    "a peacock on a night sky *",
    "a teapot on a teal background *",
    "a bicycle on a yellow striped background *",
    "a tiger on grass *",
    "a ferris wheel on a red background *",
    "a saxophone on a green background *",
    "a popcorn on a brown background *",
    "an astronaut on a red background *",
)


def draw_sheet(images: Sequence[Image.Image], out: Path) -> None:
    """Write the pictures with their prompts underneath as a PNG of less than LIMIT bytes: with as many colours in each
    picture as that allows, never dithered, which would look like the model's own grain."""
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(images, PROMPTS, COLUMNS).save(out, optimize=True)
    colours = 256
    while out.stat().st_size >= LIMIT and colours > 8:
        fewer = [image.quantize(colours, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) for image in images]
        contact_sheet([image.convert("RGB") for image in fewer], PROMPTS, COLUMNS).save(out, optimize=True)
        colours //= 2


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the sixty-four fixed prompts, once each, on one sheet.")
    parser.add_argument("--model", default=None, help="model folder [default: the bundled model]")
    parser.add_argument("--out", type=Path, default=Path("docs/images/emoji-sheet.png"))
    parser.add_argument("--steps", type=int, default=None, help="sampling steps [default: the model's own]")
    parser.add_argument("--sampler", default=None)
    options = parser.parse_args()

    import mezzotint

    pipe = mezzotint.load(options.model) if options.model else mezzotint.load()
    images: list[Image.Image] = []
    for seed, prompt in enumerate(PROMPTS):
        request = mezzotint.Request(
            prompt=prompt.removesuffix(" *"), seed=seed, steps=options.steps, sampler=options.sampler
        )
        images += pipe.generate(request).images
    draw_sheet(images, options.out)
    print(f"{len(images)} pictures written to {options.out} ({options.out.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
