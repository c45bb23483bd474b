"""Train the bundled model `emoji` from scratch, in seven stages. An interrupted stage resumes.

    python recipes/emoji/make.py [--work build/emoji] [--out src/mezzotint/data/emoji] [--device cuda]

    vae        encoder and decoder together
    latents    scenes through the encoder, which is final from here on
    text       the text encoder alone learns to foretell them
    diffusion  text encoder and UNet on them
    decoder    the decoder alone is trained further; it needs only `vae`, so it may run in parallel with `diffusion`
    distill    a change of low rank with which four steps do what twenty did
    save       the folder

`--stages decoder` runs one of them. `--share 0.1` is the first tenth of every stage, with a decay of its own: a model
for an afternoon of two CPU cores. See README.md in this folder for packages, times and curves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.config import CLIPConfig, ScheduleConfig, UNetConfig, VAEConfig
from mezzotint.diffusion.prediction import PREDICTIONS
from mezzotint.diffusion.schedule import Schedule
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import UNet
from mezzotint.models.vae import VAE
from mezzotint.train.scratch.diffusion import TextToLatents, diffusion_losses
from mezzotint.train.scratch.distill import distill
from mezzotint.train.scratch.stage import Losses, Stage, train
from mezzotint.train.scratch.text import TextToMean, text_losses
from mezzotint.train.scratch.vae import vae_losses
from mezzotint.weights import Parts, open_model, save_folder
from mezzotint.weights.save_lora import LoraPairs, save_lora
from scenes import SIDE, Scenes
from words import caption_words

VAE_SCENES, LATENT_SCENES, DECODER_SCENES = 1, 2, 3  # seeds
CROP = 64  # side of the VAE's training crops, on the grid of latents: convolutions do not need the whole picture
WINDOW = 32  # tokens with BOS and EOS: captions have 28 at most
EMPTY_SHARE = 0.1  # of captions left out, for guidance
SCENES = 200_000  # in the cache of latents
PART = 4_000  # scenes in each of its files

STAGES = ("vae", "latents", "text", "diffusion", "decoder", "distill", "save")

VAE_CONFIG = VAEConfig(block_out_channels=(16, 32, 64, 128), norm_num_groups=8, sample_size=128, force_upcast=False)
UNET_CONFIG = UNetConfig(
    sample_size=16,
    block_out_channels=(48, 96, 192),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(2, 3, 6),
    cross_attention_dim=192,
    norm_num_groups=16,
)
SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "skip_prk_steps": True,
}
FEW_STEP: dict[str, Any] = {"sampler": "lcm", "steps": 4, "guidance_scale": 1.0, "lora": "lcm_lora.safetensors"}
SETTINGS: dict[str, Any] = {"width": 128, "height": 128, "steps": 20, "guidance_scale": 3.0, "few_step": FEW_STEP}
RANK = 32  # of the few-step change

TRAINED_STAGES = {
    "vae": Stage(steps=15_000, batch=16, lr=3e-3, warmup=50, decay=4_000, ema=0.99),
    "text": Stage(steps=4_000, batch=64, lr=3e-3, warmup=20, decay=3_000, ema=0.99),
    "diffusion": Stage(steps=24_000, batch=64, lr=2e-3, warmup=50, decay=10_000, save_every=100),
    "decoder": Stage(steps=10_000, batch=16, lr=2e-3, warmup=50, decay=6_000),
    "distill": Stage(steps=4_000, batch=32, lr=4e-3, warmup=10, decay=1_600, ema=0.98, save_every=32),
}


def clip_config(tokenizer: Tokenizer) -> CLIPConfig:
    """Return the configuration of a small CLIP text encoder for the reduced vocabulary."""
    return CLIPConfig(
        vocab_size=len(tokenizer.vocab),
        hidden_size=192,
        intermediate_size=768,
        projection_dim=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=WINDOW,
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos,
        pad_token_id=tokenizer.pad,
    )


def crop_losses(vae: VAE, scenes: Scenes, batch: int) -> Callable[[int, torch.Generator], Losses]:
    """Return a function that computes the VAE's losses on random crops of new scenes at each step."""

    def losses(step: int, generator: torch.Generator) -> Losses:
        pixels, _, _ = scenes.batch(range(step * batch, (step + 1) * batch))
        top, left = (8 * torch.randint(0, (pixels.shape[-1] - CROP) // 8 + 1, (2,), generator=generator)).tolist()
        crops = pixels[:, :, top : top + CROP, left : left + CROP].contiguous(memory_format=torch.channels_last)
        return vae_losses(vae, crops, generator)

    return losses


def train_vae(work: Path, stage: Stage, device: str) -> VAE:
    """Train the VAE, then set its scaling factor so that latents have unit variance."""
    torch.manual_seed(0)
    vae = VAE(VAE_CONFIG).to(device)
    scenes = Scenes(VAE_SCENES, device)
    losses = crop_losses(vae, scenes, stage.batch)
    train(vae, losses, stage, work / "vae", adamw_only=("conv_in", "conv_out", "quant_conv"))
    vae.eval().requires_grad_(False)
    with torch.inference_mode():
        spread = vae.encode(scenes.batch(range(256))[0]).mean.std().item()
    vae.config = vae.config.model_copy(update={"scaling_factor": 1.0 / spread})
    return vae


def train_decoder(work: Path, vae: VAE, stage: Stage, device: str) -> None:
    """Train only the decoder, in place. The latents, and everything trained on them, do not change."""
    decoder = nn.ModuleList([vae.decoder, vae.post_quant_conv]).requires_grad_(True)
    losses = crop_losses(vae, Scenes(DECODER_SCENES, device), stage.batch)
    train(decoder, losses, stage, work / "decoder", adamw_only=("conv_in", "conv_out", "1.weight"))
    decoder.eval().requires_grad_(False)


def cache_latents(work: Path, vae: VAE, tokenizer: Tokenizer, device: str, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` scenes as latents (N, 4, 16, 16) and token ids (N, WINDOW), cached in files of PART scenes."""
    scenes = Scenes(LATENT_SCENES, device)
    parts: list[tuple[Tensor, Tensor]] = []
    (work / "latents").mkdir(exist_ok=True)
    for start in range(0, count, PART):
        path = work / "latents" / f"{start:07}.pt"
        if not path.exists():
            latents, ids = [], []
            for first in range(start, start + PART, 100):
                pixels, captions, _ = scenes.batch(range(first, first + 100))
                with torch.inference_mode():
                    mean = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).mean
                latents.append(vae.scale(mean).cpu())
                ids += [tokenizer.window(tokenizer.encode(caption)) for caption in captions]
            torch.save((torch.cat(latents).contiguous(), torch.tensor(ids)), path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
        parts.append(torch.load(path, weights_only=True))
    latents_, ids_ = (torch.cat(tensors)[:count].to(device) for tensors in zip(*parts, strict=True))
    return latents_, ids_


def batch_rows(rows: int, batch: int, step: int) -> Tensor:
    """Return the rows of a step's batch; each epoch visits all rows in a new random order."""
    epoch, place = divmod(step, rows // batch)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(epoch))
    return order[place * batch : (place + 1) * batch]


def train_text(work: Path, latents: Tensor, ids: Tensor, tokenizer: Tokenizer, stage: Stage) -> CLIPTextModel:
    """Train the text encoder alone to predict the latents."""
    torch.manual_seed(0)
    model = TextToMean(CLIPTextModel(clip_config(tokenizer)), latents[0].numel()).to(latents.device)

    def losses(step: int, generator: torch.Generator) -> Losses:
        rows = batch_rows(len(latents), stage.batch, step).to(latents.device)
        return text_losses(model, latents[rows], ids[rows])

    train(model, losses, stage, work / "text", adamw_only=("head",))
    return model.text_encoder


def train_diffusion(
    work: Path, latents: Tensor, ids: Tensor, tokenizer: Tokenizer, stage: Stage, start: Parts | CLIPTextModel
) -> TextToLatents:
    """Train text encoder and UNet together, from a trained text encoder or from the weights of a whole model."""
    torch.manual_seed(0)
    model = TextToLatents(CLIPTextModel(clip_config(tokenizer)), UNet(UNET_CONFIG)).to(latents.device)
    if isinstance(start, Parts):
        model.text_encoder.load_state_dict(start.text_encoders[0].state_dict())
        model.unet.load_state_dict(start.unet.state_dict())
    else:
        model.text_encoder.load_state_dict(start.state_dict())
    schedule = Schedule.from_config(ScheduleConfig.model_validate(SCHEDULER_CONFIG))
    prediction = PREDICTIONS[SCHEDULER_CONFIG["prediction_type"]]
    empty = torch.tensor(tokenizer.window([]), device=ids.device)

    def losses(step: int, generator: torch.Generator) -> Losses:
        rows = batch_rows(len(latents), stage.batch, step).to(latents.device)
        dropped = torch.rand(stage.batch, 1, generator=generator).to(latents.device) < EMPTY_SHARE
        words = torch.where(dropped, empty, ids[rows])
        shuffled = step % 100 == 0
        return diffusion_losses(model, latents[rows], words, schedule, prediction, generator, with_shuffled=shuffled)

    train(model, losses, stage, work / "diffusion", adamw_only=("conv_in", "conv_out"))
    return model.eval().requires_grad_(False)


def distill_few_step(work: Path, model: TextToLatents, ids: Tensor, tokenizer: Tokenizer, stage: Stage) -> LoraPairs:
    """Distil a LoRA with which the `lcm` sampler needs only a few steps and no guidance."""
    empty = torch.tensor(tokenizer.window([]), device=ids.device)
    side = SIDE // VAE_CONFIG.downscale
    shape = (VAE_CONFIG.latent_channels, side, side)
    options = {"guidance_scale": SETTINGS["guidance_scale"], "rank": RANK, "steps": FEW_STEP["steps"]}
    return distill(model, ids, empty, SCHEDULER_CONFIG, stage, work / "distill", shape=shape, **options)


def shorten(stage: Stage, share: float) -> Stage:
    """Return the first `share` of a stage, with a decay in the same proportion."""
    return replace(stage, steps=round(stage.steps * share), decay=max(1, round(stage.decay * share)))


def fast_in_bf16(device: str) -> bool:
    """Return whether the device multiplies matrices faster in bfloat16: GPUs, and CPUs with AMX."""
    return torch.device(device).type != "cpu" or torch.cpu._is_amx_tile_supported()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"), help="folder of checkpoints and logs")
    parser.add_argument("--out", type=Path, default=Path("src/mezzotint/data/emoji"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--share", type=float, default=1.0, help="fraction of each stage's steps and of the scenes")
    for name, stage in TRAINED_STAGES.items():
        parser.add_argument(f"--{name}-steps", type=int, help=f"steps of this stage [default: {stage.steps} x share]")
    parser.add_argument("--start", type=Path, help="model folder to continue from; its VAE stays fixed")
    options = parser.parse_args()
    with torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=fast_in_bf16(options.device)):
        run(options)


def run(options: argparse.Namespace) -> None:
    """Run the selected stages in order; a finished stage only loads its checkpoint."""
    work, device, stages = options.work, options.device, {*options.stages}
    work.mkdir(parents=True, exist_ok=True)
    trained = {}
    for name, stage in TRAINED_STAGES.items():
        steps = getattr(options, f"{name}_steps")
        trained[name] = shorten(stage, options.share if steps is None else steps / stage.steps)
    start = open_model(options.start, dtype=torch.float32, device=device) if options.start else None
    tokenizer = Tokenizer.subset(caption_words(), max_length=WINDOW)
    vae = start.vae.requires_grad_(False) if start else train_vae(work, trained["vae"], device)
    if stages & {"latents", "text", "diffusion", "distill", "save"}:
        latents, ids = cache_latents(work, vae, tokenizer, device, round(SCENES * options.share))
    if stages & {"text", "diffusion", "distill", "save"}:
        encoder_or_parts = start or train_text(work, latents, ids, tokenizer, trained["text"])
    if stages & {"diffusion", "distill", "save"}:
        model = train_diffusion(work, latents, ids, tokenizer, trained["diffusion"], encoder_or_parts)
    if stages & {"decoder", "save"}:
        train_decoder(work, vae, trained["decoder"], device)
    if stages & {"distill", "save"}:
        lora = distill_few_step(work, model, ids, tokenizer, trained["distill"])
    if "save" not in stages:
        return
    save_folder(
        options.out,
        unet=model.unet,
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        scheduler_config=SCHEDULER_CONFIG,
        settings=SETTINGS,
    )
    save_lora(options.out / FEW_STEP["lora"], {"unet": lora})


if __name__ == "__main__":
    main()
