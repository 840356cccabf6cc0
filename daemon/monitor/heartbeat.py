"""Heartbeat: measures how long the event loop is kept from running.

Everything of a daemon runs in one event loop: its sign of life in Redis, its answers to a pause, its HTTP API. Whatever
computes for long without giving the loop back delays all of them, so it is measured and reported.
"""

import asyncio
import time

import structlog

BEAT_SECONDS = 0.05
LONG_SECONDS = 0.5
"""A longer block is reported in the log."""

log = structlog.get_logger()


class Heartbeat:
    """Beats in the event loop and notes how late each beat comes. Times in seconds."""

    def __init__(self) -> None:
        self.longest_block = 0.0
        """The longest time that the loop did not run, since the start."""
        self.longest_busy_block = 0.0
        """The longest processor time that this thread used in one such block: what our own code did to the loop, even
        on a machine whose processors are shared with others."""

    async def run(self) -> None:
        """Beat until cancelled. Log a block of more than LONG_SECONDS if it is the longest so far."""
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
