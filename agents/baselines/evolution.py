"""EvoPress (Sieberling et al., 2024) on our units: level switches make offspring of one parent, the best so far.

A switch takes a level from one unit and gives it to another, which keeps the budget. A level is a share of a decoder
layer's parameters. Attention has few levels, one for each number of heads that can be kept. If a switch involves
attention, attention goes to its next level, and the other unit changes by the same number of parameters.
"""

import random
from collections.abc import Sequence

from agents.population.view import Member, Proposal, View
from protocol.plans.plan import parameters_to_next_level, unit_bounds
from protocol.plans.rates import ROUNDING

LEVELS = (0.025, 0.05, 0.1)
"""Sizes of a level, as shares of a decoder layer. EvoPress has one size. With a few hundred evaluations for the whole
search, the small size alone is too slow, and the large size alone is too coarse."""
MAX_SWITCHES = 3
MAX_TRIES = 32
"""Maximum number of random pairs of units that are tried until a switch is possible."""


def sample_switches(rng: random.Random, view: View, parents: Sequence[Member]) -> Proposal:
    """Return the first parent after one to three level switches.

    The number of switches is the smaller of two random numbers, so it is mostly one.
    """
    parent = parents[0].candidate
    rates = list(parent.rates)
    spec = view.spec
    bounds = unit_bounds(view.profile.shape, spec.granularity, spec.lowest_rate, spec.highest_rate)
    for _ in range(min(rng.randint(1, MAX_SWITCHES), rng.randint(1, MAX_SWITCHES))):
        switches = (_switch(rng, view, rates, bounds) for _ in range(MAX_TRIES))
        for i, rate in next(filter(None, switches), {}).items():
            rates[i] = rate
    return Proposal(tuple(rates), (parent.id,))


def _switch(
    rng: random.Random, view: View, rates: Sequence[float], bounds: Sequence[tuple[float, float]]
) -> dict[int, float]:
    """Return the rates of two random units after a level is shifted from one to the other; empty if that is impossible.

    A switch that only one of the two units can make is left out, because projection would spread the difference over
    all other units.
    """
    shape, units = view.profile.shape, view.units
    loser, taker = rng.sample(range(len(rates)), 2)
    signs = {loser: 1, taker: -1}
    layer = shape.layer_parameters(units[loser].layer)
    level = rng.choice(LEVELS) * layer
    steps = {
        i: parameters_to_next_level(shape, units[i], rates[i], sign)
        for i, sign in signs.items()
        if units[i].kind == "attention"
    }
    if steps:
        level = min(steps.values())
        if level == 0 or max(steps.values()) - level > LEVELS[0] / 2 * layer:
            return {}
    after = {i: rates[i] + sign * steps.get(i, level) / units[i].parameters for i, sign in signs.items()}
    within = all(bounds[i][0] - ROUNDING <= rate <= bounds[i][1] + ROUNDING for i, rate in after.items())
    return after if within else {}
