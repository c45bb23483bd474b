"""Pictures for a whole file of requests, into one folder; stopped at any moment it goes on where it was.

    with prepared(file, folder, fields) as plan:
        for outcome in run(plan, Worker.start(plan), on_step):  # or bulk_ray.run(plan): the same on a cluster's workers
            ...

A file is read in windows of WINDOW rows. In a window pictures that differ only in words and seed are put into units of
as many as are drawn at once. So a unit is a function of the file alone, not of what is left to do: one whose files are
partly there is drawn whole again, which gives the same bits, and only the missing files are written. A file appears
whole or not at all (`save_png`), so what is there is finished, and nothing else needs to be remembered.
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

    from mezzotint.memory.planner import Plan as Fit
    from mezzotint.pipeline import Pipeline

FULL = 4  # pictures in a batch where a row does not say: on a GPU so many
WINDOW = 256  # rows of which units are made; more would join more of a mixed file, and resume more slowly
RECORD, FAILURES = "bulk.json", "failures.jsonl"

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """What all workers of a run know. fields: what a row takes where it does not say. threads: of each worker's CPU.

    digest: the file's SHA-256. rows, pictures: how many, as far as can be told before they are read in earnest.
    memory: what a worker may take, or None.
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
        """Of how many windows the file is."""
        return -(-self.rows // WINDOW)


class Picture(NamedTuple):
    """One picture of a row, and the request for it alone: what image `image` of the row's request is."""

    row: int
    image: int
    request: Request

    @property
    def name(self) -> str:
        """Of its file: row 12, image 0 is 000012-0.png."""
        return name_of(self.row, self.image)


class Failure(NamedTuple):
    """A row that gives no picture, or one image of it, and the sentence that says why."""

    row: int
    image: int | None
    error: str


@dataclass
class Outcome:
    """What became of a part of a window: pictures drawn and written now, pictures that were there, and what failed."""

    window: int
    drawn: int = 0
    found: int = 0
    failures: list[Failure] = field(default_factory=list)


def name_of(row: int, image: int) -> str:
    """The name of a picture's file, by which the files sort as the rows do up to row 999,999."""
    return f"{row:06}-{image}.png"


@contextmanager
def prepared(
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
) -> Iterator[Plan]:
    """Looks at everything that can be wrong before a model is loaded, makes the folder, and keeps other runs out of it.

    fields: for rows that do not have them. threads: None is what the folder was begun with, else `cores`. Raises
    RequestError, WriteError.
    """
    if "prompt" in fields or "seed" in fields:
        raise RequestError("prompt and seed cannot be given for all rows; they are each row's own")
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
    with _locked(folder):
        begun = _begun(folder)
        if begun is None and next(folder.glob("[0-9]*-[0-9]*.png"), None):
            raise RequestError(f"{str(folder)!r} has pictures in it and no {RECORD}; give a folder of its own")
        threads = threads or (begun or {}).get("threads", cores)
        absolute = file.absolute(), folder.absolute()
        yield Plan(*absolute, dict(fields), model, device, dtype, threads, digest, count, pictures, memory)


def fit(plan: Plan) -> Fit | None:
    """What a worker does so that every row's pictures fit its memory. Raises BudgetError where they do not."""
    if plan.memory is None:
        return None
    from mezzotint.memory.planner import plan as planned

    kinds: dict[Request, Request] = {}  # without words and seeds -> that with the longest prompt
    for _, given in rows.read(plan.file, plan.fields):
        if isinstance(given, Request):
            alike = given.replace(prompt="", seed=0, negative_prompt=given.negative_prompt and "")
            if len(given.prompt) >= len(kinds.get(alike, alike).prompt):
                kinds[alike] = given
    full = [kind.replace(count=max(kind.count, kind.batch or FULL)) for kind in kinds.values()]  # rows share a batch
    return planned(plan.model, plan.memory, full or None, device=plan.device, dtype=plan.dtype)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two runs never write into one folder. The lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows; two runs there would draw the same pictures twice, and no more
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WriteError(f"{str(folder)!r} is being written to by another run; wait for its end") from None
        for part in folder.glob(".mezzotint-*.part"):  # what a killed run had begun to write
            part.unlink(missing_ok=True)
        yield
    finally:
        os.close(held)


# ---- the work --------------------------------------------------------------------------------------------------------


class Worker:
    """Draws windows of a plan's file with one model; one process has one. It reads the file forwards, once."""

    def __init__(self, plan: Plan, pipe: Pipeline) -> None:
        self.plan, self.pipe = plan, pipe
        _begin(plan, pipe)
        self._windows: Iterator[list[rows.Checked]] = iter(())
        self._next = plan.windows + 1  # of the window that comes next; the first call opens the file
        self._window: list[rows.Checked] = []

    @classmethod
    def start(cls, plan: Plan, made: Fit | None = None) -> Worker:
        """Loads the model, with the plan's number of threads. made: what `fit` gave, where it was asked before."""
        import torch

        import mezzotint

        torch.set_num_threads(plan.threads)
        made = made or fit(plan)
        placement = None if made else _placement(plan.folder)
        pipe = mezzotint.load(plan.model, device=plan.device, dtype=plan.dtype, memory=made, placement=placement)
        return cls(plan, pipe)

    def work(
        self, window: int, part: int = 0, parts: int = 1, on_step: OnStep = lambda done, total: None
    ) -> Iterator[Outcome]:
        """Draws every `parts`-th unit of a window, from unit `part` on. What is wrong with its rows is said by part 0.

        on_step is called after each step of a picture; what it raises ends the work. Raises WriteError.
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
        return os.path.exists(self.plan.folder / name_of(row, image))

    def _pictures(self, asked: Iterable[tuple[int, Request]], refused: list[Failure]) -> Iterator[Picture]:
        """Each picture of each row; what the model refuses is added to `refused`."""
        for number, request in asked:
            try:
                resolved = self.pipe.resolve(request)
            except Exception as error:
                refused.append(Failure(number, None, _sentence(error)))
                continue
            for k in range(resolved.count):
                yield Picture(number, k, resolved.replace(seed=(resolved.seed or 0) + k, count=1))

    def _unit(self, window: int, unit: list[Picture], on_step: OnStep) -> Outcome:
        """Draws a unit if one of its files is missing. If it fails each picture is drawn alone: the others go on."""
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


def run(plan: Plan, worker: Worker, on_step: OnStep) -> Iterator[Outcome]:
    """All of a plan's work in this process, by one worker."""
    for window in range(plan.windows):
        yield from worker.work(window, on_step=on_step)


def units(pictures: Iterable[Picture]) -> Iterator[list[Picture]]:
    """Pictures that differ only in words and seed, as many together as their `batch` says."""
    begun: dict[str, list[Picture]] = {}
    for picture in pictures:
        alike = picture.request.model_dump_json(exclude={"prompt", "negative_prompt", "seed"})
        unit = begun.setdefault(alike, [])
        unit.append(picture)
        if len(unit) == picture.request.batch:
            yield begun.pop(alike)
    yield from begun.values()


def _windows(plan: Plan) -> Iterator[list[rows.Checked]]:
    checked = rows.read(plan.file, plan.fields)
    while window := list(islice(checked, WINDOW)):
        yield window


def _sentence(error: Exception) -> str:
    if isinstance(error, MezzotintError):
        return str(error)
    return f"something went wrong that should not ({' '.join(f'{type(error).__name__}: {error}'.split())[:500]})"


# ---- what the folder says --------------------------------------------------------------------------------------------


class Failures:
    """failures.jsonl of a run, begun anew, for what failed before is tried again. It has the order of the rows, and
    where none fails it is not there. `rows`: how many failed so far.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FAILURES
        self._path.unlink(missing_ok=True)
        self._window, self._held = 0, list[Failure]()
        self.rows = 0

    def add(self, outcome: Outcome) -> None:
        """Takes what failed; it is written when its window is over. Raises WriteError."""
        if outcome.window != self._window:
            self.write()
        self._window = outcome.window
        self._held += outcome.failures

    def write(self) -> None:
        """Appends what is still held. Raises WriteError."""
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


def _begun(folder: Path) -> dict[str, Any] | None:
    """What bulk.json says, if it is there."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict):
        raise RequestError(f"{str(path)!r} is no record of a bulk run; give a folder of its own")
    return record


def _placement(folder: Path) -> Placement:
    """What the folder was begun with, or the fast way."""
    begun = (_begun(folder) or {}).get("placement")
    return Placement.of(**begun) if isinstance(begun, dict) else Placement()


def _begin(plan: Plan, pipe: Pipeline) -> None:
    """Writes into the folder what its pictures depend on, or compares, if it was begun before. Raises RequestError."""
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
    begun = _begun(plan.folder)
    if begun is None:
        try:
            write_atomically(plan.folder / RECORD, (json.dumps(record, indent=2) + "\n").encode())
        except OSError as error:
            raise WriteError(f"{str(plan.folder)!r} cannot be written to ({error.strerror or error})") from None
        return
    for name, now in record.items():
        was = begun.get(name, {} if name == "placement" else None)  # which older records have not
        if isinstance(was, dict) and isinstance(now, dict):  # the first of its parts that is another
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
    """As it travels from a worker elsewhere."""
    return json.dumps(asdict(outcome))


def from_json(text: str) -> Outcome:
    """The same again."""
    record = json.loads(text)
    return Outcome(**record | {"failures": [Failure(*failure) for failure in record["failures"]]})
