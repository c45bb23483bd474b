"""Measure how fast samplers converge on a model: the distance from a converged reference by sampler and steps.

    rows = measure(pipe, settings, folder)     # each row is written to disk as soon as it is measured

`statistics.py` evaluates the rows, and `page.py` writes the report. Importing this module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mezzotint import samplers
from mezzotint.errors import MezzotintError, RequestError
from mezzotint.files import atomic_path, read_text
from mezzotint.models.edits import OWN_HOOKS
from mezzotint.report.statistics import CHECK_ROW, Row, Space
from mezzotint.request import Request

if TYPE_CHECKING:
    from torch import Tensor

    from mezzotint.pipeline import Pipeline

REFERENCE, CHECK = "DPM++ 2M Karras", "Heun Karras"  # both on Karras noise levels; Heun with half the steps
THUMBNAIL = 128  # pixels

Array = NDArray[Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """What to measure. Raises RequestError if a value is invalid.

    Attributes:
        prompts: The prompts.
        samplers: The samplers, each a name or NAME/SPACING.
        steps: The numbers of steps, in ascending order.
        seeds: The number of pictures per prompt.
        reference_steps: The number of steps of the reference.
        guidance_scale: The guidance scale, or None for the model's own.
    """

    prompts: tuple[str, ...]
    samplers: tuple[str, ...]
    steps: tuple[int, ...]
    seeds: int = 4
    reference_steps: int = 500
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise RequestError(
                f"seeds is {self.seeds}; it must be at least 2, since distances are in units of that between two seeds"
            )
        for prompt, sampler, steps in product(self.prompts, self.samplers, self.steps):
            self.request(prompt, sampler, steps)
        if not 2 * self.steps[-1] <= self.reference_steps <= 1000:
            raise RequestError(
                f"reference_steps is {self.reference_steps}; it must be at most 1000 and at least twice the largest "
                f"of steps, {self.steps[-1]}"
            )

    @classmethod
    def parse(cls, prompts: Path, names: str, steps: str, **others: Any) -> Settings:
        """Parse the options of the command line.

        Args:
            prompts: A file with one prompt per line.
            names: Samplers, separated by commas, or "all".
            steps: Numbers of steps, separated by commas.
            **others: The other attributes.

        Raises:
            RequestError: If the file cannot be read or a value is invalid.
        """
        try:
            lines = [line.strip() for line in read_text(prompts, "utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise RequestError(f"prompts is {str(prompts)!r}, which cannot be read ({reason})") from None
        texts = dict.fromkeys(line for line in lines if line)  # each once, in order
        if not texts:
            raise RequestError(f"prompts is {str(prompts)!r}, which has no prompts; it must have one prompt per line")
        chosen = samplers.SOLVERS if names.strip() == "all" else [_canonical(name.strip()) for name in names.split(",")]
        try:
            numbers = sorted({int(number) for number in steps.split(",")})
        except ValueError:
            right = "whole numbers separated by commas, such as 5,10,20"
            raise RequestError(f"steps is {steps[:60]!r}; it must be {right}") from None
        return cls(tuple(texts), tuple(dict.fromkeys(chosen)), tuple(numbers), **others)

    def request(self, prompt: str, sampler: str, steps: int) -> Request:
        """Return the request of one row."""
        name, _, spacing = sampler.partition("/")
        return Request(
            prompt=prompt,
            sampler=name,
            spacing=spacing or None,
            steps=steps,
            seed=0,
            count=self.seeds,
            guidance_scale=self.guidance_scale,
            safety="off",
        )


def _canonical(name: str) -> str:
    """Return NAME or NAME/SPACING with the names in their own spelling."""
    sampler, slash, spacing = name.partition("/")
    return samplers.canonical_name(sampler) + slash + (spacing and samplers.canonical_spacing(spacing))


# ---- measuring -------------------------------------------------------------------------------------------------------


class _Job(NamedTuple):
    """A run to measure."""

    row: Row  # the row without results
    request: Request
    calls: int  # expected model calls, for the progress bar

    @property
    def key(self) -> str:
        """Return the row's key."""
        key: str = self.row["key"]
        return key


def measure(
    pipe: Pipeline, settings: Settings, folder: Path, progress: Progress = lambda done, total: None
) -> list[Row]:
    """Measure the rows that the folder does not contain yet.

    A row is the result of a sampler, a number of steps and a prompt: model calls and seconds per picture, and for
    latents and pictures (levels of 255) a matrix of the root mean square distances between all of its pictures followed
    by the reference's, (2 seeds, 2 seeds). A row that could not run has the error message as `failure` instead. The
    rows named CHECK_ROW are of a second solver, and tell how accurate the reference is. At most two runs' pictures are
    in memory.

    Args:
        pipe: The pipeline to measure.
        settings: What to measure.
        folder: Where the results are kept.
        progress: Called with (done, total) in expected model calls; an exception that it raises ends the work.

    Returns:
        The rows of all settings.

    Raises:
        RequestError: If none of the samplers runs on the model.
    """
    model, dependencies, noise = _model(pipe, settings)

    def job(name: str, prompt: str, sampler: str, steps: int, dependencies: str) -> _Job:
        run_plan = pipe.plan(settings.request(prompt, sampler, steps))
        request, solver = run_plan.request, run_plan.sampler.solver
        fields = request.model_dump_json(exclude_defaults=True)  # so that a new field of Request changes no key
        row: Row = {"key": hashlib.sha256(f"{dependencies}\n{fields}".encode()).hexdigest()[:16]}
        row |= {"sampler": name, "steps": steps, "prompt": prompt, "solver": solver}
        run = {name: getattr(request, name) for name in ("width", "height", "guidance_scale")}
        row |= {"stochastic": samplers.SOLVERS[solver].stochastic, "model": model | run}
        return _Job(row, request, steps * request.count * samplers.SOLVERS[solver].calls)

    plan: list[tuple[_Job, list[_Job]]] = []  # for each prompt the reference and the rows
    failed: list[Row] = []
    for prompt in settings.prompts:
        reference = job(REFERENCE, prompt, REFERENCE, settings.reference_steps, dependencies)
        jobs = [job(CHECK_ROW, prompt, CHECK, settings.reference_steps // 2, reference.key)]
        for sampler, steps in product(settings.samplers, settings.steps):
            try:
                jobs.append(job(sampler, prompt, sampler, steps, reference.key))
            except RequestError as error:
                failed.append({"sampler": sampler, "steps": steps, "prompt": prompt, "failure": str(error)})
        if len(jobs) == 1:
            raise RequestError(f"none of the samplers runs on this model: {failed[0]['failure']}")
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
        converged = _reference(pipe, reference, noise, folder, on_step(reference))
        done += reference.calls
        for one in jobs:
            latents = noise if one.row["sampler"] == CHECK_ROW else None
            row = one.row | {"reference": reference.key} | _measure(pipe, one, latents, converged, folder, on_step(one))
            with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            rows[one.key] = row
            done += one.calls
    return [rows[one.key] for _, jobs in plan for one in jobs] + failed


def _model(pipe: Pipeline, settings: Settings) -> tuple[Row, str, Tensor]:
    """Return the model's description, what a row depends on, and the starting noise (seeds, C, h, w).

    They come from a picture whose generation also serves as warm-up before anything is timed.
    """
    from mezzotint.diffusion.noise import SeededNoise

    result = pipe.generate(settings.request(settings.prompts[0], REFERENCE, 2).replace(count=1))
    record = json.loads(result.images[0].info["mezzotint"])
    dependencies = [record["model"], record["versions"], pipe.parts.identity, pipe.scheduler_config]
    _, channels, height, width = result.latents.shape
    noise = SeededNoise(range(settings.seeds), (channels, height, width), pipe.device).draw()
    if samplers.resolve(None, pipe.scheduler_config).start == "vp":  # the starting noise of the model's own sampler
        noise = noise * math.sqrt(1.0 + pipe.schedule.sigma_max**-2)
    return record["model"], json.dumps(dependencies, sort_keys=True), noise


def _reference(pipe: Pipeline, job: _Job, noise: Tensor, folder: Path, on_step: Progress) -> dict[Space, list[Array]]:
    """Return the converged latents and pictures of one prompt, from the folder if it has the latents."""
    import torch

    path = folder / "reference" / f"{job.key}.npy"
    if path.exists():
        latents = torch.from_numpy(np.load(path))
        images = [image for z in latents for image in pipe.decode(z[None])]
    else:
        result = pipe.generate(job.request, latents=noise, on_step=on_step)
        latents, images = result.latents.cpu(), result.images
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, latents.numpy())
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
    """Run a job and return its results: calls, seconds and distances, or its failure."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    OWN_HOOKS.add(count)  # it only counts: the record must not call it a change of the model
    hook = pipe.unet_for(pipe.plan(job.request)).register_forward_hook(count)
    start = time.perf_counter()
    try:
        result = pipe.generate(job.request, latents=noise, on_step=on_step)
    except MezzotintError as error:  # such as a sampler that diverges
        return {"failure": str(error)}
    finally:
        hook.remove()
        OWN_HOOKS.discard(count)
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
    """Return the (n, n) matrix of root mean square differences, rounded to six digits."""
    matrix = [[0.0] * len(arrays) for _ in arrays]
    for i, j in combinations(range(len(arrays)), 2):
        rms = np.sqrt(((arrays[i].astype(np.float64) - arrays[j]) ** 2).mean())
        matrix[i][j] = matrix[j][i] = float(f"{rms:.6g}")
    return matrix


def thumbnail(folder: Path, key: str) -> Path:
    """Return the path of the thumbnail of a row's first picture."""
    return folder / "pictures" / f"{key}.png"


def _save_thumbnail(folder: Path, job: _Job, image: Image.Image) -> None:
    """Save the thumbnail of a job's first picture."""
    path = thumbnail(folder, job.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.info.clear()
    small.save(path)


def _read_rows(folder: Path) -> dict[str, Row]:
    """Return the finished rows by key; an incomplete last line, left by a killed run, is removed from the file."""
    path = folder / "results.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        whole = [line for line in file if line.endswith(b"\n")]
        file.truncate(sum(map(len, whole)))
    rows = {}
    for line in whole:
        with suppress(ValueError, TypeError, KeyError):  # a line that is not a row
            row = json.loads(line)
            rows[row["key"]] = row
    return rows
