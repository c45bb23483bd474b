"""The training noise schedule: which noise level sigma a model was shown at each timestep.

Everything above this room lives in one coordinate, x = x0 + sigma * noise, with sigma^2 = (1 - alpha_bar) / alpha_bar
of the variance-preserving process that Stable Diffusion was trained on. Tables are float64. A zero-terminal-SNR
schedule keeps its last sigma finite (4096) here, and nowhere else. A model with EDM's preconditioning never saw betas;
its levels are a table all the same, so that every spacing runs on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
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
        if config.sigma_data is not None:
            return cls(1.0 / (1.0 + edm_sigmas(config) ** 2))
        alphas_cumprod: Table = np.cumprod(1.0 - betas(config), dtype=np.float64)
        if config.float32_table:
            alphas_cumprod = float32_alphas_cumprod(config)
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

    def timed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """A solver's options, those that speak of timesteps ("between", "earlier", "within") as functions of levels."""
        functions = {"between": self.between, "earlier": self.earlier, "within": self.within}
        return {
            name: functions.get(option, option) if isinstance(option, str) else option
            for name, option in options.items()
        }

    def earlier(self, sigma: float, share: float) -> float:
        """The level at `1 - share` of this one's timestep, cut to a whole one: TCD's way down (Zheng et al. 2024).

        The product is float32's, as in diffusers: (1 - 0.9) * 10 is 1 there, and less in float64.
        """
        if share == 0.0 or sigma == 0.0:
            return sigma
        return self.sigma(math.floor(np.float32(1.0 - share) * np.float32(round(self.timestep(sigma)))))

    def between(self, sigma: float, sigma_next: float) -> float:
        """The level halfway in timesteps, cut to a whole one: where PNDM's Runge-Kutta steps look (Liu et al. 2022)."""
        return self.sigma((round(self.timestep(sigma)) + round(self.timestep(sigma_next))) // 2)

    def within(self, sigma: float, first: float = 0.2, last: float = 0.8) -> float:
        """1.0 from `first` to `last` of the timesteps, else 0.0: where SA-Solver adds noise (Xue et al. 2023)."""
        return float(first <= round(self.timestep(sigma)) / self.num_train_timesteps <= last)


def edm_sigmas(config: ScheduleConfig) -> Table:
    """(T,) rising levels of EDM (Karras et al. 2022, eq. 5; or even in log sigma), 0.002 to 80 unless it says else."""
    low, high, steps = config.sigma_min or 0.002, config.sigma_max or 80.0, config.num_train_timesteps
    if config.sigma_schedule == "exponential":
        return np.geomspace(low, high, steps)
    return np.linspace(low ** (1 / config.rho), high ** (1 / config.rho), steps) ** config.rho


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


def float32_alphas_cumprod(config: ScheduleConfig) -> Table:
    """(T,) as diffusers adds it up, to its last digit."""
    if config.trained_betas is None and config.beta_schedule != "squaredcos_cap_v2":
        power = 2 if config.beta_schedule == "scaled_linear" else 1
        ends = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
        rising = torch.linspace(*ends, config.num_train_timesteps, dtype=torch.float32) ** power
    else:
        rising = torch.tensor(betas(config), dtype=torch.float32)
    alphas_cumprod = torch.cumprod(1.0 - rising, dim=0)
    sigmas = ((1.0 - alphas_cumprod) / alphas_cumprod) ** 0.5
    exact: Table = 1.0 / (1.0 + sigmas.double().numpy() ** 2)  # gives these sigmas back
    return exact


def zero_terminal_snr(alphas_cumprod: Table) -> Table:
    """Shift and scale sqrt(alpha_bar) so that the last is zero and the first stays (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(alphas_cumprod)
    rescaled: Table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    rescaled[-1] = LEAST_ALPHA
    return rescaled
