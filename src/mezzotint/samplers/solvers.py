"""The table of solvers: their properties, uses and options. No torch here.

The functions of the same names are in `mezzotint.diffusion.solvers.SOLVERS`.
"""

from __future__ import annotations

from typing import NamedTuple


class Solver(NamedTuple):
    """The properties of a solver.

    Attributes:
        order: Order of convergence of a whole run; multistep methods start with one first-order step.
        calls: Model calls in a step.
        stochastic: Whether it adds noise by default.
        good_for: What it is good for, in a few words.
        eta: Default share of the noise that it adds; None where it takes no `eta`.
        options: The other options that it takes.
        cfg_pp: Whether it is a CFG++ solver, which always needs the unconditional estimate.
        own_levels: Whether it chooses its own noise levels between the first and the last.
    """

    order: int
    calls: int
    stochastic: bool
    good_for: str
    eta: float | None = None
    options: tuple[str, ...] = ()
    cfg_pp: bool = False
    own_levels: bool = False


_LMS = ("order", "weights", "time", "euler_to_zero")
_SINGLE = ("order", "algorithm", "solver_type", "lower_order_final", "total_steps")
_SEEDS = ("nodes", "solver_type")
_MULTI = ("order", "algorithm", "solver_type", "curvature", "lower_order_final", "euler_at_final", "total_steps")
_UNIPC = ("order", "corrector_order", "predict_x0", "solver_type", "tau", "lower_order_final", "disable_corrector")
_SA = ("predictor_order", "corrector_order", "tau", "predict_x0", "lower_order_final")
_ADAPTIVE = ("order", "rtol", "atol", "h_init", "pcoeff", "icoeff", "accept_safety")

SOLVERS = {
    "ddpm": Solver(1, 1, True, "the original sampler; needs many steps", eta=1.0),
    "ddim": Solver(1, 1, False, "the deterministic baseline; adds noise if eta > 0", eta=0.0),
    "pndm": Solver(2, 1, False, "default of Stable Diffusion 1; one extra call per run", options=("midpoint",)),
    "lms": Solver(2, 1, False, "the oldest multistep solver; from 25 steps", options=_LMS),
    "euler": Solver(1, 1, False, "simple and robust; for turbo and lightning models", eta=0.0),
    "euler_a": Solver(1, 1, True, "varied pictures that change with the number of steps", eta=1.0),
    "heun": Solver(2, 2, False, "accurate, at twice the calls"),
    "heunpp2": Solver(1, 3, False, "reproduces Forge and ComfyUI; heun is more accurate"),
    "dpm2": Solver(2, 2, False, "similar to heun, from DPM-Solver", eta=0.0),
    "dpm2_a": Solver(1, 2, True, "similar to euler_a, more accurate", eta=1.0),
    "dpmpp_2s": Solver(2, 1, False, "second order, single step; for strong guidance", eta=0.0, options=_SINGLE),
    "dpmpp_2s_a": Solver(1, 2, True, "similar to euler_a, more accurate", eta=1.0, options=("guided_midpoint",)),
    "dpmpp_sde": Solver(1, 2, True, "rich detail in few steps, at twice the calls", eta=1.0, options=("r",)),
    "seeds_2": Solver(1, 2, True, "similar to dpmpp_sde, with one noise path", eta=1.0, options=_SEEDS),
    "seeds_3": Solver(1, 3, True, "similar to seeds_2, more accurate", eta=1.0, options=_SEEDS),
    "dpmpp_2m": Solver(2, 1, False, "the first to try, at 15 to 25 steps", eta=0.0, options=_MULTI),
    "dpmpp_2m_sde": Solver(1, 1, True, "fine detail, from 25 steps", eta=1.0, options=_MULTI),
    "dpmpp_3m": Solver(2, 1, False, "without guidance or with many steps", eta=0.0, options=_MULTI),
    "dpmpp_3m_sde": Solver(1, 1, True, "similar to dpmpp_2m_sde, from 30 steps", eta=1.0, options=_MULTI),
    "deis": Solver(2, 1, False, "similar to dpmpp_2m; interpolates the noise", eta=0.0, options=_MULTI),
    "deis_tab": Solver(2, 1, False, "similar to deis, in time; reproduces Forge and ComfyUI", options=_LMS),
    "unipc": Solver(2, 1, False, "few steps, 5 to 15", options=_UNIPC),
    "sa_solver": Solver(1, 1, True, "adds noise only in the middle of the run", options=_SA),
    "ipndm": Solver(2, 1, False, "similar to lms, for even spacings", options=_LMS),
    "ipndm_v": Solver(2, 1, False, "similar to ipndm, for any spacing", options=_LMS),
    "res_multistep": Solver(2, 1, False, "similar to dpmpp_2m, with exact weights", eta=0.0),
    "gradient_estimation": Solver(1, 1, False, "euler with extrapolation; few steps", options=("gamma",)),
    "er_sde": Solver(1, 1, True, "noise scale tuned for pictures, from 20 steps", options=("order", "noise_scaler")),
    "dpm_fast": Solver(3, 1, False, "few steps, which count network calls", eta=0.0, options=("calls",)),
    "dpm_adaptive": Solver(
        3, 3, False, "adapts its steps to the estimated error", eta=0.0, options=_ADAPTIVE, own_levels=True
    ),
    "restart": Solver(2, 2, True, "adds noise back to correct errors; from 36 steps", options=("segments", "karras")),
    "lcm": Solver(1, 1, True, "LCM and LCM-LoRA models, 2 to 8 steps, no guidance"),
    "tcd": Solver(1, 1, False, "TCD-LoRA models, 2 to 8 steps; eta adds noise", eta=0.0, options=("sigma_down_fn",)),
    "euler_cfg_pp": Solver(1, 1, False, "low guidance, 0.5 to 2, without oversaturation", eta=0.0, cfg_pp=True),
    "euler_a_cfg_pp": Solver(1, 1, True, "similar to euler_cfg_pp, with noise", eta=1.0, cfg_pp=True),
    "dpmpp_2s_a_cfg_pp": Solver(
        1,
        2,
        True,
        "similar to euler_a_cfg_pp, more accurate",
        eta=1.0,
        options=("guided_midpoint",),
        cfg_pp=True,
    ),
    "dpmpp_2m_cfg_pp": Solver(2, 1, False, "similar to euler_cfg_pp, in fewer steps", cfg_pp=True),
    "res_multistep_cfg_pp": Solver(2, 1, False, "similar to dpmpp_2m_cfg_pp", eta=0.0, cfg_pp=True),
    "gradient_estimation_cfg_pp": Solver(
        1, 1, False, "similar to euler_cfg_pp, in fewer steps", options=("gamma",), cfg_pp=True
    ),
}
