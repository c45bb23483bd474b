"""Pictures drawn tile by tile against a loop by hand that draws each tile and blends them, and the whole run."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint import Pipeline, Request, RequestError
from mezzotint.again import again, judge, read_source
from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.guidance import guided
from mezzotint.diffusion.prediction import PREDICTIONS
from mezzotint.diffusion.solvers import SOLVERS
from mezzotint.images.io import from_pil
from mezzotint.memory.footprint import predict
from mezzotint.memory.headers import ModelHeaders

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(
    (128, 96), Image.Resampling.BICUBIC
)
RUN = Request(prompt="a lemon", image=PICTURE, steps=4, strength=0.5, seed=5, sampler="euler_a", guidance_scale=3.0)


def ramps(length: int) -> list[tuple[int, int, np.ndarray[Any, Any]]]:
    """Cut into tiles of at most 8 cells that share at least 2; weights rise over the middle half of these."""
    count = next(n for n in itertools.count(1) if n * 8 - (n - 1) * 2 >= length)
    size = -(-(length + (count - 1) * 2) // count)
    firsts = [round(k * (length - size) / max(count - 1, 1)) for k in range(count)]
    found = []
    for k, first in enumerate(firsts):
        weights = np.ones(size)
        if k:
            shared = firsts[k - 1] + size - first
            weights = np.minimum(weights, np.clip((np.arange(size) + 0.5 - shared / 4) / (shared / 2), 0, 1))
        if k < count - 1:
            shared = first + size - firsts[k + 1]
            weights = np.minimum(weights, np.clip((np.arange(size) + 0.5 - shared / 4) / (shared / 2), 0, 1)[::-1])
        found.append((first, first + size, weights))
    return found


def by_hand(pipe: Pipeline, request: Request) -> torch.Tensor:
    """Draw each tile in a loop of its own, from the same noise, and blend."""
    plan = pipe.plan(request)
    prediction = PREDICTIONS["epsilon"]
    random = torch.Generator().manual_seed(5)
    shape = (1, 4, 12, 16)
    draws = [torch.randn(shape, generator=random) for _ in range(2 + plan.steps)]
    with torch.inference_mode():
        conditions = [pipe.encode(request.prompt, request), pipe.encode("", request)]
        posterior = pipe.vae.encode(from_pil(PICTURE))
        x0 = pipe.vae.scale(posterior.mean + torch.exp(0.5 * posterior.logvar) * draws[0])
        whole = torch.zeros(shape, dtype=torch.float64)
        for (top, bottom, down), (left, right, across) in itertools.product(ramps(12), ramps(16)):
            part = np.s_[:, :, top:bottom, left:right]
            denoise = guided(Denoiser(pipe.unet, pipe.schedule, prediction, conditions).outputs, prediction, scale=3.0)
            fresh = iter(draws[2:])
            x = x0[part] + plan.sigmas[0] * draws[1][part]
            for step in SOLVERS["euler_a"](denoise, x, plan.sigmas, lambda *_: next(fresh)[part]):  # noqa: B023
                x = step.x
            whole[part] += x.double() * torch.from_numpy(down[:, None] * across)
    return whole


def test_tiles_are_those_of_a_loop_by_hand(sd1: Pipeline) -> None:
    done: list[tuple[int, int]] = []
    result = sd1.generate(RUN.replace(tile=64), on_step=lambda k, total: done.append((k, total)))
    wanted = by_hand(sd1, RUN)
    assert float((result.latents - wanted).abs().max() / wanted.abs().max()) < 1e-5
    pixels = np.asarray(sd1.decode(wanted.float())[0], dtype=int)
    assert np.abs(np.asarray(result.images[0], dtype=int) - pixels).max() <= 1
    total = len(ramps(12)) * len(ramps(16)) * 2
    assert done == [(k + 1, total) for k in range(total)]
    plain = sd1.generate(RUN)
    assert (result.latents - plain.latents).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_one_tile_is_the_run_without(family: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(family)
    for sampler in ("euler_a", "dpmpp_2m_sde"):
        run = RUN.replace(sampler=sampler, count=2, batch=2)
        assert torch.equal(pipe.generate(run.replace(tile=128)).latents, pipe.generate(run).latents)


def test_the_record_and_again(sd1: Pipeline, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "start.png")
    image = sd1.generate(RUN.replace(image=str(tmp_path / "start.png"), tile=64)).images[0]
    image.save(tmp_path / "large.png")
    source = read_source(tmp_path / "large.png")
    assert source.request.tile == 64
    drawn = again(sd1, source, inputs={"image": str(tmp_path / "start.png")})
    assert judge(source, drawn[0]).identical


def test_a_step_takes_the_memory_of_a_tile(sd1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mezzotint.memory.system.mapped", lambda: 0)
    model = ModelHeaders.of(sd1_folder, device="cpu")
    whole, tiled, one = (
        predict(model, Request(prompt="a lemon", image=image, **fields), base=0)
        for image, fields in ((PICTURE, {}), (PICTURE, {"tile": 64}), (PICTURE.resize((56, 56)), {}))
    )
    assert tiled.stages["step"] < whole.stages["step"]
    assert tiled.stages["decode"] == whole.stages["decode"]
    assert tiled.stages["step"] == one.stages["step"]


def test_what_it_does_not_go_with(sd1: Pipeline) -> None:
    mask = Image.new("L", PICTURE.size, 255)
    for fields, sentence in (
        ({"image": None, "strength": None}, "tile is given, but there is no image to start from"),
        ({"mask": mask}, "tile and mask are both given"),
        ({"seamless": "x"}, "tile and seamless are both given"),
        ({"outpaint": (0, 0, 8, 0)}, "tile and outpaint are both given"),
    ):
        with pytest.raises(RequestError, match=sentence):
            sd1.generate(RUN.replace(tile=64, **fields))
