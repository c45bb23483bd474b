"""Sampler names and their meaning: our own, diffusers' classes, and the presets of A1111 and ComfyUI. No torch here."""

from mezzotint.samplers.diffusers_classes import SCHEDULERS
from mezzotint.samplers.names import NAMES, SPACINGS, TABLE, Spellings, canonical_name, canonical_spacing, resolve
from mezzotint.samplers.sampler import Sampler
from mezzotint.samplers.solvers import SOLVERS

__all__ = [
    "NAMES",
    "SCHEDULERS",
    "SOLVERS",
    "SPACINGS",
    "TABLE",
    "Sampler",
    "Spellings",
    "canonical_name",
    "canonical_spacing",
    "resolve",
]
