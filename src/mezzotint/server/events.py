"""Events of the queue, published by any thread and read by any number of connections."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

QUEUE_SIZE = 256  # events that a slow reader may lag behind before it is cut off
KEPT = 1000  # events that a reader can catch up on when it connects again
PASSING = ("queue", "step", "preview")  # states, of which only the newest is worth reading: they are not kept
BEAT = 15.0  # seconds between two comments that keep a silent connection open
PAUSE = 0.25  # seconds for which passing states are gathered for the page: each sending holds up the run

Data = Mapping[str, Any] | Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class Event:
    """One event.

    Attributes:
        name: "queue", "job", "step", "preview" or "picture".
        data: Its JSON values, or a function that makes them when somebody reads them.
        id: Its id, "" for a passing one.
        job: The id of the job that it is about, "" if it is about none.
    """

    name: str
    data: Data
    id: str = ""
    job: str = ""

    def read(self) -> Mapping[str, Any]:
        """Return its JSON values; this may take milliseconds."""
        return self.data() if callable(self.data) else self.data

    def encode(self) -> bytes:
        """Return the event as a block of a text/event-stream."""
        lines = [f"id: {self.id}"] if self.id else []
        lines += [f"event: {self.name}", f"data: {json.dumps(self.read(), ensure_ascii=False)}"]
        return "\n".join((*lines, "", "")).encode("utf-8", "replace")


def encode_all(events: Iterable[Event]) -> bytes:
    """Return events as blocks of a text/event-stream."""
    return b"".join(event.encode() for event in events)


Wanted = Callable[[Event], bool]


class Subscription(AsyncIterator[Event | None]):
    """The unread events of one reader: an iterator over the events since it was made.

    It ends when the events are closed or the reader is too slow; it yields None if nothing happens for a while.
    """

    def __init__(
        self,
        source: Events,
        events: Iterable[Event],
        *,
        wanted: Wanted | None,
        beat: float | None,
        pause: float,
        cut: bool,
    ) -> None:
        self.wanted, self.cut = wanted, cut
        self._source, self._beat, self._pause = source, beat, pause
        self._later: dict[tuple[str, str], tuple[float, Event]] = {}  # passing events, and when their pauses end
        self._is_timed = False  # whether the end of a pause is awaited
        self._events = deque(events)
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event; the caller holds the lock of the source."""
        if self.wanted is not None and not self.wanted(event):
            return
        key = (event.name, event.job)
        if event.name in PASSING and self._pause:
            due, _ = self._later.pop(key, (monotonic() + self._pause, event))
            self._later[key] = due, event
            if not self._is_timed:
                self._is_timed = True
                with suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._loop.call_later, self._pause, self._end_pauses)
            return
        if event.name in PASSING:
            self._events = deque(each for each in self._events if (each.name, each.job) != key)
        else:  # the job has passed what waits
            self._later = {key: each for key, each in self._later.items() if not key[1] or key[1] != event.job}
        self._append(event)
        self.wake()

    def _append(self, event: Event) -> None:
        if len(self._events) < QUEUE_SIZE:
            self._events.append(event)
        else:
            self.cut = True  # its reader connects again, and catches up by its last id

    def take(self) -> list[Event]:
        """Return what else is there to read now."""
        with self._source.lock:
            events = list(self._events)
            self._events.clear()
        return events

    def wake(self) -> None:
        """Let the reader look, from any thread."""
        with suppress(RuntimeError):  # its loop is closed
            self._loop.call_soon_threadsafe(self._arrived.set)

    def _end_pauses(self) -> None:
        now = monotonic()
        with self._source.lock:
            for key, (due, event) in list(self._later.items()):
                if due - now <= self._pause / 8:  # those that are nearly due are sent along
                    self._append(event)
                    del self._later[key]
            self._is_timed = bool(self._later)
            if self._is_timed:
                self._loop.call_later(min(due for due, _ in self._later.values()) - now, self._end_pauses)
        self._arrived.set()

    async def __anext__(self) -> Event | None:
        while True:
            with self._source.lock:
                if self._events:
                    return self._events.popleft()
                if self.cut:
                    raise StopAsyncIteration
                self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), self._beat)
            except TimeoutError:
                return None

    async def aclose(self) -> None:
        """Stop listening."""
        self._source.discard(self)


class Events:
    """Publishes events to subscribers. Publishing never waits."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._subscriptions: set[Subscription] = set()
        self._boot, self._numbers = secrets.token_hex(4), itertools.count(1)
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._closed = False

    def __len__(self) -> int:
        """Return the number of those who read all events; a call that waits for its own job is none."""
        with self.lock:
            return sum(each.wanted is None for each in self._subscriptions)

    def publish(self, name: str, data: Data, job: str = "") -> None:
        """Publish an event about a job, or about none; any thread may call this."""
        with self.lock:
            event = Event(name, data, "" if name in PASSING else f"{self._boot}-{next(self._numbers)}", job)
            if event.id:
                self._kept.append(event)
            for subscription in self._subscriptions:
                subscription.put(event)

    def close(self) -> None:
        """End all subscriptions."""
        with self.lock:
            self._closed = True
            for subscription in self._subscriptions:
                subscription.cut = True
                subscription.wake()

    def subscribe(
        self, last_id: str = "", *, wanted: Wanted | None = None, beat: float | None = None, pause: float = 0.0
    ) -> Subscription:
        """Return the events from now on, for a reader in the running loop, which closes it in the end.

        Args:
            last_id: The id of the last event that the reader has seen; the later ones come first.
            wanted: Which events the reader wants, or None for all.
            beat: Seconds of silence after which None is yielded.
            pause: Seconds that a passing event waits for a newer one; another event of its job makes it void.
        """
        with self.lock:
            missed = self._after(last_id)
            found = Subscription(self, missed, wanted=wanted, beat=beat, pause=pause, cut=self._closed)
            self._subscriptions.add(found)
        return found

    def discard(self, subscription: Subscription) -> None:
        """Forget a subscription."""
        with self.lock:
            self._subscriptions.discard(subscription)

    def _after(self, last_id: str) -> list[Event]:
        """Return the kept events after an id; all of them if it is older, none if it is of another process."""
        boot, _, number = last_id.partition("-")
        if boot != self._boot or not (number.isascii() and number.isdigit()):
            return []
        return [event for event in self._kept if int(event.id.partition("-")[2]) > int(number[:18])]
