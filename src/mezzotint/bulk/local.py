"""Generate the pictures of a file of requests into one folder. An interrupted run can be resumed.

    with prepare(file, folder, fields) as plan:
        for outcome in run(plan, Worker.start(plan), on_step):  # or ray.run(plan), on the workers of a cluster
            ...

The file is read in windows of WINDOW rows. Within a window, pictures that differ only in prompts and seed are grouped
into batches ("units"). A unit depends on the file alone, not on what is left to do: if some of its files exist, the
whole unit is generated again, which gives the same bits, and only the missing files are written. Files appear whole or
not at all (`save_png`), so an existing file is complete and no other state is needed to resume.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mezzotint import rows
from mezzotint.bulk.folder import RECORD, lock, read_record, recorded_placement, write_or_check_record
from mezzotint.errors import MezzotintError, RequestError, WriteError
from mezzotint.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from mezzotint.memory.planner import MemoryPlan
    from mezzotint.pipeline import Pipeline

GPU_BATCH = 4  # pictures in a batch on a GPU if a row does not set it
WINDOW = 256  # rows; a larger window batches a mixed file better and resumes more slowly

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class BulkPlan:
    """A bulk run, as all of its workers know it.

    Attributes:
        file: The file of requests.
        folder: Where the pictures are written.
        fields: Defaults for fields that a row does not set.
        model: What `mezzotint.load` takes.
        device: The device of each worker.
        dtype: The dtype of each worker.
        threads: CPU threads of each worker.
        digest: The SHA-256 of the file.
        rows: The number of rows.
        pictures: The number of pictures, as far as known before the rows are validated.
        memory: The memory budget of a worker, or None.
        options: More arguments of `mezzotint.load`, which overrule the model's files.
    """

    file: Path
    folder: Path
    fields: Mapping[str, Any]
    model: str | None
    device: str | None
    dtype: str | None
    threads: int
    digest: str
    rows: int
    pictures: int
    memory: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def windows(self) -> int:
        """Return the number of windows of the file."""
        return -(-self.rows // WINDOW)


class Picture(NamedTuple):
    """One picture of a row, with a request for that picture alone."""

    row: int
    image: int
    request: Request

    @property
    def name(self) -> str:
        """Return its file name, such as 000012-0.png for row 12, image 0."""
        return picture_name(self.row, self.image)


class Notice(NamedTuple):
    """What the user should know of a row."""

    row: int
    sentence: str


class Failure(NamedTuple):
    """A row (or one image of it) that failed, and the error message."""

    row: int
    image: int | None
    error: str


@dataclass
class Outcome:
    """The result of a part of a window.

    Attributes:
        window: The index of the window.
        drawn: The number of pictures generated and written.
        existing: The number of pictures that were there already.
        failures: The rows and pictures that failed.
        notices: `Result.notices` of the pictures generated, each sentence with the first row that it is on.
    """

    window: int
    drawn: int = 0
    existing: int = 0
    failures: list[Failure] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)


def picture_name(row: int, image: int) -> str:
    """Return the file name of a picture; names sort as the rows do, up to row 999,999."""
    return f"{row:06}-{image}.png"


@contextmanager
def prepare(
    file: Path,
    folder: Path,
    fields: Mapping[str, Any],
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    default_threads: Callable[[], int] = lambda: 1,
    memory: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[BulkPlan]:
    """Validate the arguments, create the folder and lock it, all before a model is loaded.

    Args:
        file: The file of requests: JSONL, CSV or Parquet.
        folder: Where the pictures are written.
        fields: Defaults for fields that a row does not set.
        model: What `mezzotint.load` takes.
        device: The device of each worker.
        dtype: The dtype of each worker.
        threads: CPU threads of each worker; None means those of the run to resume, or for a new one
            `default_threads()`.
        default_threads: Called only if needed, since it may import torch.
        memory: The memory budget of a worker, such as "4GiB".
        options: More arguments of `mezzotint.load`, which overrule the model's files.

    Raises:
        RequestError: If the file or an argument is invalid.
        WriteError: If the folder cannot be written or another run uses it.
    """
    if "prompt" in fields or "seed" in fields:
        raise RequestError("prompt and seed cannot be set for all rows; set them in each row")
    if threads is not None and not 1 <= threads <= 1024:
        raise RequestError(f"threads is {threads}; it must be a whole number from 1 to 1024")
    count, pictures = rows.measure(file, fields)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise WriteError(f"{str(folder)!r} cannot be written to ({error.strerror or error})") from None
    with lock(folder):
        recorded = read_record(folder)
        if recorded is None and next(folder.glob("[0-9]*-[0-9]*.png"), None):
            raise RequestError(f"{str(folder)!r} contains pictures but no {RECORD}; choose an empty folder")
        threads = threads or (recorded or {}).get("threads") or default_threads()
        absolute = file.absolute(), folder.absolute()
        yield BulkPlan(
            *absolute, dict(fields), model, device, dtype, threads, digest, count, pictures, memory, options or {}
        )


def plan_memory(plan: BulkPlan) -> MemoryPlan | None:
    """Return the memory plan with which the pictures of every row fit the budget; None without a budget.

    Raises:
        BudgetError: If no plan fits.
    """
    if plan.memory is None:
        return None
    from mezzotint.memory.planner import plan as plan_for

    kinds: dict[Request, Request] = {}  # request without prompts and seed -> the one with the longest prompt
    for _, request in rows.read(plan.file, plan.fields):
        if isinstance(request, Request):
            kind = request.replace(prompt="", seed=0, negative_prompt=request.negative_prompt and "")
            if len(request.prompt) >= len(kinds.get(kind, kind).prompt):
                kinds[kind] = request
    # rows of a kind share batches, so assume full ones
    requests = [request.replace(count=max(request.count, request.batch or GPU_BATCH)) for request in kinds.values()]
    return plan_for(plan.model, plan.memory, requests or None, device=plan.device, dtype=plan.dtype, **plan.options)


# ---- the work --------------------------------------------------------------------------------------------------------


class Worker:
    """Generates the pictures of a plan's windows with one pipeline. It reads the file once if windows come in order."""

    def __init__(self, plan: BulkPlan, pipe: Pipeline) -> None:
        self.plan, self.pipe = plan, pipe
        write_or_check_record(plan, pipe)
        self._windows: Iterator[list[rows.ParsedRow]] = iter(())
        self._next = plan.windows + 1  # index of the next window to read; the first call opens the file
        self._window: list[rows.ParsedRow] = []

    @classmethod
    def start(cls, plan: BulkPlan, memory_plan: MemoryPlan | None = None) -> Worker:
        """Load the model and set the number of threads.

        Args:
            plan: The run.
            memory_plan: The result of `plan_memory`, if already known.
        """
        import torch

        import mezzotint
        from mezzotint.memory import system

        system.keep_freed()
        torch.set_num_threads(plan.threads)
        memory_plan = memory_plan or plan_memory(plan)
        placement = None if memory_plan else recorded_placement(plan.folder)
        pipe = mezzotint.load(
            plan.model, device=plan.device, dtype=plan.dtype, memory=memory_plan, placement=placement, **plan.options
        )
        return cls(plan, pipe)

    def work(
        self, window: int, part: int = 0, parts: int = 1, on_step: OnStep = lambda done, total: None
    ) -> Iterator[Outcome]:
        """Generate every `parts`-th unit of a window, starting at unit `part`. Part 0 reports invalid rows.

        Args:
            window: The index of the window.
            part: The index of this part.
            parts: The number of parts that share the window.
            on_step: Called after each step of a picture; an exception that it raises ends the work.

        Raises:
            WriteError: If a picture cannot be written.
        """
        parsed = self._read_window(window)
        failures = [Failure(number, None, row) for number, row in parsed if isinstance(row, str)]
        requests = [(number, row) for number, row in parsed if isinstance(row, Request)]
        existing = 0
        if all(self._exists(number, k) for number, request in requests for k in range(request.count)):
            existing = sum(request.count for _, request in requests)
        else:
            for n, unit in enumerate(units(self._pictures(requests, failures))):
                if n % parts == part:
                    yield self._generate_unit(window, unit, on_step)
        yield Outcome(window) if part else Outcome(window, existing=existing, failures=failures)

    def _read_window(self, window: int) -> list[rows.ParsedRow]:
        """Return the rows of a window."""
        if window < self._next - 1:
            self._windows, self._next = _windows(self.plan), 0
        while self._next <= window:
            self._window, self._next = next(self._windows, []), self._next + 1
        return self._window

    def _exists(self, row: int, image: int) -> bool:
        """Return whether a picture has been written."""
        return os.path.exists(self.plan.folder / picture_name(row, image))

    def _pictures(self, requests: Iterable[tuple[int, Request]], failures: list[Failure]) -> Iterator[Picture]:
        """Yield each picture of each row; add the rows that do not fit the model to `failures`."""
        for number, request in requests:
            try:
                resolved = self.pipe.resolve(request)
            except Exception as error:
                failures.append(Failure(number, None, _error_message(error)))
                continue
            for k in range(resolved.count):
                yield Picture(number, k, resolved.replace(seed=(resolved.seed or 0) + k, count=1))

    def _generate_unit(self, window: int, unit: list[Picture], on_step: OnStep) -> Outcome:
        """Generate a unit if one of its files is missing. If it fails, generate its pictures one by one."""
        missing = [picture for picture in unit if not self._exists(picture.row, picture.image)]
        outcome = Outcome(window, existing=len(unit) - len(missing))
        try:
            if missing:
                outcome.notices = self._generate(unit, on_step)
            outcome.drawn = len(missing)
        except WriteError:
            raise
        except Exception as error:
            if len(unit) == 1:
                outcome.failures = [Failure(unit[0].row, unit[0].image, _error_message(error))]
            else:
                alone = [self._generate_unit(window, [picture], on_step) for picture in missing]
                outcome.drawn = sum(one.drawn + one.existing for one in alone)  # existing: written before the failure
                outcome.failures = [failure for one in alone for failure in one.failures]
                outcome.notices = [notice for one in alone for notice in one.notices]
        return outcome

    def _generate(self, unit: list[Picture], on_step: OnStep) -> list[Notice]:
        """Generate a unit, write its missing pictures, and return the notices on it."""
        from mezzotint.images.io import save_png

        def on_image(k: int, image: Image) -> None:
            if self._exists(unit[k].row, unit[k].image):
                return
            path = self.plan.folder / unit[k].name
            try:
                save_png(image, path)
            except RequestError as error:
                raise WriteError(str(error)) from None

        results = self.pipe.generate([picture.request for picture in unit], on_step=on_step, on_image=on_image)
        first: dict[str, int] = {}
        for picture, result in zip(unit, results, strict=True):
            for sentence in result.notices:
                first.setdefault(sentence, picture.row)
        return [Notice(row, sentence) for sentence, row in first.items()]


def run(plan: BulkPlan, worker: Worker, on_step: OnStep) -> Iterator[Outcome]:
    """Run a whole plan in this process with one worker."""
    for window in range(plan.windows):
        yield from worker.work(window, on_step=on_step)


def units(pictures: Iterable[Picture]) -> Iterator[list[Picture]]:
    """Group pictures that differ only in prompts, seed and `safety` into batches of their `batch`."""
    incomplete: dict[str, list[Picture]] = {}
    for picture in pictures:
        kind = picture.request.model_dump_json(exclude={"prompt", "negative_prompt", "seed", "safety"})
        unit = incomplete.setdefault(kind, [])
        unit.append(picture)
        if len(unit) == picture.request.batch:
            yield incomplete.pop(kind)
    yield from incomplete.values()


def _windows(plan: BulkPlan) -> Iterator[list[rows.ParsedRow]]:
    """Yield the rows of each window of the file."""
    parsed = rows.read(plan.file, plan.fields)
    while window := list(islice(parsed, WINDOW)):
        yield window


def _error_message(error: Exception) -> str:
    """Return the message of an error, with the type of one that is not mezzotint's own."""
    if isinstance(error, MezzotintError):
        return str(error)
    return f"unexpected error ({' '.join(f'{type(error).__name__}: {error}'.split())[:500]})"


def to_json(outcome: Outcome) -> str:
    """Serialize an outcome."""
    return json.dumps(asdict(outcome))


def from_json(text: str) -> Outcome:
    """Deserialize an outcome."""
    record = json.loads(text)
    failures, notices = [Failure(*each) for each in record["failures"]], [Notice(*each) for each in record["notices"]]
    return Outcome(**record | {"failures": failures, "notices": notices})
