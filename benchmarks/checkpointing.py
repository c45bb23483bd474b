"""Measure a LoRA step with and without gradient checkpointing: `python benchmarks/checkpointing.py [--side 256]`.

A UNet of SD 1.5's shape (random weights, frozen, float32), a LoRA of rank 8 on its attention, batch 1; each figure is
of a fresh process. `grown_mb` is the peak (VmHWM) above the model; `cpu_s` the processor's seconds of forward and
backward pass; `difference` the largest between a gradient and that without checkpointing. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

WAYS = ("none", "all", "resnets", "transformers", "feedforwards", "attentions", "every 2", "every 4")


def status(key: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def child(side: int, channels: int, way: str, gradients: Path) -> dict[str, float]:
    """Measure one step; write its gradients to a file, or compare them with it."""
    import peft
    import torch
    from safetensors.torch import load_file, save_file

    from mezzotint.config import UNetConfig
    from mezzotint.models.checkpointing import checkpointing
    from mezzotint.models.unet import Condition, UNet

    torch.manual_seed(0)
    widths = tuple(channels * n for n in (1, 2, 4, 4))
    unet = UNet(UNetConfig(cross_attention_dim=768, block_out_channels=widths)).to(memory_format=torch.channels_last)
    config = peft.LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian")
    lora = peft.get_peft_model(unet, config)  # type: ignore[arg-type]
    sample, noise = torch.randn(2, 1, 4, side // 8, side // 8)
    condition = Condition(torch.randn(1, 77, 768))
    every = int(way.split()[1]) if way.startswith("every") else 1
    blocks = "all" if way.startswith("every") else way
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    start = time.process_time()
    with nullcontext() if way == "none" else checkpointing(lora, blocks, every):
        loss = (lora(sample, 500.0, condition) - noise).square().mean()
        loss.backward()
    measures = {"cpu_s": time.process_time() - start, "grown_mb": (status("VmHWM") - before) / 1e6}
    found = {name: p.grad for name, p in lora.named_parameters() if p.grad is not None}
    if way == "none":
        save_file(found, gradients)
    else:
        expected = load_file(gradients)
        assert found.keys() == expected.keys()
        measures["difference"] = max((found[name] - expected[name]).abs().max().item() for name in found)
    return measures | {"model_mb": before / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256, help="picture size in pixels")
    parser.add_argument("--channels", type=int, default=320, help="channels of the UNet's first level; SD 1.5 has 320")
    parser.add_argument("--ways", nargs="+", default=WAYS, metavar="WAY", help=f"of {', '.join(WAYS)}; none is added")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.side, options.channels, options.child[0], Path(options.child[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        for way in dict.fromkeys(("none", *options.ways)):
            size = ["--side", str(options.side), "--channels", str(options.channels)]
            command = [sys.executable, __file__, *size, "--child", way, str(Path(folder) / "gradients.safetensors")]
            ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row: dict[str, Any] = {"way": way, "side": options.side, **json.loads(ran.stdout)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
