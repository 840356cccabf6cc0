"""The search: propose, enqueue, collect. Generational mode, Algorithm 1 of the paper.

What has been done is read off the ledger alone: how many candidates each agent has in each round. A search that was
killed anywhere asks for what is missing and goes on.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from agents.crossover import Crossover
from agents.initializer import Initializer
from agents.mutator import Mutator
from agents.population import Evaluation, Population
from agents.population_keeper import PopulationKeeper
from agents.selector import Selector
from agents.view import BUDGET_USED_UP, Accepted, Member, Refused, View
from daemon.journal import Journal, best_record
from daemon.pausing import Pausing
from daemon.settings import SearchSettings
from daemon.store import History
from protocol.candidate import AgentName, Candidate, Measured, Provenance, Text, candidate_id
from protocol.card import ModelCard
from protocol.errors import BudgetError
from protocol.plan import Plan
from protocol.spec import SearchSpec
from protocol.streams import CandidateQueue

log = structlog.get_logger()


@dataclass(frozen=True)
class Agents:
    """The agents that propose."""

    initializer: Initializer
    selector: Selector
    mutator: Mutator
    crossover: Crossover


class Search:
    """One search from its first question to its best candidate; `history` is what earlier processes did of it."""

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
    ) -> None:
        self.name, self.spec, self.card, self.pausing = name, spec, card, pausing
        self._settings, self._agents, self._queue = settings, agents, queue
        self._journal = journal
        self.ledger = dict(history.ledger)
        self.selections = dict(history.selections)
        self._offered: set[str] = set()
        self.population = Population()
        for id_, outcome in history.outcomes.items():
            self.population.insert(self.ledger[id_], outcome)
        self._keeper = PopulationKeeper(
            queue, self.population, self.ledger, cursor=history.cursor, on_evaluation=self._note
        )
        self.round = max((c.provenance.round for c in self.ledger.values()), default=0)

    async def run(self) -> None:
        """Search until the rounds or the budget are used up; afterwards everything issued has an outcome."""
        self._journal.begin(self.name, self.spec, self.card.shape, self.population)
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(self._keeper.run())
            await self._generations()
            await self._report()
            keeping.cancel()

    async def _generations(self) -> None:
        await self._enqueue_plan(self.spec.uniform_plan(self.card.shape), self.spec.uniform_rates(self.card.shape))
        await self._populate()
        for round_ in range(1, self._settings.rounds + 1):
            await self._keeper.settled()
            if not self.remaining_budget:
                break
            await self._next_round(round_)
        await self._keeper.settled()

    async def _populate(self) -> None:
        """Round 0: the Initializer's first population."""
        wanted, missing = self._wanted("initializer", 0, self._settings.population)
        if missing:
            log.info("round_started", round=0, missing=missing)
            await self._agents.initializer.propose(self._view(0), wanted, self._submit)

    async def _next_round(self, round_: int) -> None:
        """The Selector's parents, then mutation and crossover at the same time."""
        mutations, more = self._wanted("mutator", round_, self._settings.mutations)
        crossovers, still_more = self._wanted("crossover", round_, self._settings.crossovers)
        view = self._view(round_)
        if not more + still_more or len(view.population) < 2:
            return
        self.round = round_
        log.info("round_started", round=round_, missing=more + still_more, best=view.population[0].fitness)
        parents = await self._select(view)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._agents.mutator.propose(view, parents, mutations, self._submit))
            group.create_task(self._agents.crossover.propose(view, parents, crossovers, self._submit))

    async def _select(self, view: View) -> Sequence[Member]:
        """The Selector's parents for this round: as it chose them, if an earlier process asked it."""
        chosen = self.selections.get(view.round)
        if chosen is None:
            wanted = self._settings.mutations + self._settings.crossovers
            selection = await self._agents.selector.select(view, wanted)
            chosen = self.selections[view.round] = tuple(member.candidate.id for member in selection.parents)
            await self._queue.remember_selection(view.round, chosen)
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
        await self._keeper.settled()

    async def _submit(self, rates: Sequence[float], provenance: Provenance) -> Accepted | Refused:
        """Make proposed rates feasible, refuse what is known already, enqueue the rest."""
        try:
            feasible = self.spec.feasible(tuple(rates), self.card.shape)
            plan = self.spec.plan(feasible, self.card.shape)
        except BudgetError as error:
            return Refused(str(error))
        candidate = Candidate(
            id=candidate_id(plan, self.spec.fingerprint), rates=feasible, plan=plan, provenance=provenance
        )
        if self._made_by_the_same_call(candidate):
            return Accepted(candidate.id, again=True)
        if candidate.id in self.ledger:
            return Refused("it prunes the model exactly as an earlier configuration does")
        if not self.remaining_budget:
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
        self._offered.add(candidate.id)
        await self._queue.enqueue(candidate)
        log.info("candidate_enqueued", candidate=candidate.id, **candidate.provenance.model_dump(include=_WHO))
        return Accepted(candidate.id)

    def _note(self, evaluation: Evaluation, is_best: bool) -> None:
        candidate, outcome = evaluation.candidate, evaluation.outcome
        self._journal.evaluation(evaluation)
        if is_best:
            self._journal.best(best_record(self.name, self.spec, self.card.shape, evaluation))
        who = candidate.provenance.model_dump(include=_WHO)
        if isinstance(outcome, Measured):
            log.info(
                "candidate_measured",
                candidate=candidate.id,
                text=candidate.text,
                **outcome.figures(4),
                best=is_best,
                **who,
            )
        else:
            log.warning("candidate_failed", candidate=candidate.id, reason=outcome.reason, detail=outcome.detail, **who)

    @property
    def remaining_budget(self) -> int:
        """How many more candidates may be proposed."""
        settings = self._settings
        planned = settings.population + settings.rounds * (settings.mutations + settings.crossovers)
        return min(settings.max_evaluations or planned, planned) - self.proposed

    @property
    def proposed(self) -> int:
        """How many candidates the agents have made so far."""
        return sum(c.provenance.agent != "baseline" for c in self.ledger.values())

    def counts(self) -> dict[str, Counter[str]]:
        """Candidates by agent and by source, baselines left out."""
        proposals = [c.provenance for c in self.ledger.values() if c.provenance.agent != "baseline"]
        return {"by_agent": Counter(p.agent for p in proposals), "by_source": Counter(p.source for p in proposals)}

    def _made_by_the_same_call(self, candidate: Candidate) -> bool:
        """Whether a call that was interrupted, and is asked again, proposes what it proposed before."""
        earlier = self.ledger.get(candidate.id)
        if earlier is None or candidate.id in self._offered:
            return False
        self._offered.add(candidate.id)
        mine, its = candidate.provenance, earlier.provenance
        return (mine.agent, mine.round, mine.call) == (its.agent, its.round, its.call)

    def _wanted(self, agent: AgentName, round_: int, planned: int) -> tuple[int, int]:
        """How many candidates an agent is to make in a round, as far as the budget goes, and how many it lacks."""
        made = self._made(round_)
        wanted = max(0, min(planned, self.remaining_budget + sum(made.values())))
        return wanted, max(0, wanted - sum(n for (maker, _), n in made.items() if maker == agent))

    def _made(self, round_: int) -> Counter[tuple[AgentName, int]]:
        """The candidates of a round so far, by agent and call."""
        provenances = [c.provenance for c in self.ledger.values()]
        return Counter((p.agent, p.call) for p in provenances if p.round == round_ and p.agent != "baseline")

    def _view(self, round_: int) -> View:
        """What an agent sees in a round: what earlier rounds made, also when this one had begun before a restart."""
        earlier = [e for e in self.population.top(len(self.population)) if e.candidate.provenance.round < round_]
        members = tuple(
            Member(e.candidate, e.outcome.fitness)
            for e in earlier[: self._settings.population]
            if isinstance(e.outcome, Measured)
        )
        return View(self.spec, self.card, round_, members, self._made(round_))


_WHO = {"agent", "source", "round"}
