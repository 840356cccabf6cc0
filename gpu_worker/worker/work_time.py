"""How long a worker has been ready, and how much of that time it has measured candidates."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class WorkTime:
    """Counts seconds from the first `begin` on."""

    def __init__(self) -> None:
        self._ready_since: float | None = None
        self._measuring_since: float | None = None
        self._measured = 0.0

    def begin(self) -> None:
        """Note that the model is ready. Later calls change nothing."""
        self._ready_since = self._ready_since or time.monotonic()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count the time in this block as busy."""
        self._measuring_since = since = time.monotonic()
        try:
            yield
        finally:
            self._measuring_since = None
            self._measured += time.monotonic() - since

    def fields(self) -> dict[str, float]:
        """Return `busy_seconds` and `ready_seconds` of a WorkerStatus."""
        now = time.monotonic()
        busy = self._measured + (now - self._measuring_since if self._measuring_since else 0.0)
        ready = now - self._ready_since if self._ready_since else 0.0
        return {"busy_seconds": round(busy, 1), "ready_seconds": round(ready, 1)}
