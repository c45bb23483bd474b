"""Statistics of a sampler report: distances from the converged pictures, one curve per sampler, and conclusions.

    make_curves(rows) -> list[Curve]                 the statistics
    recommend(curves), claim(curves) -> str     the conclusions

All distances are in units of the mean distance between the reference's pictures of two seeds. A sampler that adds no
noise is compared with the reference from the same starting noise. A sampler that adds noise ends at other pictures by
design, so its distribution over the seeds is compared with the reference's. Does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np

CHECK_ROW = "check of the reference"
NEAR = 0.1  # distance within which a sampler counts as converged

Row = dict[str, Any]
Space = Literal["latents", "pictures"]

# ---- statistics ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """The distance from the reference. All but `unit` are in units of `unit`.

    Attributes:
        error: The distance to the reference from the same noise, averaged over prompts and seeds.
        shift: The distance between the two distributions over the seeds.
        noise: Two standard deviations of `shift` if the distributions were equal.
        spread: The mean distance between the sampler's own seeds; below 1 its pictures are too similar.
        unit: The mean distance between the reference's own seeds.
    """

    error: float
    shift: float
    noise: float
    spread: float
    unit: float

    @property
    def significant(self) -> bool:
        """Return whether `shift` exceeds the noise of the estimate."""
        return self.shift > self.noise

    @property
    def lower(self) -> float:
        """Return the lower end of the confidence interval of `shift`."""
        return math.sqrt(max(self.shift**2 - self.noise**2, 0.0))

    @property
    def upper(self) -> float:
        """Return the upper end of the confidence interval of `shift`."""
        return math.hypot(self.shift, self.noise)

    @property
    def bound(self) -> float:
        """Return `shift` if it is significant, and otherwise its upper bound."""
        return self.shift if self.significant else self.upper


@dataclass(frozen=True)
class Point:
    """The result of one number of steps, over all prompts. `calls` and `seconds` are per picture."""

    steps: int
    calls: float
    seconds: float
    latents: Distance
    pictures: Distance


@dataclass(frozen=True)
class Curve:
    """The results of one sampler, its points in order of steps."""

    name: str
    solver: str
    stochastic: bool
    points: tuple[Point, ...]

    def distance(self, point: Point, space: Space = "latents") -> float:
        """Return the distance of a point: between pictures, or between distributions if the sampler adds noise."""
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

    def inconclusive(self, near: float = NEAR) -> bool:
        """Return whether the noise is too large to tell if the last point is within `near`."""
        last = self.points[-1].latents
        return self.stochastic and not last.significant and last.bound > near


def make_curves(rows: Iterable[Row]) -> list[Curve]:
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
            found.append(Curve(name, first["solver"], first["stochastic"], tuple(map(_make_point, whole))))
    return found


def measure_residual(rows: Iterable[Row]) -> Point:
    """Return the distance of the check's solver from the reference, which estimates the reference's own error."""
    return _make_point([row for row in rows if row["sampler"] == CHECK_ROW])


def _make_point(rows: Sequence[Row]) -> Point:
    """Return the results of one sampler at one number of steps, averaged over the prompts."""
    calls, seconds = (float(np.mean([row[name] for row in rows])) for name in ("calls", "seconds"))
    return Point(
        rows[0]["steps"], calls, seconds, _measure_distance(rows, "latents"), _measure_distance(rows, "pictures")
    )


def _measure_distance(rows: Sequence[Row], space: Space) -> Distance:
    """Return the mean error and the energy distance between the distributions (Szekely and Rizzo 2013).

    For samples s of the sampler and r of the reference, the energy distance is 2 E|s - r'| - E|s - s'| - E|r - r'|. It
    is 0 only for equal distributions, and about d^2 / E|r - r'| if s is r shifted by a small d; `shift` is its root.
    Pairs of the same seed share their starting noise and are left out, which keeps the estimate unbiased. If the
    distributions were equal, s and r of a seed would be exchangeable, which flips the sign of its pairs; the variance
    follows from that.
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


# ---- conclusions -----------------------------------------------------------------------------------------------------


def as_percent(part: float) -> str:
    """Format a fraction as a percentage: 0.0823 -> "8 %", 0.0082 -> "0.8 %"."""
    return f"{100 * part:.{0 if part >= 0.0095 else 1}f} %"


def recommend(curves: Sequence[Curve], near: float = NEAR) -> str:
    """Recommend the sampler that converges to within `near` with the fewest network calls.

    Samplers that add no noise are preferred: converging to one picture is more than matching a distribution.
    """
    reached = [(curve, point) for curve in curves if (point := curve.reached(near))]
    reached.sort(key=lambda pair: (pair[0].stochastic, pair[1].calls, pair[0].distance(pair[1])))
    unclear = [curve for curve in curves if curve.reached(near) is None and curve.inconclusive(near)]
    missed = [curve for curve in curves if curve.reached(near) is None and curve not in unclear]
    if not reached:
        curve, point = min(
            ((curve, point) for curve in curves for point in curve.points), key=lambda pair: pair[0].distance(pair[1])
        )
        return (
            f"No sampler came within {as_percent(near)} of converged; the closest is {curve.name} at "
            f"{point.steps} steps ({point.calls:g} model calls), at {as_percent(curve.distance(point))}. "
            "Measure more steps."
        )
    (best, point), *others = reached
    text = (
        f"{best.name} at {point.steps} steps ({point.calls:g} model calls) is within "
        f"{as_percent(best.distance(point))} of converged{', in distribution' if best.stochastic else ''}"
    )
    needs = [
        f"{curve.name} needs {point.steps}" + (f" ({point.calls:g} calls)" if point.calls != point.steps else "")
        for curve, point in others
    ]
    if needs:
        text += f"; {_join(needs)}"
    most = max(point.steps for curve in curves for point in curve.points)
    if missed:
        text += f"; not converged at {most}: {_join([curve.name for curve in missed])}"
    if unclear:
        text += f"; inconclusive at {most}, with too few seeds: {_join([curve.name for curve in unclear])}"
    return f"{text}."


def check_claim(curves: Sequence[Curve]) -> str:
    """Test the claim of Lu et al. (2022b) on DPM-Solver++ and DDPM against the curves.

    The test is one of non-inferiority (Schuirmann 1987): DPM-Solver++ counts as equal if, at the ends of the confidence
    intervals, it is not farther from converged than DDPM by more than NEAR. Finding no difference would not be evidence
    of equality.
    """
    words = "DPM-Solver++ at 10 to 15 steps equals DDPM with three to five times as many steps"
    ours = next((curve for curve in curves if curve.solver == "dpmpp_2m"), None)
    ddpm = next((curve for curve in curves if curve.solver == "ddpm"), None)
    pairs = [
        (one.steps, one.latents, other.steps, other.latents)
        for one, other in product(ours.points if ours else (), ddpm.points if ddpm else ())
        if 10 <= one.steps <= 15 and 3 * one.steps <= other.steps <= 5 * one.steps
    ]
    if ours is None or ddpm is None or not pairs:
        return f"Whether {words} was not measured; to test it, measure dpmpp_2m and ddpm at steps such as 10,15,30,50."
    equal = [one.upper - other.lower <= NEAR for _, one, _, other in pairs]
    farther = [one.lower - other.upper > NEAR for _, one, _, other in pairs]
    if sum(equal) + sum(farther) < len(pairs):
        verdict = "cannot be judged on this model with so few seeds"
    elif all(farther):
        verdict = "does not hold on this model"
    else:
        verdict = f"holds {'' if all(equal) else 'in part '}on this model, to within {as_percent(NEAR)}"
        if not all(other.significant for *_, other in pairs):
            verdict += f", even if {ddpm.name} is as close as its uncertainty allows"
    figures = [
        f"{ours.name} at {n} steps {_format_shift(one)}, {ddpm.name} at {m} {_format_shift(other)}"
        for n, one, m, other in pairs
    ]
    return (
        f"The published claim that {words} {verdict}. Distance from the converged distribution: {'; '.join(figures)}."
    )


def _format_shift(distance: Distance) -> str:
    """Format a distance between distributions."""
    return f"{'' if distance.significant else 'at most '}{as_percent(distance.bound)}"


def _join(names: Sequence[str], most: int = 6) -> str:
    """Join names with commas; after `most` names, give the number of the others."""
    shown = [*names[:most], f"{len(names) - most} more"] if len(names) > most else names
    return ", ".join(shown)
