"""The last events of a search, and a place to wait for the next one. Bounded, however slow whoever reads it is."""

import asyncio
import secrets
from collections import deque
from dataclasses import dataclass
from typing import Any

from daemon.monitor.events import Event

KEPT = 1000


@dataclass(frozen=True)
class Numbered:
    """An event's record with its number; an `id` of another process (or another log) is not understood."""

    id: str
    record: dict[str, Any]


class EventLog:
    """Keeps the last events. A reader that falls behind is told how many it missed; it costs no memory."""

    def __init__(self, kept: int = KEPT) -> None:
        self._prefix = secrets.token_hex(4)
        self._events: deque[dict[str, Any]] = deque(maxlen=kept)
        self._count = 0
        self._news = asyncio.Event()
        self._closed = False

    def add(self, events: list[Event]) -> None:
        """Append, and wake whoever waits."""
        self._events.extend(event.record() for event in events)
        self._count += len(events)
        if events:
            self._wake()

    def close(self) -> None:
        """End every reader, once it has read what is there."""
        self._closed = True
        self._wake()

    def reader(self, last_id: str | None = None) -> "Reader":
        """A reader of the events behind `last_id`; without an id only of those to come.

        An id that is not of this log means that the reader knows an earlier process: it gets all that is kept.
        """
        return Reader(self, self._position(last_id))

    async def next(self, position: int) -> tuple[int, Numbered] | None:
        """The event at `position`, with the position behind it; waits for it. None behind the last of a closed log."""
        while not self._closed and position >= self._count:
            await self._news.wait()
        if position >= self._count:
            return None
        first_kept = self._count - len(self._events)
        if position < first_kept:
            missed = {"event": "events_missed", "count": first_kept - position}
            return first_kept, Numbered(self._id(first_kept), missed)
        return position + 1, Numbered(self._id(position + 1), self._events[position - first_kept])

    def _wake(self) -> None:
        # Wakes those who wait now; those who come later wait for the next news.
        self._news.set()
        self._news = asyncio.Event()

    def _id(self, position: int) -> str:
        return f"{self._prefix}-{position}"

    def _position(self, last_id: str | None) -> int:
        if last_id is None:
            return self._count
        prefix, _, number = last_id.partition("-")
        if prefix != self._prefix or not (number.isascii() and number.isdigit() and len(number) < 20):
            return self._count - len(self._events)
        return min(int(number), self._count)


class Reader:
    """Where one client is in the log."""

    def __init__(self, log: EventLog, position: int) -> None:
        self._log = log
        self._position = position

    async def next(self) -> Numbered | None:
        """The next event, waiting for it; None behind the last one of a closed log."""
        found = await self._log.next(self._position)
        if found is None:
            return None
        self._position, event = found
        return event
