"""Mixes: one parent with a range of layers from another. The surrogate ranks them, and the LLM chooses. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from agents.operators.edits import Mix, apply_mix, mix_bounds
from agents.operators.surrogate import surrogate_of
from agents.population.view import Member, Proposal, View
from protocol.errors import InvalidReply

SAMPLED = 60
"""Number of random mixes from which one menu is made."""


@dataclass(frozen=True)
class RankedMix:
    """A mix with the proposal that it makes and the fitness that the surrogate predicts."""

    mix: Mix
    proposal: Proposal
    predicted: float


def mix_menu(view: View, parents: Sequence[Member], rng: random.Random, count: int) -> tuple[RankedMix, ...]:
    """Return the `count` best of SAMPLED random mixes, best first; fewer if fewer are new.

    Of nearly equal mixes, only one is returned. Measured mixes are left out: they would rank high, and if the LLM chose
    them, they would be refused.
    """
    surrogate = surrogate_of(view)
    found: dict[tuple[float, ...], RankedMix] = {}
    for _ in range(SAMPLED):
        mix = _sample(view, parents, rng)
        try:
            proposal = apply_mix(view, parents, mix)
        except InvalidReply:  # the parents do not differ in that range
            continue
        rates = on_budget(view, proposal.rates)
        found.setdefault(
            tuple(round(rate, 2) for rate in rates),
            RankedMix(mix, replace(proposal, step="moves"), surrogate.predict_fitness(rates)),
        )
    ranked = sorted(found.values(), key=lambda ranked: ranked.predicted)
    return tuple(islice((each for each in ranked if _is_new(view, each.proposal.rates)), count))


def _is_new(view: View, rates: Sequence[float]) -> bool:
    id_ = view.candidate_id(rates)
    return id_ is not None and view.fitness_of(id_) is None


def on_budget(view: View, rates: Sequence[float]) -> tuple[float, ...]:
    """Return `rates` after an approximate projection, which changes the rate of every MLP (or layer) equally.

    It is accurate enough for predictions, but not for plans.
    """
    units = view.units
    movable = sum(unit.parameters for unit in units if unit.kind != "attention")
    total = sum(unit.parameters for unit in units)
    missing = view.spec.rate * total - sum(rate * unit.parameters for rate, unit in zip(rates, units, strict=True))
    return tuple(
        rate if unit.kind == "attention" else min(max(rate + missing / movable, 0.0), 1.0)
        for rate, unit in zip(rates, units, strict=True)
    )


def _sample(view: View, parents: Sequence[Member], rng: random.Random) -> Mix:
    first, second = rng.sample(range(1, len(parents) + 1), 2)
    fewest, most = mix_bounds(view)
    layers = rng.randint(fewest, most)
    start = rng.randint(0, len(view.profile.shape.layers) - layers)
    block = rng.choice(("both", "attention", "mlp")) if view.spec.granularity == "block" else None
    return Mix.model_validate({"parents": f"{first}+{second}", "block": block, "first": start, "layers": layers})
