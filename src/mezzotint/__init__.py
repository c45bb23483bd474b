"""Text to image with latent diffusion models: Stable Diffusion 1.x, 2.x, XL and smaller models of that shape.

`load` a model, call it with a prompt, and save the picture:

    pipe = mezzotint.load()
    image = pipe("a lemon on a blue background", seed=7)
    image.save("lemon.png")

Names are imported when they are first used, so `import mezzotint` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mezzotint import diffusion, image, prompt, samplers
    from mezzotint.enlarge import upscale
    from mezzotint.entries import regions
    from mezzotint.errors import (
        BudgetError,
        CheckpointError,
        MezzotintError,
        MissingExtraError,
        RequestError,
        TrainingError,
        WriteError,
    )
    from mezzotint.images import control
    from mezzotint.memory.planner import plan
    from mezzotint.models import attention
    from mezzotint.pipeline import Pipeline, load
    from mezzotint.placement import Placement
    from mezzotint.request import Request
    from mezzotint.result import Result
    from mezzotint.run.image_prompts import embed_images

__version__ = "0.2.0"

__all__ = [
    "BudgetError",
    "CheckpointError",
    "MezzotintError",
    "MissingExtraError",
    "Pipeline",
    "Placement",
    "Request",
    "RequestError",
    "Result",
    "TrainingError",
    "WriteError",
    "attention",
    "control",
    "diffusion",
    "embed_images",
    "image",
    "load",
    "plan",
    "prompt",
    "regions",
    "samplers",
    "upscale",
]

_SOURCES = {  # the module that defines each name
    "BudgetError": "errors",
    "CheckpointError": "errors",
    "MezzotintError": "errors",
    "MissingExtraError": "errors",
    "Pipeline": "pipeline",
    "Placement": "placement",
    "Request": "request",
    "RequestError": "errors",
    "Result": "result",
    "TrainingError": "errors",
    "WriteError": "errors",
    "embed_images": "run.image_prompts",
    "load": "pipeline",
    "plan": "memory.planner",
    "upscale": "enlarge",
}
_MODULES = {
    "attention": "models.attention",
    "control": "images.control",
    "diffusion": "diffusion",
    "image": "image",
    "prompt": "prompt",
    "regions": "entries.regions",
    "samplers": "samplers",
}


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it."""
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"mezzotint.{_MODULES[name]}")
    if name not in _SOURCES:
        raise AttributeError(f"module 'mezzotint' has no attribute {name!r}")
    return getattr(import_module(f"mezzotint.{_SOURCES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
