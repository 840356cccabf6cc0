"""The two modes of a search: generational (Algorithm 1 of the paper) and steady-state."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import structlog

from agents.population.view import Accepted, Member, Refused, Submit, View
from daemon.settings.search import SearchSettings
from protocol.plans.candidate import Provenance, Step

if TYPE_CHECKING:  # the import would be circular, because a search runs its mode
    from daemon.search.search import Search

FRUITLESS_TURNS = 50
"""The search ends after this many consecutive questions without a new plan."""

Rounds = Callable[["Search"], Awaitable[None]]
"""Runs the rounds of a search after its first population."""

log = structlog.get_logger()


def rounds_of(settings: SearchSettings) -> Rounds:
    """Return the function that runs the rounds in the mode search.mode."""
    return generations if settings.mode == "generational" else steady_state


async def generations(search: "Search") -> None:
    """Run rounds whose offspring come from earlier rounds. Each round waits for all earlier outcomes."""
    for round_ in range(1, search.settings.rounds + 1):
        await search.keeper.settled()
        if search.budget.remaining <= 0 or search.budget.tokens_are_used_up(before=round_):
            break
        await _generation(search, round_)


async def _generation(search: "Search", round_: int) -> None:
    """Select parents, then mutate and cross over concurrently."""
    left = search.settings.planned - search.state.proposals.before(round_)
    agents, wanted = search.agents, (search.settings.mutations, search.settings.crossovers)
    mutations = max(0, min(wanted[0] if agents.crossover else sum(wanted), left))
    crossovers = max(0, min(wanted[1], left - mutations)) if agents.crossover else 0
    missing = mutations + crossovers - search.state.proposals.in_round(round_)
    if missing <= 0 or len(search.state.population) < 2:
        return
    view = search.view(round_)
    search.round = round_
    log.info("round_started", round=round_, missing=missing, best=view.population[0].fitness)
    view, parents = await search.select(view)
    async with asyncio.TaskGroup() as group:
        mutating = group.create_task(agents.mutator.propose(view, parents, mutations, search.admission.submit))
        if agents.crossover:
            submit = _after(mutating, search.admission.submit)
            group.create_task(agents.crossover.propose(view, parents, crossovers, submit))


def _after(earlier: asyncio.Task[int], submit: Submit) -> Submit:
    """Return a `submit` that waits for `earlier`, so that timing does not decide which of two equal plans counts."""

    async def later(rates: Sequence[float], provenance: Provenance) -> Accepted | Refused:
        await asyncio.wait({earlier})
        return await submit(rates, provenance)

    return later


async def steady_state(search: "Search") -> None:
    """After each outcome, ask the next question with the newest population. Each question is a round.

    A limited number of candidates is asked for, queued or being measured (in_flight.py). A question asks for one
    candidate, or for several if the answers would otherwise come too slowly for the workers. Parents are selected once
    per as many rounds, while other questions go on with the parents before. The order of outcomes decides what is asked
    next, so two runs with the same answers can differ.
    """
    await search.keeper.until(lambda waiting: waiting == 0 or len(search.state.population) >= 2)
    if len(search.state.population) < 2:
        return  # breeding needs two members
    async with _Turns(search) as turns:
        # A question may yield no candidate, so the budget is not used up until the last questions are answered.
        while turns.asking or turns.may_begin():
            room = await search.in_flight.room()
            free = room.candidates - search.keeper.waiting - turns.asked_for
            count = min(turns.count(room.together), room.candidates)
            if turns.may_begin() and free >= count and len(turns.asking) < search.in_flight.at_once:
                turns.begin(count, max(1, room.candidates // count))
            else:
                await turns.next_change()


class _Turns:
    """The questions without an answer, each a round of its own. They are cancelled at the end of the block."""

    def __init__(self, search: "Search") -> None:
        self._search = search
        self._chosen: tuple[Step | None, Sequence[Member]] | None = None
        """The newest step and parents."""
        self._chosen_until = 0
        """The round in which they are chosen again."""
        self._choosing = asyncio.Lock()
        self.asking: dict[asyncio.Task[None], int] = {}
        """The questions, each with the number of candidates that it still asks for."""
        self.fruitless = 0

    @property
    def asked_for(self) -> int:
        """The number of candidates that are asked for."""
        return sum(self.asking.values())

    @property
    def left(self) -> int:
        """The number of candidates that the budget still allows to ask for."""
        return self._search.budget.remaining - self.asked_for

    def count(self, together: int) -> int:
        """Return how many candidates the next question asks for: at most a quarter of those that are left."""
        return max(1, min(together, self.left // 4))

    def may_begin(self) -> bool:
        """Whether the budget allows another question."""
        return self.left > 0 and not self._search.budget.tokens_are_used_up() and self.fruitless < FRUITLESS_TURNS

    def begin(self, count: int, limit: int) -> None:
        """Ask for `count` more candidates; parents are selected once per `limit` questions."""
        self._search.round += 1
        self.asking[asyncio.create_task(self._turn(self._search.round, count, limit))] = count

    async def next_change(self) -> None:
        """Wait for an outcome or for a question to end."""
        before = self._search.keeper.waiting
        outcome = asyncio.create_task(self._search.keeper.until(lambda waiting: waiting < before))
        try:
            done, _ = await asyncio.wait({outcome, *self.asking}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            outcome.cancel()
        for task in done & self.asking.keys():
            del self.asking[task]
            task.result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.asking:
            task.cancel()
        await asyncio.gather(*self.asking, return_exceptions=True)

    async def _turn(self, turn: int, count: int, limit: int) -> None:
        settings, agents = self._search.settings, self._search.agents
        view = replace(self._search.view(turn), together=count)
        log.info("round_started", round=turn, missing=count, best=view.population[0].fitness)
        began = time.monotonic()
        view, parents = await self._with_parents(view, limit)
        crosses = turn % (settings.mutations + settings.crossovers) >= settings.mutations
        agent = agents.crossover if crosses and agents.crossover else agents.mutator
        made = await agent.propose(view, parents, count, self._counting(asyncio.current_task()))
        self._search.in_flight.answered(time.monotonic() - began, count)
        self.fruitless = 0 if made else self.fruitless + 1

    def _counting(self, question: asyncio.Task[None] | None) -> Submit:
        """Return a `submit` after which an accepted candidate of `question` is no longer asked for."""

        async def submit(rates: Sequence[float], provenance: Provenance) -> Accepted | Refused:
            found = await self._search.admission.submit(rates, provenance)
            if isinstance(found, Accepted) and question in self.asking:
                self.asking[question] -= 1
            return found

        return submit

    async def _with_parents(self, view: View, limit: int) -> tuple[View, Sequence[Member]]:
        """Return the view with the chosen step, and the parents, which are selected once per `limit` rounds."""
        if self._search.agents.selector is None:
            return view, view.population
        if self._chosen is None or (view.round >= self._chosen_until and not self._choosing.locked()):
            async with self._choosing:
                if self._chosen is None or view.round >= self._chosen_until:
                    selected, parents = await self._search.select(view)
                    self._chosen, self._chosen_until = (selected.step, parents), view.round + limit
        step, parents = self._chosen
        return replace(view, step=step), parents
