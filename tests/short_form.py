"""Matrices of cases in a short form: the normal run takes some cases of each value, `make test-slow` the rest."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest


def short_form(*axes: Sequence[Any], together: int = 1) -> list[Any]:
    """Return every combination of the axes' values, those that the short form can spare marked slow.

    Args:
        axes: The values of each parameter.
        together: How many values of different axes occur together in some case of the short form: 1 takes each value,
            2 each pair of values.
    """
    cases = list(itertools.product(*(range(len(axis)) for axis in axes)))
    parts = {case: set(itertools.combinations(enumerate(case), together)) for case in cases}
    missing, uses, kept = set().union(*parts.values()), Counter[tuple[int, int]](), set[tuple[int, ...]]()
    while missing:  # the case that adds most, of values that occur least
        best = max(cases, key=lambda case: (len(parts[case] & missing), -sum(uses[part] for part in enumerate(case))))
        kept.add(best)
        missing -= parts[best]
        uses.update(enumerate(best))
    return [
        pytest.param(
            *(axis[k] for axis, k in zip(axes, case, strict=True)), marks=() if case in kept else pytest.mark.slow
        )
        for case in cases
    ]
