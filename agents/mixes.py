"""Mixes: something of one parent in another, ranked for the LLM to choose from. Pure.

Either a range of layers, of which a surrogate says what it expects; or what a mutation changed that helped, in another
parent that does not have it: where it helped by half a percent, it may do so there too.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agents.edits import Mix, apply_mix, mix_bounds
from agents.lessons import changes
from agents.view import Member, Proposal, View
from protocol.errors import InvalidReply

DRAWN = 60
"""Ranges of layers that are drawn for one menu."""


@dataclass(frozen=True)
class RankedMix:
    """A mix with what it becomes and what is expected of it, as a fitness."""

    what: str
    """What is taken from the donor, in words."""
    base: Member
    donor: Member
    proposal: Proposal
    expected: float


def mix_menu(view: View, parents: Sequence[Member], rng: random.Random, count: int) -> tuple[RankedMix, ...]:
    """The `count` best mixes, best first, no two of them nearly the same; up to half of them of what helped."""
    helped = _transplants(view, parents, count // 2)
    mixes = (*helped, *_ranges(view, parents, rng)[: count - len(helped)])
    return tuple(sorted(mixes, key=lambda ranked: ranked.expected))


def _transplants(view: View, parents: Sequence[Member], most: int) -> list[RankedMix]:
    """What mutations changed that helped, in the best member and in `parents`; the `most` best, best first."""
    by_id = {member.candidate.id: member for member in (*view.measured, *view.population, *parents)}
    helped = [(donor, before) for donor in by_id.values() for before in _improved(donor, by_id)]
    found = []
    for base in {m.candidate.id: m for m in (*view.population[:1], *parents)}.values():
        has = set(_ancestry(base, by_id))
        found += [
            (_expected(view, base, donor, before), base, donor, before)
            for donor, before in helped
            if donor.candidate.id not in has
        ]
    found.sort(key=lambda each: each[0])
    return [_transplant(view, *each) for each in found[:most]]


def _improved(donor: Member, by_id: dict[str, Member]) -> Iterator[Member]:
    """The one parent of a mutation, where it is known and was worse."""
    who = donor.candidate.provenance
    before = by_id.get(who.parents[0]) if who.agent == "mutator" and len(who.parents) == 1 else None
    if before is not None and before.fitness > donor.fitness:
        yield before


def _ancestry(member: Member, by_id: dict[str, Member]) -> Iterator[str]:
    """The ids of a member and of all that it descends from, as far as they are known."""
    left, seen = [member.candidate.id], set[str]()
    while left:
        id_ = left.pop()
        if id_ not in seen and id_ in by_id:
            seen.add(id_)
            yield id_
            left += by_id[id_].candidate.provenance.parents


def _expected(view: View, base: Member, donor: Member, before: Member) -> float:
    """The fitness of `base` if what `donor` has changed of `before` helps it as much."""
    if view.spec.measure == "kl":
        return max(base.fitness + donor.fitness - before.fitness, 0.0)
    return base.fitness * donor.fitness / before.fitness


def _transplant(view: View, expected: float, base: Member, donor: Member, before: Member) -> RankedMix:
    old, new = before.candidate.rates, donor.candidate.rates
    rates = (rate + b - a for rate, a, b in zip(base.candidate.rates, old, new, strict=True))
    return RankedMix(
        what=changes(view, old, new) or "small changes",
        base=base,
        donor=donor,
        proposal=Proposal(tuple(min(max(r, 0.0), 1.0) for r in rates), (base.candidate.id, donor.candidate.id)),
        expected=expected,
    )


def _ranges(view: View, parents: Sequence[Member], rng: random.Random) -> list[RankedMix]:
    """Ranges of layers of one parent in another, drawn at random; best first, no two of them nearly the same."""
    found: dict[tuple[float, ...], RankedMix] = {}
    for _ in range(DRAWN):
        mix = _draw(view, parents, rng)
        try:
            proposal = apply_mix(view, parents, mix)
        except InvalidReply:  # nothing is mixed: the parents are alike there
            continue
        rates = on_budget(view, proposal.rates)
        base, donor = (parents[int(number) - 1] for number in mix.parents.split("+"))
        blocks = "layers" if mix.block in (None, "both") else f"{mix.block} of layers"
        found.setdefault(
            tuple(round(rate, 2) for rate in rates),
            RankedMix(
                what=f"{blocks} {mix.first} to {mix.first + mix.layers - 1}",
                base=base,
                donor=donor,
                proposal=proposal,
                expected=view.surrogate.fitness_of_rates(rates),
            ),
        )
    return sorted(found.values(), key=lambda ranked: ranked.expected)


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
    start = rng.randint(0, len(view.card.shape.layers) - layers)
    block = rng.choice(("both", "attention", "mlp")) if view.spec.granularity == "block" else None
    return Mix.model_validate({"parents": f"{first}+{second}", "block": block, "first": start, "layers": layers})
