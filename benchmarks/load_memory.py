"""Measure peak memory of `mezzotint.load` in this process: `python benchmarks/load_memory.py FILE DTYPE`.

Prints one JSON object: the peak (VmHWM) above `import torch`, the bytes of the tensors that the pipeline then holds,
and their ratio. Linux only.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch


def peak() -> int:
    """Return the peak resident set size of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    path, dtype = sys.argv[1:3]
    before = peak()
    import mezzotint

    start = time.perf_counter()
    pipe = mezzotint.load(path, device="cpu", dtype=dtype)
    seconds = time.perf_counter() - start
    grown = peak() - before
    networks = (pipe.unet, pipe.vae, *pipe.text_encoders)
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    assert {tensor.dtype for tensor in tensors} == {getattr(torch, dtype)}
    held = sum(tensor.nbytes for tensor in tensors)
    measures = {"load_s": seconds, "grown_mb": grown / 1e6, "held_mb": held / 1e6, "peak_over_held": grown / held}
    print(json.dumps(measures))


if __name__ == "__main__":
    main()
