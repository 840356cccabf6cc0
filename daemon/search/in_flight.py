"""How many candidates a steady state keeps under way, so that no worker waits for a question to be answered."""

import math
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from agents.population.population import Population
from agents.population.view import Accepted, Refused, Submit
from protocol.plans.candidate import Measured, Provenance

CountWorkers = Callable[[], Awaitable[int]]
REMEMBERED = 8
"""Number of the newest questions and outcomes whose times count."""
COUNT_EVERY = 10.0
"""Seconds between two counts of the workers."""
MOST = 512
"""Most candidates under way, even if an answer takes very long."""


async def one_worker() -> int:
    """Return one: for a search whose workers cannot be counted."""
    return 1


class InFlight:
    """The limit of candidates that are asked for, queued or being measured.

    `fixed` is search.max_in_flight. If it is None, the limit is, by Little's law, workers · (1 + answer / evaluation)
    with the median seconds of both, and one more for each worker, because times differ.
    """

    def __init__(self, fixed: int | None, population: Population, count_workers: CountWorkers) -> None:
        self._fixed, self._population, self._count = fixed, population, count_workers
        self._answers: deque[float] = deque(maxlen=REMEMBERED)
        self._workers = 1
        self._counted = -math.inf

    def answered(self, seconds: float) -> None:
        """Note how long it took to get a candidate from a question."""
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
        evaluations = [outcome.seconds for outcome in newest if isinstance(outcome, Measured)]
        if not (evaluations and self._answers):
            return 2 * self._workers
        ratio = statistics.median(self._answers) / max(statistics.median(evaluations), 1e-3)
        return min(MOST, math.ceil(self._workers * (1 + ratio)) + self._workers)
