"""Samplers: every name (`names`), diffusers' classes, and A1111's and ComfyUI's presets. No torch here."""

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
