"""Measure the time of a request with a folder of many LoRA files or embeddings, and without it.

    python benchmarks/folders.py [--loras 3000] [--embeddings 500] [--repeats 5]

The folders are made of small files in a temporary place. A request takes one step at 64x64 pixels. Times are the
processor's milliseconds, which other processes hardly change; the first run with a folder is reported apart from the
median of those after it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import mezzotint


def make_loras(pipe: mezzotint.Pipeline, folder: Path, count: int) -> None:
    """Write LoRA files of rank 1 on one layer."""
    layer = pipe.unet.conv_in.weight
    draw = torch.Generator().manual_seed(0)
    for k in range(count):
        down, up = torch.randn(1, *layer.shape[1:], generator=draw), torch.randn(len(layer), 1, 1, 1, generator=draw)
        tensors = {"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up}
        save_file(tensors, folder / f"lora{k:05}.safetensors", {"ss_output_name": f"trained{k:05}"})


def make_embeddings(pipe: mezzotint.Pipeline, folder: Path, count: int) -> None:
    """Write embeddings of one vector."""
    width = pipe.text_encoders[0].config.hidden_size
    draw = torch.Generator().manual_seed(0)
    for k in range(count):
        save_file({"emb_params": torch.randn(1, width, generator=draw)}, folder / f"word{k:05}.safetensors")


def measure(pipe: mezzotint.Pipeline, request: mezzotint.Request, repeats: int) -> dict[str, float]:
    """Return the processor's milliseconds of the first run and the median of the next ones."""
    times = []
    for _ in range(repeats + 1):
        begin = time.process_time()
        pipe.generate(request)
        times.append(1000 * (time.process_time() - begin))
    return {"first": round(times[0], 1), "next": round(statistics.median(times[1:]), 1)}


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loras", type=int, default=3000, help="LoRA files in the folder [default: 3000]")
    parser.add_argument("--embeddings", type=int, default=500, help="embeddings in the folder [default: 500]")
    parser.add_argument("--repeats", type=int, default=5, help="runs after the first [default: 5]")
    options = parser.parse_args()
    pipe = mezzotint.load(device="cpu")
    plain = mezzotint.Request(prompt="a lemon", steps=1, width=64, height=64, seed=7, batch=1)
    with tempfile.TemporaryDirectory() as folder:
        loras, words = Path(folder) / "loras", Path(folder) / "words"
        loras.mkdir()
        words.mkdir()
        make_loras(pipe, loras, options.loras)
        make_embeddings(pipe, words, options.embeddings)
        name = f"lora{options.loras // 2:05}"
        one_file = plain.replace(loras=((str(loras / f"{name}.safetensors"), 0.5),))
        rows = {
            "plain": plain,
            "one LoRA": one_file,
            "LoRA folder": plain.replace(prompt=f"a lemon <lora:{name}:0.5>", lora_folder=str(loras)),
            "LoRA folder, ss_output_name": plain.replace(
                prompt=f"a lemon <lora:{name.replace('lora', 'trained')}:0.5>", lora_folder=str(loras)
            ),
            "embedding folder": plain.replace(prompt="a lemon word00007", embeddings=(str(words),)),
        }
        pipe.generate(plain)
        found = {
            f"{row}, count {count}": measure(pipe, request.replace(count=count), options.repeats)
            for row, request in rows.items()
            for count in (1, 4)
        }
    print(json.dumps({"loras": options.loras, "embeddings": options.embeddings, "milliseconds": found}, indent=1))


if __name__ == "__main__":
    main()
