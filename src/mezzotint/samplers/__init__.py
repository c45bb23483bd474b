"""Sampler names and their meaning: our own, diffusers' classes, and the presets of A1111 and ComfyUI. No torch here."""

from mezzotint.samplers.names import (
    A1111_SCHEDULES,
    CLASSES,
    COMFYUI_SCHEDULES,
    FEW_STEPS,
    NAMES,
    SCHEDULERS,
    SOLVERS,
    SPACINGS,
    TABLE,
    NoiseKind,
    Row,
    Sampler,
    Start,
    resolve,
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
