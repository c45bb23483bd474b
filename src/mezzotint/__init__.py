"""mezzotint: text to image with latent diffusion. See `load`, and README.md. Importing this costs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mezzotint import diffusion, prompt
    from mezzotint.errors import BudgetError, CheckpointError, MezzotintError, RequestError
    from mezzotint.memory.planner import plan
    from mezzotint.models import attention
    from mezzotint.pipeline import Pipeline, load
    from mezzotint.placement import Placement
    from mezzotint.request import Request, Result

__all__ = [
    "BudgetError",
    "CheckpointError",
    "MezzotintError",
    "Pipeline",
    "Placement",
    "Request",
    "RequestError",
    "Result",
    "attention",
    "diffusion",
    "load",
    "plan",
    "prompt",
]

_ROOMS = {
    "Pipeline": "pipeline",
    "load": "pipeline",
    "Placement": "placement",
    "plan": "memory.planner",
    "Request": "request",
    "Result": "request",
    "BudgetError": "errors",
    "CheckpointError": "errors",
    "MezzotintError": "errors",
    "RequestError": "errors",
}
_MODULES = {"attention": "models.attention", "diffusion": "diffusion", "prompt": "prompt"}


def __getattr__(name: str) -> object:
    """Public names are imported from their rooms on first use."""
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"mezzotint.{_MODULES[name]}")
    if name not in _ROOMS:
        raise AttributeError(f"module 'mezzotint' has no attribute {name!r}")
    return getattr(import_module(f"mezzotint.{_ROOMS[name]}"), name)
