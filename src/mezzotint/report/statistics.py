"""What the rows of a sampler report say: distances from converged, a curve for each sampler, and the answer in words.

    curves(rows) -> list[Curve]                 the statistics
    recommend(curves), claim(curves) -> str     what they say

One unit for all: 1 is the mean distance between the reference's pictures of two seeds. A sampler that adds no noise is
compared with the reference from the same starting noise. One that does ends elsewhere by design: there the two
distributions over the seeds are compared, in the same unit. No torch here, and no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np

CHECK_ROW = "check of the reference"
NEAR = 0.1  # what the recommendation calls converged

Row = dict[str, Any]
Space = Literal["latents", "pictures"]

# ---- statistics ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """From the reference, in units of `unit`, the mean distance between the reference's own seeds.

    error: to the reference from the same noise, mean over prompts and seeds. shift: between the two distributions over
    the seeds; noise: what that would reach by chance if they were one (two standard deviations). spread: the mean
    distance between the sampler's own seeds; below 1 they are too much alike.
    """

    error: float
    shift: float
    noise: float
    spread: float
    unit: float

    @property
    def told(self) -> bool:
        """Whether `shift` is more than chance."""
        return self.shift > self.noise

    @property
    def low(self) -> float:
        """The least that `shift` may be, by chance."""
        return math.sqrt(max(self.shift**2 - self.noise**2, 0.0))

    @property
    def high(self) -> float:
        """The most."""
        return math.hypot(self.shift, self.noise)

    @property
    def bound(self) -> float:
        """`shift`, or where it is not told from chance the most that it may be."""
        return self.shift if self.told else self.high


@dataclass(frozen=True)
class Point:
    """One number of steps, over all prompts. calls and seconds are a picture's."""

    steps: int
    calls: float
    seconds: float
    latents: Distance
    pictures: Distance


@dataclass(frozen=True)
class Curve:
    """One sampler, its points in order of steps."""

    name: str
    solver: str
    stochastic: bool
    points: tuple[Point, ...]

    def distance(self, point: Point, space: Space = "latents") -> float:
        """Return the distance by which the sampler is judged: between pictures, or distributions if it adds noise."""
        distance: Distance = getattr(point, space)
        return distance.bound if self.stochastic else distance.error

    def reached(self, near: float = NEAR) -> Point | None:
        """Return the first point from which all distances stay within `near`."""
        found = None
        for point in reversed(self.points):
            if self.distance(point) > near:
                break
            found = point
        return found

    def hidden(self, near: float = NEAR) -> bool:
        """Whether the last point may be within `near` or not: chance is greater."""
        last = self.points[-1].latents
        return self.stochastic and not last.told and last.bound > near


def curves(rows: Iterable[Row]) -> list[Curve]:
    """Return a curve for each sampler, in the order of the rows, without steps that failed on a prompt."""
    groups: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        if row["sampler"] != CHECK_ROW:
            groups.setdefault(row["sampler"], {}).setdefault(row["steps"], []).append(row)
    found = []
    for name, by_steps in groups.items():
        whole = [group for _, group in sorted(by_steps.items()) if not any("failure" in row for row in group)]
        if whole:
            first = whole[0][0]
            found.append(Curve(name, first["solver"], first["stochastic"], tuple(map(_point, whole))))
    return found


def residual(rows: Iterable[Row]) -> Point:
    """How far the solver that checks the reference ends from it: the order of the reference's own error, or above."""
    return _point([row for row in rows if row["sampler"] == CHECK_ROW])


def _point(rows: Sequence[Row]) -> Point:
    """One sampler at one number of steps, over the prompts."""
    calls, seconds = (float(np.mean([row[name] for row in rows])) for name in ("calls", "seconds"))
    return Point(rows[0]["steps"], calls, seconds, _distance(rows, "latents"), _distance(rows, "pictures"))


def _distance(rows: Sequence[Row], space: Space) -> Distance:
    """error, and the energy distance between the distributions, Szekely and Rizzo 2013, over different seeds.

    For samples s of the sampler and r of the reference it is 2 E|s - r'| - E|s - s'| - E|r - r'|: 0 only for equal
    distributions, and for small d about d^2 / E|r - r'| if s is r moved by d; its root is `shift`. Pairs of the same
    seed, which share their starting noise, are left out, so that it is unbiased for every sampler. Were the
    distributions one, s and r of a seed could change places, which turns the sign of its pairs: hence the variance.
    """
    errors, energies, variances, spreads, units = [], [], [], [], []
    for row in rows:
        matrix = np.asarray(row[space])
        n = len(matrix) // 2
        different = ~np.eye(n, dtype=bool)
        own, cross, reference = matrix[:n, :n], matrix[:n, n:], matrix[n:, n:]
        unit = reference[different].mean()
        pairs = ((cross + cross.T - own - reference) / unit)[different]
        errors.append(np.diag(cross).mean() / unit)
        energies.append(pairs.mean())
        variances.append(2 * (pairs**2).sum() / (n * (n - 1)) ** 2)
        spreads.append(own[different].mean() / unit)
        units.append(unit)
    deviation = math.sqrt(sum(variances)) / len(rows)
    shift, noise = math.sqrt(max(np.mean(energies), 0.0)), math.sqrt(2 * deviation)
    return Distance(float(np.mean(errors)), shift, noise, float(np.mean(spreads)), float(np.mean(units)))


# ---- words -----------------------------------------------------------------------------------------------------------


def percent(part: float) -> str:
    """0.0823 -> "8 %", 0.0082 -> "0.8 %"."""
    return f"{100 * part:.{0 if part >= 0.0095 else 1}f} %"


def recommend(curves: Sequence[Curve], near: float = NEAR) -> str:
    """Recommend the sampler that converges to within `near` with the fewest network calls.

    Samplers that add no noise are preferred: converging to one picture is more than matching a distribution.
    """
    reached = [(curve, point) for curve in curves if (point := curve.reached(near))]
    reached.sort(key=lambda pair: (pair[0].stochastic, pair[1].calls, pair[0].distance(pair[1])))
    hidden = [curve for curve in curves if curve.reached(near) is None and curve.hidden(near)]
    missed = [curve for curve in curves if curve.reached(near) is None and curve not in hidden]
    if not reached:
        curve, point = min(
            ((curve, point) for curve in curves for point in curve.points), key=lambda pair: pair[0].distance(pair[1])
        )
        return (
            f"No sampler came within {percent(near)} of converged; the nearest is {curve.name} at {point.steps} steps "
            f"({point.calls:g} model calls), at {percent(curve.distance(point))}. Measure more steps."
        )
    (best, point), *others = reached
    text = (
        f"{best.name} at {point.steps} steps ({point.calls:g} model calls) is within {percent(best.distance(point))} "
        f"of converged{', in distribution' if best.stochastic else ''}"
    )
    needs = [
        f"{curve.name} needs {point.steps}" + (f" ({point.calls:g} calls)" if point.calls != point.steps else "")
        for curve, point in others
    ]
    if needs:
        text += f"; {_listed(needs)}"
    most = max(point.steps for curve in curves for point in curve.points)
    if missed:
        text += f"; not there at {most}: {_listed([curve.name for curve in missed])}"
    if hidden:
        text += f"; too few seeds to tell at {most}: {_listed([curve.name for curve in hidden])}"
    return f"{text}."


def claim(curves: Sequence[Curve]) -> str:
    """Compare the curves with the claim of Lu et al. (2022b) on DPM-Solver++ and DDPM, by their distributions.

    Equal is not to be farther from converged than the other by more than NEAR, by what chance allows at most: a test of
    non-inferiority (Schuirmann 1987), for that no difference was found is no evidence that there is none.
    """
    words = "DPM-Solver++ at 10 to 15 steps equals DDPM at three to five times as many"
    ours = next((curve for curve in curves if curve.solver == "dpmpp_2m"), None)
    ddpm = next((curve for curve in curves if curve.solver == "ddpm"), None)
    pairs = [
        (one.steps, one.latents, other.steps, other.latents)
        for one, other in product(ours.points if ours else (), ddpm.points if ddpm else ())
        if 10 <= one.steps <= 15 and 3 * one.steps <= other.steps <= 5 * one.steps
    ]
    if ours is None or ddpm is None or not pairs:
        return f"Whether {words} was not measured; it takes dpmpp_2m and ddpm at steps such as 10,15,30,50."
    equal = [one.high - other.low <= NEAR for _, one, _, other in pairs]
    farther = [one.low - other.high > NEAR for _, one, _, other in pairs]
    if sum(equal) + sum(farther) < len(pairs):
        verdict = "cannot be judged on this model with so few seeds"
    elif all(farther):
        verdict = "does not hold on this model"
    else:
        verdict = f"holds {'' if all(equal) else 'in part '}on this model, to within {percent(NEAR)}"
        if not all(other.told for *_, other in pairs):
            verdict += f" and however near {ddpm.name} may be, which chance hides"
    figures = [
        f"{ours.name} at {n} steps {_shift(one)}, {ddpm.name} at {m} {_shift(other)}" for n, one, m, other in pairs
    ]
    return f"The field's claim that {words} {verdict}. Distance from the converged distribution: {'; '.join(figures)}."


def _shift(distance: Distance) -> str:
    return f"{'' if distance.told else 'at most '}{percent(distance.bound)}"


def _listed(names: Sequence[str], most: int = 6) -> str:
    shown = [*names[:most], f"{len(names) - most} more"] if len(names) > most else names
    return ", ".join(shown)
