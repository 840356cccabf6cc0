"""Proposals by operators without an LLM, for the fallback and for the agents that ask no LLM. Pure, seeded."""

import random
from collections.abc import Sequence

from agents.operators.genetic import cross, mutate, random_rates
from agents.operators.mixes import mix_menu
from agents.operators.moves import apply_moves, move_menu
from agents.population.view import Member, Proposal, View

MAX_MOVES = 4
"""Maximum number of moves that one mutation combines."""
RANKED_MOVES = 6
"""Maximum number of moves on a menu. On a longer menu, the last moves would have no expected gain."""
RANKED_MIXES = 8
"""Maximum number of mixes on a menu; for the Crossover, twice the number of proposals if that is larger."""


def sample_profile(rng: random.Random, view: View, _parents: Sequence[Member]) -> Proposal:
    """Return a random profile over depth.

    At block granularity, attention and MLP have a profile each, because the split between them matters most.
    """
    kinds = len({unit.kind for unit in view.units})
    return Proposal(random_rates(rng, len(view.units), view.spec.rate, kinds))


def sample_mutation(rng: random.Random, _view: View, parents: Sequence[Member]) -> Proposal:
    """Return one of `parents` after small shifts of rate between its units."""
    parent = rng.choice(parents).candidate
    return Proposal(mutate(rng, parent.rates), (parent.id,))


def sample_mix(rng: random.Random, _view: View, parents: Sequence[Member]) -> Proposal:
    """Return one of `parents` with a range of units from another."""
    first, second = (member.candidate for member in rng.sample(parents, 2))
    mixed = cross(rng, first.rates, second.rates)
    # Half of the mixes are mutated too. Similar parents have few different mixes, and soon all of them are known.
    return Proposal(mutate(rng, mixed) if rng.random() < 0.5 else mixed, (first.id, second.id))


def sample_move_parent(rng: random.Random, view: View, parents: Sequence[Member]) -> Member:
    """Return the member to which moves are applied.

    With a probability of two thirds it is the best member of the population, even if the Selector did not choose it.
    Otherwise it is one of `parents` (best first), each a third as likely as the parent before it. Moves are small steps
    that mostly help. From a parent that is one percent worse than the best member, they would still not reach the best.
    """
    ranked = view.population[:1] + tuple(member for member in parents if member not in view.population[:1])
    rank = 0
    while rank < len(ranked) - 1 and rng.random() < 1 / 3:
        rank += 1
    return ranked[rank]


def sample_ranked_moves(rng: random.Random, view: View, parents: Sequence[Member]) -> Proposal:
    """Return a parent after up to MAX_MOVES random moves of a menu; without moves, return a random mutation."""
    parent = sample_move_parent(rng, view, parents)
    moves = move_menu(view, parent, rng, RANKED_MOVES)
    if not moves:
        return sample_mutation(rng, view, parents)
    return apply_moves(parent, rng.sample(moves, min(rng.randint(1, MAX_MOVES), len(moves))))


def sample_ranked_mix(rng: random.Random, view: View, parents: Sequence[Member]) -> Proposal:
    """Return one of the mixes that the surrogate ranks best; without new mixes, return any random mix."""
    mixes = mix_menu(view, parents, rng, RANKED_MIXES)
    return rng.choice(mixes).proposal if mixes else sample_mix(rng, view, parents)
