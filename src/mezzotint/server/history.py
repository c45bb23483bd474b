"""The history: the pictures of the store with ratings and tags, and the limit on their size."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from mezzotint.server.entries import pictures_of
from mezzotint.server.errors import NotFoundError
from mezzotint.server.files import DataFolder
from mezzotint.server.store import Picture, Store, as_picture

FRESH = 300.0  # seconds for which the call that drew a picture, or sent one, may still read it
UNDO = 3600.0  # seconds for which a deleted picture can be restored


class History:
    """The pictures and uploads of a data folder.

    Args:
        store: The database.
        folder: The data folder.
        keep: Bytes of pictures and uploads that are kept; None for all.
    """

    def __init__(self, store: Store, folder: DataFolder, keep: int | None = None) -> None:
        self._store, self._folder, self._keep = store, folder, keep

    def search(
        self,
        text: str | None = None,
        *,
        rating: int | None = None,
        tag: str | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> list[Picture]:
        """Return pictures, the newest first.

        Args:
            text: What the prompt contains, whatever its case.
            rating: The lowest rating.
            tag: A tag that they have.
            before: The id of a picture; only older ones are returned.
            limit: How many at most.
        """
        clauses, values = ["deleted IS NULL"], list[Any]()
        for word in (text or "").split():
            clauses.append("prompt LIKE ? ESCAPE '\\'")
            values.append("%" + word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%")
        if rating:
            clauses.append("rating >= ?")
            values.append(rating)
        if tag:
            clauses.append("EXISTS (SELECT 1 FROM json_each(tags) WHERE value = ?)")
            values.append(tag)
        if before:
            clauses.append("number < (SELECT number FROM pictures WHERE id = ?)")
            values.append(before)
        query = f"SELECT * FROM pictures WHERE {' AND '.join(clauses)} ORDER BY number DESC LIMIT ?"
        return [as_picture(row) for row in self._store.rows(query, [*values, limit])]

    def get(self, id: str, *, deleted: bool = False) -> Picture:
        """Return a picture. Raises NotFoundError."""
        rows = self._store.rows("SELECT * FROM pictures WHERE id = ?", [id])
        if not rows or (rows[0]["deleted"] is not None and not deleted):
            raise NotFoundError("there is no such picture")
        return as_picture(rows[0])

    def change(self, id: str, *, rating: int | None = None, tags: Sequence[str] | None = None) -> Picture:
        """Rate or tag a picture and return it. Raises NotFoundError."""
        self.get(id)
        with self._store.transaction() as db:
            if rating is not None:
                db.execute("UPDATE pictures SET rating = ? WHERE id = ?", (rating, id))
            if tags is not None:
                db.execute("UPDATE pictures SET tags = ? WHERE id = ?", (json.dumps([*dict.fromkeys(tags)]), id))
        return self.get(id)

    def set_verified(self, id: str, verdict: dict[str, Any]) -> None:
        """Record the verdict on a picture that was drawn again."""
        with self._store.transaction() as db:
            db.execute("UPDATE pictures SET verified = ? WHERE id = ?", (json.dumps(verdict), id))

    def delete(self, id: str) -> None:
        """Delete a picture; it can be restored for an hour. Raises NotFoundError."""
        self.get(id)
        with self._store.transaction() as db:
            db.execute("UPDATE pictures SET deleted = ? WHERE id = ?", (time.time(), id))

    def restore(self, id: str) -> Picture:
        """Restore a deleted picture and return it. Raises NotFoundError."""
        self.get(id, deleted=True)
        with self._store.transaction() as db:
            db.execute("UPDATE pictures SET deleted = NULL WHERE id = ?", (id,))
        return self.get(id)

    # ---- uploads -----------------------------------------------------------------------------------------------------

    def upload(self, data: bytes, param: str = "file") -> dict[str, Any]:
        """Keep an uploaded picture, named by its content, and describe it. Raises InvalidError about the field."""
        id, format, width, height = self._folder.store_upload(data, param)
        with self._store.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO uploads VALUES (?, ?, ?, ?, ?, ?)",
                (id, format, width, height, len(data), time.time()),
            )
        return self.find_upload(id)

    def find_upload(self, id: str) -> dict[str, Any]:
        """Describe an upload. Raises NotFoundError."""
        rows = self._store.rows("SELECT id, format, width, height, bytes FROM uploads WHERE id = ?", [id])
        if not rows:
            raise NotFoundError("there is no such upload")
        return dict(rows[0])

    def forget_uploads(self, before: float) -> None:
        """Delete the uploads that were last used before a time."""
        ids = [row["id"] for row in self._store.rows("SELECT id FROM uploads WHERE used < ?", [before])]
        if ids:
            with self._store.transaction() as db:
                db.executemany("DELETE FROM uploads WHERE id = ?", [(id,) for id in ids])
        for id in ids:
            self._folder.remove("uploads", id)

    # ---- what is kept ------------------------------------------------------------------------------------------------

    def clean(self) -> None:
        """Delete the files of pictures that were deleted an hour ago, and the oldest ones above the bound.

        Uploads are deleted before pictures, unless a job waits for them, and pictures by their rating. What is a few
        minutes old is kept whatever the bound.
        """
        now = time.time()
        gone = self._store.rows("SELECT id FROM pictures WHERE deleted < ?", [now - UNDO])
        ids = [row["id"] for row in gone]
        uploads: list[str] = []
        if self._keep is not None and (excess := self._size() - self._keep) > 0:
            query = "SELECT id, bytes FROM pictures WHERE created < ? ORDER BY rating, number"
            pictures = [row for row in self._store.rows(query, [now - FRESH]) if row["id"] not in set(ids)]
            waiting = self._store.rows("SELECT request FROM jobs WHERE state IN ('queued', 'running')")
            requests = [json.loads(row["request"]) for row in waiting]
            needed = {str(request.get(name)) for request in requests for name in ("image", "mask")}
            needed |= {id for request in requests for id in pictures_of(request)}
            kept = self._store.rows("SELECT id, bytes FROM uploads WHERE used < ? ORDER BY used", [now - FRESH])
            for row in kept:
                if excess > 0 and row["id"] not in needed:
                    uploads.append(row["id"])
                    excess -= row["bytes"]
            for row in pictures:
                if excess > 0:
                    ids.append(row["id"])
                    excess -= row["bytes"]
        if not ids and not uploads:
            return
        with self._store.transaction() as db:  # the rows first: a file without a row is never shown
            db.executemany("DELETE FROM pictures WHERE id = ?", [(id,) for id in ids])
            db.executemany("DELETE FROM uploads WHERE id = ?", [(id,) for id in uploads])
        for id in ids:
            for name in ("pictures", "thumbnails", "maps"):
                self._folder.remove(name, id)
        for id in uploads:
            self._folder.remove("uploads", id)

    def _size(self) -> int:
        """Return the bytes of the pictures and uploads, without those that are deleted for good next."""
        query = (
            "SELECT (SELECT total(bytes) FROM pictures WHERE deleted IS NULL OR deleted >= ?) "
            "+ (SELECT total(bytes) FROM uploads)"
        )
        return int(self._store.rows(query, [time.time() - UNDO])[0][0])
