"""The search: propose, enqueue, collect; its modes are in daemon/search/modes.py.

What has been done is read off the ledger alone: which candidates each call of each agent has made in each round. A
search that was killed anywhere repeats the calls that are not complete and goes on. What a generation gets depends on
the earlier ones and on the LLM's answers, never on what was faster, so a search can be replayed from its transcript.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

import structlog
from structlog.contextvars import bound_contextvars

from agents.baselines.seeds import plant_seeds
from agents.population.keeper import PopulationKeeper
from agents.population.population import Evaluation, Population
from agents.population.view import (
    BUDGET_USED_UP,
    KNOWN_ALREADY,
    Accepted,
    Member,
    Refused,
    Tried,
    View,
)
from daemon.search.budget import Proposals
from daemon.search.control import Pausing
from daemon.search.modes import generations, steady_state
from daemon.search.outcome_log import WHO, log_outcome
from daemon.search.roles import Agents
from daemon.settings.search import SearchSettings
from daemon.state.history import History
from daemon.state.journal import Journal
from protocol.errors import BudgetError
from protocol.plans.candidate import (
    Candidate,
    Failed,
    Measured,
    Provenance,
    Race,
    Source,
    Stopped,
    Text,
    candidate_id,
)
from protocol.plans.card import ModelCard
from protocol.plans.plan import Plan
from protocol.plans.spec import SearchSpec
from protocol.queue.streams import CandidateQueue

SHOWN_BEST = 500
SHOWN_RECENT = 200
"""Candidates that a view holds beside the population: what is reckoned from them must not grow with the search."""

log = structlog.get_logger()


class Search:
    """One search from its first question to its best candidate; `history` is what earlier processes did of it.

    `seconds` says how long it has run, over all its processes.
    """

    def __init__(
        self,
        name: str,
        spec: SearchSpec,
        settings: SearchSettings,
        *,
        card: ModelCard,
        agents: Agents,
        queue: CandidateQueue,
        journal: Journal,
        history: History,
        pausing: Pausing,
        seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.name, self.spec, self.card, self.pausing = name, spec, card, pausing
        self.settings, self.agents, self._queue = settings, agents, queue
        self._journal, self._seconds = journal, seconds
        self._time_is_up = False
        self.ledger = dict(history.ledger)
        self.proposals = Proposals(self.ledger.values())
        self.selections = dict(history.selections)
        self.population = Population()
        for id_, outcome in history.outcomes.items():
            self.population.insert(self.ledger[id_], outcome)
        self.keeper = PopulationKeeper(queue, self.population, self.ledger, on_evaluation=self._note)
        self._tokens: Counter[int] = Counter()
        """Measured tokens by the round of their candidates."""
        for evaluation in self.population:
            self._tokens[evaluation.candidate.provenance.round] += _tokens(evaluation)
        self.parents_source: Source | None = None
        """Who chose the parents of the last round."""
        self.round = max((c.provenance.round for c in self.ledger.values()), default=0)

    async def run(self) -> None:
        """Search until the rounds or the budget are used up; afterwards everything issued has an outcome."""
        self._journal.begin(self.name, self.spec, self.card, self.population)
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(self.keeper.run())
            await (generations if self.settings.mode == "generational" else steady_state)(self)
            await self.keeper.settled()
            await self._report()
            keeping.cancel()

    async def begin(self) -> None:
        """Round 0: the seeds, uniform to compare with, and the Initializer's first population."""
        await plant_seeds(self.settings.seeds, self.view(0), self.submit)
        await self._enqueue_plan(self.spec.uniform_plan(self.card.shape), self.spec.uniform_rates(self.card.shape))
        count = min(self.settings.population, self.planned) - self.proposals.made("seed", 0)
        missing = count - self.proposals.made("initializer", 0)
        if missing > 0:
            log.info("round_started", round=0, missing=missing)
            await self.agents.initializer.propose(self.view(0), count, self.submit)

    async def select(self, view: View) -> Sequence[Member]:
        """The Selector's parents for this view's round: as it chose them, if an earlier process asked it."""
        selector = self.agents.selector
        if selector is None:
            return view.population
        chosen = self.selections.get(view.round)
        if chosen is None:
            wanted = self.settings.mutations + self.settings.crossovers
            selection = await selector.select(view, wanted)
            self.parents_source = selection.source
            ids = [member.candidate.id for member in selection.parents]
            chosen = self.selections[view.round] = await self._queue.remember_selection(view.round, ids)
        members = {member.candidate.id: member for member in view.population}
        return [members[id_] for id_ in chosen if id_ in members]

    async def _report(self) -> None:
        """Measure uniform and the best on the report text."""
        best = self.population.best()
        if self.spec.report is None or best is None:
            return
        shape = self.card.shape
        await self._enqueue_plan(self.spec.uniform_plan(shape), self.spec.uniform_rates(shape), text="report")
        await self._enqueue_plan(best.candidate.plan, best.candidate.rates, text="report")
        await self.keeper.settled()

    async def submit(self, rates: Sequence[float], provenance: Provenance) -> Accepted | Refused:
        """Make proposed rates feasible, refuse what is known already, enqueue the rest."""
        try:
            feasible = self.spec.feasible(tuple(rates), self.card.shape)
            plan = self.spec.plan(feasible, self.card.shape)
        except BudgetError as error:
            return Refused(str(error))
        candidate = Candidate(
            id=candidate_id(plan, self.spec.fingerprint),
            rates=feasible,
            plan=plan,
            provenance=provenance,
            race=self._race(provenance.round),
        )
        if known := self.ledger.get(candidate.id):
            is_repeated = _maker(known.provenance) == _maker(provenance)
            return Accepted(candidate.id) if is_repeated else KNOWN_ALREADY
        if self.remaining_budget <= 0:
            return BUDGET_USED_UP
        return await self._enqueue(candidate)

    async def _enqueue_plan(self, plan: Plan, rates: Sequence[float], *, text: Text = "fitness") -> None:
        provenance = Provenance(agent="baseline", source="allocation", round=0)
        id_ = candidate_id(plan, self.spec.fingerprint, text)
        if id_ not in self.ledger:
            await self._enqueue(Candidate(id=id_, rates=tuple(rates), plan=plan, provenance=provenance, text=text))

    async def _enqueue(self, candidate: Candidate) -> Accepted:
        # Into the ledger first: an agent running at the same time must not propose it again meanwhile.
        self.ledger[candidate.id] = candidate
        self.proposals.add(candidate)
        with bound_contextvars(candidate=candidate.id):
            await self._queue.enqueue(candidate)
        log.info("candidate_enqueued", candidate=candidate.id, **candidate.provenance.model_dump(include=WHO))
        return Accepted(candidate.id)

    def _race(self, round_: int) -> Race | None:
        """What candidates of a round race against, once there is one: the K-th best of the rounds before.

        Of evolution the best, whose offspring they are: no other ever has any.
        """
        first_windows = self.settings.first_windows
        if first_windows is None:
            return None
        rivals = 1 if self.settings.proposer == "evolution" else self.settings.population
        best = self.population.top(rivals, before=round_)
        last = best[-1].outcome if len(best) == rivals else None
        against = last.losses if isinstance(last, Measured) else ()
        return Race(against=against, first_windows=first_windows)

    def _note(self, evaluation: Evaluation, is_best: bool) -> None:
        self._tokens[evaluation.candidate.provenance.round] += _tokens(evaluation)
        self._journal.evaluation(evaluation, is_best=is_best)
        log_outcome(evaluation, is_best=is_best)

    @property
    def remaining_budget(self) -> int:
        """How many more candidates may be proposed; none once search.budget_hours are over."""
        return 0 if self._hours_are_over() else self.planned - self.proposed

    def tokens_are_used_up(self, *, before: int | None = None) -> bool:
        """Whether search.max_tokens are measured, in the rounds `before` one where it is given.

        So a round is begun or not whatever was measured of it, by a process that was killed, or meanwhile.
        """
        most = self.settings.max_tokens
        if most is None:
            return False
        return sum(tokens for round_, tokens in self._tokens.items() if before is None or round_ < before) >= most

    @property
    def proposed(self) -> int:
        """How many candidates the agents have made so far."""
        return len(self.proposals)

    def counts(self) -> dict[str, Counter[str]]:
        """Candidates by agent and by source, baselines left out."""
        return {"by_agent": self.proposals.by_agent.copy(), "by_source": self.proposals.by_source.copy()}

    @property
    def planned(self) -> int:
        """How many candidates the agents shall make in all."""
        settings = self.settings
        planned = settings.population + settings.rounds * (settings.mutations + settings.crossovers)
        return min(settings.max_evaluations or planned, planned)

    def _hours_are_over(self) -> bool:
        hours = self.settings.budget_hours
        if hours is not None and not self._time_is_up and self._seconds() >= 3600 * hours:
            self._time_is_up = True
            log.info("search_hours_used_up", hours=hours, candidates=self.proposed)
        return self._time_is_up

    def view(self, round_: int) -> View:
        """What the agents are shown in a round, the same whenever in that round they are asked."""
        measured = tuple(
            Member(e.candidate, e.outcome.fitness)
            for e in self.population.top(max(SHOWN_BEST, self.settings.population), before=round_)
            if isinstance(e.outcome, Measured)
        )
        population = measured[: self.settings.population]
        calls = self.proposals.calls(round_)
        first = self.population.top(1, before=1)
        return View(
            self.spec,
            self.card,
            round_,
            population,
            calls,
            measured,
            self._recent(round_),
            first[0].candidate.rates if first else None,
            partial(self._fitness_of, before=round_),
        )

    def _fitness_of(self, candidate_id: str, before: int) -> float | None:
        evaluation = self.population.get(candidate_id)
        if evaluation is None or evaluation.candidate.provenance.round >= before:
            return None
        return _tried(evaluation).fitness

    def _recent(self, round_: int) -> tuple[Tried, ...]:
        """The last proposals of the rounds before that have an outcome."""
        issued = (c for c in reversed(self.ledger.values()) if c.is_proposal)
        before = (e for c in issued if c.provenance.round < round_ and (e := self.population.get(c.id)))
        return tuple(reversed([_tried(e) for e in islice(before, SHOWN_RECENT)]))


def _tried(evaluation: Evaluation) -> Tried:
    candidate, outcome = evaluation.candidate, evaluation.outcome
    if isinstance(outcome, Stopped) and candidate.race is not None:
        return Tried(candidate, outcome.guess(candidate.race), stopped=True)
    return Tried(candidate, outcome.fitness if isinstance(outcome, Measured) else None)


def _tokens(evaluation: Evaluation) -> int:
    """Tokens that a candidate of the agents was measured on."""
    if evaluation.candidate.provenance.agent == "baseline" or isinstance(evaluation.outcome, Failed):
        return 0
    return evaluation.outcome.tokens


def _maker(provenance: Provenance) -> tuple[str, int, int]:
    return provenance.agent, provenance.round, provenance.call
