"""Several requests at once. Those that differ only in words and seeds share batches; each gives what it gives alone."""

import mezzotint

COLOURS = ("yellow", "green", "pink")

pipe = mezzotint.load()
plain = mezzotint.Request(prompt="a lemon", seed=7, count=2, batch=6, sampler="DPM++ 2M Karras", steps=12)
requests = [plain.replace(prompt=f"a lemon on a {colour} background") for colour in COLOURS]

for colour, result in zip(COLOURS, pipe.generate(requests), strict=True):
    paths = result.save(f"{colour}.png")
    print(f"{colour}: {', '.join(map(str, paths))}, {result.request.steps} steps of {result.request.sampler}")
