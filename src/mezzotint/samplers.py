"""The names of samplers, in every dialect, and what each means: solver, spacing, and their options. No torch here.

`resolve(name, scheduler_config)` answers with a `Sampler`, which holds all that a run needs to know. Our own names and
the class names of diffusers mean that class's `from_config(the model's scheduler_config.json)`: a key missing from the
file takes the default of the class that *runs*, not of the class that the file names. The names of A1111 ("DPM++ 2M
Karras", with its capitals) and ComfyUI ("dpmpp_2m karras", sampler and scheduler) mean what those programs do.

Differences between the programs are values in the tables below, never code in a solver.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from mezzotint.config import ScheduleConfig
from mezzotint.errors import RequestError

Start = Literal["sigma", "vp"]
TimestepKind = Literal["interpolated", "linear", "rounded", "truncated"]


@dataclass(frozen=True)
class Sampler:
    """How a run goes from noise to picture.

    name: as asked for, or our name of the model's own. solver, options: into SOLVERS. spacing, spacing_options: into
    SPACINGS. start: the first x is noise * sigma ("sigma") or noise * sqrt(sigma^2 + 1) ("vp"). timestep: the kind that
    the Denoiser is told. rescale_final: divide the last x by sqrt(1 + sigma_last^2) before decoding. schedule: the
    training schedule, as the class that runs reads it from the model's file.
    """

    name: str
    solver: str
    spacing: str
    options: dict[str, Any] = field(default_factory=dict)
    spacing_options: dict[str, Any] = field(default_factory=dict)
    start: Start = "sigma"
    timestep: TimestepKind = "interpolated"
    rescale_final: bool = False
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


class Solver(NamedTuple):
    """What a solver is, for the table: its order of convergence, model calls a step, whether it adds noise."""

    order: int
    calls: int
    stochastic: bool


SOLVERS = {
    "ddpm": Solver(1, 1, True),
    "ddim": Solver(1, 1, False),  # with eta above 0 it adds noise
    "pndm": Solver(2, 1, False),  # 4 in its steps, 2 by its start; one call more in all
    "lms": Solver(2, 1, False),  # as pndm
    "euler": Solver(1, 1, False),
    "euler_a": Solver(1, 1, True),
    "heun": Solver(2, 2, False),
    "dpmpp_2m": Solver(2, 1, False),
}


# ---- diffusers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheduler:
    """A scheduler class of diffusers.

    scaled: it works in the variance-preserving coordinate, on whole timesteps, as all but k-diffusion's offspring do.
    points: of SPACINGS. defaults: those keys of its configuration that matter here, with the class's own defaults; keys
    that it does not list are ignored by it, as in diffusers.
    """

    name: str
    solver: str
    scaled: bool
    points: Literal["n", "n+1"]
    defaults: Mapping[str, Any]


_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_VARIANCE_PRESERVING = {**_SCHEDULE, **_ZERO_SNR, "timestep_spacing": "leading", "thresholding": False}
_K_DIFFUSION = {**_SCHEDULE, "timestep_spacing": "linspace"}

SCHEDULERS = (
    Scheduler("DDPMScheduler", "ddpm", True, "n", {**_VARIANCE_PRESERVING, "variance_type": "fixed_small"}),
    Scheduler("DDIMScheduler", "ddim", True, "n", {**_VARIANCE_PRESERVING, "set_alpha_to_one": True}),
    Scheduler(
        "PNDMScheduler",
        "pndm",
        True,
        "n",
        {**_SCHEDULE, "timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": False},
    ),
    Scheduler("LMSDiscreteScheduler", "lms", False, "n", {**_K_DIFFUSION, **_SIGMAS}),
    Scheduler(
        "EulerDiscreteScheduler",
        "euler",
        False,
        "n",
        {
            **_K_DIFFUSION,
            **_ZERO_SNR,
            **_SIGMAS,
            "interpolation_type": "linear",
            "timestep_type": "discrete",
            "sigma_min": None,
            "sigma_max": None,
            "final_sigmas_type": "zero",
        },
    ),
    Scheduler("EulerAncestralDiscreteScheduler", "euler_a", False, "n", {**_K_DIFFUSION, **_ZERO_SNR}),
    Scheduler(
        "HeunDiscreteScheduler",
        "heun",
        False,
        "n",
        {**_K_DIFFUSION, **_SIGMAS, "beta_start": 0.00085, "beta_end": 0.012},
    ),
    Scheduler(
        "DPMSolverMultistepScheduler",
        "dpmpp_2m",
        True,
        "n+1",
        {
            **_SCHEDULE,
            **_ZERO_SNR,
            **_SIGMAS,
            "timestep_spacing": "linspace",
            "thresholding": False,
            "solver_order": 2,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "lower_order_final": True,
            "euler_at_final": False,
            "final_sigmas_type": "zero",
            "use_lu_lambdas": False,
            "use_flow_sigmas": False,
            "use_dynamic_shifting": False,
            "lambda_min_clipped": float("-inf"),
            "variance_type": None,
        },
    ),
)

# Keys of which only these values run here. `clip_sample` is not among them: latents are never clipped.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "skip_prk_steps": (True,),
    "solver_order": (2,),
    "algorithm_type": ("dpmsolver++", "deis"),  # diffusers runs the second as the first
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # and the last three as the first
    "variance_type": ("fixed_small", None),
    "lambda_min_clipped": (float("-inf"),),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "thresholding": (False,),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
}


def _from_config(scheduler: Scheduler, config: Mapping[str, Any], spacing: str | None) -> Sampler:
    """diffusers' `scheduler.from_config(config)`; `spacing` replaces the file's choice of spacing."""
    flags = {key: config.get(key, default) for key, default in scheduler.defaults.items()}
    if spacing in SUPPORTED["timestep_spacing"]:
        flags.update(timestep_spacing=spacing, use_karras_sigmas=False)
    for key, supported in SUPPORTED.items():
        if key in flags and flags[key] not in supported:
            source = "the model's scheduler_config.json" if key in config else f"the default of {scheduler.name}"
            raise RequestError(
                f"the sampler {scheduler.solver} with {key} = {flags[key]!r} ({source}) is not supported; {key} may be "
                f"{' or '.join(repr(value) for value in supported)}, or choose another sampler"
            )
    last = flags.get("final_sigmas_type", "zero")
    if not flags.get("set_alpha_to_one", True):
        last = "sigma_min"
    base, offset = flags["timestep_spacing"], flags["steps_offset"]
    spacing_options: dict[str, Any]
    timestep: TimestepKind
    if spacing == "karras" or flags.get("use_karras_sigmas"):
        chosen, timestep = "karras", "interpolated"
        spacing_options = {"range": "table" if scheduler.scaled else base, "offset": offset}
        if scheduler.scaled and "use_karras_sigmas" in flags:
            timestep = "rounded"
    else:
        chosen, timestep = base, "linear"
        spacing_options = {
            "leading": {"points": scheduler.points, "offset": offset},
            "linspace": {"points": scheduler.points, "round": scheduler.scaled},
            "trailing": {},
        }[base]
    return Sampler(
        name=scheduler.solver,
        solver=scheduler.solver,
        spacing=chosen,
        options={key: flags[key] for key in ("lower_order_final", "euler_at_final") if key in flags},
        spacing_options={**spacing_options, "last": last},
        start="vp" if scheduler.scaled or base == "leading" else "sigma",
        timestep=timestep,
        rescale_final=scheduler.scaled and last != "zero",
        schedule=_schedule(flags),
    )


# ---- A1111 and ComfyUI -----------------------------------------------------------------------------------------------

K_SPACINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("linspace", {"log": True}),
    "sgm": ("linspace", {"log": True, "points": "n+1"}),
    "karras": ("karras", {}),
}
A1111_SCHEDULES = {"Uniform": "uniform", "Karras": "karras", "SGM Uniform": "sgm"}
COMFYUI_SCHEDULES = {"normal": "uniform", "karras": "karras", "sgm_uniform": "sgm"}

A1111_SAMPLERS = {  # name: (solver, the schedule of "Automatic")
    "Euler": ("euler", "uniform"),
    "Euler a": ("euler_a", "uniform"),
    "Heun": ("heun", "uniform"),
    "LMS": ("lms", "uniform"),
    "DPM++ 2M": ("dpmpp_2m", "karras"),
}
COMFYUI_SAMPLERS = {"euler": "euler", "euler_ancestral": "euler_a", "heun": "heun", "dpmpp_2m": "dpmpp_2m"}

# A1111's samplers that are not k-diffusion's: leading with offset 1 to the lowest level, variance-preserving.
A1111_TIMESTEP_SAMPLERS = {"DDIM": "ddim", "PLMS": "pndm"}


def _preset(name: str, solver: str, schedule: str, start: Start, timestep: TimestepKind) -> Sampler:
    spacing, options = K_SPACINGS[schedule]
    return Sampler(name, solver, spacing, spacing_options=dict(options), start=start, timestep=timestep)


def _presets() -> dict[str, Sampler]:
    """Every spelling of A1111 and ComfyUI that is not also our own name."""
    presets = {}
    for name, (solver, automatic) in A1111_SAMPLERS.items():
        presets[name] = _preset(name, solver, automatic, "sigma", "interpolated")
        for suffix, schedule in A1111_SCHEDULES.items():
            spelling = f"{name} {suffix}"
            presets[spelling] = _preset(spelling, solver, schedule, "sigma", "interpolated")
    for name, solver in A1111_TIMESTEP_SAMPLERS.items():
        presets[name] = Sampler(
            name,
            solver,
            "leading",
            spacing_options={"offset": 1, "last": "sigma_min"},
            start="vp",
            rescale_final=True,
        )
    for name, solver in COMFYUI_SAMPLERS.items():
        if name not in SOLVERS:
            presets[name] = _preset(name, solver, "uniform", "vp", "rounded")
        for suffix, schedule in COMFYUI_SCHEDULES.items():
            spelling = f"{name} {suffix}"
            presets[spelling] = _preset(spelling, solver, schedule, "vp", "rounded")
    return presets


PRESETS = _presets()


# ---- the answer ------------------------------------------------------------------------------------------------------

CLASSES = {scheduler.name: scheduler for scheduler in SCHEDULERS} | {
    scheduler.solver: scheduler for scheduler in SCHEDULERS
}
NAMES = (*SOLVERS, *(scheduler.name for scheduler in SCHEDULERS), *PRESETS)
SPACINGS = ("leading", "linspace", "trailing", "karras")


def resolve(name: str | None, scheduler_config: Mapping[str, Any], spacing: str | None = None) -> Sampler:
    """What `name` means for a model with this scheduler_config.json; None is the class that the file names.

    `spacing` replaces only the spacing. Raises RequestError for unknown names, with the nearest ones, and for a flag in
    the file that is not supported.
    """
    if spacing is not None and spacing not in SPACINGS:
        raise RequestError(f"spacing is {spacing!r}; {_nearest(spacing, SPACINGS)}")
    if name is None:
        name = scheduler_config.get("_class_name", "")
        if name not in CLASSES:
            raise RequestError(
                f"the model's own sampler, _class_name = {name!r} in its scheduler_config.json, is not supported; "
                f"sampler may be {', '.join(SOLVERS)}"
            )
    if name in CLASSES:
        return _from_config(CLASSES[name], scheduler_config, spacing)
    if name not in PRESETS:
        raise RequestError(f"sampler is {name!r}; {_nearest(name, NAMES)}")
    preset = PRESETS[name]
    last = preset.spacing_options.get("last", "zero")
    options = preset.spacing_options if spacing in (None, preset.spacing) else {"last": last}
    return Sampler(
        name,
        preset.solver,
        spacing or preset.spacing,
        preset.options,
        options,
        preset.start,
        preset.timestep,
        preset.rescale_final,
        _schedule(scheduler_config),
    )


def _schedule(config: Mapping[str, Any]) -> ScheduleConfig:
    try:
        return ScheduleConfig.model_validate(dict(config))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RequestError(f"the model's scheduler_config.json is not supported: {wrong}") from None


def _nearest(name: str, names: tuple[str, ...]) -> str:
    close = {known.lower(): known for known in names}
    found = [close[match] for match in difflib.get_close_matches(name.lower(), close, n=3, cutoff=0.5)]
    return f"did you mean {' or '.join(found)}?" if found else f"there are {', '.join(names)}"


class Row(NamedTuple):
    """A line of `mezzotint samplers`: our name, and the same in other programs (empty where there is none)."""

    name: str
    diffusers: str
    a1111: str
    comfyui: str
    order: int
    calls: int
    stochastic: bool


def _row(scheduler: Scheduler) -> Row:
    a1111 = [k for k, (solver, _) in A1111_SAMPLERS.items() if solver == scheduler.solver]
    a1111 += [k for k, solver in A1111_TIMESTEP_SAMPLERS.items() if solver == scheduler.solver]
    comfyui = [k for k, solver in COMFYUI_SAMPLERS.items() if solver == scheduler.solver]
    facts = SOLVERS[scheduler.solver]
    return Row(scheduler.solver, scheduler.name, ", ".join(a1111), ", ".join(comfyui), *facts)


TABLE = tuple(_row(scheduler) for scheduler in SCHEDULERS)
