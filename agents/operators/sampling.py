"""Proposals by classical operators: the LLM's fallback, and the agents that ask no LLM. Pure, seeded."""

import random
from collections.abc import Sequence

from agents.operators.genetic import cross, mutate, random_rates
from agents.operators.mixes import mix_menu
from agents.operators.moves import apply_moves, move_menu
from agents.population.view import Member, Proposal, View

MAX_MOVES = 4
"""Moves that one mutation combines."""
RANKED_MOVES = 6
"""Moves on a menu; on a longer menu the last ones would have no expected gain."""
RANKED_MIXES = 8
"""The fewest mixes on a menu."""


def sample_profile(rng: random.Random, view: View, _parents: Sequence[Member]) -> Proposal:
    """Return a random profile over depth.

    With blocks, attention and MLP have a profile each: how they share the pruning matters most.
    """
    kinds = len({unit.kind for unit in view.units})
    return Proposal(random_rates(rng, len(view.units), view.spec.rate, kinds))


def sample_mutation(rng: random.Random, _view: View, parents: Sequence[Member]) -> Proposal:
    """Return one of `parents` with a little rate shifted between its units."""
    parent = rng.choice(parents).candidate
    return Proposal(mutate(rng, parent.rates), (parent.id,))


def sample_mix(rng: random.Random, _view: View, parents: Sequence[Member]) -> Proposal:
    """Return one of `parents` with a range of units from another."""
    first, second = (member.candidate for member in rng.sample(parents, 2))
    mixed = cross(rng, first.rates, second.rates)
    # Every other one is mutated too: similar parents have few mixes, and soon all of them are known.
    return Proposal(mutate(rng, mixed) if rng.random() < 0.5 else mixed, (first.id, second.id))


def sample_move_parent(rng: random.Random, view: View, parents: Sequence[Member]) -> Member:
    """Return the member that moves begin at.

    Two times out of three it is the best of the population, whether or not it was selected. Else it is one of `parents`
    (best first), each a third as likely as the one before it. Moves are small steps that mostly help: from a parent
    that is a percent worse than the best they would still end behind the best.
    """
    ranked = view.population[:1] + tuple(member for member in parents if member not in view.population[:1])
    rank = 0
    while rank < len(ranked) - 1 and rng.random() < 1 / 3:
        rank += 1
    return ranked[rank]


def sample_ranked_moves(rng: random.Random, view: View, parents: Sequence[Member]) -> Proposal:
    """Return a parent after up to MAX_MOVES random moves of a menu; after a shift of rate if there are no moves."""
    parent = sample_move_parent(rng, view, parents)
    moves = move_menu(view, parent, rng, RANKED_MOVES)
    if not moves:
        return sample_mutation(rng, view, parents)
    return apply_moves(parent, rng.sample(moves, min(rng.randint(1, MAX_MOVES), len(moves))))


def sample_ranked_mix(rng: random.Random, view: View, parents: Sequence[Member]) -> Proposal:
    """Return one of the mixes that the surrogate ranks best; any random mix if there are none."""
    mixes = mix_menu(view, parents, rng, RANKED_MIXES)
    return rng.choice(mixes).proposal if mixes else sample_mix(rng, view, parents)
