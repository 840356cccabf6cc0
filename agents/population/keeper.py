"""PopulationKeeper: consumes outcomes, and is the only writer of the population."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

import structlog
from structlog.contextvars import bound_contextvars

from agents.population.population import Evaluation, Population
from protocol.plans.candidate import Candidate, Result

log = structlog.get_logger()


class Outcomes(Protocol):
    """The source of outcomes, which also makes applied outcomes durable."""

    async def results(self, cursor: str) -> list[Result]:
        """Return the outcomes after `cursor`; if there are none, wait briefly for the first one."""

    async def apply(self, result: Result) -> bool:
        """Make `result` durable; return False if its id already has an outcome."""

    async def drop(self, result: Result) -> None:
        """Forget a result that belongs to no candidate."""


class PopulationKeeper:
    """Applies each outcome once, in order, and wakes the tasks that wait for it.

    `ledger` holds the issued candidates. `on_evaluation` is called after an outcome was made durable, with the
    evaluation and whether it is the new best.
    """

    def __init__(
        self,
        outcomes: Outcomes,
        population: Population,
        ledger: Mapping[str, Candidate],
        *,
        on_evaluation: Callable[[Evaluation, bool], None],
    ) -> None:
        self._outcomes = outcomes
        self._population = population
        self._ledger = ledger
        self._cursor = "0-0"
        self._on_evaluation = on_evaluation
        self._changed = asyncio.Condition()

    async def run(self) -> None:
        """Consume outcomes until cancelled."""
        while True:
            for result in await self._outcomes.results(self._cursor):
                await self._take(result)

    @property
    def waiting(self) -> int:
        """Number of issued candidates without an outcome."""
        return len(self._ledger) - self._population.outcomes

    async def settled(self) -> None:
        """Wait until every issued candidate has its outcome."""
        await self.until(lambda waiting: waiting == 0)

    async def until(self, enough: Callable[[int], bool]) -> None:
        """Wait until `enough(waiting)` is true; it is checked after every outcome."""
        async with self._changed:
            await self._changed.wait_for(lambda: enough(self.waiting))

    async def _take(self, result: Result) -> None:
        candidate = self._ledger.get(result.id)
        self._cursor = result.cursor
        if candidate is None:
            log.error("outcome_of_unknown_candidate", candidate=result.id)
            await self._outcomes.drop(result)
            return
        with bound_contextvars(candidate=candidate.id):
            await self._apply(candidate, result)
        async with self._changed:
            self._changed.notify_all()

    async def _apply(self, candidate: Candidate, result: Result) -> None:
        await self._outcomes.apply(result)
        # The returned value does not show whether the outcome is new. If the reply was lost, the repeated call returns
        # False for a new outcome. If the server has lost its data, the call returns True for an old outcome.
        if candidate.id not in self._population:
            is_best = self._population.insert(candidate, result.outcome)
            evaluation = self._population.get(candidate.id)
            assert evaluation is not None
            self._on_evaluation(evaluation, is_best)
