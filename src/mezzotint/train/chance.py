"""Chance without a state: numbers that are functions of their key (SHA-256), the same on every machine, in any order.

Whatever training draws (order, crop, flip, caption, noise, timestep) it draws by a key such as (seed, epoch, sample id,
what for), so that it hangs on no worker, no process and no earlier draw, and a killed run goes on as if it never was.
"""

from __future__ import annotations

import hashlib
import json

import torch


def number(*key: int | str) -> int:
    """0 to 2**63 - 1. The parts of a key are told apart: ("a", "bc") is not ("ab", "c"), 1 is not "1"."""
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8]) >> 1


def uniform(*key: int | str) -> float:
    """In [0, 1), a multiple of 2**-53."""
    return (number(*key) >> 10) / 2**53


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for what needs many numbers."""
    return torch.Generator().manual_seed(number(*key))
