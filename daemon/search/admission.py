"""Admission of proposals: make them feasible, plan them, refuse duplicates, and enqueue the rest."""

from collections.abc import Sequence

import structlog
from structlog.contextvars import bound_contextvars

from agents.population.population import Population
from agents.population.view import BUDGET_USED_UP, KNOWN_ALREADY, Accepted, Refused
from daemon.search.budget import Budget
from daemon.search.state import SearchState
from daemon.settings.search import SearchSettings
from protocol.errors import BudgetError
from protocol.plans.candidate import Candidate, Measured, Provenance, Race, Text, candidate_id
from protocol.plans.plan import Plan
from protocol.plans.shape import ModelShape
from protocol.plans.spec import SearchSpec
from protocol.queue.streams import CandidateQueue

log = structlog.get_logger()


class Admission:
    """Accepts proposals within the budget, and adds new ones to the ledger and the queue."""

    def __init__(self, settings: SearchSettings, state: SearchState, budget: Budget, queue: CandidateQueue) -> None:
        self._settings, self._state, self._budget, self._queue = settings, state, budget, queue

    async def submit(self, rates: Sequence[float], provenance: Provenance) -> Accepted | Refused:
        """Make proposed rates feasible and enqueue their plan if it is new.

        A known plan is refused, unless the same call proposed it before a restart.
        """
        spec, shape = self._state.spec, self._state.profile.shape
        try:
            feasible, plan = planned(spec, shape, rates)
        except BudgetError as error:
            return Refused(str(error))
        id_ = candidate_id(plan, spec.fingerprint)
        if known := self._state.ledger.get(id_):
            return Accepted(id_) if _maker(known.provenance) == _maker(provenance) else KNOWN_ALREADY
        if self._budget.remaining <= 0:
            return BUDGET_USED_UP
        race = race_of_round(self._settings, self._state.population, provenance.round)
        await self._enqueue(Candidate(id=id_, rates=feasible, plan=plan, provenance=provenance, race=race))
        return Accepted(id_)

    async def measure_uniform(self, *, text: Text = "fitness") -> None:
        """Enqueue uniform pruning, the baseline."""
        spec, shape = self._state.spec, self._state.profile.shape
        await self.measure(spec.uniform_plan(shape), spec.uniform_rates(shape), text=text)

    async def measure(self, plan: Plan, rates: Sequence[float], *, text: Text) -> None:
        """Enqueue a plan that does not count towards the budget, unless the ledger already has it for this text."""
        provenance = Provenance(agent="baseline", source="allocation", round=0)
        id_ = candidate_id(plan, self._state.spec.fingerprint, text)
        if id_ not in self._state.ledger:
            await self._enqueue(Candidate(id=id_, rates=tuple(rates), plan=plan, provenance=provenance, text=text))

    async def _enqueue(self, candidate: Candidate) -> None:
        # Add it to the ledger first, so that a concurrent agent cannot propose the same plan.
        self._state.ledger[candidate.id] = candidate
        self._state.proposals.add(candidate)
        with bound_contextvars(candidate=candidate.id):
            await self._queue.enqueue(candidate)
        log.debug("candidate_enqueued", candidate=candidate.id, **candidate.provenance.log_fields)


def planned(spec: SearchSpec, shape: ModelShape, rates: Sequence[float]) -> tuple[tuple[float, ...], Plan]:
    """Return the feasible rates nearest to raw `rates` (one per unit), and their plan. Raises BudgetError."""
    feasible = spec.feasible(tuple(rates), shape)
    return feasible, spec.plan(feasible, shape)


def race_of_round(settings: SearchSettings, population: Population, round_: int) -> Race | None:
    """Return the race of a round's candidates, which may stop them after the first windows; None without first_windows.

    Each candidate is compared with the K-th best candidate of earlier rounds (K is search.population), if there is one.
    With evolution it is compared with the best candidate, because that is the parent of all offspring.
    """
    if settings.first_windows is None:
        return None
    rivals = 1 if settings.proposer == "evolution" else settings.population
    best = population.top(rivals, before=round_)
    last = best[-1].outcome if len(best) == rivals else None
    return Race(against=last.losses if isinstance(last, Measured) else (), first_windows=settings.first_windows)


def _maker(provenance: Provenance) -> tuple[str, int, int]:
    return provenance.agent, provenance.round, provenance.call
