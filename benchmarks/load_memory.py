"""Peak memory of opening one model, in a process of its own: `python benchmarks/load_memory.py FILE [DTYPE]`.

Prints one JSON object: the peak (VmHWM) above `import torch`, the bytes of the tensors that the model then holds, their
ratio (the bound is 1.15), and seconds. Linux only.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch


def peak() -> int:
    """The largest resident size that this process has had, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    path, dtype = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    before = peak()
    from mezzotint.weights import open_model

    start = time.perf_counter()
    parts = open_model(path, dtype=getattr(torch, dtype) if dtype else None)
    seconds = time.perf_counter() - start
    networks = (parts.unet, parts.vae, *parts.text_encoders)
    held = sum(tensor.nbytes for network in networks for tensor in network.state_dict().values())
    grown = peak() - before
    ratio = round(grown / held, 4)
    print(json.dumps({"dtype": dtype, "peak": grown, "held": held, "ratio": ratio, "seconds": round(seconds, 2)}))


if __name__ == "__main__":
    main()
