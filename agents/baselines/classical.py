"""Agents that ask no LLM: what an LLM's search is compared with, and what takes the place of one of its agents.

Each has the interface of the agent whose place it takes, so its candidates go the same way: made feasible, planned,
compared with what is known, queued, measured. What is drawn is decided by the search's seed, the round, and what was
measured in earlier rounds, so a search that was killed draws the same again.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from agents.operators.genetic import tournament
from agents.operators.sampling import RankedTrades, drawn_mix, drawn_mutation, drawn_profile, drawn_ranked_mix
from agents.population.call import Call
from agents.population.submission import Draw, NothingLeft, Offers
from agents.population.view import Member, Selection, Submit, View
from protocol.plans.candidate import AgentName


async def draw_all(agent: AgentName, view: View, count: int, submit: Submit, draw: Draw) -> int:
    """Get `count` of what `draw` makes accepted; returns how many were, fewer only where no new plan was found."""
    call = Call(agent, view, 0, count)
    offers = Offers(agent, call, submit)
    if not offers.is_complete:
        with suppress(NothingLeft):
            await offers.draw(call.rng, count, draw, "classical")
    return len(offers.made)


class RandomInitializer:
    """Proposes random profiles over depth."""

    async def propose(self, view: View, count: int, submit: Submit) -> int:
        """Get `count` candidates accepted; returns how many were."""
        return await draw_all("initializer", view, count, submit, partial(drawn_profile, view=view))


class RandomMutator:
    """Random search: every round is as the first population, whatever was measured."""

    async def propose(self, view: View, _parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Get `count` candidates accepted; returns how many were."""
        return await draw_all("mutator", view, count, submit, partial(drawn_profile, view=view))


class ClassicalMutator:
    """Shifts rate between the units of a parent drawn at random."""

    async def propose(self, view: View, parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Get `count` mutations of `parents` accepted; returns how many were."""
        if not parents:
            return 0
        return await draw_all("mutator", view, count, submit, partial(drawn_mutation, parents=parents))


class ClassicalCrossover:
    """Takes a range of units from a second parent."""

    async def propose(self, view: View, parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Get `count` crossovers of `parents` accepted; returns how many were. Fewer than two parents have none."""
        if len(parents) < 2:
            return 0
        return await draw_all("crossover", view, count, submit, partial(drawn_mix, parents=parents))


class RankedMutator:
    """Makes trades that a surrogate ranks, by dice: beside it is seen what the LLM's choice among them is worth."""

    async def propose(self, view: View, parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Get `count` mutations of `parents` accepted; returns how many were."""
        if not parents:
            return 0
        return await draw_all("mutator", view, count, submit, RankedTrades(view, parents))


class RankedCrossover:
    """Makes mixes that a surrogate ranks, by dice."""

    async def propose(self, view: View, parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Get `count` crossovers of `parents` accepted; returns how many were. Fewer than two parents have none."""
        if len(parents) < 2:
            return 0
        draw = partial(drawn_ranked_mix, view=view, parents=parents)
        return await draw_all("crossover", view, count, submit, draw)


class TournamentSelector:
    """Each parent is the best of three drawn."""

    async def select(self, view: View, count: int) -> Selection:
        """Up to `count` parents, best first, at most half of the population (but two)."""
        wanted = min(count, max(2, len(view.population) // 2), len(view.population))
        return Selection(tournament(Call("selector", view, 0, wanted).rng, view.population, wanted), "classical")
