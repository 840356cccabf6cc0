"""Mixes: a range of layers of one parent in another, ranked by a surrogate for the LLM to choose from. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from agents.operators.edits import Mix, apply_mix, mix_bounds
from agents.operators.surrogate import surrogate_of
from agents.population.view import Member, Proposal, View
from protocol.errors import InvalidReply

DRAWN = 60
"""Mixes that are drawn for one menu."""


@dataclass(frozen=True)
class RankedMix:
    """A mix with what it becomes and what the surrogate expects of it, as a fitness."""

    mix: Mix
    proposal: Proposal
    expected: float


def mix_menu(view: View, parents: Sequence[Member], rng: random.Random, count: int) -> tuple[RankedMix, ...]:
    """The `count` best of some mixes drawn at random, best first; no two of them nearly the same, and none measured.

    What was measured ranks high, and an LLM that is asked to choose would choose what is then refused.
    """
    surrogate = surrogate_of(view)
    found: dict[tuple[float, ...], RankedMix] = {}
    for _ in range(DRAWN):
        mix = _draw(view, parents, rng)
        try:
            proposal = apply_mix(view, parents, mix)
        except InvalidReply:  # nothing is mixed: the parents are alike there
            continue
        rates = on_budget(view, proposal.rates)
        found.setdefault(
            tuple(round(rate, 2) for rate in rates),
            RankedMix(mix, proposal, surrogate.fitness_of_rates(rates)),
        )
    ranked = sorted(found.values(), key=lambda ranked: ranked.expected)
    return tuple(islice((each for each in ranked if _is_new(view, each.proposal.rates)), count))


def _is_new(view: View, rates: Sequence[float]) -> bool:
    id_ = view.candidate_id(rates)
    return id_ is not None and view.fitness_of(id_) is None


def on_budget(view: View, rates: Sequence[float]) -> tuple[float, ...]:
    """About what projection makes of `rates`: each MLP (or layer) loses so much more. For guesses, not for plans."""
    units = view.units
    movable = sum(unit.parameters for unit in units if unit.kind != "attention")
    total = sum(unit.parameters for unit in units)
    missing = view.spec.rate * total - sum(rate * unit.parameters for rate, unit in zip(rates, units, strict=True))
    return tuple(
        rate if unit.kind == "attention" else min(max(rate + missing / movable, 0.0), 1.0)
        for rate, unit in zip(rates, units, strict=True)
    )


def _draw(view: View, parents: Sequence[Member], rng: random.Random) -> Mix:
    first, second = rng.sample(range(1, len(parents) + 1), 2)
    fewest, most = mix_bounds(view)
    layers = rng.randint(fewest, most)
    start = rng.randint(0, len(view.profile.shape.layers) - layers)
    block = rng.choice(("both", "attention", "mlp")) if view.spec.granularity == "block" else None
    return Mix.model_validate({"parents": f"{first}+{second}", "block": block, "first": start, "layers": layers})
