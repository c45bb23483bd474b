"""Hash forty pictures, one for each mode of a run, to compare two revisions bit for bit on one machine.

    python tests/picture_hashes.py --out before.json          # at the first revision
    python tests/picture_hashes.py --against before.json      # at the second: exits with 1 where a picture differs

Bits depend on the processor, the thread count and the torch build (docs/fidelity.md): never commit the hashes.
Only public names are used here, so the same file runs at both revisions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import mezzotint

LEMON = "a lemon on a blue background"
TWO = "a lemon left of a whale on a pink background"


def inputs(folder: Path) -> dict[str, str]:
    """Write a picture, a mask, a LoRA and an embedding for the bundled model; return their paths by name."""
    picture, mask = Image.new("RGB", (128, 128), (40, 90, 200)), Image.new("L", (128, 128), 0)
    ImageDraw.Draw(picture).ellipse((30, 30, 98, 98), fill=(250, 220, 40))
    ImageDraw.Draw(mask).rectangle((64, 48, 120, 120), fill=255)
    picture.save(folder / "picture.png")
    mask.save(folder / "mask.png")
    draw = torch.Generator().manual_seed(0)
    lora: dict[str, torch.Tensor] = {}
    pipe = mezzotint.load(device="cpu")
    for name, module in pipe.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn1.to_q", "ff.net.2")):
            outputs, width = module.weight.shape  # type: ignore[union-attr]
            key = f"lora_unet_{name.replace('.', '_')}"
            lora[f"{key}.lora_down.weight"] = torch.randn(4, width, generator=draw) * 0.1
            lora[f"{key}.lora_up.weight"] = torch.randn(outputs, 4, generator=draw) * 0.1
            lora[f"{key}.alpha"] = torch.tensor(2.0)
    for name, module in pipe.text_encoders[0].named_modules():
        if name.endswith("self_attn.v_proj"):
            outputs, width = module.weight.shape  # type: ignore[union-attr]
            key = f"lora_te_{name.replace('.', '_')}"
            lora[f"{key}.lora_down.weight"] = torch.randn(4, width, generator=draw) * 0.1
            lora[f"{key}.lora_up.weight"] = torch.randn(outputs, 4, generator=draw) * 0.1
            lora[f"{key}.alpha"] = torch.tensor(2.0)
    (folder / "loras").mkdir()
    save_file(lora, folder / "loras" / "style.safetensors")
    width = pipe.text_encoders[0].config.hidden_size
    save_file({"emb_params": torch.randn(2, width, generator=draw) * 0.3}, folder / "blob.safetensors")
    return {
        "image": str(folder / "picture.png"),
        "mask": str(folder / "mask.png"),
        "lora": str(folder / "loras" / "style.safetensors"),
        "lora_folder": str(folder / "loras"),
        "embedding": str(folder / "blob.safetensors"),
    }


def requests(paths: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the fields of each request by a name; `load` holds arguments of `mezzotint.load`."""
    image, mask = {"image": paths["image"]}, {"image": paths["image"], "mask": paths["mask"]}
    return {
        "plain": {},
        "no guidance": {"guidance_scale": 1.0},
        "negative": {"negative_prompt": "a whale"},
        "ddim eta": {"sampler": "ddim", "eta": 0.7},
        "pndm": {"sampler": "pndm"},
        "lms": {"sampler": "LMSDiscreteScheduler"},
        "euler a": {"sampler": "Euler a"},
        "dpmpp 2m karras": {"sampler": "DPM++ 2M Karras"},
        "dpmpp sde": {"sampler": "DPM++ SDE Karras", "noise": "philox"},
        "dpmpp 2m sde": {"sampler": "dpmpp_2m_sde"},
        "comfyui": {"sampler": "dpmpp_2m_sde karras"},
        "unipc": {"sampler": "unipc", "spacing": "trailing"},
        "heun": {"sampler": "heun", "spacing": "exponential"},
        "restart": {"sampler": "restart", "steps": 12},
        "dpm adaptive": {"sampler": "dpm_adaptive"},
        "cfg pp": {"sampler": "dpmpp_2m_cfg_pp", "guidance_scale": 0.8},
        "few steps": {"sampler": "lcm", "steps": None},
        "own sigmas": {"steps": None, "sampler": "euler", "sigmas": (14.0, 6.0, 3.0, 1.5, 0.7, 0.2, 0.0)},
        "rescale": {"guidance_rescale": 0.7, "guidance_scale": (6.0, 2.0), "guidance_steps": (0.1, 0.9)},
        "interval": {"guidance_interval": (0.3, 5.0), "mimic_scale": 3.0, "threshold_percentile": 0.95},
        "apg": {"guidance_method": "apg", "apg_momentum": -0.5},
        "perp neg": {"guidance_method": "perp_neg", "negative_prompt": "a red lemon"},
        "and, editing": {"prompt": "a [lemon:whale:0.5] AND a blue background :0.7", "prompt_syntax": "a1111"},
        "comfy": {"prompt": "a {lemon|whale} on a (blue:1.4) background", "prompt_syntax": "comfy"},
        "compel": {"prompt": "a lemon++ (on a blue background)1.2", "prompt_syntax": "compel", "clip_skip": 1},
        "loras": {"loras": ((paths["lora"], 0.8, 0.5),)},
        "lora folder": {"prompt": f"{LEMON} <lora:style:0.6>", "lora_folder": paths["lora_folder"], "count": 2},
        "embedding": {"prompt": "a blob on a blue background", "embeddings": (paths["embedding"],)},
        "img2img": image | {"strength": 0.6, "sampler": "dpmpp_2m"},
        "img2img, all steps": image | {"strength": 0.5, "fix_steps": True, "sampler": "Euler"},
        "inpaint": mask | {"mask_blur": 4.0, "masked_content": "noise", "strength": 0.8},
        "only masked": mask | {"only_masked": 16, "invert_mask": False},
        "outpaint": image | {"outpaint": (0, 0, 64, 0), "steps": 6},
        "hires latent": {"hires": 1.5, "sampler": "euler", "steps": 6},
        "hires pixels": {"hires": 1.5, "hires_upscale": "pixels", "hires_steps": 4, "sampler": "euler_a"},
        "seamless, variation": {"seamless": "x", "variation_seed": 5, "variation_strength": 0.3},
        "batch": {"prompt": TWO, "count": 3, "batch": 3, "width": 96, "height": 160},
        "stream, split, strips": {"load": {"weights": "stream", "guidance": "split", "vae": "strips"}},
        "offload, int8, sliced": {"load": {"weights": "offload", "storage": "int8", "attention": "sliced:1MiB"}},
        "bfloat16, tiles": {"load": {"storage": "bfloat16", "vae": "tiles"}, "width": 256, "height": 192, "steps": 4},
    }


def digest(result: Any) -> str:
    """Return the SHA-256 of all pixels and latents of a result."""
    found = hashlib.sha256()
    for image in result.images:
        found.update(np.asarray(image.convert("RGB")).tobytes())
    found.update(result.latents.contiguous().numpy().tobytes())
    return found.hexdigest()


def main() -> int:
    """Draw, hash, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the hashes to this JSON file")
    parser.add_argument("--against", type=Path, help="compare with the hashes in this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        paths = inputs(Path(folder))
        pipes: dict[str, mezzotint.Pipeline] = {}
        found: dict[str, str] = {}
        for name, fields in requests(paths).items():
            placement = fields.pop("load", {})
            key = json.dumps(placement)
            if key not in pipes:
                chosen = mezzotint.Placement(**placement) if placement else None
                pipes[key] = mezzotint.load(device="cpu", placement=chosen)
            request = mezzotint.Request(**{"prompt": LEMON, "seed": 7, "steps": 8} | fields)
            found[name] = digest(pipes[key].generate(request))
            print(f"{found[name][:16]}  {name}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    if not options.against:
        return 0
    before = json.loads(options.against.read_text())
    different = [name for name in {**before, **found} if before.get(name) != found.get(name)]
    print(f"{len(found)} requests, {len(different)} differ: {', '.join(different) or 'none'}")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
