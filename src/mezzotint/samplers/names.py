"""The names of samplers in every dialect, and their meaning: a solver, a spacing and their options. No torch here.

`resolve(name, scheduler_config)` returns a `Sampler`. Our own names and the class names of diffusers mean that class's
`from_config(scheduler_config)` (from_config.py). The names of A1111 ("DPM++ 2M Karras") and ComfyUI ("dpmpp_2m
karras", sampler and scheduler) mean what those programs do (presets.py). Differences between the programs are values in
tables, never code in a solver.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from mezzotint.errors import RequestError
from mezzotint.samplers.diffusers_classes import CLASSES
from mezzotint.samplers.from_config import from_config, read_schedule_config, with_spacing
from mezzotint.samplers.presets import (
    A1111_SAMPLERS,
    A1111_SCHEDULES,
    A1111_WITHOUT_SCHEDULE,
    COMFYUI_ENDS,
    COMFYUI_SAMPLERS,
    COMFYUI_SCHEDULES,
    PRESET_SCHEDULE,
    PRESETS,
)
from mezzotint.samplers.sampler import Sampler
from mezzotint.samplers.solvers import SOLVERS

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


class Spellings:
    """Names that are found whatever their case, spaces, hyphens and underscores.

    Args:
        names: Each spelling and the name that it means, in the order in which they win.
    """

    def __init__(self, names: Iterable[tuple[str, str]]) -> None:
        keys: tuple[Callable[[str], str], ...] = (str, str.casefold, self._letters)
        last_to_first = list(names)[::-1]
        self._tables = [(key, {key(spelling): name for spelling, name in last_to_first}) for key in keys]

    def find(self, text: str) -> str | None:
        """Return the name of the exact spelling, or of one that differs in case, or in case and separators."""
        return next((table[key(text)] for key, table in self._tables if key(text) in table), None)

    @staticmethod
    def _letters(text: str) -> str:
        return re.sub(r"[\s_-]+", "", text).casefold()


# ours before diffusers', A1111's and ComfyUI's
_SPELLINGS = Spellings((name, name) for name in NAMES)
# A1111's schedules that are one of our spacings with its usual options
_SPACING_SPELLINGS = Spellings(
    [
        *((name, name) for name in SPACINGS),
        *((label, spacing) for label, (spacing, options) in A1111_SCHEDULES.items() if not options),
    ]
)


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
        name: A name in any dialect; None is the class that scheduler_config.json names. Case, spaces, hyphens and
            underscores do not matter: of several names the one of the exact spelling is meant, then one that differs in
            case alone; among those ours, then diffusers', A1111's and ComfyUI's.
        scheduler_config: The model's scheduler_config.json.
        spacing: Replaces only the spacing.
        family: The model's family, for the levels of Align Your Steps.
        pipeline: The model's pipeline class in diffusers.

    Raises:
        RequestError: If the name is unknown (the message suggests the nearest ones), if a value in the file is not
            supported, or if the solver cannot use the spacing.
    """
    if spacing is not None:
        spacing = canonical_spacing(spacing)
    own = scheduler_config.get("_class_name", "")
    if name is None:
        name = own
        if not isinstance(name, str) or name not in CLASSES:
            raise RequestError(
                f"the model's own sampler, _class_name = {name!r} in its scheduler_config.json, is not supported; "
                f"sampler may be {', '.join(SOLVERS)}"
            )
    else:
        name = canonical_name(name)
    config = dict(scheduler_config)
    if name in CLASSES:
        scheduler = CLASSES[name]
        if pipeline == "StableDiffusionPipeline" and ("steps_offset" in config or scheduler.name == own):
            config["steps_offset"] = 1  # that pipeline corrects its scheduler's configuration when it loads
        sampler = from_config(scheduler, config, spacing or scheduler.default_spacing)
    elif name in FEW_STEPS:
        base, keys, steps, guidance_scale = FEW_STEPS[name]
        sampler = from_config(CLASSES[base], config | keys, spacing)
        sampler = replace(sampler, name=name, steps=steps, guidance_scale=guidance_scale)
    else:
        trained = read_schedule_config(config).model_copy(update=PRESET_SCHEDULE)
        sampler = with_spacing(replace(PRESETS[name], schedule=trained), spacing)
    if sampler.schedule.sigma_data is not None:  # a network with EDM's preconditioning
        sampler = replace(sampler, timestep="edm", rescale_final=False)
    if sampler.spacing == "ays" and family == "sdxl":
        sampler = replace(sampler, spacing_options={**sampler.spacing_options, "family": family})
    return sampler


def canonical_name(name: str) -> str:
    """Return the sampler's name in its own spelling; raise RequestError with the nearest names if it is unknown."""
    known = {**dict.fromkeys(NAMES), **CLASSES}  # with the solvers that a user has registered
    found = name if name in known else _SPELLINGS.find(name) or Spellings((own, own) for own in known).find(name)
    if found is None and ":" in name:
        raise RequestError(
            f"sampler is {name!r}, a solver function of the program that used it, which is not registered here; call "
            f"mezzotint.samplers.register({name!r}, function) first"
        )
    if found is None:
        stem, _, schedule = name.rpartition(" ")
        sought = stem if schedule in COMFYUI_SCHEDULES and stem not in NAMES else name
        raise RequestError(f"sampler is {name!r}; {_nearest(sought, tuple(known), tuple(SOLVERS))}")
    return found


def canonical_spacing(name: str) -> str:
    """Return the spacing's name in its own spelling; raise RequestError with the nearest names if it is unknown."""
    found = _SPACING_SPELLINGS.find(name)
    if found is None:
        raise RequestError(f"spacing is {name!r}; {_nearest(name, SPACINGS, SPACINGS)}")
    return found


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
    Row(
        name,
        CLASSES[name].name,
        _join_names(name, _A1111),
        _join_names(name, _COMFYUI),
        solver.order,
        solver.calls,
        solver.stochastic,
        solver.good_for,
        solver.cfg_pp,
    )
    for name, solver in SOLVERS.items()
)
