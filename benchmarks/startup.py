"""Say where the time to the first picture goes: `python benchmarks/startup.py MODEL [--size 128] [--dtype float32]`.

It does what `mezzotint generate` does, one thing after another, and prints a line of wall and CPU seconds for each. The
second step and the second decoding show what the first ones spend on caches.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise

PROMPT = "a lemon on a blue background"


def main() -> None:
    marks = [("", time.perf_counter() - time.process_time(), 0.0)]  # about when the process began

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter(), time.process_time()))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--size", type=int)
    parser.add_argument("--dtype")
    options = parser.parse_args()
    mark("Python")
    import mezzotint.cli.commands

    mark("import the command line")
    import torch  # noqa: F401

    mark("import torch")
    import mezzotint.run.runner
    import mezzotint.weights

    mark("import the rest of mezzotint")
    pipe = mezzotint.load(options.model, device="cpu", dtype=options.dtype)
    mark("load: read, convert, lay out")
    pipe.encode(PROMPT)
    mark("encode the prompt")
    pipe.encode("a lime")
    mark("encode another")
    request = mezzotint.Request(
        prompt=PROMPT, seed=7, steps=3, sampler="euler", width=options.size, height=options.size
    )
    stream = pipe.stream(request)
    next(stream)
    mark("first step, with another encoding")
    next(stream)
    mark("second step")
    latents = next(stream).x
    mark("third step")
    pipe.decode(latents)
    mark("decode")
    pipe.decode(latents)
    mark("decode again")
    print("| stage | s | CPU s |\n|---|---|---|")
    for (_, wall, cpu), (name, wall_after, cpu_after) in pairwise(marks):
        print(f"| {name} | {wall_after - wall:.2f} | {cpu_after - cpu:.2f} |")


if __name__ == "__main__":
    main()
