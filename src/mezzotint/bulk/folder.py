"""The folder of a bulk run: its lock, its record bulk.json, and failures.jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.errors import RequestError, WriteError
from mezzotint.files import remove_leftovers, write_atomically
from mezzotint.placement import Placement

if TYPE_CHECKING:
    from mezzotint.bulk.local import BulkPlan, Failure, Outcome
    from mezzotint.pipeline import Pipeline

RECORD, FAILURES = "bulk.json", "failures.jsonl"


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock a folder against other runs. The lock ends with the process."""
    try:
        import fcntl
    except ImportError:  # Windows; there two runs would only generate the same pictures twice
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WriteError(f"{str(folder)!r} is in use by another run; wait until it ends") from None
        remove_leftovers(folder)
        yield
    finally:
        os.close(descriptor)


class Failures:
    """Writes failures.jsonl, in the order of the rows.

    A run starts with a new file, since it retries the rows that failed; without failures there is no file.

    Attributes:
        rows: The number of rows that failed so far.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FAILURES
        self._path.unlink(missing_ok=True)
        self._window, self._pending = 0, list["Failure"]()
        self.rows = 0

    def add(self, outcome: Outcome) -> None:
        """Collect the failures of an outcome; they are written at the end of their window. Raises WriteError."""
        if outcome.window != self._window:
            self.write()
        self._window = outcome.window
        self._pending += outcome.failures

    def write(self) -> None:
        """Append the collected failures to the file. Raises WriteError."""
        ordered = sorted(self._pending, key=lambda failure: (failure.row, failure.image or 0))
        lines = [{name: value for name, value in one._asdict().items() if value is not None} for one in ordered]
        self._pending = []
        self.rows += len({failure.row for failure in ordered})
        try:
            if lines:
                with self._path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise WriteError(f"{str(self._path)!r} cannot be written: {error.strerror or error}") from None


def read_record(folder: Path) -> dict[str, Any] | None:
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


def recorded_placement(folder: Path) -> Placement:
    """Return the placement of the run to resume, or the default."""
    recorded = (read_record(folder) or {}).get("placement")
    return Placement.of(**recorded) if isinstance(recorded, dict) else Placement()


def write_or_check_record(plan: BulkPlan, pipe: Pipeline) -> None:
    """Write bulk.json, which holds what the pictures depend on; of a resumed run compare it, or raise RequestError."""
    import torch

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
    recorded = read_record(plan.folder)
    if recorded is None:
        try:
            write_atomically(plan.folder / RECORD, (json.dumps(record, indent=2) + "\n").encode())
        except OSError as error:
            raise WriteError(f"{str(plan.folder)!r} cannot be written to ({error.strerror or error})") from None
        return
    before, now = (_flatten({name: each.get(name) for name in record}) for each in (recorded, record))
    for name in now | before:
        was, value = before.get(name), now.get(name)
        if was != value:
            fix = "leave out --memory" if name.startswith("placement") else f"use the same {name}"
            raise RequestError(
                f"{name} is {json.dumps(value)[:80]}, but {str(plan.folder)!r} was started with "
                f"{json.dumps(was)[:80]}; {fix}, or choose another folder"
            )


def _flatten(record: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten {"fields": {"steps": 2}} to {"fields steps": 2}."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= {f"{name} {part}": each for part, each in value.items()} if isinstance(value, dict) else {name: value}
    return flat
