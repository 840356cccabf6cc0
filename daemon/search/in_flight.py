"""How many candidates a steady state keeps under way, so that no worker waits for a question to be answered."""

import math
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from agents.population.population import Population
from agents.population.view import Accepted, Refused, Submit
from protocol.plans.candidate import Measured, Provenance, Stopped

CountWorkers = Callable[[], Awaitable[int]]
REMEMBERED = 8
"""Number of the newest questions and outcomes whose times count."""
COUNT_EVERY = 10.0
"""Seconds between two counts of the workers."""


async def one_worker() -> int:
    """Return one: for a search whose workers cannot be counted."""
    return 1


def enough(workers: int, answer: float, evaluation: float, at_once: int) -> int:
    """Return how many candidates under way keep all workers busy.

    By Little's law, workers · answer / evaluation of them are being asked for, where the times are in seconds; but more
    than `at_once` questions only wait for each other. Each worker measures one more candidate, and has another one
    waiting, because times differ.
    """
    return 2 * workers + min(math.ceil(workers * answer / max(evaluation, 1e-3)), at_once)


class InFlight:
    """The limits of candidates that are asked for, queued or being measured.

    `fixed` is search.max_in_flight. If it is None, the limit comes from the median seconds of answers and evaluations.
    At most `at_once` questions are asked at once, because the endpoints answer no more.
    """

    def __init__(self, fixed: int | None, population: Population, count_workers: CountWorkers, at_once: int) -> None:
        self.at_once = at_once
        self._fixed, self._population, self._count = fixed, population, count_workers
        self._answers: deque[float] = deque(maxlen=REMEMBERED)
        self._evaluation: float | None = None
        self._workers = 1
        self._counted = -math.inf

    def answered(self, seconds: float) -> None:
        """Note how long a question took."""
        self._answers.append(seconds)

    def timed(self, submit: Submit) -> Submit:
        """Return a `submit` that notes how long it took until its first call: the first answer of a search."""
        began = time.monotonic()

        async def noting(rates: Sequence[float], provenance: Provenance) -> Accepted | Refused:
            if not self._answers:
                self.answered(time.monotonic() - began)
            return await submit(rates, provenance)

        return noting

    async def limit(self) -> int:
        """Return how many candidates may be under way now."""
        if self._fixed is not None:
            return self._fixed
        if time.monotonic() - self._counted > COUNT_EVERY:
            self._workers = max(1, await self._count())
            self._counted = time.monotonic()
        newest = [each.outcome for each in self._population.newest(REMEMBERED)]
        if measured := [outcome.seconds for outcome in newest if isinstance(outcome, Measured | Stopped)]:
            self._evaluation = statistics.median(measured)
        if self._evaluation is None or not self._answers:
            return 2 * self._workers
        return enough(self._workers, statistics.median(self._answers), self._evaluation, self.at_once)
