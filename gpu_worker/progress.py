"""Progress of long stages: how it is reported, which steps are logged, and the time that is left."""

import time
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, the number of steps done and the total number of steps."""
T = TypeVar("T")
LOG_INTERVAL_SECONDS = 10.0
"""Seconds between two log lines about one stage."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def steps(progress: Progress, stage: str, items: Collection[T]) -> Iterator[T]:
    """Yield each of `items` as one step of the stage. Report progress before the first step and after each step."""
    progress(stage, 0, len(items))
    for done, item in enumerate(items, start=1):
        yield item
        progress(stage, done, len(items))


class LogThrottle:
    """Decides which steps are logged: a stage's first and last step, and one step every LOG_INTERVAL_SECONDS."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._logged: tuple[str, int, int] = ("", 0, 0)
        self._logged_at = 0.0
        self._began: tuple[str, int, float] = ("", 0, 0.0)
        """The current stage, with the number of steps done and the time at its first report."""
        self._done = 0

    def should_log(self, stage: str, done: int, total: int) -> bool:
        """Return whether to log this step. No step is logged twice."""
        step, now = (stage, done, total), self._clock()
        if stage != self._began[0] or done < self._done:  # a new process has started the stage again
            self._began = (stage, done, now)
        self._done = done
        is_due = stage != self._logged[0] or done == total or now - self._logged_at >= LOG_INTERVAL_SECONDS
        if step == self._logged or not is_due:
            return False
        self._logged, self._logged_at = step, now
        return True

    def seconds_left(self, done: int, total: int) -> int | None:
        """Return the estimated seconds until the current stage ends; None before the stage's second report."""
        _, before, since = self._began
        if done <= before:
            return None
        return round((self._clock() - since) * (total - done) / (done - before))
