"""The recipe from nothing to a folder that draws, in miniature: its own main(), small networks, an atlas of squares."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import make
import mezzotint
import scenes
import words
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.vae import VAE
from mezzotint.train.scratch import distill

SMALL_UNET = {
    "block_out_channels": (8, 8, 16),
    "attention_head_dim": (2, 2, 2),
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
}
SMALL_CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "projection_dim": 16}
VAE_STEPS, TEXT_STEPS, DIFFUSION_STEPS, DECODER_STEPS, DISTILL_STEPS = (
    [f"{stage} {step}" for step in range(4)] for stage in ("vae", "text", "diffusion", "decoder", "distill")
)


class Died(BaseException):
    """Stands for a kill."""


class Few(scenes.Scenes):
    """Batches cut to 16 scenes: the encoder's work at full size is what would take long."""

    def batch(self, indices: Sequence[int]) -> Any:
        return super().batch(indices[:16])


class Recipe:
    """The recipe made small, writing into `folder`. `ran` lists the steps of training that ran, as "vae 3"."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, atlas: dict[int, torch.Tensor]) -> None:
        self.work, self.model, self.patch = folder / "work", folder / "model", monkeypatch
        self.ran: list[str] = []
        self.die_at = ""
        self._train, clip_config = make.train, make.clip_config
        for name, value in {
            "VAE_CONFIG": make.VAE_CONFIG.model_copy(update={"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2}),
            "UNET_CONFIG": make.UNET_CONFIG.model_copy(update=SMALL_UNET),
            "clip_config": lambda tokenizer: clip_config(tokenizer).model_copy(update=SMALL_CLIP),
            "Scenes": partial(Few, atlas=atlas),
            "SCENES": 16,
            "PART": 16,
            "RANK": 2,
            "TRAINED_STAGES": {
                name: replace(stage, steps=8, batch=4, save_every=2, log_every=1)
                for name, stage in make.TRAINED_STAGES.items()
            },
            "train": self.train,
        }.items():
            monkeypatch.setattr(make, name, value)
        monkeypatch.setattr(distill, "train", self.train)
        monkeypatch.setattr(distill, "POOL", 1)

    def train(self, module: Any, losses: Callable[..., Any], stage: Any, folder: Path, **options: Any) -> Any:
        def noted(step: int, generator: torch.Generator) -> Any:
            if self.die_at == f"{folder.name} {step}":
                raise Died
            self.ran.append(f"{folder.name} {step}")
            return losses(step, generator)

        return self._train(module, noted, stage, folder, **(options | {"log": lambda line: None}))

    def run(self, *arguments: str, die_at: str = "") -> dict[str, bytes]:
        """main(), as from the command line; the files that it wrote."""
        self.die_at, self.ran = die_at, []
        places = [f"--work={self.work}", f"--out={self.model}", "--device=cpu"]
        self.patch.setattr(sys, "argv", ["make.py", *places, "--share=0.5", *arguments])
        make.main()
        files = (path for path in self.model.rglob("*") if path.is_file())
        return {str(path.relative_to(self.model)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def atlas() -> dict[int, torch.Tensor]:
    """A square of one colour for each object, in each size: no font is needed."""
    colours = torch.randint(0, 256, (len(words.NAMES), 1, 1, 4), generator=torch.Generator().manual_seed(0))
    colours[..., 3] = 255
    return {size: colours.to(torch.uint8).expand(-1, size, size, -1) for size in scenes.SIZES}


def test_from_nothing_to_a_model_that_draws_and_the_same_after_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atlas: dict[int, torch.Tensor]
) -> None:
    with monkeypatch.context() as patch:
        recipe = Recipe(tmp_path / "unbroken", patch, atlas)
        made = recipe.run()
        assert recipe.ran == VAE_STEPS + TEXT_STEPS + DIFFUSION_STEPS + DECODER_STEPS + DISTILL_STEPS

        pipe = mezzotint.load(recipe.model, device="cpu")
        request = pipe.resolve(mezzotint.Request(prompt="a lemon left of a whale on a pink background", seed=7))
        assert json.loads(made["mezzotint.json"]) == make.SETTINGS
        assert all(getattr(request, name) == value for name, value in make.SETTINGS.items() if name != "few_step")
        (image,) = pipe.generate(request.replace(steps=2)).images
        assert image.size == (128, 128) and len(image.getcolors(128 * 128) or []) > 100
        few = pipe.resolve(mezzotint.Request(prompt=request.prompt, seed=7, sampler="lcm"))
        assert (few.steps, few.guidance_scale) == (4, 1.0)
        assert pipe.generate(few).images[0].tobytes() != image.tobytes()
        assert pipe.schedule.sigma_max == pytest.approx(4096, rel=1e-3), "zero terminal SNR"
        assert pipe.tokenizers[0].max_length == make.WINDOW

        latents, ids = torch.load(recipe.work / "latents" / "0000000.pt", weights_only=True)
        assert latents.shape == (16, 4, 16, 16) and ids.shape == (16, make.WINDOW)
        assert 0.5 < latents.std() < 2.0, "the scaling factor makes them about unit variance"

        again = recipe.run()  # all there: nothing is trained, the same folder is written
        assert recipe.ran == [] and again == made

        recipe.work = tmp_path / "more"  # from the folder alone: what no step changes comes out as it went in
        idle = ("--start", str(recipe.model), "--decoder-steps=0", "--distill-steps=0")
        same = recipe.run(*idle, "--diffusion-steps=0")
        assert {name for name in made if same[name] != made[name]} == {"lcm_lora.safetensors"}
        recipe.run(*idle, "--diffusion-steps=2")
        assert recipe.ran == DIFFUSION_STEPS[:2], "the VAE is final"

    with monkeypatch.context() as patch:
        recipe = Recipe(tmp_path / "killed", patch, atlas)
        with pytest.raises(Died):
            recipe.run(die_at="vae 3")
        assert recipe.ran == VAE_STEPS[:3]
        with pytest.raises(Died):
            recipe.run(die_at="diffusion 1")
        assert recipe.ran == VAE_STEPS[2:] + TEXT_STEPS + DIFFUSION_STEPS[:1]
        recipe.run("--stages", "decoder")  # before its turn: it needs the VAE only
        assert recipe.ran == DECODER_STEPS and not recipe.model.exists()
        assert recipe.run() == made, "the same bytes"
        assert recipe.ran == DIFFUSION_STEPS + DISTILL_STEPS, "nothing that was finished is made again"


def test_the_configurations_fit_together() -> None:
    """The full sizes, on no memory: what section 6 of the design allows."""
    tokenizer = Tokenizer.subset(words.caption_words(), max_length=make.WINDOW)
    with torch.device("meta"):
        networks = make.CLIPTextModel(make.clip_config(tokenizer)), make.UNet(make.UNET_CONFIG), VAE(make.VAE_CONFIG)
    assert make.clip_config(tokenizer).hidden_size == make.UNET_CONFIG.cross_attention_dim
    assert make.VAE_CONFIG.sample_size == scenes.SIDE == make.SETTINGS["width"] == make.SETTINGS["height"]
    assert make.UNET_CONFIG.sample_size == scenes.SIDE // make.VAE_CONFIG.downscale
    half = sum(2 * parameter.numel() for network in networks for parameter in network.parameters())
    assert half < 48_000_000, "bytes in fp16"


def test_every_caption_fits_the_window_uncut_and_in_whole_words() -> None:
    tokenizer, whole = Tokenizer.subset(words.caption_words(), max_length=make.WINDOW), Tokenizer.clip()
    for caption in scenes.Scenes(make.LATENT_SCENES).specs(range(1_000))[0]:
        ids = tokenizer.encode(caption)
        assert len(ids) <= make.WINDOW - 2
        assert [tokenizer.token(id) for id in ids] == [whole.token(id) for id in whole.encode(caption)]


def test_no_two_batches_of_an_epoch_share_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And guidance gets its share of empty captions."""
    tokenizer = Tokenizer.subset(["a lemon"], max_length=8)
    latents = torch.arange(20.0).view(20, 1, 1, 1).expand(20, 4, 2, 2)
    ids = torch.full((20, 8), 3)
    seen: list[tuple[list[int], int]] = []

    def record(model: Any, latents: torch.Tensor, ids: torch.Tensor, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        seen.append((latents[:, 0, 0, 0].int().tolist(), int((ids != 3).any(1).sum())))
        return {}

    def only_losses(module: Any, losses: Callable[..., Any], stage: Any, folder: Path, **options: Any) -> None:
        for step in range(stage.steps):
            losses(step, torch.Generator().manual_seed(step))

    monkeypatch.setattr(make, "diffusion_losses", record)
    monkeypatch.setattr(make, "train", only_losses)
    monkeypatch.setattr(make, "UNET_CONFIG", make.UNET_CONFIG.model_copy(update=SMALL_UNET))
    start = make.CLIPTextModel(make.clip_config(tokenizer))
    model = make.train_diffusion(tmp_path, latents, ids, tokenizer, make.Stage(steps=250, batch=4), start)
    for name, weight in start.state_dict().items():
        assert torch.equal(model.text_encoder.state_dict()[name], weight), "it begins from the text stage's"
    epochs = [[row for rows, _ in seen[i : i + 5] for row in rows] for i in range(0, 250, 5)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 50, "each in another order"
    assert abs(sum(empty for _, empty in seen) / 1000 - make.EMPTY_SHARE) < 0.03
