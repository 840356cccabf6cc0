"""Heartbeat: measures how long the event loop is blocked.

The whole daemon runs in one event loop, including its heartbeat in Redis, the reaction to a pause and the HTTP API. A
long computation delays all of them, so blocks are measured and reported.
"""

import asyncio
import time

import structlog

BEAT_SECONDS = 0.05
LONG_SECONDS = 0.5
"""Blocks longer than this are logged."""

log = structlog.get_logger()


class Heartbeat:
    """Measures how late the event loop wakes it. Times in seconds."""

    def __init__(self) -> None:
        self.longest_block = 0.0
        """The longest block since the start."""
        self.longest_busy_block = 0.0
        """The longest processor time of this thread in one block. Unlike `longest_block`, it does not depend on how
        busy the machine is."""

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
