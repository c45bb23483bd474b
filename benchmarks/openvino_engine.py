"""OpenVINO as a peer: `python benchmarks/openvino_engine.py FOLDER OUT [--size 512]` converts.

It writes the networks of a diffusers folder to OUT as OpenVINO's files, for guidance (a batch of 2), and to OUT/SIZE
with static shapes. They are kept in float32: compressed to float16, as is usual, the frequencies of the timestep would
be rounded too, and the latents would differ by 2 %. `Engine` runs them; the loop around them is Euler in numpy, without
torch, transformers or diffusers, which only converting needs.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
TOKENS = 77
ENCODERS = ("text_encoder", "text_encoder_2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=512, help="pixels of a side [default: 512]")
    parser.add_argument("--seed", type=int, help="also write noise.npy, the noise that diffusers draws for this seed")
    options = parser.parse_args()
    static = options.out / str(options.size)
    static.mkdir(parents=True, exist_ok=True)
    for part in (*ENCODERS, "unet", "vae"):
        if (options.folder / part).is_dir():
            convert(options.folder / part, options.out / f"{part}.xml")
            fix(options.out / f"{part}.xml", static / f"{part}.xml", options.size // 8)
    if options.seed is not None:
        import torch

        generator = torch.Generator("cpu").manual_seed(options.seed)
        noise = torch.randn(1, 4, options.size // 8, options.size // 8, generator=generator)
        np.save(static / "noise.npy", noise.numpy())


def convert(folder: Path, file: Path) -> None:
    """Convert one network of a folder for pictures of any size, unless it was."""
    if file.exists():
        return
    import openvino
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    class Denoise(torch.nn.Module):
        def __init__(self, unet: Any) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: Any, timestep: Any, context: Any, pooled: Any = None, time_ids: Any = None) -> Any:
            added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
            return self.unet(x, timestep, context, added_cond_kwargs=added, return_dict=False)[0]

    class Decode(torch.nn.Module):
        def __init__(self, vae: Any) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, z: Any) -> Any:
            pixels = self.vae.decode(z / self.vae.config.scaling_factor, return_dict=False)[0]
            return (pixels / 2 + 0.5).clamp(0, 1)

    class Encode(torch.nn.Module):
        def __init__(self, encoder: Any, xl: bool) -> None:
            super().__init__()
            self.encoder, self.xl = encoder, xl

        def forward(self, ids: Any) -> Any:
            encoded = self.encoder(ids, output_hidden_states=self.xl)
            if not self.xl:
                return encoded.last_hidden_state
            return encoded.hidden_states[-2], getattr(encoded, "text_embeds", encoded.last_hidden_state)

    part, options = folder.name, {"torch_dtype": torch.float32}
    with torch.no_grad():
        if part == "unet":
            unet = UNet2DConditionModel.from_pretrained(folder, **options)
            inputs = [torch.zeros(2, unet.config.in_channels, 16, 16), torch.tensor(1.0)]
            inputs.append(torch.zeros(2, TOKENS, unet.config.cross_attention_dim))
            if unet.config.addition_embed_type == "text_time":
                ids = 6 * unet.config.addition_time_embed_dim
                pooled = unet.config.projection_class_embeddings_input_dim - ids
                inputs += [torch.zeros(2, pooled), torch.zeros(2, 6)]
            network: torch.nn.Module = Denoise(unet)
        elif part == "vae":
            vae = AutoencoderKL.from_pretrained(folder, **options)
            network, inputs = Decode(vae), [torch.zeros(1, vae.config.latent_channels, 16, 16)]
        else:
            kind = CLIPTextModelWithProjection if part.endswith("2") else CLIPTextModel
            encoder = kind.from_pretrained(folder, attn_implementation="eager", **options)
            xl = folder.with_name("text_encoder_2").exists()
            network, inputs = Encode(encoder, xl), [torch.ones(2, TOKENS, dtype=torch.int64)]
        shapes = [[*tensor.shape[:2], -1, -1] if tensor.ndim == 4 else list(tensor.shape) for tensor in inputs]
        model = openvino.convert_model(network.eval(), example_input=tuple(inputs), input=shapes)
    openvino.save_model(model, file, compress_to_fp16=False)


def fix(file: Path, static: Path, side: int) -> None:
    """Write a network with the shapes of latents of side x side."""
    import openvino

    if not static.exists():
        model = openvino.Core().read_model(file)
        shapes = {port: list(port.get_partial_shape()) for port in model.inputs}
        model.reshape({port: [*shape[:2], side, side] if len(shape) == 4 else shape for port, shape in shapes.items()})
        openvino.save_model(model, static, compress_to_fp16=False)


class Engine:
    """The compiled networks of one model."""

    def __init__(self, folder: Path, converted: Path, dtype: str, parts: tuple[str, ...]) -> None:
        """Compile the named parts; the numbers they compute with are of `dtype`."""
        import openvino

        core = openvino.Core()
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        settings["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
        if threads := os.environ.get("OMP_NUM_THREADS"):
            settings["INFERENCE_NUM_THREADS"] = int(threads)
        self.folder = folder
        self.run = {
            part: core.compile_model(converted / f"{part}.xml", "CPU", settings)
            for part in parts
            if (converted / f"{part}.xml").exists()
        }

    def encode(self, prompt: str, size: int) -> list[Array]:
        """Return what the UNet takes beside latents and timestep, for no prompt and the prompt."""
        encoders = [part for part in ENCODERS if part in self.run]
        outputs = []
        for part in encoders:
            ids = tokens(self.folder / part.replace("text_encoder", "tokenizer"), ["", prompt])
            outputs.append(list(self.run[part](ids).values()))
        if len(encoders) == 1:
            return outputs[0]
        context, pooled = np.concatenate([hidden for hidden, _ in outputs], axis=2), outputs[1][1].copy()
        context[0] = pooled[0] = 0  # what SDXL takes for no prompt
        time_ids = np.array([[size, size, 0, 0, size, size]] * 2, np.float32)
        return [context, pooled, time_ids]

    def denoise(self, noise: Array, condition: list[Array], steps: int, guidance: float) -> Iterator[Array]:
        """Yield the latents after each step, (1, C, h, w)."""
        config = json.loads((self.folder / "scheduler" / "scheduler_config.json").read_text())
        unet = self.run["unet"]

        def predict(x: Array, timestep: float) -> Array:
            inputs = [np.concatenate([x, x]), np.float32(timestep), *condition]
            return next(iter(unet(inputs).values()))

        return euler(predict, noise, config, steps, guidance)

    def decode(self, latents: Array) -> Array:
        """Return the picture, (H, W, 3) uint8."""
        pixels = next(iter(self.run["vae"]([latents]).values()))
        return (pixels[0].transpose(1, 2, 0) * 255).round().astype(np.uint8)


def euler(predict: Any, noise: Array, config: dict[str, Any], steps: int, guidance: float) -> Iterator[Array]:
    """Yield the latents after each step of Euler with leading spacing, as diffusers' EulerDiscreteScheduler.

    `predict(x, timestep)` returns the noise for no prompt and the prompt, (2, C, h, w).
    """
    count = config["num_train_timesteps"]
    betas = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, count, dtype=np.float64) ** 2
    products = np.cumprod(1 - betas)
    timesteps = (np.arange(steps) * (count // steps))[::-1] + config["steps_offset"]
    sigmas = np.append(((1 - products) / products)[timesteps] ** 0.5, 0.0)
    x = noise * np.float32((sigmas[0] ** 2 + 1) ** 0.5)
    for timestep, sigma, after in zip(timesteps, sigmas, sigmas[1:], strict=False):
        plain, prompted = predict(x / np.float32((sigma**2 + 1) ** 0.5), float(timestep))
        x = x + np.float32(after - sigma) * (plain + np.float32(guidance) * (prompted - plain))
        yield x


def tokens(folder: Path, prompts: list[str]) -> Array:
    """Return token ids (prompts, 77), padded as the tokenizer's own configuration says."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    padding = json.loads((folder / "tokenizer_config.json").read_text())["pad_token"]
    pad = padding if isinstance(padding, str) else padding["content"]
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(prompts)], np.int64)


if __name__ == "__main__":
    main()
