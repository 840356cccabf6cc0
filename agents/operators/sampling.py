"""Proposals by classical operators: the LLM's fallback, and the agents that ask no LLM. Pure, seeded."""

import random
from collections.abc import Sequence

from agents.operators.genetic import cross, mutate, random_rates
from agents.operators.mixes import mix_menu
from agents.operators.trades import menu, traded
from agents.population.view import Member, Proposal, View

MOST_TRADES = 4
"""Trades that one mutation makes together."""
RANKED_TRADES = 6
"""Trades on a menu: of more the last ones promise nothing."""
RANKED_MIXES = 8
"""Mixes on a menu, at least."""


def drawn_profile(rng: random.Random, view: View) -> Proposal:
    """A random profile over depth; of blocks one each for attention and MLP, for how they share matters most."""
    kinds = len({unit.kind for unit in view.units})
    return Proposal(random_rates(rng, len(view.units), view.spec.rate, kinds))


def drawn_mutation(rng: random.Random, parents: Sequence[Member]) -> Proposal:
    """One of `parents` with a little rate shifted between its units."""
    parent = rng.choice(parents).candidate
    return Proposal(mutate(rng, parent.rates), (parent.id,))


def drawn_mix(rng: random.Random, parents: Sequence[Member]) -> Proposal:
    """One of `parents` with a range of units from another."""
    first, second = (member.candidate for member in rng.sample(parents, 2))
    mixed = cross(rng, first.rates, second.rates)
    # Every other one is mutated too: parents that resemble each other have few mixes, soon all known.
    return Proposal(mutate(rng, mixed) if rng.random() < 0.5 else mixed, (first.id, second.id))


def good_one(rng: random.Random, view: View, parents: Sequence[Member]) -> Member:
    """Where trades begin: at the best of the population two times of three, whoever selected the parents; else at one
    of `parents` (best first), each a third as often as the one before it.

    Trades are small steps that mostly help: from a parent that is a percent worse they end behind the best.
    """
    ranked = view.population[:1] + tuple(member for member in parents if member not in view.population[:1])
    place = 0
    while place < len(ranked) - 1 and rng.random() < 1 / 3:
        place += 1
    return ranked[place]


class RankedTrades:
    """Draws up to MOST_TRADES trades of a menu, as the LLM might choose them; where there are none, a shift of rate."""

    def __init__(self, view: View, parents: Sequence[Member]) -> None:
        self._view, self._parents = view, parents

    def __call__(self, rng: random.Random) -> Proposal:
        """One proposal."""
        parent = good_one(rng, self._view, self._parents)
        trades = menu(self._view, parent, rng, RANKED_TRADES)
        if not trades:
            return drawn_mutation(rng, self._parents)
        return traded(parent, rng.sample(trades, min(rng.randint(1, MOST_TRADES), len(trades))))


def drawn_ranked_mix(rng: random.Random, view: View, parents: Sequence[Member]) -> Proposal:
    """One of the mixes that a surrogate ranks best; where there are none, one at random."""
    mixes = mix_menu(view, parents, rng, RANKED_MIXES)
    return rng.choice(mixes).proposal if mixes else drawn_mix(rng, parents)
