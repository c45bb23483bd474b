"""The solvers as a table: what each is, what it is good for, and what it accepts. No torch here.

The functions are `mezzotint.diffusion.solvers.SOLVERS`, by the same names.
"""

from __future__ import annotations

from typing import NamedTuple


class Solver(NamedTuple):
    """What a solver is.

    Attributes:
        order: Order of convergence of a whole run; multistep methods start with one first-order step.
        calls: Model calls in a step.
        stochastic: Whether it adds noise by default.
        good_for: Its use, in a few words.
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
_SINGLE = ("order", "algorithm", "solver_type", "lower_order_final")
_SEEDS = ("nodes", "solver_type")
_MULTI = ("order", "algorithm", "solver_type", "curvature", "lower_order_final", "euler_at_final", "total_steps")
_UNIPC = ("order", "corrector_order", "predict_x0", "solver_type", "tau", "lower_order_final", "disable_corrector")
_SA = ("predictor_order", "corrector_order", "tau", "predict_x0", "lower_order_final")
_ADAPTIVE = ("order", "rtol", "atol", "h_init", "pcoeff", "icoeff", "accept_safety")

SOLVERS = {
    "ddpm": Solver(1, 1, True, "what the model was trained to undo; many steps", eta=1.0),
    "ddim": Solver(1, 1, False, "the baseline; with eta above 0 it adds noise", eta=0.0),
    "pndm": Solver(2, 1, False, "Stable Diffusion 1's own; one call more in all", options=("midpoint",)),
    "lms": Solver(2, 1, False, "the first multistep; from 25 steps", options=_LMS),
    "euler": Solver(1, 1, False, "simple and robust; turbo and lightning models", eta=0.0),
    "euler_a": Solver(1, 1, True, "varied pictures that keep changing with the steps", eta=1.0),
    "heun": Solver(2, 2, False, "exact, at twice the calls"),
    "heunpp2": Solver(1, 3, False, "Forge's and ComfyUI's pictures; heun is more exact"),
    "dpm2": Solver(2, 2, False, "as heun, from DPM-Solver", eta=0.0),
    "dpm2_a": Solver(1, 2, True, "as euler_a, finer steps", eta=1.0),
    "dpmpp_2s": Solver(2, 1, False, "second order without memory; strong guidance", eta=0.0, options=_SINGLE),
    "dpmpp_2s_a": Solver(1, 2, True, "as euler_a, finer steps", eta=1.0),
    "dpmpp_sde": Solver(1, 2, True, "rich detail in few steps, at twice the calls", eta=1.0, options=("r",)),
    "seeds_2": Solver(1, 2, True, "as dpmpp_sde, one noise path", eta=1.0, options=_SEEDS),
    "seeds_3": Solver(1, 3, True, "as seeds_2, finer steps", eta=1.0, options=_SEEDS),
    "dpmpp_2m": Solver(2, 1, False, "the first to try: 15 to 25 steps", eta=0.0, options=_MULTI),
    "dpmpp_2m_sde": Solver(1, 1, True, "detail of noise, from 25 steps", eta=1.0, options=_MULTI),
    "dpmpp_3m": Solver(2, 1, False, "as dpmpp_2m, without guidance or with many steps", eta=0.0, options=_MULTI),
    "dpmpp_3m_sde": Solver(1, 1, True, "as dpmpp_2m_sde, from 30 steps", eta=1.0, options=_MULTI),
    "deis": Solver(2, 1, False, "as dpmpp_2m, interpolates the noise", eta=0.0, options=_MULTI),
    "deis_tab": Solver(2, 1, False, "as deis, interpolates in time; Forge's and ComfyUI's", options=_LMS),
    "unipc": Solver(2, 1, False, "few steps, 5 to 15", options=_UNIPC),
    "sa_solver": Solver(1, 1, True, "noise in the middle of the run only", options=_SA),
    "ipndm": Solver(2, 1, False, "as lms, cheap weights; even spacings", options=_LMS),
    "ipndm_v": Solver(2, 1, False, "as ipndm, any spacing", options=_LMS),
    "res_multistep": Solver(2, 1, False, "as dpmpp_2m, exact weights", eta=0.0),
    "gradient_estimation": Solver(1, 1, False, "euler that looks ahead; few steps", options=("gamma",)),
    "er_sde": Solver(1, 1, True, "noise tuned for pictures, from 20 steps", options=("order", "noise_scaler")),
    "dpm_fast": Solver(3, 1, False, "steps counts calls; few of them", eta=0.0, options=("calls",)),
    "dpm_adaptive": Solver(
        3, 3, False, "chooses its own steps by the error it measures", eta=0.0, options=_ADAPTIVE, own_levels=True
    ),
    "restart": Solver(2, 2, True, "goes back up and repairs; from 36 steps", options=("segments", "karras")),
    "lcm": Solver(1, 1, True, "LCM and LCM-LoRA models, 2 to 8 steps, no guidance"),
    "tcd": Solver(1, 1, False, "TCD-LoRA models, 2 to 8 steps; eta adds noise", eta=0.0, options=("sigma_down_fn",)),
    "euler_cfg_pp": Solver(1, 1, False, "low guidance, 0.5 to 2, without oversaturation", eta=0.0, cfg_pp=True),
    "euler_a_cfg_pp": Solver(1, 1, True, "as euler_cfg_pp, varied", eta=1.0, cfg_pp=True),
    "dpmpp_2s_a_cfg_pp": Solver(1, 2, True, "as euler_a_cfg_pp, finer steps", eta=1.0, cfg_pp=True),
    "dpmpp_2m_cfg_pp": Solver(2, 1, False, "as euler_cfg_pp, fewer steps", cfg_pp=True),
    "res_multistep_cfg_pp": Solver(2, 1, False, "as dpmpp_2m_cfg_pp", eta=0.0, cfg_pp=True),
    "gradient_estimation_cfg_pp": Solver(1, 1, False, "as euler_cfg_pp, fewer steps", options=("gamma",), cfg_pp=True),
}
