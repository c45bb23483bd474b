"""Solvers of a user's own, by name. No torch here.

    def midpoint(denoise, x, sigmas, noise, **options): ...   # a generator of Steps, as in mezzotint.diffusion.solvers

    mezzotint.samplers.register("midpoint", midpoint, spacing="karras")
    pipe("a lemon", sampler="midpoint")
    pipe("a lemon", sampler=midpoint)      # without a name it is registered under its own, "__main__:midpoint"

A registered name is one of this process: a Request and a picture's record keep it, and where it is not registered, they
are answered with a sentence.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mezzotint.errors import RequestError
from mezzotint.samplers.diffusers_classes import CLASSES, Scheduler
from mezzotint.samplers.names import NAMES, canonical_spacing
from mezzotint.samplers.sampler import NoiseKind
from mezzotint.samplers.solvers import SOLVERS, Solver

EULER = CLASSES["euler"].defaults  # the configuration of solvers that diffusers does not have
_lock = threading.Lock()


@dataclass(frozen=True)
class OwnSolver:
    """A registered solver.

    Attributes:
        function: The generator.
        origin: Its module and name, "my_solvers:midpoint".
    """

    function: Callable[..., Any]
    origin: str


OWN: dict[str, OwnSolver] = {}


def register(
    name: str,
    solver: Callable[..., Any],
    *,
    options: Mapping[str, Any] | None = None,
    spacing: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    noise: NoiseKind = "seeded",
    eta: float | None = None,
    cfg_pp: bool = False,
    order: int = 1,
    calls: int = 1,
    stochastic: bool = False,
    description: str = "",
) -> str:
    """Register a solver, so that its name can be the sampler of a Request in this process.

    The noise levels are those of our samplers that diffusers does not have: EulerDiscreteScheduler's for the model's
    configuration, unless a spacing is given here or in the Request.

    Args:
        name: The name, which no other sampler may have. Registering it again replaces the solver.
        solver: A generator function `solver(denoise, x, sigmas, noise, **options)` that yields
            `mezzotint.diffusion.solvers.Step`, one for each interval of `sigmas`.
        options: Keyword arguments that it is called with.
        spacing: The spacing if the Request gives none.
        steps: Number of steps if the Request gives none.
        guidance_scale: Guidance scale if the Request gives none.
        noise: What `noise(sigma, sigma_next)` returns: "seeded" draws, or a "brownian" path.
        eta: Default of the keyword argument `eta`, which then a Request may set; None if it takes none.
        cfg_pp: Whether it calls `denoise.pair`, and so always needs the unconditional estimate.
        order: Order of convergence, for tables.
        calls: Calls of the denoiser in a step, for estimates of time.
        stochastic: Whether it adds noise, for tables.
        description: What it is good for, in a few words.

    Returns:
        The name.

    Raises:
        RequestError: If the name is taken or is no name, or an argument is not valid.
    """
    if not isinstance(name, str) or not 0 < len(name) <= 100 or name != name.strip():
        raise RequestError(f"the name of a sampler is {name!r}; it must be a text of 1 to 100 characters")
    if name in NAMES:
        raise RequestError(f"the name {name!r} is that of another sampler; choose another one")
    if not callable(solver):
        raise RequestError(
            f"the solver {name!r} is of type {type(solver).__name__}; it must be a generator function solver(denoise, "
            "x, sigmas, noise, **options)"
        )
    spacing = None if spacing is None else canonical_spacing(spacing)
    fixed = dict(options or {})
    if eta is not None:
        fixed.setdefault("eta", eta)
    _check_arguments(name, solver, fixed)
    with _lock:
        SOLVERS[name] = Solver(order, calls, stochastic, description or "a solver of your own", eta, (), cfg_pp)
        CLASSES[name] = Scheduler(
            name,
            "",
            EULER,
            fixed=fixed,
            noise=noise,
            default_spacing=spacing,
            steps=steps,
            guidance_scale=guidance_scale,
        )
        OWN[name] = OwnSolver(solver, origin_of(solver))
    return name


def _check_arguments(name: str, solver: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise RequestError if a solver cannot be called as the run will call it."""
    try:
        inspect.signature(solver).bind(None, None, None, None, **options)
    except ValueError:  # it has no signature
        return
    except TypeError as error:
        given = "".join(f", {option}=..." for option in options)
        raise RequestError(
            f"the solver {name!r} cannot be called as solver(denoise, x, sigmas, noise{given}): {error}"
        ) from None


def unregister(name: str) -> None:
    """Remove a solver that was registered.

    Raises:
        RequestError: If there is none of this name.
    """
    with _lock:
        if name not in OWN:
            raise RequestError(f"no solver was registered as {name!r}")
        del SOLVERS[name], CLASSES[name], OWN[name]


def origin(name: str) -> str | None:
    """Return the module and name of the function that is registered under a name, or None."""
    return OWN[name].origin if name in OWN else None


def name_of(solver: Callable[..., Any]) -> str:
    """Return the name that a function is registered under; if there is none, register it under its own name."""
    for name, own in [*OWN.items()]:
        if own.function is solver:
            return name
    origin = origin_of(solver)[:90]
    names = itertools.chain([origin], (f"{origin}#{k}" for k in itertools.count(2)))
    return register(next(name for name in names if name not in OWN), solver)


def origin_of(solver: Callable[..., Any]) -> str:
    """Return the module and name of a function, also of one wrapped by functools.partial."""
    inner: Any = solver
    while hasattr(inner, "func"):
        inner = inner.func
    kind = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{kind.__module__}:{kind.__qualname__}"
