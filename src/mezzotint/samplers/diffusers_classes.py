"""The scheduler classes of diffusers, as combinations of a solver, a spacing and their options. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mezzotint.samplers.sampler import NoiseKind, TimestepKind


@dataclass(frozen=True)
class Scheduler:
    """A scheduler class of diffusers, under our name.

    Attributes:
        key: Our name, or the class name where several classes share a solver.
        name: The class; "" if diffusers has none, and the solver is configured like EulerDiscreteScheduler.
        defaults: The configuration keys that are used, with the defaults of the class. Other keys are ignored, as in
            diffusers.
        flags: Keys that our name sets.
        options: Configuration keys that are options of the solver, with the names of the options.
        values: Values of these options, by key, where they differ from the configuration's.
        fixed: Further options. A string may name a function of `Schedule.bind_options`.
        solver: The solver, if it is not `key`.
        scaled: Whether it works in the variance-preserving coordinate, as all classes do that do not come from
            k-diffusion.
        points: The `points` option of its spacings.
        last: The `last` option of its spacings, unless a key determines it.
        kinds: How noise levels are converted to timesteps under a spacing in sigma, where they are not interpolated.
        choices: The supported values of a key.
        noise: See `Sampler`.
        spacing: The spacing, if the class has only one.
        spacing_options: Options of that spacing.
        default_spacing: The spacing in place of the configuration's, if the request gives none.
        steps: Default number of steps.
        guidance_scale: Default guidance scale.
    """

    key: str
    name: str
    defaults: Mapping[str, Any]
    flags: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    solver: str = ""
    scaled: bool = False
    points: Literal["n", "n+1"] = "n"
    last: Literal["zero", "sigma_min"] = "zero"
    kinds: Mapping[str, TimestepKind] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    noise: NoiseKind = "seeded"
    spacing: str | None = None
    spacing_options: Mapping[str, Any] = field(default_factory=dict)
    default_spacing: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None


# ---- configurations: the keys that are used, with the defaults of the classes ----------------------------------------

_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_SD_BETAS = {**_BETAS, "beta_start": 0.00085, "beta_end": 0.012}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FINAL = {"final_sigmas_type": "zero"}
_THRESHOLDING = {"thresholding": False}
_FLOW = {"use_flow_sigmas": False}
_EULER = {
    **_BETAS,
    **_LINSPACE,
    **_ZERO_SNR,
    **_SIGMAS,
    **_FINAL,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
}
_SECOND_ORDER = {**_SD_BETAS, **_LINSPACE, **_SIGMAS}
_LAMBDA = {**_BETAS, **_SIGMAS, **_THRESHOLDING, **_FLOW, "lower_order_final": True}
_ORDER = {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True}
_CLIPPED = {"lambda_min_clipped": float("-inf"), "variance_type": None}
_SHIFTING = {"use_dynamic_shifting": False}
_DPM = {
    **_LAMBDA,
    **_LINSPACE,
    **_ZERO_SNR,
    **_FINAL,
    **_ORDER,
    **_CLIPPED,
    **_SHIFTING,
    "euler_at_final": False,
    "use_lu_lambdas": False,
}
_CONSISTENCY = {
    **_SD_BETAS,
    **_ZERO_SNR,
    **_THRESHOLDING,
    "beta_schedule": "scaled_linear",
    "original_inference_steps": 50,
}
EDM_DEFAULTS = {
    **_FINAL,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "rho": 7.0,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}

_ORDER_OPTIONS = {name: name for name in ("solver_type", "lower_order_final")} | {"solver_order": "order"}
_DPM_OPTIONS = {**_ORDER_OPTIONS, "algorithm_type": "algorithm", "euler_at_final": "euler_at_final"}
_MIDPOINT_OR_HEUN = {"solver_type": ("midpoint", "heun")}
# diffusers' multistep classes pass integer timesteps to the network, rounded in two ways
_WHOLE = {"karras": "rounded", "lu": "rounded", "exponential": "truncated", "beta": "truncated"}
_MULTISTEP: dict[str, Any] = {"scaled": True, "points": "n+1", "kinds": _WHOLE}
_DISTILLED: dict[str, Any] = {"scaled": True, "spacing": "trailing", "steps": 4, "guidance_scale": 1.0}


def _dpm(key: str, **flags: Any) -> Scheduler:
    algorithms = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
    return Scheduler(
        key,
        "DPMSolverMultistepScheduler",
        _DPM,
        flags=flags,
        options=_DPM_OPTIONS,
        choices={**_MIDPOINT_OR_HEUN, "algorithm_type": algorithms},
        **_MULTISTEP,
    )


_NOT_IN_DIFFUSERS = (
    "heunpp2",
    "dpmpp_2s_a",
    "seeds_2",
    "seeds_3",
    "deis_tab",
    "ipndm",
    "ipndm_v",
    "res_multistep",
    "gradient_estimation",
    "er_sde",
    "euler_cfg_pp",
    "euler_a_cfg_pp",
    "dpmpp_2s_a_cfg_pp",
    "dpmpp_2m_cfg_pp",
    "res_multistep_cfg_pp",
    "gradient_estimation_cfg_pp",
)

SCHEDULERS = (
    Scheduler(
        "ddpm",
        "DDPMScheduler",
        {**_BETAS, **_LEADING, **_ZERO_SNR, **_THRESHOLDING, "variance_type": "fixed_small"},
        scaled=True,
    ),
    Scheduler(
        "ddim",
        "DDIMScheduler",
        {**_BETAS, **_LEADING, **_ZERO_SNR, **_THRESHOLDING, "set_alpha_to_one": True},
        scaled=True,
    ),
    Scheduler(
        "pndm",
        "PNDMScheduler",
        {**_BETAS, **_LEADING, "set_alpha_to_one": False, "skip_prk_steps": False},
        options={"skip_prk_steps": "midpoint"},
        values={"skip_prk_steps": {True: None, False: "pndm_midpoint"}},
        scaled=True,
    ),
    Scheduler("lms", "LMSDiscreteScheduler", {**_BETAS, **_LINSPACE, **_SIGMAS}),
    Scheduler("euler", "EulerDiscreteScheduler", _EULER),
    Scheduler("euler_a", "EulerAncestralDiscreteScheduler", {**_BETAS, **_LINSPACE, **_ZERO_SNR}),
    Scheduler("heun", "HeunDiscreteScheduler", _SECOND_ORDER),
    Scheduler("dpm2", "KDPM2DiscreteScheduler", _SECOND_ORDER, kinds={"karras": "rounded"}),
    Scheduler("dpm2_a", "KDPM2AncestralDiscreteScheduler", _SECOND_ORDER),
    Scheduler(
        "dpmpp_2s",
        "DPMSolverSinglestepScheduler",
        {**_LAMBDA, **_FINAL, **_ORDER, **_CLIPPED, **_SHIFTING, "lower_order_final": False},
        options={**_ORDER_OPTIONS, "algorithm_type": "algorithm"},
        choices={**_MIDPOINT_OR_HEUN, "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++")},
        **_MULTISTEP,
    ),
    Scheduler("dpmpp_sde", "DPMSolverSDEScheduler", _SECOND_ORDER, noise="brownian midpoints"),
    _dpm("dpmpp_2m"),
    _dpm("dpmpp_2m_sde", algorithm_type="sde-dpmsolver++"),
    _dpm("dpmpp_3m", solver_order=3),
    _dpm("dpmpp_3m_sde", solver_order=3, algorithm_type="sde-dpmsolver++"),
    Scheduler(
        "deis",
        "DEISMultistepScheduler",
        {**_LAMBDA, **_LINSPACE, **_SHIFTING, "solver_order": 2, "algorithm_type": "deis", "solver_type": "logrho"},
        options={"solver_order": "order", "lower_order_final": "lower_order_final"},
        choices={"algorithm_type": ("deis",), "solver_type": ("logrho",)},
        last="sigma_min",
        **_MULTISTEP,
    ),
    Scheduler(
        "unipc",
        "UniPCMultistepScheduler",
        {
            **_LAMBDA,
            **_LINSPACE,
            **_ZERO_SNR,
            **_FINAL,
            **_SHIFTING,
            "solver_order": 2,
            "solver_type": "bh2",
            "predict_x0": True,
            "disable_corrector": [],
            "solver_p": None,
            "sigma_min": None,
            "sigma_max": None,
        },
        options={**_ORDER_OPTIONS, "predict_x0": "predict_x0", "disable_corrector": "disable_corrector"},
        choices={"solver_type": ("bh1", "bh2")},
        **_MULTISTEP,
    ),
    Scheduler(
        "sa_solver",
        "SASolverScheduler",
        {
            **_LAMBDA,
            **_LINSPACE,
            **_CLIPPED,
            "predictor_order": 2,
            "corrector_order": 2,
            "algorithm_type": "data_prediction",
            "tau_func": None,
        },
        options={
            "predictor_order": "predictor_order",
            "corrector_order": "corrector_order",
            "algorithm_type": "predict_x0",
            "lower_order_final": "lower_order_final",
        },
        values={"algorithm_type": {"data_prediction": True, "noise_prediction": False}},
        fixed={"tau": "sa_solver_tau"},
        choices={"algorithm_type": ("data_prediction", "noise_prediction")},
        last="sigma_min",
        **_MULTISTEP,
    ),
    *(Scheduler(key, "", _EULER) for key in _NOT_IN_DIFFUSERS),
    Scheduler("dpm_fast", "", _EULER, spacing="exponential", spacing_options={"calls": 3, "last": "own"}),
    Scheduler("dpm_adaptive", "", _EULER, spacing="exponential", spacing_options={"last": "own"}),
    Scheduler("restart", "", {**_EULER, "use_karras_sigmas": True}),
    Scheduler("lcm", "LCMScheduler", _CONSISTENCY, **_DISTILLED),
    Scheduler(
        "tcd", "TCDScheduler", _CONSISTENCY, fixed={"sigma_down_fn": "tcd_sigma_down"}, last="sigma_min", **_DISTILLED
    ),
    Scheduler("EDMEulerScheduler", "EDMEulerScheduler", EDM_DEFAULTS, solver="euler"),
    Scheduler(
        "EDMDPMSolverMultistepScheduler",
        "EDMDPMSolverMultistepScheduler",
        {**EDM_DEFAULTS, **_ORDER, **_THRESHOLDING, "euler_at_final": False},
        options=_DPM_OPTIONS,
        choices={**_MIDPOINT_OR_HEUN, "algorithm_type": ("dpmsolver++", "sde-dpmsolver++")},
        solver="dpmpp_2m",
    ),
)

# By our name and by class name; a class with several of our names means the first.
CLASSES = {scheduler.name: scheduler for scheduler in reversed(SCHEDULERS)} | {s.key: s for s in SCHEDULERS}
del CLASSES[""]
