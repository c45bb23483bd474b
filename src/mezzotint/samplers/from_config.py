"""The sampler that a diffusers class gives for a scheduler_config.json. No torch here.

`from_config(scheduler, config)` corresponds to diffusers' `Class.from_config(scheduler_config)`: a key missing from the
file takes the default of the class that runs, not of the class that the file names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from mezzotint.config import ScheduleConfig
from mezzotint.errors import RequestError
from mezzotint.samplers.diffusers_classes import EDM_DEFAULTS, Scheduler
from mezzotint.samplers.sampler import Sampler
from mezzotint.samplers.solvers import SOLVERS

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
    timestep = sampler.timestep if sampler.timestep in ("nearest", "edm", "lcm") else "interpolated"
    return replace(sampler, spacing=spacing, spacing_options=options, timestep=timestep, steps_from=None)


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
        read |= {key: config.get(key, default) for key, default in EDM_DEFAULTS.items()}
    try:
        return ScheduleConfig.model_validate(read)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise RequestError(f"the model's scheduler_config.json is not supported: {wrong}") from None
