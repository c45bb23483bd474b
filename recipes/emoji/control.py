"""Train the bundled model's ControlNet on outlines: `mezzotint train controlnet` without files in between.

    python recipes/emoji/control.py [--work build/control] [--steps 1500] [--start FOLDER] [--out FOLDER]

The scenes of outlines.py go through the VAE once; a step is that of the method `controlnet` (train/finetune.py). An
interrupted run resumes, and one with a constant learning rate may be given more steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.models.vae import VAE, Posterior
from mezzotint.train import keyed_rng
from mezzotint.train.batches import Batch
from mezzotint.train.finetune import Report, finetune
from mezzotint.train.recipe import Recipe
from mezzotint.train.trainable import TrainableModel
from mezzotint.weights.checkpoint import open_model
from mezzotint.weights.hub import BUNDLED
from mezzotint.weights.save import save_control
from outlines import TRAINING_SEED, Outlines, outline

PART = 1_000  # scenes in each file of the cache
WIDTHS = (8, 16, 32, 64)  # of the convolutions that read the outline


class CachedBatches:
    """Batches of scenes, each drawn from (seed, epoch, scene) as those of train/batches.py."""

    def __init__(self, moments: Tensor, outlines: Tensor, captions: list[str], vae: VAE, recipe: Recipe) -> None:
        self.moments, self.outlines, self.captions = moments, outlines, captions
        self.vae, self.recipe = vae, recipe

    def __len__(self) -> int:
        return len(self.captions) // self.recipe.batch

    def at(self, k: int) -> Batch:
        """Return batch k."""
        epoch, index = divmod(k, len(self))
        seed, batch = self.recipe.seed, self.recipe.batch
        order = torch.randperm(len(self.captions), generator=keyed_rng.generator(seed, epoch, "order"))
        rows = order[index * batch : (index + 1) * batch].tolist()
        latents, captions = [], []
        for row in rows:
            rng = keyed_rng.generator(seed, epoch, str(row), "latents")
            latents.append(self.vae.scale(Posterior(*self.moments[row][:, None]).sample(rng)))
            dropped = keyed_rng.uniform(seed, epoch, str(row), "caption dropout") < self.recipe.caption_dropout
            captions.append("" if dropped else self.captions[row])
        hints = self.outlines[rows].float()[:, None].expand(-1, 3, -1, -1)
        return Batch(epoch, tuple(map(str, rows)), tuple(captions), torch.cat(latents), torch.zeros(batch, 6), hints)


def cache_scenes(folder: Path, vae: VAE, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """Return the posteriors (N, 2, 4, 16, 16), outlines (N, 128, 128) and captions of scenes, cached in files."""
    scenes, parts = Outlines(TRAINING_SEED), []
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, count, PART):
        path = folder / f"{first}.pt"
        if not path.exists():
            words = [scenes.scene(index) for index in range(first, first + PART)]
            moments, lines = [], []
            for k in range(0, PART, 20):
                pixels, silhouettes = scenes.compose(words[k : k + 20])
                with torch.no_grad():
                    posterior = vae.encode(pixels)
                moments.append(torch.stack([posterior.mean, posterior.logvar], 1))
                lines += [torch.from_numpy(outline(silhouette)) for silhouette in silhouettes]
            part = torch.cat(moments), torch.stack(lines), [scene.caption for scene in words]
            torch.save(part, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
            print(f"{first + PART} of {count} scenes encoded", flush=True)
        parts.append(torch.load(path, weights_only=True))
    means, outlines = (torch.cat([part[k] for part in parts]) for k in (0, 1))
    return means, outlines, [caption for part in parts for caption in part[2]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled model's ControlNet on outlines.")
    parser.add_argument("--work", type=Path, default=Path("build/control"))
    parser.add_argument("--out", type=Path, help="folder of the result [default: controlnet in the run's folder]")
    parser.add_argument("--run", default="run", help="name of the run's folder in the work folder")
    parser.add_argument("--scenes", type=int, default=4_000)
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--schedule", choices=("constant", "cosine", "linear"), default="constant")
    parser.add_argument("--warmup", type=int, default=40)
    parser.add_argument("--start", help="a ControlNet to continue from")
    options = parser.parse_args()
    fields = {name: getattr(options, name) for name in ("steps", "batch", "lr", "schedule", "warmup")}
    recipe = Recipe.of("controlnet", None, fields | {
        "data": "outlines", "resolution": 128, "caption_dropout": 0.15, "timesteps": "cubic", "ema": 0.99,
        "condition_widths": WIDTHS, "controlnet": options.start, "save_every": 50, "tensorboard": False,
    })  # fmt: skip
    parts = open_model(BUNDLED, dtype=torch.float32, device="cpu")
    parts.vae.eval().requires_grad_(False)
    scenes = cache_scenes(options.work / "latents", parts.vae, options.scenes)
    batches = CachedBatches(*scenes, parts.vae, recipe)

    def on_step(report: Report) -> None:
        if report.step % recipe.log_every == 0:
            print(f"{report.step} loss {report.loss:.4f} norm {report.norm:.3f} {report.rate:.1f}/s", flush=True)

    folder = options.work / options.run
    model = finetune(TrainableModel(parts, recipe), batches, folder, on_step=on_step)
    assert model.controlnet is not None
    save_control(options.out or folder / "controlnet", model.controlnet)


if __name__ == "__main__":
    main()
