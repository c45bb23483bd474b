"""Events: what happens in the queue, published by any thread and read by any number of connections."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import threading
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

QUEUE_SIZE = 256  # events that a slow reader may lag behind before it is cut off
KEPT = 1000  # events that a reader can catch up on when it connects again
PASSING = ("step", "preview")  # what the next event of its kind replaces: neither kept nor worth waiting for
BEAT = 15.0  # seconds between two comments that keep a silent connection open


@dataclass(frozen=True)
class Event:
    """One event.

    Attributes:
        name: "queue", "job", "step", "preview" or "picture".
        data: Its JSON values.
        id: Its id, "" for a passing one.
    """

    name: str
    data: Mapping[str, Any]
    id: str = ""

    def encode(self) -> bytes:
        """Return the event as a block of a text/event-stream."""
        lines = [f"id: {self.id}"] if self.id else []
        lines += [f"event: {self.name}", f"data: {json.dumps(self.data, ensure_ascii=False)}"]
        return "\n".join((*lines, "", "")).encode("utf-8", "replace")


@dataclass(eq=False)
class Subscription:
    """What one reader has still to read."""

    loop: asyncio.AbstractEventLoop
    events: deque[Event] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    cut: bool = False


class Events:
    """Publishes events to subscribers. Publishing never waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscriptions: set[Subscription] = set()
        self._boot, self._numbers = secrets.token_hex(4), itertools.count(1)
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._closed = False

    def __len__(self) -> int:
        return len(self._subscriptions)

    def publish(self, name: str, data: Mapping[str, Any]) -> None:
        """Publish an event; any thread may call this."""
        with self._lock:
            event = Event(name, data, "" if name in PASSING else f"{self._boot}-{next(self._numbers)}")
            if event.id:
                self._kept.append(event)
            for subscription in self._subscriptions:
                if len(subscription.events) >= QUEUE_SIZE:
                    if name in PASSING:
                        continue
                    subscription.cut = True  # its reader connects again, and catches up by its last id
                else:
                    subscription.events.append(event)
                with suppress(RuntimeError):  # its loop is closed
                    subscription.loop.call_soon_threadsafe(subscription.arrived.set)

    def close(self) -> None:
        """End all subscriptions."""
        with self._lock:
            self._closed = True
            for subscription in self._subscriptions:
                subscription.cut = True
                with suppress(RuntimeError):
                    subscription.loop.call_soon_threadsafe(subscription.arrived.set)

    async def subscribe(self, last_id: str = "", *, beat: float | None = None) -> AsyncGenerator[Event | None, None]:
        """Yield events as they are published.

        Args:
            last_id: The id of the last event that the reader has seen; the later ones come first.
            beat: Seconds of silence after which None is yielded.
        """
        subscription = Subscription(asyncio.get_running_loop())
        with self._lock:
            subscription.events.extend(self._after(last_id))
            subscription.cut = self._closed
            self._subscriptions.add(subscription)
        try:
            while True:
                while subscription.events:
                    yield subscription.events.popleft()
                if subscription.cut:
                    return
                subscription.arrived.clear()
                if subscription.events or subscription.cut:
                    continue
                try:
                    await asyncio.wait_for(subscription.arrived.wait(), beat)
                except TimeoutError:
                    yield None
        finally:
            with self._lock:
                self._subscriptions.discard(subscription)

    def _after(self, last_id: str) -> list[Event]:
        """Return the kept events after an id; all of them if it is older, none if it is of another process."""
        boot, _, number = last_id.partition("-")
        if boot != self._boot or not (number.isascii() and number.isdigit()):
            return []
        return [event for event in self._kept if int(event.id.partition("-")[2]) > int(number[:18])]
