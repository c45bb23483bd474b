"""Per-image streams."""

from __future__ import annotations

import torch
from diffusers.utils.torch_utils import randn_tensor

from mezzotint.diffusion.noise import SeededNoise

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
