"""Several requests at once. Those that differ only in words and seeds share batches; each gives what it gives alone."""

import mezzotint
from mezzotint.image import save_png

COLOURS = ("yellow", "green", "pink")

pipe = mezzotint.load()
plain = mezzotint.Request(prompt="a lemon", seed=7, count=2, batch=6, sampler="DPM++ 2M Karras", steps=12)
requests = [plain.replace(prompt=f"a lemon on a {colour} background") for colour in COLOURS]

for colour, result in zip(COLOURS, pipe.generate(requests), strict=True):
    for seed, image in zip(result.seeds, result.images, strict=True):
        save_png(image, f"{colour}-{seed}.png")
    print(f"{colour}: seeds {result.seeds}, {result.request.steps} steps of {result.request.sampler}")
