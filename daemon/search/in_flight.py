"""How many candidates a steady state keeps under way and asks for in one question, so that no worker waits."""

import math
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from agents.population.population import Population
from protocol.plans.candidate import Measured, Stopped

CountWorkers = Callable[[], Awaitable[int]]
REMEMBERED = 8
"""Number of the newest outcomes whose times count, and of the newest questions for each number of candidates."""
COUNT_EVERY = 10.0
"""Seconds between two counts of the workers."""
MOST_TOGETHER = 8
"""Maximum number of candidates that one question asks for: they are all made without the outcome of the others."""
SPARE = 1.25
"""How many times as many candidates the LLM should give as the workers take, because times differ."""
GAIN = 1.1
"""Asking for twice as many candidates at once must give so many times as many in the same time."""
ENOUGH_ANSWERS = 3
"""Number of questions after which the number of candidates for each may change."""


async def one_worker() -> int:
    """Return one: for a search whose workers cannot be counted."""
    return 1


@dataclass(frozen=True)
class Room:
    """How many candidates may be under way, and how many of them one question asks for."""

    candidates: int
    together: int = 1


def enough(workers: int, answer: float, evaluation: float, at_once: int, together: int = 1) -> int:
    """Return how many candidates under way keep all workers busy, if each question asks for `together`.

    By Little's law, workers · answer / evaluation candidates are being asked for, where the times are in seconds; but
    more than `at_once` questions only wait for each other. Each worker measures one more candidate, and has another one
    waiting, because times differ. Candidates that are asked for together also arrive together and wait for each other,
    and the next question begins only when there is room for all of its candidates.
    """
    asked_for = math.ceil(workers * answer / max(evaluation, 1e-3)) + together - 1
    return 2 * workers + min(asked_for, at_once * together) + together - 1


def supply(answer: float, together: int, workers: int, evaluation: float, at_once: int) -> float:
    """Return how many candidates the LLM gives for each one that the workers take; times in seconds."""
    return at_once * together / max(answer, 1e-3) / (workers / max(evaluation, 1e-3))


class InFlight:
    """The limit of candidates that are asked for, queued or being measured.

    `fixed` is search.max_in_flight. If it is None, the limit comes from the median seconds of answers and evaluations.
    At most `at_once` questions are asked at once, because the endpoints answer no more. If that gives too few
    candidates, each question asks for two, four, or at most `most_together`, as long as that gives more in the same
    time. With a fixed limit, each asks for one.
    """

    def __init__(
        self,
        fixed: int | None,
        population: Population,
        count_workers: CountWorkers,
        at_once: int,
        most_together: int = MOST_TOGETHER,
    ) -> None:
        self.at_once, self._most_together = at_once, most_together
        self._fixed, self._population, self._count = fixed, population, count_workers
        self._answers: dict[int, deque[float]] = {}
        """Seconds of the newest questions, by the number of candidates that they asked for."""
        self._together = 1
        self._evaluation: float | None = None
        self._workers = 1
        self._counted = -math.inf

    def answered(self, seconds: float, count: int = 1) -> None:
        """Note how long a question for `count` candidates took."""
        self._answers.setdefault(count, deque(maxlen=REMEMBERED)).append(seconds)
        if count == self._together and self._evaluation is not None and len(self._answers[count]) >= ENOUGH_ANSWERS:
            self._adjust(self._answers[count], self._evaluation)

    async def room(self) -> Room:
        """Return how many candidates may be under way now."""
        if self._fixed is not None:
            return Room(self._fixed)
        if time.monotonic() - self._counted > COUNT_EVERY:
            self._workers = max(1, await self._count())
            self._counted = time.monotonic()
        newest = [each.outcome for each in self._population.newest(REMEMBERED)]
        if measured := [outcome.seconds for outcome in newest if isinstance(outcome, Measured | Stopped)]:
            self._evaluation = statistics.median(measured)
        together = self._together
        answer = self._answer(together) or self._answer(together // 2) or self._answer(2 * together)
        if self._evaluation is None or answer is None:
            return Room(2 * self._workers)
        limit = enough(self._workers, answer, self._evaluation, self.at_once, together)
        return Room(limit, together)

    def _answer(self, count: int) -> float | None:
        """Return the median seconds of the newest questions for `count` candidates."""
        return statistics.median(self._answers[count]) if self._answers.get(count) else None

    def _adjust(self, answers: Sequence[float], evaluation: float) -> None:
        """Ask for more candidates at once if the LLM gives too few, and for fewer if half as many are enough."""
        count, seconds, before = self._together, statistics.median(answers), self._answer(self._together // 2)
        given = supply(seconds, count, self._workers, evaluation, self.at_once)
        if before is not None and count / seconds < GAIN * (count // 2) / before:
            self._together = self._most_together = count // 2  # the answers take as much longer
        elif given < SPARE and 2 * count <= self._most_together:
            self._together = 2 * count
        elif given > 2 * SPARE and count > 1:
            self._together = count // 2
            self._answers.pop(count // 2, None)  # they may be from a time when the LLM was slower
