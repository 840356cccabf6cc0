"""How the long stages report their progress, which of their steps are logged, and how long a stage still takes."""

import time
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the steps done and all steps of the stage."""
T = TypeVar("T")
LOG_INTERVAL_SECONDS = 10.0
"""Seconds between two lines about one stage."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def steps(progress: Progress, stage: str, items: Collection[T]) -> Iterator[T]:
    """Each of `items`, one step of the stage; `progress` hears before the first and after each."""
    progress(stage, 0, len(items))
    for done, item in enumerate(items, start=1):
        yield item
        progress(stage, done, len(items))


class LogThrottle:
    """Picks the steps for a log: a stage's first and last, and one every LOG_INTERVAL_SECONDS seconds between; none twice."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: tuple[str, int, int] = ("", 0, 0)
        self._told_at = 0.0
        self._began: tuple[str, int, float] = ("", 0, 0.0)
        """The stage, the steps that were done when it was first reported, and when that was."""
        self._done = 0

    def should_log(self, stage: str, done: int, total: int) -> bool:
        """Whether a log is told of this step."""
        step, now = (stage, done, total), self._clock()
        if stage != self._began[0] or done < self._done:  # fewer: it begins again, in a new process
            self._began = (stage, done, now)
        self._done = done
        is_due = stage != self._told[0] or done == total or now - self._told_at >= LOG_INTERVAL_SECONDS
        if step == self._told or not is_due:
            return False
        self._told, self._told_at = step, now
        return True

    def seconds_left(self, done: int, total: int) -> int | None:
        """Seconds until the stage that was picked last ends, at its speed so far; None before its second report."""
        _, before, since = self._began
        if done <= before:
            return None
        return round((self._clock() - since) * (total - done) / (done - before))
