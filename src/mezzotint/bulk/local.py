"""Generate the pictures of a file of requests into one folder. An interrupted run can be resumed.

    with prepare(file, folder, fields) as plan:
        for outcome in run(plan, Worker.start(plan), on_step):  # or bulk_ray.run(plan): the same on a cluster's workers
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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mezzotint import rows
from mezzotint.errors import MezzotintError, RequestError, WriteError
from mezzotint.placement import Placement
from mezzotint.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from mezzotint.memory.planner import MemoryPlan
    from mezzotint.pipeline import Pipeline

GPU_BATCH = 4  # pictures in a batch on a GPU if a row does not set it
WINDOW = 256  # rows; a larger window batches a mixed file better and resumes more slowly
RECORD, FAILURES = "bulk.json", "failures.jsonl"

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


class Failure(NamedTuple):
    """A row (or one image of it) that failed, and the error message."""

    row: int
    image: int | None
    error: str


@dataclass
class Outcome:
    """The result of a part of a window: numbers of pictures written and already present, and the failures."""

    window: int
    drawn: int = 0
    found: int = 0
    failures: list[Failure] = field(default_factory=list)


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
    cores: int = 1,
    memory: str | None = None,
) -> Iterator[BulkPlan]:
    """Validate the arguments, create the folder and lock it, all before a model is loaded.

    Args:
        file: The file of requests: JSONL, CSV or Parquet.
        folder: Where the pictures are written.
        fields: Defaults for fields that a row does not set.
        model: What `mezzotint.load` takes.
        device: The device of each worker.
        dtype: The dtype of each worker.
        threads: CPU threads of each worker; None means those of the run to resume, or `cores` for a new one.
        cores: The default for `threads`.
        memory: The memory budget of a worker, such as "4GiB".

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
    with _lock(folder):
        begun = _read_record(folder)
        if begun is None and next(folder.glob("[0-9]*-[0-9]*.png"), None):
            raise RequestError(f"{str(folder)!r} has pictures but no {RECORD}; choose an empty folder")
        threads = threads or (begun or {}).get("threads", cores)
        absolute = file.absolute(), folder.absolute()
        yield BulkPlan(*absolute, dict(fields), model, device, dtype, threads, digest, count, pictures, memory)


def plan_memory(plan: BulkPlan) -> MemoryPlan | None:
    """Return the memory plan with which the pictures of every row fit the budget; None without a budget.

    Raises:
        BudgetError: If no plan fits.
    """
    if plan.memory is None:
        return None
    from mezzotint.memory.planner import plan as plan_for

    kinds: dict[Request, Request] = {}  # request without prompts and seed -> the one with the longest prompt
    for _, given in rows.read(plan.file, plan.fields):
        if isinstance(given, Request):
            alike = given.replace(prompt="", seed=0, negative_prompt=given.negative_prompt and "")
            if len(given.prompt) >= len(kinds.get(alike, alike).prompt):
                kinds[alike] = given
    full = [
        kind.replace(count=max(kind.count, kind.batch or GPU_BATCH)) for kind in kinds.values()
    ]  # rows share a batch
    return plan_for(plan.model, plan.memory, full or None, device=plan.device, dtype=plan.dtype)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lock a folder against other runs. The lock ends with the process."""
    try:
        import fcntl
    except ImportError:  # Windows; there two runs would only generate the same pictures twice
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WriteError(f"{str(folder)!r} is being written to by another run; wait until it ends") from None
        for part in folder.glob(".mezzotint-*.part"):  # left by a killed run
            part.unlink(missing_ok=True)
        yield
    finally:
        os.close(held)


# ---- the work --------------------------------------------------------------------------------------------------------


class Worker:
    """Generates windows of a plan's file with one model; each process has one. It reads the file once, in order."""

    def __init__(self, plan: BulkPlan, pipe: Pipeline) -> None:
        self.plan, self.pipe = plan, pipe
        _write_or_check_record(plan, pipe)
        self._windows: Iterator[list[rows.Checked]] = iter(())
        self._next = plan.windows + 1  # of the window that comes next; the first call opens the file
        self._window: list[rows.Checked] = []

    @classmethod
    def start(cls, plan: BulkPlan, memory_plan: MemoryPlan | None = None) -> Worker:
        """Load the model and set the number of threads.

        Args:
            plan: The run.
            memory_plan: The result of `plan_memory`, if already known.
        """
        import torch

        import mezzotint

        torch.set_num_threads(plan.threads)
        memory_plan = memory_plan or plan_memory(plan)
        placement = None if memory_plan else _placement(plan.folder)
        pipe = mezzotint.load(plan.model, device=plan.device, dtype=plan.dtype, memory=memory_plan, placement=placement)
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
        checked = self._read(window)
        refused = [Failure(number, None, given) for number, given in checked if isinstance(given, str)]
        asked = [(number, given) for number, given in checked if isinstance(given, Request)]
        pictures = sum(request.count for _, request in asked)
        if all(self._has(number, k) for number, request in asked for k in range(request.count)):
            yield Outcome(window, 0, 0 if part else pictures, [] if part else refused)
            return
        for n, unit in enumerate(units(self._pictures(asked, refused))):
            if n % parts == part:
                yield self._unit(window, unit, on_step)
        yield Outcome(window, 0, 0, [] if part else refused)

    def _read(self, window: int) -> list[rows.Checked]:
        if window < self._next - 1:
            self._windows, self._next = _windows(self.plan), 0
        while self._next <= window:
            self._window, self._next = next(self._windows, []), self._next + 1
        return self._window

    def _has(self, row: int, image: int) -> bool:
        return os.path.exists(self.plan.folder / picture_name(row, image))

    def _pictures(self, asked: Iterable[tuple[int, Request]], refused: list[Failure]) -> Iterator[Picture]:
        """Yield each picture of each row; rows that do not fit the model are added to `refused`."""
        for number, request in asked:
            try:
                resolved = self.pipe.resolve(request)
            except Exception as error:
                refused.append(Failure(number, None, _sentence(error)))
                continue
            for k in range(resolved.count):
                yield Picture(number, k, resolved.replace(seed=(resolved.seed or 0) + k, count=1))

    def _unit(self, window: int, unit: list[Picture], on_step: OnStep) -> Outcome:
        """Generate a unit if one of its files is missing. If it fails, generate its pictures one by one."""
        missing = [picture for picture in unit if not self._has(picture.row, picture.image)]
        outcome = Outcome(window, found=len(unit) - len(missing))
        if not missing:
            return outcome
        try:
            self._draw(unit, on_step)
        except WriteError:
            raise
        except Exception as error:
            if len(unit) > 1:
                alone = [self._unit(window, [picture], on_step) for picture in missing]
                outcome.drawn = sum(one.drawn + one.found for one in alone)  # found: written before the failure
                outcome.failures = [failure for one in alone for failure in one.failures]
            else:
                outcome.failures = [Failure(unit[0].row, unit[0].image, _sentence(error))]
            return outcome
        outcome.drawn = len(missing)
        return outcome

    def _draw(self, unit: list[Picture], on_step: OnStep) -> None:
        from mezzotint.images.io import save_png

        def on_image(k: int, image: Image) -> None:
            if self._has(unit[k].row, unit[k].image):
                return
            path = self.plan.folder / unit[k].name
            try:
                save_png(image, path)
            except RequestError as error:
                raise WriteError(str(error)) from None

        self.pipe.generate([picture.request for picture in unit], on_step=on_step, on_image=on_image)


def run(plan: BulkPlan, worker: Worker, on_step: OnStep) -> Iterator[Outcome]:
    """Run a whole plan in this process with one worker."""
    for window in range(plan.windows):
        yield from worker.work(window, on_step=on_step)


def units(pictures: Iterable[Picture]) -> Iterator[list[Picture]]:
    """Group pictures that differ only in prompts and seed into batches of their `batch`."""
    begun: dict[str, list[Picture]] = {}
    for picture in pictures:
        alike = picture.request.model_dump_json(exclude={"prompt", "negative_prompt", "seed"})
        unit = begun.setdefault(alike, [])
        unit.append(picture)
        if len(unit) == picture.request.batch:
            yield begun.pop(alike)
    yield from begun.values()


def _windows(plan: BulkPlan) -> Iterator[list[rows.Checked]]:
    checked = rows.read(plan.file, plan.fields)
    while window := list(islice(checked, WINDOW)):
        yield window


def _sentence(error: Exception) -> str:
    if isinstance(error, MezzotintError):
        return str(error)
    return f"unexpected error ({' '.join(f'{type(error).__name__}: {error}'.split())[:500]})"


# ---- the state of the folder -----------------------------------------------------------------------------------------


class Failures:
    """Writes failures.jsonl, in the order of the rows.

    Each run starts the file afresh, since earlier failures are tried again; without failures it does not exist.

    Attributes:
        rows: The number of rows that failed so far.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FAILURES
        self._path.unlink(missing_ok=True)
        self._window, self._held = 0, list[Failure]()
        self.rows = 0

    def add(self, outcome: Outcome) -> None:
        """Collect the failures of an outcome; they are written at the end of their window. Raises WriteError."""
        if outcome.window != self._window:
            self.write()
        self._window = outcome.window
        self._held += outcome.failures

    def write(self) -> None:
        """Append the collected failures to the file. Raises WriteError."""
        ordered = sorted(self._held, key=lambda failure: (failure.row, failure.image or 0))
        lines = [{name: value for name, value in one._asdict().items() if value is not None} for one in ordered]
        self._held = []
        self.rows += len({failure.row for failure in ordered})
        try:
            if lines:
                with self._path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise WriteError(f"{str(self._path)!r} cannot be written: {error.strerror or error}") from None


def _read_record(folder: Path) -> dict[str, Any] | None:
    """Read bulk.json, if it exists."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict):
        raise RequestError(f"{str(path)!r} is not the record of a bulk run; choose an empty folder")
    return record


def _placement(folder: Path) -> Placement:
    """Return the placement of the run to resume, or the default."""
    begun = (_read_record(folder) or {}).get("placement")
    return Placement.of(**begun) if isinstance(begun, dict) else Placement()


def _write_or_check_record(plan: BulkPlan, pipe: Pipeline) -> None:
    """Write what the pictures depend on into the folder, or compare it if the run is resumed. Raises RequestError."""
    import torch

    from mezzotint.images.io import write_atomically
    from mezzotint.records.record import version

    record = {
        "file": plan.digest,
        "fields": dict(plan.fields),
        "model": pipe.parts.identity,
        "device": pipe.device.type,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "threads": plan.threads,
        "placement": pipe.placement.changes(),
        "versions": {"mezzotint": version("mezzotint"), "torch": torch.__version__},
    }
    begun = _read_record(plan.folder)
    if begun is None:
        try:
            write_atomically(plan.folder / RECORD, (json.dumps(record, indent=2) + "\n").encode())
        except OSError as error:
            raise WriteError(f"{str(plan.folder)!r} cannot be written to ({error.strerror or error})") from None
        return
    for name, now in record.items():
        was = begun.get(name, {} if name == "placement" else None)  # missing in older records
        if isinstance(was, dict) and isinstance(now, dict):  # compare part by part
            name, was, now = next(
                (
                    (f"{name} {part}", was.get(part), now.get(part))
                    for part in was | now
                    if was.get(part) != now.get(part)
                ),
                (name, was, was),
            )
        if was != now:
            fix = "leave out --memory" if name.startswith("placement") else f"use the same {name}"
            raise RequestError(
                f"{name} is {json.dumps(now)[:80]} and {str(plan.folder)!r} was started with {json.dumps(was)[:80]}; "
                f"{fix}, or another folder"
            )


def to_json(outcome: Outcome) -> str:
    """Serialize an outcome."""
    return json.dumps(asdict(outcome))


def from_json(text: str) -> Outcome:
    """Deserialize an outcome."""
    record = json.loads(text)
    return Outcome(**record | {"failures": [Failure(*failure) for failure in record["failures"]]})
