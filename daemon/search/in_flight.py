"""How many candidates a steady state keeps under way and asks for in one question, so that no worker waits."""

import math
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from agents.population.population import Population
from agents.population.view import Accepted, Refused, Submit
from protocol.plans.candidate import Measured, Provenance, Stopped

CountWorkers = Callable[[], Awaitable[int]]
REMEMBERED = 8
"""Number of the newest questions and outcomes whose times count."""
MOST_TOGETHER = 8
"""Maximum number of candidates that one question asks for: they are all made without the outcome of the others."""
COUNT_EVERY = 10.0
"""Seconds between two counts of the workers."""


async def one_worker() -> int:
    """Return one: for a search whose workers cannot be counted."""
    return 1


@dataclass(frozen=True)
class Room:
    """How many candidates may be under way, and how many of them one question asks for."""

    candidates: int
    together: int = 1


def enough(workers: int, answer: float, evaluation: float, at_once: int, most_together: int = MOST_TOGETHER) -> Room:
    """Return what keeps all workers busy.

    By Little's law, workers · answer / evaluation candidates are being asked for, where the times are in seconds. At
    most `at_once` questions are asked at once, because more only wait for each other; so each asks for several
    candidates if need be, with a quarter more than that, because times differ. Each worker measures one more candidate,
    and has another one waiting. Candidates that arrive together wait longer, so there may be as many more.
    """
    asked_for = workers * answer / max(evaluation, 1e-3)
    together = min(max(1, math.ceil(1.25 * asked_for / at_once)), most_together)
    return Room(2 * workers + min(math.ceil(asked_for) + together - 1, at_once * together), together)


class InFlight:
    """The limit of candidates that are asked for, queued or being measured.

    `fixed` is search.max_in_flight. If it is None, the limit comes from the median seconds of answers and evaluations.
    At most `at_once` questions are asked at once, because the endpoints answer no more. Each asks for at most
    `most_together` candidates; for one if the limit is fixed.
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
        if self._evaluation is None or not self._answers:
            return Room(2 * self._workers)
        answer = statistics.median(self._answers)
        return enough(self._workers, answer, self._evaluation, self.at_once, self._most_together)
