"""Peak memory and time of attention by each backend: `python benchmarks/attention_memory.py [--quick] [--json]`.

Each figure is of a fresh process: one self-attention of SD 1.5 at 512x512 (4096 tokens) and 1024x1024 (16384), 8 heads
of 40, batch 2, and one step of a UNet of SD 1.5's shape (random weights) at 512x512, batch 2, float32 all. `grown_mb`
is the peak (VmHWM) above what was held before the call; `cpu_s` the processor's seconds in it. What would not fit into
the memory that is free is not run. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BACKENDS = ("math", "sdpa", "sliced", "sliced:8MiB")
SHAPE = (2, 8, 40)  # batch, heads, head size
SPARE = 4 * 2**30  # bytes to leave free


def status(file: str, key: str) -> int:
    """Return a value of a /proc file in bytes."""
    line = next(line for line in Path("/proc", file).read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(work: Callable[[], Any], backend: str) -> dict[str, float]:
    """Measure peak memory and seconds of one call."""
    import torch

    from mezzotint.models import attention

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("self/status", "VmRSS")
    with torch.no_grad(), attention.backend(backend):
        start = time.process_time()
        work()
        seconds = time.process_time() - start
    return {"grown_mb": (status("self/status", "VmHWM") - before) / 1e6, "cpu_s": seconds}


def layer(tokens: int, backend: str) -> dict[str, float]:
    """Measure one self-attention."""
    import torch

    from mezzotint.models.attention import attention

    batch, heads, dim = SHAPE
    q, k, v = torch.randn(batch, tokens, 3 * heads * dim).chunk(3, dim=-1)
    q, k, v = (x.unflatten(-1, (heads, dim)).transpose(1, 2) for x in (q, k, v))
    attention(q[:, :, :64], k[:, :, :64], v[:, :, :64])  # warm up
    return measure(lambda: attention(q, k, v), backend)


def step(side: int, backend: str) -> dict[str, float]:
    """Measure one call of an SD 1.5 UNet for a picture of `side` pixels."""
    import torch

    from mezzotint.config import UNetConfig
    from mezzotint.models.unet import Condition, UNet

    unet = UNet(UNetConfig(cross_attention_dim=768)).to(memory_format=torch.channels_last)
    sample, condition = torch.randn(SHAPE[0], 4, side // 8, side // 8), Condition(torch.randn(SHAPE[0], 77, 768))
    with torch.no_grad():
        unet(sample[..., :8, :8], 500.0, condition)
    return measure(lambda: unet(sample, 500.0, condition), backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "SIZE", "BACKEND"), help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="smoke test: only one small layer")
    parser.add_argument("--json", action="store_true", help="print JSON objects")
    options = parser.parse_args()
    if options.child:
        what, size, backend = options.child
        print(json.dumps({"layer": layer, "step": step}[what](int(size), backend)))
        return
    cases = (
        [("layer", 256, 256)]
        if options.quick
        else [("layer", 4096, 4096), ("layer", 16384, 16384), ("step", 512, 4096)]
    )
    for what, size, tokens in cases:
        for backend in BACKENDS:
            tables = 2 * SHAPE[0] * SHAPE[1] * tokens**2 * 4
            row: dict[str, Any] = {"what": what, "size": size, "backend": backend}
            if backend == "math" and tables > status("meminfo", "MemAvailable") - SPARE:
                row["not_run"] = f"its two tables of scores take {tables / 1e9:.1f} GB"
            else:
                command = [sys.executable, __file__, "--child", what, str(size), backend]
                ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                row |= json.loads(ran.stdout)
            figures = row.get("not_run") or f"{row['grown_mb']:8.0f} MB {row['cpu_s']:8.2f} s"
            print(json.dumps(row) if options.json else f"{what:5} {size:6} {backend:12} {figures}", flush=True)


if __name__ == "__main__":
    main()
