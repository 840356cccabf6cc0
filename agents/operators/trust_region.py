"""Whole plans: all rates at once, as the surrogate predicts them to be best within a trust region. Pure, seeded.

Moves change few units and are ranked one by one. Here CMA-ES looks for the plan with the best acquisition, and may
change every unit by up to the length of the region (after TuRBO, Eriksson et al., 2019). Far from all measured
candidates, the surrogate errs. So regions are short and long in turn, and the exploration weight differs from plan to
plan: the proposals of one round are different plans, some of them safe and some of them bold.
"""

import random
from collections.abc import Sequence

import numpy as np

from agents.operators.acquisition import lowest_acquisition
from agents.operators.sampling import sample_move_parent
from agents.population.view import Member, Proposal, View
from protocol.plans.rates import ROUNDING, weighted_mean
from protocol.plans.rule import DEFAULT_RULE

SHORTEST, LONGEST = 0.05, 0.4
"""Lengths of a region: how much each rate may change at most."""
FIRST_SPREAD = 0.08
"""Standard deviation of the changes of the first plans."""
GENERATIONS, GENERATION_SIZE = 60, 24
"""The surrogate predicts this number of generations, each of this number of plans; it takes less than a second."""


def sample_plan(rng: random.Random, view: View, parents: Sequence[Member]) -> Proposal:
    """Return the plan with the best acquisition in a region around a good member; without members, a first plan."""
    if not view.population:
        return sample_first_plan(rng, view, parents)
    center = sample_move_parent(rng, view, parents)
    rates = _best(view, center.candidate.rates, random_length(rng), abs(rng.gauss(0, 1)), rng)
    return Proposal(rates, (center.candidate.id,), step="plans")


def random_length(rng: random.Random) -> float:
    """Return the length of a region, as likely below as above the geometric middle of SHORTEST and LONGEST."""
    return SHORTEST * float((LONGEST / SHORTEST) ** rng.random())


def sample_first_plan(rng: random.Random, view: View, _parents: Sequence[Member]) -> Proposal:
    """Return the rates of the default rule after random changes of every unit.

    Nothing is measured yet. From many small changes at once, the surrogate learns most about the region that matters.
    If a feature of the rule is not known, the changes are made to the allocation by sensitivity, or to uniform rates.
    If the search learns from searches at other rates, the surrogate knows enough to make a plan near one of their best.
    """
    if any(view.at_other_rates):
        center = moved_to_budget(rng.choice([members[0] for members in view.at_other_rates if members]), view)
        return Proposal(_best(view, center, random_length(rng), abs(rng.gauss(0, 1)), rng), step="plans")
    features = view.features
    rates = features.get("least_damage", features["rate"])
    if DEFAULT_RULE.features <= features.keys():
        rates = DEFAULT_RULE.rates(features)
    return Proposal(tuple(rate + rng.gauss(0, FIRST_SPREAD) for rate in rates), step="plans")


def moved_to_budget(member: Member, view: View) -> tuple[float, ...]:
    """Return the rates of a candidate of another search, each multiplied so that their mean is this search's rate."""
    old = member.candidate.rates
    weights = [unit.parameters for unit in view.units]
    factor = view.spec.rate / max(weighted_mean(old, weights), ROUNDING)
    return view.spec.feasible([rate * factor for rate in old], view.profile.shape)


def _best(view: View, center: Sequence[float], length: float, kappa: float, rng: random.Random) -> tuple[float, ...]:
    """Return the rates that CMA-ES finds for the lowest `mean - kappa * std` of the surrogate."""
    from cmaes import SepCMA  # not at the start: it loads SciPy, which takes a second

    start = np.array(center)
    box = np.stack([start - length, start + length], axis=1)
    optimizer = SepCMA(start, length / 4, bounds=box, seed=rng.getrandbits(32), population_size=GENERATION_SIZE)
    found = lowest_acquisition(view, optimizer, GENERATIONS, kappa, lambda samples: samples)
    return tuple(found.tolist())
