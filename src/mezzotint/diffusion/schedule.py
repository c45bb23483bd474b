"""The training noise schedule: which noise level sigma a model was shown at each timestep.

Everything above this room lives in one coordinate, x = x0 + sigma * noise, with sigma^2 = (1 - alpha_bar) / alpha_bar
of the variance-preserving process that Stable Diffusion was trained on. Tables are float64. A zero-terminal-SNR
schedule keeps its last sigma finite (4096) here, and nowhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mezzotint.config import ScheduleConfig

Table = NDArray[np.float64]

LEAST_ALPHA = 2.0**-24  # stands for a terminal SNR of zero: sigma = 4096, as in diffusers


@dataclass(frozen=True, eq=False)
class Schedule:
    """`alphas_cumprod` (T,), falling with the timestep: the signal's share of variance (alpha_bar, Ho et al. 2020)."""

    alphas_cumprod: Table

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> Schedule:
        """The schedule of a `scheduler_config.json`."""
        alphas_cumprod: Table = np.cumprod(1.0 - betas(config), dtype=np.float64)
        if config.rescale_betas_zero_snr:
            alphas_cumprod = zero_terminal_snr(alphas_cumprod)
        return cls(alphas_cumprod)

    @cached_property
    def sigmas(self) -> Table:
        """(T,) noise levels, rising with the timestep."""
        return np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)

    @cached_property
    def log_sigmas(self) -> Table:
        """(T,) their logarithms."""
        return np.log(self.sigmas)

    @property
    def num_train_timesteps(self) -> int:
        """T, 1000 for Stable Diffusion."""
        return len(self.alphas_cumprod)

    @property
    def sigma_min(self) -> float:
        """The lowest trained noise level (0.029 for Stable Diffusion)."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The highest trained noise level (14.6 for Stable Diffusion)."""
        return float(self.sigmas[-1])

    def sigma(self, timestep: float, *, log: bool = False) -> float:
        """The noise level at a timestep, beyond the table's ends the end's.

        Between two of the table linear in sigma, as diffusers spaces, or in log sigma, as k-diffusion does.
        """
        index = np.arange(self.num_train_timesteps)
        if log:
            return math.exp(np.interp(timestep, index, self.log_sigmas))
        return float(np.interp(timestep, index, self.sigmas))

    def timestep(self, sigma: float, *, log: bool = True) -> float:
        """The timestep in [0, T - 1] of a noise level; the inverse of `sigma`, but log unless told otherwise."""
        index = np.arange(self.num_train_timesteps)
        if log:
            return float(np.interp(math.log(max(sigma, 1e-10)), self.log_sigmas, index))
        return float(np.interp(sigma, self.sigmas, index))


def betas(config: ScheduleConfig) -> Table:
    """(T,) variances of the noise added at each timestep (Ho et al. 2020; cosine: Nichol and Dhariwal 2021, eq. 17)."""
    steps = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.asarray(config.trained_betas, dtype=np.float64)
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, steps)
    if config.beta_schedule == "scaled_linear":
        return np.linspace(math.sqrt(config.beta_start), math.sqrt(config.beta_end), steps) ** 2
    alpha_bar: Table = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def zero_terminal_snr(alphas_cumprod: Table) -> Table:
    """Shift and scale sqrt(alpha_bar) so that the last is zero and the first stays (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(alphas_cumprod)
    rescaled: Table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    rescaled[-1] = LEAST_ALPHA
    return rescaled
