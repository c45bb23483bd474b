"""Random numbers as functions of a key (SHA-256) instead of a stream.

Everything random in training (order, crop, flip, caption, noise, timestep) is drawn with a key such as (seed, epoch,
sample id, purpose). It depends on no worker, process or earlier draw, so a run that was killed resumes exactly.
"""

from __future__ import annotations

import hashlib
import json

import torch


def integer(*key: int | str) -> int:
    """Return an integer from 0 to 2**63 - 1. ("a", "bc") and ("ab", "c") are different keys, as are 1 and "1"."""
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8]) >> 1


def uniform(*key: int | str) -> float:
    """Return a number in [0, 1), a multiple of 2**-53."""
    return (integer(*key) >> 10) / 2**53


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded with the key."""
    return torch.Generator().manual_seed(integer(*key))
