"""Sampler names and their meaning: our own, diffusers' classes, the presets of A1111 and ComfyUI, and a user's own.

`register` gives a name to a solver function. No torch here.
"""

from mezzotint.samplers.diffusers_classes import SCHEDULERS
from mezzotint.samplers.names import NAMES, SPACINGS, TABLE, Spellings, canonical_name, canonical_spacing, resolve
from mezzotint.samplers.own import OWN, name_of, origin, register, unregister
from mezzotint.samplers.sampler import Sampler
from mezzotint.samplers.solvers import SOLVERS

__all__ = [
    "NAMES",
    "OWN",
    "SCHEDULERS",
    "SOLVERS",
    "SPACINGS",
    "TABLE",
    "Sampler",
    "Spellings",
    "canonical_name",
    "canonical_spacing",
    "name_of",
    "origin",
    "register",
    "resolve",
    "unregister",
]
