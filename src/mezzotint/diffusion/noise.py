"""Noise that depends only on an image's own seed, not on its position in the batch or on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PHILOX_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # of Philox4x32
PHILOX_WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key in each round: the golden ratio, and sqrt(3) - 1
BROWNIAN_DIGITS = 6  # torchsde's Brownian tree rounds levels to this many digits, and warns of one beyond its ends


class Philox:
    """The numbers of `torch.randn(shape, device="cuda", generator=...)`, drawn on the CPU.

    PyTorch's CUDA generator is cuRAND's Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
    3"). Its key is the seed; thread k of a launch has the counter (previous draws, k), and uses the first of its four
    normals as long as the tensor has no more elements than a launch has threads, SM count x 2048
    (aten/src/ATen/native/cuda/ DistributionTemplates.h). Larger tensors follow an order on the GPU that depends on its
    size; here they continue in this one. The normals agree with the GPU's to 1e-5, because its sine is an
    approximation.
    """

    def __init__(self, seed: int) -> None:
        """Set the key to the seed, from 0 to 2**64 - 1."""
        self.key = seed & 0xFFFFFFFF, seed >> 32
        self.draws = 0

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Return the next draw, float32."""
        count = math.prod(shape)
        counter = np.zeros((4, count), dtype=np.uint32)
        counter[0], counter[2] = self.draws, np.arange(count, dtype=np.uint32)
        self.draws += 1
        first, second, *_ = philox4x32(counter, self.key)
        return torch.from_numpy(box_muller(first, second)).reshape(tuple(shape))


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int], rounds: int = 10) -> NDArray[np.uint32]:
    """Philox4x32 (Salmon et al. 2011, section 3.3).

    Args:
        counter: Counters of shape (4, n).
        key: Two 32-bit numbers.
        rounds: Number of rounds.

    Returns:
        Random numbers of shape (4, n).
    """
    c0, c1, c2, c3 = counter.astype(np.uint64)
    low = np.uint64(0xFFFFFFFF)
    for i in range(rounds):
        k0, k1 = (np.uint64((k + i * weyl) % 2**32) for k, weyl in zip(key, PHILOX_WEYL, strict=True))
        left, right = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & low, (left >> 32) ^ c3 ^ k1, left & low
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def box_muller(x: NDArray[np.uint32], y: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Return cuRAND's first normal of two 32-bit numbers, sqrt(-2 ln u) sin v.

    u in (0, 1] and v in (0, 2 pi] are float32 as on the GPU (the rounding of u determines the smallest normals); the
    functions are evaluated in float64.
    """
    unit = np.float64(2.0**-32)
    turn = np.float64(np.float32(2.0**-32) * np.float32(2 * math.pi))
    u = (x.astype(np.float32) * unit + unit / 2).astype(np.float32).astype(np.float64)
    v = (y.astype(np.float32) * turn + turn / 2).astype(np.float32).astype(np.float64)
    return (np.sqrt(-2.0 * np.log(u)) * np.sin(v)).astype(np.float32)


class Window(NamedTuple):
    """A part of larger latents.

    Attributes:
        size: (h, w) of the larger ones.
        rows: Where it lies in them.
        columns: Likewise.
    """

    size: tuple[int, int]
    rows: slice
    columns: slice

    def crop(self, x: Tensor) -> Tensor:
        """Return this part of the larger latents (B, C, h, w)."""
        return x[:, :, self.rows, self.columns]


class SeededNoise:
    """Standard normal noise for a batch, where each image has its own generator.

    Args:
        seeds: One seed for each image.
        shape: (C, h, w) of one image's latents.
        device: Where the draws are moved to.
        kind: "seeded" draws from CPU generators, like diffusers with a list of them; "philox" draws what CUDA
            generators would.
        window: Where the latents lie in larger ones, whose noise is drawn; None if they are the whole.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        device: torch.device | str | None = None,
        kind: str = "seeded",
        window: Window | None = None,
    ) -> None:
        self.generators: list[torch.Generator] | list[Philox] = (
            [Philox(seed) for seed in seeds]
            if kind == "philox"
            else [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        )
        self.shape, self.window = shape, window
        self.device = device

    @property
    def whole_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of what is drawn."""
        return (self.shape[0], *self.window.size) if self.window else self.shape

    def sample(self, shape: Sequence[int]) -> Tensor:
        """Return the next noise, (B, *shape) float32; each image is drawn as (1, *shape)."""
        draws = [
            g.randn((1, *shape)) if isinstance(g, Philox) else torch.randn((1, *shape), generator=g)
            for g in self.generators
        ]
        return torch.cat(draws).to(self.device)

    def draw(self) -> Tensor:
        """Return the next noise of the shape of the latents, (B, C, h, w) float32."""
        return self.crop(self.sample(self.whole_shape))

    def crop(self, drawn: Tensor) -> Tensor:
        """Return the window's part of noise for the whole."""
        return self.window.crop(drawn) if self.window else drawn

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """Return the noise of one step, as solvers request it; the levels have no influence."""
        return self.draw()


class BrownianNoise:
    """The increments of a Brownian path in sigma, one path for each image.

    The same as k-diffusion's BrownianTreeNoiseSampler. More steps sample the same path more finely, so the picture
    changes little with their number.

    Args:
        seeds: One seed for each image.
        shape: (C, h, w) of one image's latents.
        sigmas: Levels of the run; the path lies between the highest and the lowest above 0. They are rounded to float32
            as in k-diffusion: the path is not smooth, and the last digit moves it by a thousandth.
        device: Where the increments are moved to.
        midpoints: Also round the midpoints in lambda = -log sigma, which DPM++ SDE requests.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        sigmas: Sequence[float],
        device: torch.device | str | None = None,
        *,
        midpoints: bool = False,
    ) -> None:
        from torchsde import BrownianTree  # type: ignore[import-untyped]  # importing it takes half a second

        levels = torch.tensor([sigma for sigma in sigmas if sigma > 0.0], dtype=torch.float32)
        self.low, self.high = round(float(levels.min()), BROWNIAN_DIGITS), round(float(levels.max()), BROWNIAN_DIGITS)
        if midpoints:
            lambdas = -levels.log()
            levels = torch.cat([lambdas, lambdas[:-1] + lambdas.diff() * 0.5]).neg().exp()
        self.levels = levels.tolist()
        start = torch.zeros(shape, dtype=torch.float32)
        self.trees = [BrownianTree(t0=self.low, w0=start, t1=self.high, entropy=seed) for seed in seeds]
        self.device = device

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """Return the path's increment from sigma to sigma_next over its standard deviation, (B, C, h, w) float32."""
        top, bottom = self._snap(sigma), self._snap(sigma_next)
        increments = torch.stack([tree(bottom, top) for tree in self.trees])
        return (increments / -math.sqrt(top - bottom) if top > bottom else increments).to(self.device)

    def _snap(self, level: float) -> float:
        nearest = min(self.levels, key=lambda known: abs(known - level))
        level = nearest if math.isclose(nearest, level, rel_tol=1e-5) else level
        return min(max(round(level, BROWNIAN_DIGITS), self.low), self.high)
