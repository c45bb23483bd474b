"""Per-image streams."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from diffusers.utils.torch_utils import randn_tensor

from mezzotint.diffusion.noise import BrownianNoise, Philox, SeededNoise, box_muller, philox4x32
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


@pytest.mark.parametrize("kind", ["seeded", "philox"])
def test_noise_depends_only_on_the_seed_and_the_draw(kind: str) -> None:
    """Any batch, any order, any company, and a device that it is moved to."""
    seeds = [7, 0, 2**64 - 1, 8, 2**31]  # of a CPU generator the lower 32 bits count
    alone = {seed: SeededNoise([seed], SHAPE, kind=kind) for seed in seeds}
    draws = {seed: [noise.draw(), noise(3.0, 2.0), noise.sample((2, 9))] for seed, noise in alone.items()}
    assert len({float(first.sum()) for first, *_ in draws.values()}) == len(seeds)
    for company in (seeds, seeds[::-1], seeds[1:3], [8, 8, 7]):
        batch = SeededNoise(company, SHAPE, "cpu", kind)
        for made, k in zip([batch.draw(), batch(9.0, 1.0), batch.sample((2, 9))], range(3), strict=True):
            assert made.dtype == torch.float32
            assert torch.equal(made, torch.cat([draws[seed][k] for seed in company]))


# Random123 1.09, tests/kat_vectors: counter, key, result
KNOWN = {
    "philox4x32 7": ("00000000 " * 6, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    "philox4x32 10, zeros": ("00000000 " * 6, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "philox4x32 10, ones": ("ffffffff " * 6, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "philox4x32 10, digits of pi": (
        "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_philox_gives_the_published_integers(name: str) -> None:
    given, expected = ([int(word, 16) for word in words.split()] for words in KNOWN[name])
    counter = np.array(given[:4], dtype=np.uint32)[:, None].repeat(3, axis=1)
    made = philox4x32(counter, (given[4], given[5]), rounds=7 if name.endswith("7") else 10)
    assert made.dtype == np.uint32 and (made == np.array(expected, dtype=np.uint32)[:, None]).all()


# torch.randn(12, device="cuda", generator=torch.Generator("cuda").manual_seed(0)), as AUTOMATIC1111's
# modules/rng_philox.py states it (commit 82a973c)
CUDA_SEED_0 = [
    -0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564, -0.62285122, -0.32838709, -1.07454231,
    -0.36314407, -1.67105067, 2.26550497,
]  # fmt: skip


def test_normals_are_those_of_cuda() -> None:
    torch.testing.assert_close(Philox(0).randn((3, 4)).flatten(), torch.tensor(CUDA_SEED_0), rtol=0, atol=2e-6)


def test_box_muller_is_the_transform_of_the_paper() -> None:
    """Box and Muller 1958, in float64; the integers at the ends are the extremes that a draw can have."""
    words = np.array([0, 1, 2**31, 2**32 - 1, 0x12345678], dtype=np.uint32)
    x, y = (side.flatten() for side in np.meshgrid(words, words))
    u, v = (x + 0.5) / 2.0**32, (y + 0.5) / 2.0**32 * 2 * math.pi
    expected = np.sqrt(-2 * np.log(u)) * np.sin(v)
    whole = x < 2**31 + 1  # beyond it float32 rounds u to 1, as on the GPU, and the normal to 0
    made = box_muller(x, y)
    assert np.abs(made - expected)[whole].max() < 1e-5
    assert (made[x == 2**32 - 1] == 0).all() and np.isfinite(made).all() and np.abs(made).max() < 6.8


def test_philox_is_standard_normal_and_each_draw_is_another() -> None:
    generator = Philox(5)
    first, second = generator.randn((4, 100, 100)), generator.randn((4, 100, 100))
    for draw in (first, second):
        assert float(draw.mean()) == pytest.approx(0.0, abs=0.02) and float(draw.std()) == pytest.approx(1.0, abs=0.02)
    assert abs(float((first * second).mean())) < 0.02
    assert torch.equal(Philox(5).randn((40_000,)), first.flatten()), "the shape is a view"
    assert not torch.equal(Philox(5 + 2**32).randn((4, 100, 100)), first), "all 64 bits of the seed"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**64 - 1])
def test_philox_is_what_a_gpu_draws(seed: int) -> None:
    """For tensors of one launch: SM count x 2048 elements."""
    launch = torch.cuda.get_device_properties(0).multi_processor_count * 2048
    theirs, ours = torch.Generator("cuda").manual_seed(seed), Philox(seed)
    for count in (1, 100, 4 * 64 * 64, launch):
        expected = torch.randn(count, device="cuda", generator=theirs).cpu()
        torch.testing.assert_close(ours.randn((count,)), expected, rtol=0, atol=1e-5)


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
