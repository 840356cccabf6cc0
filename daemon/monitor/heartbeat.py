"""Heartbeat: measures how long the event loop is blocked.

The whole daemon runs in one event loop: its heartbeat in Redis, the reaction to a pause, the HTTP API. A long
computation delays all of them, so blocks are measured and reported.
"""

import asyncio
import time

import structlog

BEAT_SECONDS = 0.05
LONG_SECONDS = 0.5
"""Longer blocks are logged."""

log = structlog.get_logger()


class Heartbeat:
    """Measures how late the event loop wakes it. Times in seconds."""

    def __init__(self) -> None:
        self.longest_block = 0.0
        """The longest block since the start."""
        self.longest_busy_block = 0.0
        """The most processor time of this thread in one block: the part caused by our own code, even on a busy
        machine."""

    async def run(self) -> None:
        """Run until cancelled. Log a block longer than LONG_SECONDS if it is the longest so far."""
        beat, busy = time.monotonic(), time.thread_time()
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            now, busy_now = time.monotonic(), time.thread_time()
            self._note(max(0.0, now - beat - BEAT_SECONDS), busy_now - busy)
            beat, busy = now, busy_now

    def _note(self, late: float, busy: float) -> None:
        if late > max(self.longest_block, LONG_SECONDS):
            log.warning("event_loop_blocked", seconds=round(late, 2), processor_seconds=round(busy, 2))
        self.longest_block = max(self.longest_block, late)
        self.longest_busy_block = max(self.longest_busy_block, min(late, busy))
