"""Which jobs share a batch, in a table of the store.

A batch is recorded in the transaction that claims its jobs, and outlives a restart: it is always drawn whole and in the
same order, so that each picture keeps its bits whatever happens to the other jobs.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mezzotint.server.store import Store

MOST = 16  # jobs of a batch; with more a GPU is hardly faster, and each job waits for all of them
WINDOW = 100  # jobs at the head of the queue among which those alike are looked for
FREE = ("prompt", "negative_prompt", "seed")  # fields in which the jobs of a batch may differ
SCHEMA = """
CREATE TABLE IF NOT EXISTS batches (job TEXT PRIMARY KEY, batch TEXT NOT NULL, place INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS batches_by_batch ON batches (batch, place);
"""
_ORDER = "ORDER BY priority, position, number LIMIT ?"


def find_alike(store: Store) -> list[str]:
    """Return the ids of the next job and of those that wait behind it and could share a batch with it, in order."""
    query = "SELECT jobs.*, batch FROM jobs LEFT JOIN batches ON batches.job = jobs.id WHERE state = 'queued'"
    rows = store.rows(f"{query} {_ORDER}", [WINDOW])
    first = _common(rows[0]) if rows else None
    return [row["id"] for row in rows if first is not None and _common(row) == first][:MOST]


def _common(row: sqlite3.Row) -> tuple[Any, ...] | None:
    """Return what the jobs of a batch have in common; None if the job is drawn alone, or in a batch already."""
    request = json.loads(row["request"])
    if row["kind"] != "draw" or row["batch"] is not None or request.pop("count", 1) != 1:
        return None
    fields = {name: value for name, value in request.items() if name not in (*FREE, "batch")}
    negative = bool(request.get("negative_prompt"))  # without one there may be another unconditional prompt
    return row["priority"], row["model"], row["vae"], negative, fields


def claim(db: sqlite3.Connection, together: Sequence[str]) -> list[str]:
    """Mark the next job, and those of its batch, as running.

    Args:
        db: The connection, in a transaction.
        together: Ids, as of `find_alike`, for a new batch if the first of them is the next job.

    Returns:
        The ids of the batch in order, those that have ended too; of a single job; or none if no job waits.
    """
    row = db.execute(f"SELECT id FROM jobs WHERE state = 'queued' {_ORDER}", [1]).fetchone()
    if row is None:
        return []
    ids = [row["id"]]
    query = "SELECT job FROM batches WHERE batch = (SELECT batch FROM batches WHERE job = ?) ORDER BY place"
    if known := db.execute(query, ids).fetchall():
        ids = [member["job"] for member in known]
    elif together and together[0] == row["id"]:
        marks = ",".join("?" * len(together))
        waiting = db.execute(f"SELECT id FROM jobs WHERE state = 'queued' AND id IN ({marks})", together).fetchall()
        ids = [id for id in together if id in {each["id"] for each in waiting}]
        if len(ids) > 1:
            db.executemany("INSERT INTO batches VALUES (?, ?, ?)", [(id, ids[0], k) for k, id in enumerate(ids)])
    marks = ",".join("?" * len(ids))
    db.execute(
        f"UPDATE jobs SET state = 'running', started = ? WHERE state = 'queued' AND id IN ({marks})",
        (time.time(), *ids),
    )
    return ids
