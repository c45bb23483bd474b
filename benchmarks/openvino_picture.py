"""The peer: `python benchmarks/openvino_picture.py FOLDER CONVERTED PROMPT NOISE.npy OUT.png [OPTIONS]`.

OpenVINO draws a picture with networks that openvino_engine.py converted, from given noise (1, 4, h, w), by Euler. It
imports neither torch nor diffusers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from openvino_engine import ENCODERS, Engine
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("converted", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("noise", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, required=True)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    noise = np.load(options.noise)
    engine = Engine(options.folder, options.converted, options.dtype, (*ENCODERS, "unet", "vae"))
    condition = engine.encode(options.prompt, 8 * noise.shape[-1])
    *_, latents = engine.denoise(noise, condition, options.steps, options.guidance)
    Image.fromarray(engine.decode(latents)).save(options.out)


if __name__ == "__main__":
    main()
