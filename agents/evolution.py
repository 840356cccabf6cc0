"""EvoPress (Sieberling et al., 2024) on our units: one parent, the best so far, and offspring by level switches.

A switch takes a level from one unit and gives it to another, so the budget stays. A level is a share of a decoder
layer's parameters. Attention has few levels, one for each number of heads that can stay: where a switch meets it, the
level is its next one, and the MLP on the other side takes as many parameters.
"""

import random
from collections.abc import Sequence
from functools import partial

from agents.classical import draw_all
from agents.view import Member, Proposal, Submit, View
from protocol.plan import next_level

LEVELS = (0.025, 0.05, 0.1)
"""Sizes of a level, as shares of a decoder layer. EvoPress has one size; with a few hundred evaluations for the whole
search the small one alone is too slow, and the large one alone too coarse."""
MOST_SWITCHES = 3


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
    for _ in range(min(rng.randint(1, MOST_SWITCHES), rng.randint(1, MOST_SWITCHES))):
        _switch(rng, view, rates)
    return Proposal(tuple(rates), (parent.candidate.id,))


def _switch(rng: random.Random, view: View, rates: list[float]) -> None:
    """Move one level between two units; nothing where one of them has none to lose or to take."""
    loser, taker = rng.sample(range(len(rates)), 2)
    level = rng.choice(LEVELS) * view.card.shape.layer_parameters(view.units[loser].layer)
    changed: dict[int, float] = {}
    # Attention first: how much it can move decides what the MLP on the other side does.
    for i in sorted((loser, taker), key=lambda i: view.units[i].kind != "attention"):
        unit, sign = view.units[i], 1 if i == loser else -1
        if unit.kind == "attention":
            step = next_level(view.card.shape, unit.layer, rates[i], sign)
            if step is None:
                return
            level = abs(step - rates[i]) * unit.parameters
            changed[i] = step
        else:
            changed[i] = min(max(rates[i] + sign * level / unit.parameters, 0.0), 1.0)
    for i, rate in changed.items():
        rates[i] = rate
