"""Proposals by classical operators: the LLM's stand-in, and the agents that ask no LLM. Pure, seeded."""

import random
from collections.abc import Sequence

from agents.operators import cross, mutate, random_rates
from agents.view import Member, Proposal, View


def drawn_profile(rng: random.Random, view: View) -> Proposal:
    """A random profile over depth."""
    return Proposal(random_rates(rng, len(view.units), view.spec.rate))


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
