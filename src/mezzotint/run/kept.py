"""What is kept from one run to the next: descriptions of files until those are written, and what was made of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class Descriptions(Generic[T]):
    """Descriptions of files, each made once for each state of its files. Threads may share them."""

    def __init__(self, paths: Callable[[T], Iterable[Path]]) -> None:
        """Keep none yet.

        Args:
            paths: Returns the files that a description is of.
        """
        self._paths = paths
        self._found: dict[Hashable, tuple[object, T]] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, describe: Callable[[], T]) -> T:
        """Return the description that was made for a key, or make it, if it is the first or a file was written."""
        with self._lock:
            known = self._found.get(key)
            if known is None or known[0] is None or known[0] != self._state(known[1]):
                found = describe()
                known = self._found[key] = self._state(found), found
            return known[1]

    def _state(self, found: T) -> object:
        """Return what changes when a file is written; None if one is missing."""
        try:
            stats = [path.stat() for path in self._paths(found)]
        except OSError:
            return None
        return [(stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats]


class LastRun(Generic[T]):
    """What the last run has made, such as networks, by key. Threads may share it."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, T] = {}
        self._lock = threading.Lock()

    def get(self, makers: Mapping[Hashable, Callable[[], T]]) -> dict[Hashable, T]:
        """Forget what is not asked for, then return what is, made now or kept from the last run."""
        with self._lock:
            self._kept = {key: value for key, value in self._kept.items() if key in makers}
            for key, make in makers.items():
                if key not in self._kept:
                    self._kept[key] = make()
            return dict(self._kept)
