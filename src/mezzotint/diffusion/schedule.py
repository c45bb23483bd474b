"""The training noise schedule: the noise level sigma of each training timestep.

All other modules use the coordinate x = x0 + sigma * noise, where sigma^2 = (1 - alpha_bar) / alpha_bar of the
variance-preserving process that Stable Diffusion was trained on. Tables are float64. The last sigma of a
zero-terminal-SNR schedule is kept finite here, and nowhere else (`ScheduleConfig.terminal_alpha`). A model with EDM's
preconditioning has no betas, but its levels are made a table too, so that every spacing works with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mezzotint.config import ScheduleConfig

Table = NDArray[np.float64]
Interpolated = Literal["sigma", "log_sigma", "log_alpha"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """A training noise schedule.

    Attributes:
        alphas_cumprod: The signal's share of the variance at each timestep (alpha_bar, Ho et al. 2020), decreasing,
            (T,).
    """

    alphas_cumprod: Table

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> Schedule:
        """Return the schedule of a `scheduler_config.json`."""
        if config.sigma_data is not None:
            return cls(1.0 / (1.0 + edm_sigmas(config) ** 2))
        alphas_cumprod: Table = np.cumprod(1.0 - betas(config), dtype=np.float64)
        if config.float32_table:
            alphas_cumprod = float32_alphas_cumprod(config)
        if config.rescale_betas_zero_snr:
            alphas_cumprod = zero_terminal_snr(alphas_cumprod, config.terminal_alpha)
        return cls(alphas_cumprod)

    @cached_property
    def sigmas(self) -> Table:
        """Noise levels, increasing with the timestep, (T,)."""
        return np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)

    @cached_property
    def log_sigmas(self) -> Table:
        """Logarithms of the noise levels, (T,)."""
        return np.log(self.sigmas)

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps T, 1000 for Stable Diffusion."""
        return len(self.alphas_cumprod)

    @property
    def sigma_min(self) -> float:
        """The lowest noise level (0.029 for Stable Diffusion)."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The highest noise level (14.6 for Stable Diffusion)."""
        return float(self.sigmas[-1])

    def sigma(self, timestep: float, interpolate: Interpolated = "sigma") -> float:
        """Return the noise level at a timestep; timesteps beyond the ends of the table give the ends.

        Args:
            timestep: A timestep, possibly fractional.
            interpolate: What is interpolated linearly in the timestep: "sigma", as in diffusers; "log_sigma", as in
                k-diffusion; or "log_alpha" (the logarithm of alpha_bar), as UniPC's authors do.
        """
        index = np.arange(self.num_train_timesteps)
        if interpolate == "log_alpha":
            return math.sqrt(math.expm1(-np.interp(timestep, index, np.log(self.alphas_cumprod))))
        if interpolate == "log_sigma":
            return math.exp(np.interp(timestep, index, self.log_sigmas))
        return float(np.interp(timestep, index, self.sigmas))

    def timestep(self, sigma: float, interpolate: Interpolated = "log_sigma") -> float:
        """Return the timestep in [0, T - 1] of a noise level, the inverse of `sigma`.

        Args:
            sigma: A noise level.
            interpolate: As in `sigma`.
        """
        index = np.arange(self.num_train_timesteps)
        if interpolate == "log_alpha":
            return float(np.interp(math.log1p(sigma**2), -np.log(self.alphas_cumprod), index))
        if interpolate == "log_sigma":
            return float(np.interp(math.log(max(sigma, 1e-10)), self.log_sigmas, index))
        return float(np.interp(sigma, self.sigmas, index))

    def distilled(self, count: int) -> Schedule:
        """Return the schedule of every (T // count)-th timestep from the highest, on which a model was distilled."""
        stride = max(self.num_train_timesteps // count, 1)
        return Schedule(self.alphas_cumprod[::-1][::stride][:count][::-1])

    def lcm_timestep(self, sigma: float, count: int = 50) -> float:
        """Return the nearest, in log sigma, of the timesteps that LCM was distilled on (Luo et al. 2023)."""
        stride, distilled = max(self.num_train_timesteps // count, 1), self.distilled(count)
        below = distilled.num_train_timesteps - 1 - round(distilled.timestep(sigma))
        return float(self.num_train_timesteps - 1 - stride * below)

    def bind_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the names of this schedule's functions in a solver's options by the functions.

        The names are "pndm_midpoint", "tcd_sigma_down" and "sa_solver_tau".
        """
        functions = {
            "pndm_midpoint": self.pndm_midpoint,
            "tcd_sigma_down": self.tcd_sigma_down,
            "sa_solver_tau": self.sa_solver_tau,
        }
        return {
            name: functions.get(option, option) if isinstance(option, str) else option
            for name, option in options.items()
        }

    def tcd_sigma_down(self, sigma: float, eta: float) -> float:
        """Return the level at (1 - eta) of this level's timestep, rounded down: where TCD steps to (Zheng et al. 2024).

        The product is rounded to float32 as in diffusers, where (1 - 0.9) * 10 is 1; in float64 it is less.
        """
        if eta == 0.0 or sigma == 0.0:
            return sigma
        return self.sigma(math.floor(np.float32(1.0 - eta) * np.float32(round(self.timestep(sigma)))))

    def pndm_midpoint(self, sigma: float, sigma_next: float) -> float:
        """Return the level halfway in timesteps, rounded down, of PNDM's Runge-Kutta steps (Liu et al. 2022)."""
        return self.sigma((round(self.timestep(sigma)) + round(self.timestep(sigma_next))) // 2)

    def sa_solver_tau(self, sigma: float, first: float = 0.2, last: float = 0.8) -> float:
        """Return 1.0 from `first` to `last` of the timesteps, where SA-Solver adds noise (Xue et al. 2023), or 0.0."""
        return float(first <= round(self.timestep(sigma)) / self.num_train_timesteps <= last)


def edm_sigmas(config: ScheduleConfig) -> Table:
    """Return EDM's levels (Karras et al. 2022, eq. 5, or evenly spaced in log sigma), increasing, (T,)."""
    low, high, steps = config.sigma_min or 0.002, config.sigma_max or 80.0, config.num_train_timesteps
    if config.sigma_schedule == "exponential":
        return np.geomspace(low, high, steps)
    return np.linspace(low ** (1 / config.rho), high ** (1 / config.rho), steps) ** config.rho


def betas(config: ScheduleConfig) -> Table:
    """Return the variance of the noise added at each timestep, (T,).

    Sources: Ho et al. 2020; for "squaredcos_cap_v2", Nichol and Dhariwal 2021, eq. 17.
    """
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
    """Return the table as diffusers computes it in float32, to the last digit, (T,)."""
    if config.trained_betas is None and config.beta_schedule != "squaredcos_cap_v2":
        power = 2 if config.beta_schedule == "scaled_linear" else 1
        ends = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
        betas32 = torch.linspace(*ends, config.num_train_timesteps, dtype=torch.float32) ** power
    else:
        betas32 = torch.tensor(betas(config), dtype=torch.float32)
    alphas_cumprod = torch.cumprod(1.0 - betas32, dim=0)
    sigmas = ((1.0 - alphas_cumprod) / alphas_cumprod) ** 0.5
    exact: Table = 1.0 / (1.0 + sigmas.double().numpy() ** 2)  # the inverse of `Schedule.sigmas`
    return exact


def zero_terminal_snr(alphas_cumprod: Table, terminal_alpha: float = ScheduleConfig().terminal_alpha) -> Table:
    """Shift and scale sqrt(alpha_bar) so that the last is zero and the first is unchanged (Lin et al. 2023, alg. 1).

    Args:
        alphas_cumprod: The table, (T,).
        terminal_alpha: Replaces the last alpha_bar, so that its noise level is finite.
    """
    root = np.sqrt(alphas_cumprod)
    rescaled: Table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    rescaled[-1] = terminal_alpha
    return rescaled
