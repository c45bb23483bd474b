"""The sampler report: which sampler, at how many steps, for the model in hand. `report_page.py` shows what this finds.

    measure(pipe, settings, folder) -> rows     the work; each row is on disk as soon as it is known
    curves(rows) -> list[Curve]                 the statistics
    recommend(curves), claim(curves) -> str     what they say

One unit for all: 1 is the mean distance between the reference's pictures of two seeds. A sampler that adds no noise is
compared with the reference from the same starting noise. One that does ends elsewhere by design: there the two
distributions over the seeds are compared, in the same unit. No torch here until a model is measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mezzotint import samplers
from mezzotint.errors import MezzotintError, RequestError
from mezzotint.request import Request

if TYPE_CHECKING:
    from torch import Tensor

    from mezzotint.pipeline import Pipeline

REFERENCE, CHECK = "DPM++ 2M Karras", "Heun Karras"  # both at the model's exact levels; Heun in half the steps
CHECK_ROW = "check of the reference"
NEAR = 0.1  # what the recommendation calls converged
THUMBNAIL = 128  # pixels

Array = NDArray[Any]
Row = dict[str, Any]
Progress = Callable[[int, int], None]
Space = Literal["latents", "pictures"]


@dataclass(frozen=True)
class Settings:
    """samplers: each a name or name/spacing. steps: rising. seeds: pictures a prompt. Raises RequestError."""

    prompts: tuple[str, ...]
    samplers: tuple[str, ...]
    steps: tuple[int, ...]
    seeds: int = 4
    reference_steps: int = 500
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise RequestError(f"seeds is {self.seeds}; it must be at least 2: the distance between two is the unit")
        for prompt, sampler, steps in product(self.prompts, self.samplers, self.steps):
            self.request(prompt, sampler, steps)
        if not 2 * self.steps[-1] <= self.reference_steps <= 1000:
            raise RequestError(
                f"reference_steps is {self.reference_steps}; it must be at most 1000 and at least twice the greatest "
                f"of steps, {self.steps[-1]}"
            )

    @classmethod
    def parse(cls, prompts: Path, names: str, steps: str, **others: Any) -> Settings:
        """From what a command line holds: a file with one prompt a line; names and numbers with commas between."""
        try:
            lines = [line.strip() for line in prompts.read_text("utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise RequestError(f"prompts is {str(prompts)!r}, which cannot be read ({reason})") from None
        texts = dict.fromkeys(line for line in lines if line)  # each once, in order
        if not texts:
            raise RequestError(f"prompts is {str(prompts)!r}, which holds none; it must have one prompt a line")
        chosen = samplers.SOLVERS if names.strip() == "all" else [name.strip() for name in names.split(",")]
        try:
            numbers = sorted({int(number) for number in steps.split(",")})
        except ValueError:
            right = "whole numbers with commas between, such as 5,10,20"
            raise RequestError(f"steps is {steps[:60]!r}; it must be {right}") from None
        return cls(tuple(texts), tuple(dict.fromkeys(chosen)), tuple(numbers), **others)

    def request(self, prompt: str, sampler: str, steps: int) -> Request:
        """The pictures of one row."""
        name, _, spacing = sampler.partition("/")
        return Request(
            prompt=prompt,
            sampler=name,
            spacing=spacing or None,
            steps=steps,
            seed=0,
            count=self.seeds,
            guidance_scale=self.guidance_scale,
        )


# ---- measuring -------------------------------------------------------------------------------------------------------


class _Job(NamedTuple):
    """One run to come."""

    row: Row  # what its row begins with
    request: Request
    calls: int  # model calls as the table of samplers has them, for the time left

    @property
    def key(self) -> str:
        key: str = self.row["key"]
        return key


def measure(
    pipe: Pipeline, settings: Settings, folder: Path, progress: Progress = lambda done, total: None
) -> list[Row]:
    """Measures what `folder` does not hold yet. progress(done, total), in expected model calls, may raise to stop.

    A row is a sampler, a number of steps and a prompt. It has model calls and seconds a picture, and for the latents
    (root mean square) and the pictures (the same, in levels of 255) a matrix (2 seeds, 2 seeds): the distances between
    all of its pictures, followed by the reference's. Or, where it could not run, its `failure`, a sentence. The rows
    CHECK_ROW are another solver's, to tell how far the reference is to be trusted. Of two runs at most are the pictures
    in memory.
    """
    model, depends, noise = _model(pipe, settings)

    def job(name: str, prompt: str, sampler: str, steps: int, depends: str) -> _Job:
        request = pipe.resolve(settings.request(prompt, sampler, steps))
        solver = samplers.resolve(request.sampler, pipe.scheduler_config, request.spacing).solver
        asked = request.model_dump_json(exclude_defaults=True)  # a field that comes later changes no key
        row: Row = {"key": hashlib.sha256(f"{depends}\n{asked}".encode()).hexdigest()[:16]}
        row |= {"sampler": name, "steps": steps, "prompt": prompt, "solver": solver}
        run = {name: getattr(request, name) for name in ("width", "height", "guidance_scale")}
        row |= {"stochastic": samplers.SOLVERS[solver].stochastic, "model": model | run}
        return _Job(row, request, steps * request.count * samplers.SOLVERS[solver].calls)

    plan: list[tuple[_Job, list[_Job]]] = []  # for each prompt the reference and the rows
    refused: list[Row] = []
    for prompt in settings.prompts:
        reference = job(REFERENCE, prompt, REFERENCE, settings.reference_steps, depends)
        jobs = [job(CHECK_ROW, prompt, CHECK, settings.reference_steps // 2, reference.key)]
        for sampler, steps in product(settings.samplers, settings.steps):
            try:
                jobs.append(job(sampler, prompt, sampler, steps, reference.key))
            except RequestError as error:
                refused.append({"sampler": sampler, "steps": steps, "prompt": prompt, "failure": str(error)})
        if len(jobs) == 1:
            raise RequestError(f"none of the samplers runs on this model: {refused[0]['failure']}")
        plan.append((reference, jobs))

    rows = _read_rows(folder)
    missing = [(reference, [job for job in jobs if job.key not in rows]) for reference, jobs in plan]
    missing = [(reference, jobs) for reference, jobs in missing if jobs]
    total = sum(job.calls for reference, jobs in missing for job in (reference, *jobs))
    done = 0

    def on_step(job: _Job) -> Progress:
        before = done
        return lambda step, steps: progress(before + job.calls * step // steps, total)

    for reference, jobs in missing:
        standard = _reference(pipe, reference, noise, folder, on_step(reference))
        done += reference.calls
        for one in jobs:
            given = noise if one.row["sampler"] == CHECK_ROW else None
            row = one.row | {"reference": reference.key} | _measure(pipe, one, given, standard, folder, on_step(one))
            with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            rows[one.key] = row
            done += one.calls
    return [rows[one.key] for _, jobs in plan for one in jobs] + refused


def _model(pipe: Pipeline, settings: Settings) -> tuple[Row, str, Tensor]:
    """The model in words, what a row depends on beside its request, and the reference's first noise (seeds, C, h, w).

    The picture that it draws to learn this also warms the machine up, before anything is timed.
    """
    from mezzotint.diffusion.noise import SeededNoise

    result = pipe.generate(settings.request(settings.prompts[0], REFERENCE, 2).replace(count=1))
    record = json.loads(result.images[0].info["mezzotint"])
    depends = [record["model"], record["versions"], pipe.parts.identity, pipe.scheduler_config]
    _, channels, height, width = result.latents.shape
    noise = SeededNoise(range(settings.seeds), (channels, height, width), pipe.device).draw()
    if samplers.resolve(None, pipe.scheduler_config).start == "vp":  # as the model's own sampler starts
        noise = noise * math.sqrt(1.0 + pipe.schedule.sigma_max**-2)
    return record["model"], json.dumps(depends, sort_keys=True), noise


def _reference(pipe: Pipeline, job: _Job, noise: Tensor, folder: Path, on_step: Progress) -> dict[Space, list[Array]]:
    """The converged latents and pictures of one prompt, run, or made again from the folder's latents."""
    import torch

    path = folder / "reference" / f"{job.key}.npy"
    if path.exists():
        latents = torch.from_numpy(np.load(path))
        images = [image for z in latents for image in pipe.decode(z[None])]
    else:
        result = pipe.generate(job.request, latents=noise, on_step=on_step)
        latents, images = result.latents.cpu(), result.images
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, latents.numpy())
        part.replace(path)  # whole or not at all
    _save_thumbnail(folder, job, images[0])
    return {"latents": [*latents.numpy()], "pictures": [np.asarray(image) for image in images]}


def _measure(
    pipe: Pipeline,
    job: _Job,
    noise: Tensor | None,
    reference: dict[Space, list[Array]],
    folder: Path,
    on_step: Progress,
) -> Row:
    """What a row says of its run."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = pipe.unet_for(job.request).register_forward_hook(count)
    start = time.perf_counter()
    try:
        result = pipe.generate(job.request, latents=noise, on_step=on_step)
    except MezzotintError as error:  # such as a sampler that runs away
        return {"failure": str(error)}
    finally:
        hook.remove()
    seconds = time.perf_counter() - start
    _save_thumbnail(folder, job, result.images[0])
    batches = math.ceil(job.request.count / (job.request.batch or 1))
    return {
        "calls": calls / batches,
        "seconds": round(seconds / job.request.count, 4),
        "latents": _distances([*result.latents.cpu().numpy(), *reference["latents"]]),
        "pictures": _distances([*map(np.asarray, result.images), *reference["pictures"]]),
    }


def _distances(arrays: Sequence[Array]) -> list[list[float]]:
    """(n, n) root mean square differences, six digits of them."""
    matrix = [[0.0] * len(arrays) for _ in arrays]
    for i, j in combinations(range(len(arrays)), 2):
        rms = np.sqrt(((arrays[i].astype(np.float64) - arrays[j]) ** 2).mean())
        matrix[i][j] = matrix[j][i] = float(f"{rms:.6g}")
    return matrix


def thumbnail(folder: Path, key: str) -> Path:
    """Where a row's first picture is, small."""
    return folder / "pictures" / f"{key}.png"


def _save_thumbnail(folder: Path, job: _Job, image: Image.Image) -> None:
    path = thumbnail(folder, job.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.info.clear()
    small.save(path)


def _read_rows(folder: Path) -> dict[str, Row]:
    """The finished rows by key. A last line that a kill cut short is taken out, to be measured again."""
    path = folder / "results.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        whole = [line for line in file if line.endswith(b"\n")]
        file.truncate(sum(map(len, whole)))
    rows = {}
    for line in whole:
        with suppress(ValueError, TypeError, KeyError):  # a line that is not ours
            row = json.loads(line)
            rows[row["key"]] = row
    return rows


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
        """What this sampler is judged by: from the same noise, or where it adds noise between the distributions."""
        distance: Distance = getattr(point, space)
        return distance.bound if self.stochastic else distance.error

    def reached(self, near: float = NEAR) -> Point | None:
        """The first point from which on all are within `near`."""
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
    """A curve for each sampler, in order of the rows, without the steps that failed on a prompt."""
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
    """The sampler that comes within `near` of converged with the fewest model calls, and what the others need.

    Samplers that add no noise go first: to end at one point is more than to have the distribution.
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
    """What the curves say of the field's claim on DPM-Solver++ (Lu et al. 2022b) and DDPM, by their distributions.

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
