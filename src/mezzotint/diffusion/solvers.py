"""Solvers, from noise to picture along decreasing noise levels: `SOLVERS[name](denoise, x, sigmas, noise, **options)`.

Args of every solver:
    denoise: `denoise(x, sigma) -> denoised`, the network's estimate of x0, of the shape of x. The CFG++ solvers call
        `denoise.pair(x, sigma) -> (guided, unconditional)`.
    x: Sample at the first level, x0 + sigmas[0] * noise, of shape (B, C, h, w). Its dtype is kept.
    sigmas: n + 1 decreasing Python floats; the last one is 0.0 or above.
    noise: `noise(sigma, sigma_next)`, fresh standard normal noise of the shape of x.

A solver is a generator that yields a Step each time it has advanced, n in all, however often it calls the denoiser.
Progress bars, previews and cancelling are the caller's. No solver waits for the device except dpm_adaptive, which
chooses its own levels and therefore its own number of steps. The levels of `restart` also rise. Invalid options raise
RequestError at the first step.

The ODE is dx/dsigma = (x - denoised) / sigma (Karras et al. 2022, eq. 3). For a variance-preserving model this slope is
the predicted noise, so the update rules of DDIM, DDPM and PNDM, written in alphas, are the same as here.
"""

from __future__ import annotations

from functools import partial

from mezzotint.diffusion.multistep import (
    ADAMS_BASHFORTH,
    dpm_multistep,
    dpmpp_2m_cfg_pp,
    er_sde,
    gradient_estimation,
    lms,
    pndm,
    res_multistep,
    sa_solver,
    unipc,
    vp_time,
)
from mezzotint.diffusion.singlestep import (
    dpm2,
    dpm_adaptive,
    dpm_fast,
    dpmpp_2s,
    dpmpp_2s_a,
    dpmpp_sde,
    euler,
    heun,
    heunpp2,
    lcm,
    restart,
    seeds_solver,
    tcd,
)
from mezzotint.diffusion.solving import Denoise, Noise, Solver, Step

__all__ = ["SOLVERS", "Denoise", "Noise", "Solver", "Step"]

SOLVERS: dict[str, Solver] = {
    "ddpm": partial(euler, eta=1.0),
    "ddim": euler,
    "pndm": pndm,
    "lms": lms,
    "euler": euler,
    "euler_a": partial(euler, eta=1.0),
    "heun": heun,
    "heunpp2": heunpp2,
    "dpm2": dpm2,
    "dpm2_a": partial(dpm2, eta=1.0),
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_2s_a": dpmpp_2s_a,
    "dpmpp_sde": dpmpp_sde,
    "seeds_2": seeds_solver,
    "seeds_3": partial(seeds_solver, nodes=(1 / 3, 2 / 3), solver_type="logrho"),
    "dpmpp_2m": dpm_multistep,
    "dpmpp_2m_sde": partial(dpm_multistep, eta=1.0),
    "dpmpp_3m": partial(dpm_multistep, order=3),
    "dpmpp_3m_sde": partial(dpm_multistep, order=3, eta=1.0),
    "deis": partial(dpm_multistep, algorithm="dpmsolver", solver_type="logrho"),
    "deis_tab": partial(lms, order=3, time=vp_time, euler_to_zero=True),
    "unipc": unipc,
    "sa_solver": sa_solver,
    "res_multistep": res_multistep,
    "er_sde": er_sde,
    "ipndm": partial(lms, weights=ADAMS_BASHFORTH, euler_to_zero=True),
    "ipndm_v": partial(lms, euler_to_zero=True),
    "gradient_estimation": gradient_estimation,
    "dpm_fast": dpm_fast,
    "dpm_adaptive": dpm_adaptive,
    "restart": restart,
    "lcm": lcm,
    "tcd": tcd,
    "euler_cfg_pp": partial(euler, cfg_pp=True),
    "euler_a_cfg_pp": partial(euler, eta=1.0, cfg_pp=True),
    "dpmpp_2s_a_cfg_pp": partial(dpmpp_2s_a, cfg_pp=True),
    "dpmpp_2m_cfg_pp": dpmpp_2m_cfg_pp,
    "res_multistep_cfg_pp": partial(res_multistep, cfg_pp=True),
    "gradient_estimation_cfg_pp": partial(gradient_estimation, cfg_pp=True),
}
