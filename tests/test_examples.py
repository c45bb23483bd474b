"""Every example runs as it stands, from an empty folder, on the tiny model in place of the bundled one."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

import mezzotint
from mezzotint import pipeline
from mezzotint.config import ScheduleConfig
from mezzotint.diffusion.schedule import Schedule
from mezzotint.diffusion.solvers import SOLVERS
from mezzotint.diffusion.spacing import SPACINGS
from mezzotint.images.io import read_metadata

EXAMPLES = Path(__file__).parents[1] / "examples"
WRITES = {
    "text_to_image": {"lemon.png"},
    "batch_of_requests": {f"{colour}-000{k}.png" for colour in ("yellow", "green", "pink") for k in (1, 2)},
    "watch_the_steps": {"steps.png"},
    "your_own_loop": {"by_hand.png"},
    "own_sampler": {"midpoint.png"},
    "from_a_picture": {f"{name}.png" for name in ("lemon", "tangerine", "whale", "wide", "tile", "tiles")},
}


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sd1_folder: Path) -> Path:
    monkeypatch.setattr(pipeline, "BUNDLED", sd1_folder)
    monkeypatch.setattr(pipeline, "best_device", lambda: "cpu")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # what an example draws without a seed of its own
    return tmp_path


def run(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_all_are_listed_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == WRITES.keys()


@pytest.mark.parametrize("name", WRITES)
def test_an_example_is_short_and_has_a_docstring(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30
    assert text.startswith('"""') and "mezzotint.load()" in text


@pytest.mark.parametrize("name", WRITES)
def test_an_example_runs(empty: Path, name: str) -> None:
    run(name)
    assert {path.name for path in empty.iterdir()} == WRITES[name]
    for file in WRITES[name]:
        with Image.open(empty / file) as image:
            assert len(image.convert("RGB").getcolors(image.width * image.height) or []) > 100, "not a grey picture"


def test_the_first_pictures_file_carries_its_record(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("text_to_image")
    assert read_metadata("lemon.png")["parameters"] == capsys.readouterr().out.strip()


def test_the_loop_by_hand_is_the_pipelines(empty: Path) -> None:
    """The same picture as the same choices make in one call."""
    by_hand = run("your_own_loop")["step"].x
    request = mezzotint.Request(
        prompt="a lemon on a blue background",
        seed=7,
        steps=12,
        guidance_scale=3.0,
        sampler="dpmpp_2m",
        spacing="trailing",
    )
    pipe = mezzotint.load()
    latents = pipe.generate(request, noise(pipe, request)).latents
    assert (by_hand - latents).abs().max() < 1e-4 * latents.abs().max()
    with Image.open("by_hand.png") as image:
        difference = ImageChops.difference(image, pipe.decode(latents)[0])
    assert max(extreme[1] for extreme in difference.getextrema()) <= 1


def noise(pipe: mezzotint.Pipeline, request: mezzotint.Request) -> torch.Tensor:
    """The pipeline starts diffusers' DPM++ 2M from noise * sqrt(sigma^2 + 1), the example from noise * sigma."""
    sigma = pipe.plan(request).sigmas[0]
    drawn = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    return drawn * sigma / (sigma**2 + 1) ** 0.5


def test_the_solver_of_your_own_solves(empty: Path) -> None:
    """As the others do: second order on a Gaussian, whose denoiser is known."""
    midpoint = run("own_sampler")["midpoint"]
    schedule, variance = Schedule.from_config(ScheduleConfig()), 0.25

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return x * variance / (variance + sigma**2)

    def error(solver: Any, steps: int) -> float:
        sigmas = SPACINGS["karras"](schedule, steps, last="sigma_min")[:-1]
        x = torch.ones(1, dtype=torch.float64) * sigmas[0]
        *_, last = solver(denoise, x, sigmas, None)
        exact = x * ((variance + sigmas[-1] ** 2) / (variance + sigmas[0] ** 2)) ** 0.5
        return float((last.x - exact).abs())

    assert error(midpoint, 80) < error(midpoint, 40) / 3.5, "half the step, a quarter of the error"
    assert error(midpoint, 40) < error(SOLVERS["euler"], 40) / 5
