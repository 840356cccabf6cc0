"""The last events of a search, for readers that wait for the next events. A slow reader does not use more memory."""

import asyncio
import json
import math
import secrets
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from daemon.monitor.events import Event

KEPT = 1000
AT_ONCE = 100
"""Events that a reader gets together, so that slow readers do not each hold the whole log as text."""


@dataclass(frozen=True)
class NumberedEvent:
    """An event's record with its id, which is valid only for this log and process."""

    id: str
    record: dict[str, Any]

    @cached_property
    def text(self) -> str:
        """The event as a server-sent event. It is written once for all readers, because there may be hundreds."""
        return f"id: {self.id}\nevent: {self.record['event']}\ndata: {strict_json(self.record)}\n\n"


def strict_json(value: Any) -> str:
    """Return `value` as JSON in one line, with null in place of NaN and infinity, which JSON does not have."""
    return json.dumps(_finite(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class EventLog:
    """Keeps the last events. A reader that falls behind gets the number of events that it missed."""

    def __init__(self, kept: int = KEPT) -> None:
        self._prefix = secrets.token_hex(4)
        self._events: deque[NumberedEvent] = deque(maxlen=kept)
        self._count = 0
        self._news = asyncio.Event()
        self._closed = False

    def add(self, events: list[Event]) -> None:
        """Append events and wake the waiting readers."""
        for event in events:
            self._count += 1
            self._events.append(NumberedEvent(self._id(self._count), event.record()))
        if events:
            self._wake()

    def close(self) -> None:
        """End every reader after it has read the events that are already in the log."""
        self._closed = True
        self._wake()

    def reader(self, last_id: str | None = None) -> "Reader":
        """Return a reader of the events after `last_id`. Without `last_id` it reads only future events.

        An unknown id comes from an earlier process. The reader then gets all events that are kept.
        """
        return Reader(self, self._position(last_id))

    async def next(self, position: int) -> tuple[int, list[NumberedEvent]] | None:
        """Wait for events from `position` on, and return the next position and up to AT_ONCE events.

        Returns None at the end of a closed log.
        """
        while not self._closed and position >= self._count:
            await self._news.wait()
        if position >= self._count:
            return None
        first_kept = self._count - len(self._events)
        if position < first_kept:
            missed = {"event": "events_missed", "count": first_kept - position}
            return first_kept, [NumberedEvent(self._id(first_kept), missed)]
        begin = position - first_kept
        events = list(islice(self._events, begin, begin + AT_ONCE))
        return position + len(events), events

    def _wake(self) -> None:
        # Wake the current readers. Readers that come later wait on the new asyncio.Event.
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
    """One client's position in the log."""

    def __init__(self, log: EventLog, position: int) -> None:
        self._log = log
        self._position = position

    async def next(self) -> list[NumberedEvent] | None:
        """Wait for the next events and return them; None at the end of a closed log."""
        found = await self._log.next(self._position)
        if found is None:
            return None
        self._position, events = found
        return events
