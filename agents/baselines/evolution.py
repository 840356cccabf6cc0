"""EvoPress (Sieberling et al., 2024) on our units: one parent, the best so far, and offspring by level switches.

A switch takes a level from one unit and gives it to another, so the budget stays. A level is a share of a decoder
layer's parameters. Attention has few levels, one for each number of heads that can stay: where a switch meets it, the
level is its next one, and the other side takes as many parameters.
"""

import random
from collections.abc import Sequence
from functools import partial

from agents.baselines.classical import draw_all
from agents.population.view import Member, Proposal, Submit, View
from protocol.plans.plan import parameters_to_next_level, unit_bounds
from protocol.plans.rates import ROUNDING

LEVELS = (0.025, 0.05, 0.1)
"""Sizes of a level, as shares of a decoder layer. EvoPress has one size; with a few hundred evaluations for the whole
search the small one alone is too slow, and the large one alone too coarse."""
MOST_SWITCHES = 3
MOST_DRAWS = 32
"""Pairs of units that are drawn for a switch, until there is one that can be made."""


class EvolutionMutator:
    """The (1 + λ) search: offspring of the best candidate alone."""

    async def propose(self, view: View, parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Get `count` offspring of the first of `parents` accepted; returns how many were."""
        if not parents:
            return 0
        return await draw_all("mutator", view, count, submit, partial(switched, view=view, parent=parents[0]))


def switched(rng: random.Random, view: View, parent: Member) -> Proposal:
    """The parent with one to three level switches, mostly one (the smaller of two draws)."""
    rates = list(parent.candidate.rates)
    spec = view.spec
    bounds = unit_bounds(view.profile.shape, spec.granularity, spec.lowest_rate, spec.highest_rate)
    for _ in range(min(rng.randint(1, MOST_SWITCHES), rng.randint(1, MOST_SWITCHES))):
        draws = (_switch(rng, view, rates, bounds) for _ in range(MOST_DRAWS))
        for i, rate in next(filter(None, draws), {}).items():
            rates[i] = rate
    return Proposal(tuple(rates), (parent.candidate.id,))


def _switch(
    rng: random.Random, view: View, rates: Sequence[float], bounds: Sequence[tuple[float, float]]
) -> dict[int, float]:
    """Two units' rates after a level has gone from one to the other; empty where one has none to lose or to take.

    Half a switch is none: all other units would have to make up for it.
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
