"""The names of samplers in every dialect, and their meaning: a solver, a spacing and their options. No torch here.

`resolve(name, scheduler_config)` returns a `Sampler`. Our own names and the class names of diffusers mean that class's
`from_config(scheduler_config)` (diffusers_classes.py). The names of A1111 ("DPM++ 2M Karras") and ComfyUI ("dpmpp_2m
karras", sampler and scheduler) mean what those programs do (presets.py). Differences between the programs are values in
tables, never code in a solver.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from mezzotint.errors import RequestError
from mezzotint.samplers.diffusers_classes import (
    CLASSES,
    SCHEDULERS,
    NoiseKind,
    Sampler,
    Start,
    from_config,
    read_schedule_config,
    with_spacing,
)
from mezzotint.samplers.presets import (
    A1111_SAMPLERS,
    A1111_SCHEDULES,
    A1111_WITHOUT_SCHEDULE,
    COMFYUI_ENDS,
    COMFYUI_SAMPLERS,
    COMFYUI_SCHEDULES,
    PRESETS,
)

__all__ = [
    "A1111_SCHEDULES",
    "CLASSES",
    "COMFYUI_SCHEDULES",
    "FEW_STEPS",
    "NAMES",
    "SCHEDULERS",
    "SOLVERS",
    "SPACINGS",
    "TABLE",
    "NoiseKind",
    "Row",
    "Sampler",
    "Start",
    "resolve",
]


class Solver(NamedTuple):
    """Properties of a solver, for the table of samplers.

    Attributes:
        order: Order of convergence.
        calls: Calls of the model in a step.
        stochastic: Whether it adds noise.
        good_for: What to use it for.
        cfg_pp: Whether it is a CFG++ solver, which always needs the unconditional estimate.
    """

    order: int
    calls: int
    stochastic: bool
    good_for: str
    cfg_pp: bool = False


# The order is that of a whole run: a multistep method starts with a first-order step, which limits it to 2.
SOLVERS = {
    "ddpm": Solver(1, 1, True, "what the model was trained to undo; many steps"),
    "ddim": Solver(1, 1, False, "the baseline; with eta above 0 it adds noise"),
    "pndm": Solver(2, 1, False, "Stable Diffusion 1's own; one call more in all"),
    "lms": Solver(2, 1, False, "the first multistep; from 25 steps"),
    "euler": Solver(1, 1, False, "simple and robust; turbo and lightning models"),
    "euler_a": Solver(1, 1, True, "varied pictures that keep changing with the steps"),
    "heun": Solver(2, 2, False, "exact, at twice the calls"),
    "heunpp2": Solver(1, 3, False, "Forge's and ComfyUI's pictures; heun is more exact"),
    "dpm2": Solver(2, 2, False, "as heun, from DPM-Solver"),
    "dpm2_a": Solver(1, 2, True, "as euler_a, finer steps"),
    "dpmpp_2s": Solver(2, 1, False, "second order without memory; strong guidance"),
    "dpmpp_2s_a": Solver(1, 2, True, "as euler_a, finer steps"),
    "dpmpp_sde": Solver(1, 2, True, "rich detail in few steps, at twice the calls"),
    "seeds_2": Solver(1, 2, True, "as dpmpp_sde, one noise path"),
    "seeds_3": Solver(1, 3, True, "as seeds_2, finer steps"),
    "dpmpp_2m": Solver(2, 1, False, "the first to try: 15 to 25 steps"),
    "dpmpp_2m_sde": Solver(1, 1, True, "detail of noise, from 25 steps"),
    "dpmpp_3m": Solver(2, 1, False, "as dpmpp_2m, without guidance or with many steps"),
    "dpmpp_3m_sde": Solver(1, 1, True, "as dpmpp_2m_sde, from 30 steps"),
    "deis": Solver(2, 1, False, "as dpmpp_2m, interpolates the noise"),
    "deis_tab": Solver(2, 1, False, "as deis, interpolates in time; Forge's and ComfyUI's"),
    "unipc": Solver(2, 1, False, "few steps, 5 to 15"),
    "sa_solver": Solver(1, 1, True, "noise in the middle of the run only"),
    "ipndm": Solver(2, 1, False, "as lms, cheap weights; even spacings"),
    "ipndm_v": Solver(2, 1, False, "as ipndm, any spacing"),
    "res_multistep": Solver(2, 1, False, "as dpmpp_2m, exact weights"),
    "gradient_estimation": Solver(1, 1, False, "euler that looks ahead; few steps"),
    "er_sde": Solver(1, 1, True, "noise tuned for pictures, from 20 steps"),
    "dpm_fast": Solver(3, 1, False, "steps counts calls; few of them"),
    "dpm_adaptive": Solver(3, 3, False, "chooses its own steps by the error it measures"),
    "restart": Solver(2, 2, True, "goes back up and repairs; from 36 steps"),
    "lcm": Solver(1, 1, True, "LCM and LCM-LoRA models, 2 to 8 steps, no guidance"),
    "tcd": Solver(1, 1, False, "TCD-LoRA models, 2 to 8 steps; eta adds noise"),
    "euler_cfg_pp": Solver(1, 1, False, "low guidance, 0.5 to 2, without oversaturation", True),
    "euler_a_cfg_pp": Solver(1, 1, True, "as euler_cfg_pp, varied", True),
    "dpmpp_2s_a_cfg_pp": Solver(1, 2, True, "as euler_a_cfg_pp, finer steps", True),
    "dpmpp_2m_cfg_pp": Solver(2, 1, False, "as euler_cfg_pp, fewer steps", True),
    "res_multistep_cfg_pp": Solver(2, 1, False, "as dpmpp_2m_cfg_pp", True),
    "gradient_estimation_cfg_pp": Solver(1, 1, False, "as euler_cfg_pp, fewer steps", True),
}

# For models distilled to a few steps: (our name, configuration keys to replace, steps, guidance_scale).
FEW_STEPS: dict[str, tuple[str, dict[str, Any], int, float]] = {
    "turbo": ("euler_a", {"timestep_spacing": "trailing"}, 4, 1.0),
    "lightning": ("euler", {"timestep_spacing": "trailing"}, 4, 1.0),
    "lcm-lora": ("lcm", {}, 4, 1.0),
}

SPACINGS = (
    "leading",
    "linspace",
    "trailing",
    "karras",
    "exponential",
    "polyexponential",
    "lu",
    "beta",
    "sgm_uniform",
    "simple",
    "normal",
    "ddim_uniform",
    "kl_optimal",
    "linear_quadratic",
    "ays",
)

NAMES = tuple(dict.fromkeys([*SOLVERS, *CLASSES, *FEW_STEPS, *PRESETS]))


def resolve(
    name: str | None,
    scheduler_config: Mapping[str, Any],
    spacing: str | None = None,
    *,
    family: str = "",
    pipeline: str = "",
) -> Sampler:
    """Return the sampler that a name means for a model.

    Args:
        name: A name in any dialect; None is the class that scheduler_config.json names.
        scheduler_config: The model's scheduler_config.json.
        spacing: Replaces only the spacing.
        family: The model's family, for the levels of Align Your Steps.
        pipeline: The model's pipeline class in diffusers.

    Raises:
        RequestError: If the name is unknown (the message suggests the nearest ones), if a value in the file is not
            supported, or if the solver cannot use the spacing.
    """
    if spacing is not None and spacing not in SPACINGS:
        raise RequestError(f"spacing is {spacing!r}; {_nearest(spacing, SPACINGS, SPACINGS)}")
    own = scheduler_config.get("_class_name", "")
    if name is None:
        name = own
        if name not in CLASSES:
            raise RequestError(
                f"the model's own sampler, _class_name = {name!r} in its scheduler_config.json, is not supported; "
                f"sampler may be {', '.join(SOLVERS)}"
            )
    config = dict(scheduler_config)
    if name in CLASSES:
        scheduler = CLASSES[name]
        if pipeline == "StableDiffusionPipeline" and ("steps_offset" in config or scheduler.name == own):
            config["steps_offset"] = 1  # that pipeline corrects its scheduler's configuration when it loads
        sampler = from_config(scheduler, config, spacing)
    elif name in FEW_STEPS:
        base, keys, steps, guidance_scale = FEW_STEPS[name]
        sampler = from_config(CLASSES[base], config | keys, spacing)
        sampler = replace(sampler, name=name, steps=steps, guidance_scale=guidance_scale)
    elif name in PRESETS:
        sampler = with_spacing(replace(PRESETS[name], schedule=read_schedule_config(config)), spacing)
    else:
        stem, _, schedule = name.rpartition(" ")
        sought = stem if schedule in COMFYUI_SCHEDULES and stem not in NAMES else name
        raise RequestError(f"sampler is {name!r}; {_nearest(sought, NAMES, tuple(SOLVERS))}")
    if sampler.schedule.sigma_data is not None:  # a network with EDM's preconditioning
        sampler = replace(sampler, timestep="edm", rescale_final=False)
    if sampler.spacing == "ays" and family == "sdxl":
        sampler = replace(sampler, spacing_options={**sampler.spacing_options, "family": family})
    return sampler


def _nearest(name: str, names: tuple[str, ...], ours: tuple[str, ...]) -> str:
    """Return a suggestion of the nearest names."""
    close = {known.lower(): known for known in reversed(names)}
    found = [close[match] for match in difflib.get_close_matches(name.lower(), close, n=3, cutoff=0.5)]
    return f"did you mean {' or '.join(found)}?" if found else f"there are {', '.join(ours)}"


class Row(NamedTuple):
    """A row of `mezzotint samplers`: our name and its equivalents in other programs (empty if there is none)."""

    name: str
    diffusers: str
    a1111: str
    comfyui: str
    order: int
    calls: int
    stochastic: bool
    good_for: str
    cfg_pp: bool


_A1111 = {name: preset.solver for name, preset in A1111_SAMPLERS.items()} | {
    name: sampler.solver for name, sampler in A1111_WITHOUT_SCHEDULE.items()
}
# a name that is also our name of another solver means ComfyUI's only together with a schedule
_COMFYUI = {
    f"{name} {preset.schedule}" if name in SOLVERS and name != preset.solver else name: preset.solver
    for name, preset in COMFYUI_SAMPLERS.items()
} | {name: name for name in COMFYUI_ENDS}


def _join_names(solver: str, names: Mapping[str, str]) -> str:
    """Return the names of a solver, separated by commas."""
    return ", ".join(name for name, theirs in names.items() if theirs == solver)


TABLE = tuple(
    Row(name, CLASSES[name].name, _join_names(name, _A1111), _join_names(name, _COMFYUI), *solver)
    for name, solver in SOLVERS.items()
)
