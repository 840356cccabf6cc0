"""Algorithm 1 of the paper: a first population, then rounds of select, mutate and cross over; modes.py has the rounds.

The ledger records which candidates each call of each agent has made in each round, so a killed search repeats only the
incomplete calls. A generation's proposals depend on earlier generations and on the LLM's answers, never on the workers'
speed, so a search can be replayed from its transcript.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import structlog

from agents.baselines.seeds import submit_seeds
from agents.population.keeper import PopulationKeeper
from agents.population.population import Evaluation
from agents.population.view import Member, View
from daemon.search.admission import Admission
from daemon.search.budget import Budget
from daemon.search.figures import figures_of, reported
from daemon.search.in_flight import MOST_TOGETHER, CountWorkers, InFlight, one_worker
from daemon.search.roles import Agents
from daemon.search.snapshot import view_of_round
from daemon.search.state import SearchState
from daemon.settings.search import SearchSettings
from daemon.state.journal import Journal
from protocol.plans.candidate import KeptSelection, Measured, Source, Stopped, outcome_fields
from protocol.plans.plan import Plan
from protocol.queue.streams import CandidateQueue

log = structlog.get_logger()


class Search:
    """One search from its first question to its best candidate."""

    def __init__(
        self,
        settings: SearchSettings,
        state: SearchState,
        agents: Agents,
        queue: CandidateQueue,
        journal: Journal,
        *,
        seconds: Callable[[], float] = lambda: 0.0,
        count_workers: CountWorkers = one_worker,
        questions_at_once: int = 4,
        most_together: int = MOST_TOGETHER,
    ) -> None:
        self.settings, self.state, self.agents, self._queue, self._journal = settings, state, agents, queue, journal
        self.budget = Budget(settings, state, seconds)
        self.admission = Admission(settings, state, self.budget, queue)
        self.in_flight = InFlight(
            settings.max_in_flight, state.population, count_workers, questions_at_once, most_together
        )
        self.keeper = PopulationKeeper(queue, state.population, state.ledger, on_evaluation=self._note)
        self.parents_source: Source | None = None
        """Whether the LLM or the fallback chose the parents of the last round."""
        self.round = max((c.provenance.round for c in state.ledger.values()), default=0)

    async def run(self, rounds: Callable[["Search"], Awaitable[None]]) -> None:
        """Populate, run `rounds` until the budget is used up, and report. At the end every candidate has an outcome."""
        before = len(self.state.ledger)
        self._journal.begin(self.settings.name, self.state.spec, self.state.profile, self.state.population)
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(self.keeper.run())
            await self._populate()
            await rounds(self)
            await self.keeper.settled()
            await self._report()
            keeping.cancel()
        if before and before == len(self.state.ledger):
            proposed = self.budget.proposed
            log.warning("nothing_left_to_do", measured=proposed, advice=self.settings.how_to_lengthen(proposed))

    async def _populate(self) -> None:
        """Run round 0: seeds, the uniform baseline, and the Initializer's first population."""
        await submit_seeds(self.settings.seed_allocations, self.view(0), self.admission.submit)
        await self.admission.measure_uniform()
        proposals = self.state.proposals
        count = min(self.settings.population, self.settings.planned) - proposals.made("seed", 0)
        missing = count - proposals.made("initializer", 0)
        if missing > 0:
            log.info("round_started", round=0, missing=missing)
            await self.agents.initializer.propose(self.view(0), count, self.admission.submit)

    async def select(self, view: View) -> tuple[View, Sequence[Member]]:
        """Return the view of the round with the chosen step, and the chosen parents.

        If an earlier process selected for this round, return its selection.
        """
        selector = self.agents.selector
        if selector is None:
            return view, view.population
        chosen = self.state.selections.get(view.round)
        if chosen is None:
            selection = await selector.select(view, self.settings.mutations + self.settings.crossovers)
            self.parents_source = selection.source
            ids = [member.candidate.id for member in selection.parents]
            found = KeptSelection(parents=tuple(ids), step=selection.step)
            chosen = self.state.selections[view.round] = await self._queue.remember_selection(view.round, found)
        members = {member.candidate.id: member for member in view.population}
        return replace(view, step=chosen.step), [members[id_] for id_ in chosen.parents if id_ in members]

    async def _report(self) -> None:
        """Measure uniform pruning, the best allocation, the best rule and the best candidate on the report text."""
        found = reported(self.state.population)
        if self.state.spec.report is not None and found:
            await self.admission.measure_uniform(text="report")
            for each in found.values():
                await self.admission.measure(each.candidate.plan, each.candidate.rates, text="report")
            await self.keeper.settled()

    def view(self, round_: int) -> View:
        """Return what the agents see in a round."""
        return view_of_round(self.state, self.settings.population, round_)

    def _note(self, evaluation: Evaluation, is_best: bool) -> None:
        self.budget.count(evaluation)
        self._journal.evaluation(evaluation, is_best=is_best)
        self._log_outcome(evaluation, is_best=is_best)

    def _log_outcome(self, evaluation: Evaluation, *, is_best: bool) -> None:
        candidate, outcome, state = evaluation.candidate, evaluation.outcome, self.state
        fields, figures = outcome_fields(candidate, outcome), figures_of(state.spec, state.profile, state.population)
        if isinstance(outcome, Stopped):
            log.info("candidate_stopped", **fields)
        elif not isinstance(outcome, Measured):
            log.warning("candidate_failed", **fields)
        elif candidate.text == "report":
            says = f"on the report text: {self._name(candidate.plan)} {figures.shown(outcome.fitness)}"
            log.info("candidate_measured", says=says, **fields)
        else:
            done = sum(each.candidate.is_proposal for each in state.population)
            number = f"{done}/{self.settings.planned}" if candidate.is_proposal else "uniform"
            here = f"{figures.shown(outcome.fitness)}{', new best' if is_best else ''}"
            says = f"measured {number}: {here} ({figures.in_words()})"
            log.info("candidate_measured", says=says, is_best=is_best, **figures.fields(), **fields)

    def _name(self, plan: Plan) -> str:
        """Return what a plan that is measured on the report text is called."""
        if plan == self.state.spec.uniform_plan(self.state.profile.shape):
            return "uniform"
        found = reported(self.state.population)
        return next((name for name, each in found.items() if each.candidate.plan == plan), "one that was best before")
