"""Agents that ask no LLM: baselines of a search by an LLM, and replacements of one of its agents.

Each has the interface of the agent that it replaces, so its candidates take the same path: made feasible, planned,
compared with the known plans, queued, measured. The samples depend on the search's seed, the round and the outcomes of
earlier rounds alone, so a search that was killed samples the same again.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from agents.operators.genetic import tournament
from agents.operators.sampling import (
    sample_mix,
    sample_mutation,
    sample_profile,
    sample_ranked_mix,
    sample_ranked_moves,
)
from agents.population.call import Call
from agents.population.submission import NothingLeft, Sampler, Submitter
from agents.population.view import Member, Selection, Submit, View
from protocol.plans.candidate import AgentName


async def submit_samples(agent: AgentName, view: View, count: int, submit: Submit, sampler: Sampler) -> int:
    """Get `count` samples accepted. Return how many were: fewer only if no new plan was found."""
    call = Call(agent, view, 0, count)
    submitter = Submitter(agent, call, submit)
    if not submitter.is_complete:
        with suppress(NothingLeft):
            await submitter.sample(call.rng, count, sampler, "classical")
    return len(submitter.accepted)


class RandomInitializer:
    """Proposes random profiles over depth."""

    async def propose(self, view: View, count: int, submit: Submit) -> int:
        """Get `count` candidates accepted; return how many were."""
        return await submit_samples("initializer", view, count, submit, partial(sample_profile, view=view))


class RandomMutator:
    """Random search: samples every round like the first population and ignores all outcomes."""

    async def propose(self, view: View, _parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Get `count` candidates accepted; return how many were."""
        return await submit_samples("mutator", view, count, submit, partial(sample_profile, view=view))


class ClassicalMutator:
    """Shifts rate between the units of a random parent."""

    async def propose(self, view: View, parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Get `count` mutations of `parents` accepted; return how many were."""
        if not parents:
            return 0
        return await submit_samples("mutator", view, count, submit, partial(sample_mutation, parents=parents))


class ClassicalCrossover:
    """Takes a range of units from a second parent."""

    async def propose(self, view: View, parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Get `count` crossovers of `parents` accepted; return how many were: 0 for fewer than two parents."""
        if len(parents) < 2:
            return 0
        return await submit_samples("crossover", view, count, submit, partial(sample_mix, parents=parents))


class RankedMutator:
    """Chooses at random from the moves that the surrogate ranks: the baseline for the LLM's choice among them."""

    async def propose(self, view: View, parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Get `count` mutations of `parents` accepted; return how many were."""
        if not parents:
            return 0
        return await submit_samples(
            "mutator", view, count, submit, partial(sample_ranked_moves, view=view, parents=parents)
        )


class RankedCrossover:
    """Chooses at random from the mixes that the surrogate ranks."""

    async def propose(self, view: View, parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Get `count` crossovers of `parents` accepted; return how many were: 0 for fewer than two parents."""
        if len(parents) < 2:
            return 0
        sampler = partial(sample_ranked_mix, view=view, parents=parents)
        return await submit_samples("crossover", view, count, submit, sampler)


class TournamentSelector:
    """Selects each parent as the best of three random members."""

    async def select(self, view: View, count: int) -> Selection:
        """Return up to `count` parents, best first, at most half of the population (but two)."""
        wanted = min(count, max(2, len(view.population) // 2), len(view.population))
        return Selection(tournament(Call("selector", view, 0, wanted).rng, view.population, wanted), "classical")
