"""Per-image streams."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from diffusers.utils.torch_utils import randn_tensor

from mezzotint.diffusion.noise import BrownianNoise, SeededNoise
from test_kdiffusion import sampling  # noqa: F401  (a fixture: k-diffusion's sampling.py)

SHAPE = (4, 3, 5)


def test_an_image_does_not_know_its_neighbours() -> None:
    together, alone = SeededNoise([7, 8, 2**63], SHAPE), SeededNoise([8], SHAPE)
    for _ in range(3):
        batch = together.draw()
        assert batch.shape == (3, *SHAPE) and batch.dtype == torch.float32
        assert torch.equal(batch[1:2], alone.draw())


def test_the_stream_is_that_of_diffusers() -> None:
    noise = SeededNoise([1, 2], SHAPE)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    for _ in range(2):
        assert torch.equal(noise(1.0, 0.5), randn_tensor((2, *SHAPE), generator=generators))
    assert [g.get_state().tolist() for g in noise.generators] == [g.get_state().tolist() for g in generators]


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    SeededNoise([1], SHAPE).draw()
    assert torch.equal(before, torch.get_rng_state())


LEVELS = [14.5, 10.25, 6.0, 2.5, 0.75, 0.03125, 0.0]  # exact in float32


@pytest.mark.parametrize("theirs", ["diffusers", "k-diffusion"])
def test_the_path_is_that_of_the_references(theirs: str, sampling: Any) -> None:  # noqa: F811
    """Whatever the order and fineness of the questions; each image's own, batched or alone."""
    cls = BrownianTreeNoiseSampler if theirs == "diffusers" else sampling.BrownianTreeNoiseSampler
    seeds, like = [7, 2**40], torch.zeros(2, *SHAPE, dtype=torch.float32)
    ours, reference = BrownianNoise(seeds, SHAPE, LEVELS), cls(like, LEVELS[-2], LEVELS[0], seed=seeds)
    for top, bottom in [(6.0, 2.5), (14.5, 10.25), (10.25, 8.0), (0.75, 0.03125), (8.0, 6.0)]:
        noise = ours(top, bottom)
        expected = reference(*torch.tensor([top, bottom], dtype=torch.float32))
        torch.testing.assert_close(noise, expected, rtol=0, atol=1e-5)
        assert torch.equal(noise[1:], BrownianNoise(seeds[1:], SHAPE, LEVELS)(top, bottom))


@pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning")  # theirs goes a digit beyond its path
def test_midpoints_are_asked_for_as_the_references_round_them(sampling: Any) -> None:  # noqa: F811
    """k-diffusion's sample_dpmpp_sde in float32, on levels that are not exact in it."""
    sigmas = torch.linspace(14.6, 0.1, 9, dtype=torch.float32)
    asked: list[torch.Tensor] = []
    tree = sampling.BrownianTreeNoiseSampler(
        torch.zeros(1, *SHAPE, dtype=torch.float32), sigmas[-1], sigmas[0], seed=[7]
    )

    def record(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        asked.append(tree(sigma, sigma_next))
        return asked[-1]

    start = torch.zeros(1, *SHAPE, dtype=torch.float32)
    sampling.sample_dpmpp_sde(lambda x, sigma: x, start, sigmas, noise_sampler=record, disable=True)
    levels = sigmas.tolist()
    for midpoints in (True, False):
        noise, apart = BrownianNoise([7], SHAPE, levels, midpoints=midpoints), []
        for k in range(len(levels) - 1):
            for j, end in enumerate((math.sqrt(levels[k] * levels[k + 1]), levels[k + 1])):
                apart.append(float((noise(levels[k], end) - asked[2 * k + j]).abs().max()))
        assert max(apart) < 1e-5 if midpoints else max(apart) > 1e-4


def test_pieces_of_the_path_add_up() -> None:
    noise = BrownianNoise([3], SHAPE, LEVELS)
    whole = noise(14.5, 2.5) * math.sqrt(12.0)
    pieces = noise(14.5, 6.0) * math.sqrt(8.5) + noise(6.0, 2.5) * math.sqrt(3.5)
    torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=1e-4)


def test_a_brownian_increment_is_standard_normal() -> None:
    noise = BrownianNoise([5], (4, 40, 40), LEVELS)(6.0, 2.5)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.05) and float(noise.std()) == pytest.approx(1.0, abs=0.03)


def test_below_the_path_there_is_no_noise() -> None:
    """Solvers ask for the noise of a step to level 0 too, which adds none."""
    assert torch.equal(BrownianNoise([5], SHAPE, LEVELS)(0.03125, 0.0), torch.zeros(1, *SHAPE, dtype=torch.float32))
