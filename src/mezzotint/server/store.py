"""The store: jobs, pictures, uploads and options in an SQLite database.

Accepted jobs are committed and on the disk (WAL, synchronous=FULL) before `submit` returns. Each change of state is one
transaction. Concurrent submissions share one, so that many clients share one flush.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mezzotint.errors import WriteError
from mezzotint.server import batches
from mezzotint.server.errors import ConflictError, NotFoundError, QueueFullError

QUEUED, RUNNING, DONE, FAILED, CANCELLED = STATES = ("queued", "running", "done", "failed", "cancelled")
INTERACTIVE, BULK = 0, 1  # priorities; the lower number runs first
VERSION = 1
RETRY_AFTER = 5  # seconds that a client is told to wait while the queue is full
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, state TEXT NOT NULL, kind TEXT NOT NULL,
    priority INTEGER NOT NULL, position REAL NOT NULL, model TEXT NOT NULL, vae TEXT, request TEXT NOT NULL,
    dialect TEXT NOT NULL, target TEXT, created REAL NOT NULL, started REAL, finished REAL, error TEXT, result TEXT);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, priority, position, number);
CREATE TABLE IF NOT EXISTS pictures (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL, place INTEGER NOT NULL,
    seed TEXT NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL,
    flagged INTEGER, rating INTEGER NOT NULL DEFAULT 0, tags TEXT NOT NULL DEFAULT '[]', prompt TEXT NOT NULL,
    model TEXT NOT NULL, created REAL NOT NULL, deleted REAL, verified TEXT, UNIQUE (job, place));
CREATE INDEX IF NOT EXISTS pictures_by_job ON pictures (job);
CREATE INDEX IF NOT EXISTS deleted_pictures ON pictures (deleted) WHERE deleted IS NOT NULL;
CREATE TABLE IF NOT EXISTS uploads (
    id TEXT PRIMARY KEY, format TEXT NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, bytes INTEGER NOT NULL,
    used REAL NOT NULL);
CREATE TABLE IF NOT EXISTS options (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True)
class NewJob:
    """A job to submit.

    Attributes:
        request: The fields of the Request as JSON values; input pictures are ids of uploads, files are listed names.
        model: The listed name of the model.
        vae: The listed name of the VAE, or None for the model's own.
        priority: INTERACTIVE or BULK.
        dialect: The API that it came by: "api", "a1111" or "openai".
        kind: "draw"; "verify" and "maps" draw the picture `target` again.
        target: The id of a picture.
    """

    request: Mapping[str, Any]
    model: str
    vae: str | None = None
    priority: int = INTERACTIVE
    dialect: str = "api"
    kind: str = "draw"
    target: str | None = None


@dataclass(frozen=True)
class Picture:
    """A finished picture; `place` is its index in the job."""

    id: str
    job: str
    place: int
    seed: int
    width: int
    height: int
    bytes: int
    sha256: str
    flagged: bool | None
    prompt: str
    model: str
    created: float
    rating: int = 0
    tags: tuple[str, ...] = ()
    deleted: float | None = None
    verified: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return vars(self) | {"tags": list(self.tags)}


@dataclass(frozen=True)
class Job:
    """A job, as it is stored."""

    id: str
    state: str
    kind: str
    priority: int
    position: float
    model: str
    vae: str | None
    request: dict[str, Any]
    dialect: str
    target: str | None
    created: float
    started: float | None = None
    finished: float | None = None
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    pictures: tuple[Picture, ...] = field(default=())

    @property
    def ended(self) -> bool:
        """Whether its state is final."""
        return self.state in (DONE, FAILED, CANCELLED)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return vars(self) | {"pictures": [picture.to_dict() for picture in self.pictures]}


class _Submission:
    """Jobs of one call that wait for the next transaction."""

    def __init__(self, jobs: Sequence[NewJob]) -> None:
        self.jobs = jobs
        self.added: list[Job] = []
        self.error: Exception | None = None
        self.committed = False


class Store:
    """The database.

    Args:
        path: Its file, which is made if it is missing; None keeps it in memory.
        limit: The number of jobs that may wait.
    """

    def __init__(self, path: Path | None, limit: int = 1000) -> None:
        self._limit = limit
        self._lock, self._read_lock = threading.RLock(), threading.RLock()
        self._pending: list[_Submission] = []
        self._pending_lock = threading.Lock()
        self._write, self._read = self._connect(path), None
        try:
            version = self._write.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise WriteError(f"{str(path)!r} was made by a newer version of mezzotint; choose another data folder")
            self._write.executescript(SCHEMA + batches.SCHEMA + f"PRAGMA user_version = {VERSION};")
            if path is None:  # which one connection alone can see
                self._read, self._read_lock = self._write, self._lock
                return
            self._read = self._connect(path)
        except sqlite3.Error as error:
            raise WriteError(f"the database {str(path)!r} cannot be used: {error}") from None
        path.chmod(0o600)

    def close(self) -> None:
        """Close the database."""
        for connection in (self._read, self._write):
            if connection is not None:
                connection.close()

    @staticmethod
    def _connect(path: Path | None) -> sqlite3.Connection:
        connection = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False, timeout=10)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Commit what the block executes, or nothing of it.

        Args:
            durable: Whether it must be on the disk at the end; if not, a loss of power may undo it, but no kill.

        Raises:
            WriteError: If the disk is full or broken.
        """
        with self._lock:
            try:
                if not durable:
                    self._write.execute("PRAGMA synchronous = NORMAL")
                self._write.execute("BEGIN IMMEDIATE")
                yield self._write
                self._write.execute("COMMIT")
            except BaseException as error:
                if self._write.in_transaction:
                    self._write.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise WriteError(f"the database cannot be written: {error}") from error
                raise
            finally:
                if not durable:
                    self._write.execute("PRAGMA synchronous = FULL")

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Return the rows of a query."""
        assert self._read
        with self._read_lock:
            return self._read.execute(query, values).fetchall()

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[NewJob]) -> list[Job]:
        """Add jobs to the queue, all of them or none. When this returns, they are on the disk.

        Raises:
            QueueFullError: If so many would wait that the limit is passed.
            WriteError: If the disk is full or broken.
        """
        mine = _Submission(jobs)
        with self._pending_lock:
            self._pending.append(mine)
        with self._lock:
            if not mine.committed and mine.error is None:  # else another call has committed it with its own
                with self._pending_lock:
                    together, self._pending = self._pending, []
                try:
                    with self.transaction() as db:
                        waiting = db.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()[0]
                        for each in together:
                            waiting = self._insert(db, each, waiting)
                except Exception as error:
                    for each in together:
                        each.error = each.error or error
                for each in together:
                    each.committed = each.error is None
        if mine.error is not None:
            raise mine.error
        return mine.added

    def _insert(self, db: sqlite3.Connection, submission: _Submission, waiting: int) -> int:
        """Insert the jobs of one call, if the queue has room for them; return how many wait then."""
        if waiting + len(submission.jobs) > self._limit:
            submission.error = QueueFullError(
                f"the queue holds {waiting:,} jobs, and at most {self._limit:,} may wait; try again later",
                retry_after=RETRY_AFTER,
            )
            return waiting
        now = time.time()
        for job in submission.jobs:
            id, request = secrets.token_hex(16), json.dumps(job.request)
            number = db.execute(
                "INSERT INTO jobs (id, state, kind, priority, position, model, vae, request, dialect, target, created) "
                "VALUES (?, 'queued', ?, ?, 0, ?, ?, ?, ?, ?, ?)",
                (id, job.kind, job.priority, job.model, job.vae, request, job.dialect, job.target, now),
            ).lastrowid
            position = float(number or 0)
            db.execute("UPDATE jobs SET position = ? WHERE number = ?", (position, number))
            values = vars(job) | {"request": json.loads(request), "position": position, "created": now}
            submission.added.append(Job(id=id, state=QUEUED, **values))
        return waiting + len(submission.jobs)

    def get(self, id: str) -> Job:
        """Return a job. Raises NotFoundError."""
        found = self._jobs("id = ?", [id])
        if not found:
            raise NotFoundError("there is no such job")
        return found[0]

    def jobs(
        self, state: str | None = None, *, limit: int = 100, before: float | None = None, newest: bool = True
    ) -> list[Job]:
        """Return jobs: queued ones in the order in which they will run, others newest first.

        Args:
            state: Their state, or None for all.
            limit: How many at most.
            before: The time before which they were made, to go on with older ones.
            newest: Whether the newest come first, where they do not wait.
        """
        where = "(? IS NULL OR state = ?) AND (? IS NULL OR created < ?)"
        order = "priority, position, number" if state == QUEUED else f"number {'DESC' if newest else ''}"
        return self._jobs(where, [state, state, before, before], order, limit)

    def _jobs(self, where: str, values: Sequence[Any], order: str = "number", limit: int = -1) -> list[Job]:
        with self._read_lock:
            rows = self.rows(f"SELECT * FROM jobs WHERE {where} ORDER BY {order} LIMIT ?", [*values, limit])
            ids = [row["id"] for row in rows]
            pictures: dict[str, list[Picture]] = {id: [] for id in ids}
            if ids:
                marks = ",".join("?" * len(ids))
                for row in self.rows(f"SELECT * FROM pictures WHERE job IN ({marks}) ORDER BY place", ids):
                    pictures[row["job"]].append(as_picture(row))
        return [_job(row, tuple(pictures[row["id"]])) for row in rows]

    def counts(self) -> dict[str, int]:
        """Return how many jobs there are in each state."""
        found = {row[0]: row[1] for row in self.rows("SELECT state, count(*) FROM jobs GROUP BY state")}
        return {state: found.get(state, 0) for state in STATES}

    def order(self) -> list[str]:
        """Return the ids of the queued jobs in the order in which they will run."""
        rows = self.rows("SELECT id FROM jobs WHERE state = 'queued' ORDER BY priority, position, number")
        return [row["id"] for row in rows]

    def claim(self, together: Sequence[str] = ()) -> list[Job]:
        """Mark the next job and those that share its batch as running and return them; see `batches.claim`."""
        with self.transaction(durable=False) as db:  # after a loss of power it is queued, which is right
            ids = batches.claim(db, together)
        return [self.get(id) for id in ids]

    def add_picture(self, picture: Picture, *, last: bool = False) -> None:
        """Add a picture whose file is on the disk; with the last one its job is done, in the same transaction."""
        values = vars(picture) | {
            "seed": str(picture.seed),
            "tags": json.dumps(picture.tags),
            "verified": json.dumps(picture.verified) if picture.verified else None,
        }
        names = ", ".join(values)
        with self.transaction() as db:
            db.execute(
                f"INSERT OR IGNORE INTO pictures ({names}) VALUES ({', '.join('?' * len(values))})",
                list(values.values()),
            )
            if last:
                _end(db, picture.job, DONE)

    def finish(self, id: str, result: Mapping[str, Any] | None = None) -> None:
        """Mark a running job as done."""
        with self.transaction() as db:
            _end(db, id, DONE, result=result)

    def fail(self, id: str, error: Mapping[str, Any]) -> None:
        """Mark a running job as failed."""
        with self.transaction() as db:
            _end(db, id, FAILED, error=error)

    def cancel(self, id: str, *, running: bool = False) -> Job:
        """Cancel a job that waits, or with `running` one that runs; return it, whatever its state is then."""
        states = "('queued', 'running')" if running else "('queued')"
        with self.transaction() as db:
            db.execute(
                f"UPDATE jobs SET state = 'cancelled', finished = ? WHERE id = ? AND state IN {states}",
                (time.time(), id),
            )
        return self.get(id)

    def requeue(self, id: str | None = None) -> int:
        """Queue a running job again, in its place, or all of them; return how many."""
        with self.transaction() as db:
            return db.execute(
                "UPDATE jobs SET state = 'queued', started = NULL WHERE state = 'running' AND (? IS NULL OR id = ?)",
                (id, id),
            ).rowcount

    def move(self, id: str, before: str | None = None, *, last: bool = False) -> None:
        """Move a job that waits: before another one, to the end, or to the beginning.

        Raises:
            NotFoundError: If there is no such job.
            ConflictError: If it, or the other one, does not wait.
        """
        with self.transaction() as db:
            query = "SELECT id, priority, position FROM jobs WHERE state = 'queued' ORDER BY priority, position, number"
            rows = db.execute(query).fetchall()
            order = [row["id"] for row in rows]
            for each in (id, *([before] if before else [])):
                if each not in order:
                    known = db.execute("SELECT 1 FROM jobs WHERE id = ?", (each,)).fetchone()
                    raise (ConflictError if known else NotFoundError)(
                        "the job does not wait" if known else "there is no such job"
                    )
            if before == id:
                return
            others = [row for row in rows if row["id"] != id]
            place = len(others) if last else 0
            if before:
                place = next(k for k, row in enumerate(others) if row["id"] == before)
            neighbour = others[min(place, len(others) - 1)] if others else None
            if neighbour is None:
                return
            priority = neighbour["priority"]
            left = others[place - 1]["position"] if place and others[place - 1]["priority"] == priority else None
            right = others[place]["position"] if place < len(others) else None
            if left is None:
                position = (right or 0.0) - 1.0
            elif right is None:
                position = left + 1.0
            else:
                position = (left + right) / 2
                if not left < position < right:  # no number is left between them
                    for k, row in enumerate(others):
                        db.execute("UPDATE jobs SET position = ? WHERE id = ?", (float(k), row["id"]))
                    position = place - 0.5
            db.execute("UPDATE jobs SET priority = ?, position = ? WHERE id = ?", (priority, position, id))

    def forget(self, ids: Sequence[str], before: float) -> None:
        """Delete these jobs and their pictures' rows, as far as they have ended, and all that ended before a time."""
        marks = ",".join("?" * len(ids))
        ended = f"state IN ('done', 'failed', 'cancelled') AND (id IN ({marks}) OR finished < ?)"
        with self.transaction() as db:
            db.execute(f"DELETE FROM pictures WHERE job IN (SELECT id FROM jobs WHERE {ended})", [*ids, before])
            db.execute(f"DELETE FROM batches WHERE job IN (SELECT id FROM jobs WHERE {ended})", [*ids, before])
            db.execute(f"DELETE FROM jobs WHERE {ended}", [*ids, before])

    # ---- options -----------------------------------------------------------------------------------------------------

    def option(self, name: str, default: Any = None) -> Any:
        """Return an option."""
        rows = self.rows("SELECT value FROM options WHERE name = ?", [name])
        return json.loads(rows[0]["value"]) if rows else default

    def set_option(self, name: str, value: Any) -> None:
        """Set an option."""
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO options VALUES (?, ?)", (name, json.dumps(value)))


def _end(
    db: sqlite3.Connection,
    id: str,
    state: str,
    *,
    error: Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
) -> None:
    """End a running job; one that was cancelled meanwhile stays so."""
    db.execute(
        "UPDATE jobs SET state = ?, finished = ?, error = ?, result = ? WHERE id = ? AND state = 'running'",
        (state, time.time(), json.dumps(error) if error else None, json.dumps(result) if result else None, id),
    )


def _job(row: sqlite3.Row, pictures: tuple[Picture, ...]) -> Job:
    values = {name: row[name] for name in row.keys() if name != "number"}  # noqa: SIM118 - a Row iterates its values
    for name in ("request", "error", "result"):
        values[name] = json.loads(values[name]) if values[name] else None
    return Job(**values, pictures=pictures)


def as_picture(row: sqlite3.Row) -> Picture:
    """Return a row of the table of pictures."""
    values = {name: row[name] for name in row.keys() if name != "number"}  # noqa: SIM118
    values |= {
        "seed": int(values["seed"]),
        "flagged": None if values["flagged"] is None else bool(values["flagged"]),
        "tags": tuple(json.loads(values["tags"])),
        "verified": json.loads(values["verified"]) if values["verified"] else None,
    }
    return Picture(**values)
