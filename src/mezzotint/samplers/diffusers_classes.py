"""The scheduler classes of diffusers, as combinations of a solver, a spacing and their options. No torch here.

`from_config(scheduler, config)` corresponds to diffusers' `Class.from_config(scheduler_config)`: a key missing from the
file takes the default of the class that runs, not of the class that the file names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import ValidationError

from mezzotint.config import ScheduleConfig
from mezzotint.errors import RequestError
from mezzotint.samplers.solvers import SOLVERS

Start = Literal["sigma", "vp"]
TimestepKind = Literal["interpolated", "nearest", "linear", "rounded", "truncated", "edm"]
NoiseKind = Literal["seeded", "brownian", "brownian midpoints"]
Counts = Literal["diffusers", "a1111", "a1111 timesteps", "a1111 unipc", "comfyui"]


@dataclass(frozen=True)
class Sampler:
    """How a run gets from noise to a picture.

    Attributes:
        name: The name that was requested, or our name of the model's own sampler.
        solver: A key of `diffusion.solvers.SOLVERS`.
        spacing: A key of `diffusion.spacing.SPACINGS`.
        options: Keyword arguments of the solver.
        spacing_options: Keyword arguments of the spacing.
        start: Scale of the starting noise: "sigma", or "vp" for sqrt(sigma^2 + 1).
        timestep: How the denoiser converts noise levels to timesteps.
        noise: Noise of the steps: "seeded" draws, or a "brownian" path, which "brownian midpoints" also evaluates
            halfway.
        rescale_final: Whether to divide the final latents by sqrt(1 + sigma_last^2) before decoding.
        schedule: The training schedule of the model, as the class that runs reads it.
        steps: Default number of steps, if the sampler has one.
        guidance_scale: Default guidance scale, if the sampler has one.
        guidance_divisor: The requested guidance scale is divided by this.
        counts: Whose rule determines the number of steps of an image-to-image run (run/levels.py).
    """

    name: str
    solver: str
    spacing: str
    options: dict[str, Any] = field(default_factory=dict)
    spacing_options: dict[str, Any] = field(default_factory=dict)
    start: Start = "sigma"
    timestep: TimestepKind = "interpolated"
    noise: NoiseKind = "seeded"
    rescale_final: bool = False
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_divisor: float = 1.0
    counts: Counts = "diffusers"


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
_EDM = {
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
    Scheduler("EDMEulerScheduler", "EDMEulerScheduler", _EDM, solver="euler"),
    Scheduler(
        "EDMDPMSolverMultistepScheduler",
        "EDMDPMSolverMultistepScheduler",
        {**_EDM, **_ORDER, **_THRESHOLDING, "euler_at_final": False},
        options=_DPM_OPTIONS,
        choices={**_MIDPOINT_OR_HEUN, "algorithm_type": ("dpmsolver++", "sde-dpmsolver++")},
        solver="dpmpp_2m",
    ),
)

# By our name and by class name; a class with several of our names means the first.
CLASSES = {scheduler.name: scheduler for scheduler in reversed(SCHEDULERS)} | {s.key: s for s in SCHEDULERS}
del CLASSES[""]

# Keys with their supported values. `clip_sample` is not among them: latents are never clipped.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "sigma_schedule": ("karras", "exponential"),
    "skip_prk_steps": (True, False),
    "variance_type": ("fixed_small", None),
    "lambda_min_clipped": (float("-inf"),),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete", "continuous"),
    "thresholding": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "tau_func": (None,),
    "solver_p": (None,),
}

# Keys that select a spacing in sigma, in diffusers' order of precedence.
USES = {
    "use_karras_sigmas": "karras",
    "use_lu_lambdas": "lu",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}
# A file may have been written for another class; a class uses its own default for another class's type.
TYPES = ("dpmsolver++", "dpmsolver", "deis", "midpoint", "heun", "logrho", "bh1", "bh2")


def from_config(scheduler: Scheduler, config: Mapping[str, Any], spacing: str | None = None) -> Sampler:
    """Return the sampler of diffusers' `scheduler.from_config(config)`.

    Args:
        scheduler: The class that runs.
        config: The model's scheduler_config.json.
        spacing: Replaces the spacing that the configuration selects.

    Raises:
        RequestError: If the value of a key is not supported.
    """
    flags = {key: config.get(key, default) for key, default in scheduler.defaults.items()} | dict(scheduler.flags)
    if spacing not in (None, _spacing(scheduler, flags)):
        flags |= {flag: name == spacing for flag, name in USES.items() if flag in flags}
        if spacing in SUPPORTED["timestep_spacing"] and "timestep_spacing" in flags:
            flags["timestep_spacing"] = spacing
    for key, own in scheduler.choices.items():
        if flags[key] in TYPES and flags[key] not in own:
            flags[key] = scheduler.defaults[key]
    for key, supported in {**SUPPORTED, **scheduler.choices}.items():
        if key in flags and flags[key] not in supported:
            source = "the model's scheduler_config.json" if key in config else f"the default of {scheduler.name}"
            raise RequestError(
                f"the sampler {scheduler.key} with {key} = {flags[key]!r} ({source}) is not supported; {key} may be "
                f"{' or '.join(repr(value) for value in supported)}, or choose another sampler"
            )
    timestep_spacing = flags.get("timestep_spacing", "linspace")
    chosen = _spacing(scheduler, flags)
    offset = flags.get("steps_offset", 0)
    last: str = scheduler.last
    if flags.get("final_sigmas_type") == "sigma_min" or not flags.get("set_alpha_to_one", True):
        last = "sigma_min"
    elif last == "sigma_min" and chosen in USES.values():
        last = "repeat"
    spacing_options: dict[str, Any]
    if scheduler.spacing:
        spacing_options = dict(scheduler.spacing_options)
        if "original_inference_steps" in flags:
            spacing_options["original"] = flags["original_inference_steps"]
    elif "sigma_data" in flags:
        spacing_options = {"rho": flags["rho"]} if chosen == "karras" else {}
    elif chosen in USES.values():
        spacing_options = {"range": "table" if scheduler.points == "n+1" else timestep_spacing, "offset": offset}
        spacing_options |= {key: flags[key] for key in ("sigma_min", "sigma_max") if flags.get(key)}
    else:
        spacing_options = {
            "leading": {"points": scheduler.points, "offset": offset},
            "linspace": {"points": scheduler.points, "round": scheduler.scaled},
            "trailing": {},
        }[chosen]
    schedule = read_schedule_config(config, flags, float32=scheduler.noise != "seeded")
    in_timesteps = chosen in SUPPORTED["timestep_spacing"]
    continuous = flags.get("timestep_type") == "continuous" and schedule.prediction_type == "v_prediction"
    sampler = Sampler(
        name=scheduler.key,
        solver=scheduler.solver or scheduler.key,
        spacing=chosen,
        options=_options(scheduler, flags),
        spacing_options={"last": last, **spacing_options},
        start="vp" if scheduler.scaled or "sigma_data" in flags or timestep_spacing == "leading" else "sigma",
        timestep="edm" if continuous else "linear" if in_timesteps else scheduler.kinds.get(chosen, "interpolated"),
        noise=scheduler.noise,
        rescale_final=scheduler.scaled,
        schedule=schedule,
        steps=scheduler.steps,
        guidance_scale=scheduler.guidance_scale,
    )
    return with_spacing(sampler, spacing)


def _spacing(scheduler: Scheduler, flags: Mapping[str, Any]) -> str:
    """Return the spacing that the flags select."""
    asked = [name for flag, name in USES.items() if flags.get(flag)]
    only = scheduler.spacing or flags.get("sigma_schedule")
    return str(only or (asked[0] if asked else flags.get("timestep_spacing", "linspace")))


def _options(scheduler: Scheduler, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the solver's options among the flags."""
    options = dict(scheduler.fixed)
    for key, option in scheduler.options.items():
        options[option] = scheduler.values[key][flags[key]] if key in scheduler.values else flags[key]
    if "algorithm" in options:
        stochastic = options["algorithm"].startswith("sde-")
        options |= {"algorithm": options["algorithm"].removeprefix("sde-"), "eta": float(stochastic)}
        if stochastic and options["order"] == 3 and "euler_at_final" in options:
            options["curvature"] = -1.0  # reproduces diffusers' sign error
    return options


def with_spacing(sampler: Sampler, spacing: str | None) -> Sampler:
    """Return the sampler with another spacing; None changes nothing.

    Only the options that determine how the run ends are kept.

    Raises:
        RequestError: If the solver does not use a spacing.
    """
    if spacing in (None, sampler.spacing):
        return sampler
    if SOLVERS[sampler.solver].own_levels:
        raise RequestError(
            f"spacing is {spacing!r}, but {sampler.name} chooses its own noise levels; leave spacing out"
        )
    options = {key: value for key, value in sampler.spacing_options.items() if key in ("last", "points", "calls")}
    timestep = sampler.timestep if sampler.timestep in ("nearest", "edm") else "interpolated"
    return replace(sampler, spacing=spacing, spacing_options=options, timestep=timestep)


def read_schedule_config(
    config: Mapping[str, Any], flags: Mapping[str, Any] | None = None, float32: bool = False
) -> ScheduleConfig:
    """Return the training schedule of a scheduler_config.json.

    A model with EDM's preconditioning keeps it, whichever class runs.

    Args:
        config: The model's scheduler_config.json.
        flags: The configuration with the defaults of the class that runs.
        float32: Whether to compute the table in float32, as diffusers does.

    Raises:
        RequestError: If the schedule is not supported.
    """
    read = {**(config if flags is None else flags), "float32_table": float32}
    if str(config.get("_class_name", "")).startswith("EDM"):
        read |= {key: config.get(key, default) for key, default in _EDM.items()}
    try:
        return ScheduleConfig.model_validate(read)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RequestError(f"the model's scheduler_config.json is not supported: {wrong}") from None
