"""The `edits` replies: small decisions with whole numbers, their JSON schemas, and the rates that they mean. Pure.

All numbers are integers or enums, because a grammar made from a schema (llama.cpp's) keeps to integer ranges but not
to ranges of decimals. The schema's ranges are the rails for a small model; what is checked here is only what would
make no sense.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field

from agents.operators.genetic import interpolate
from agents.population.view import Member, Proposal, View
from protocol.errors import InvalidReply
from protocol.plans.shape import BlockKind

T = TypeVar("T")
Percent = Annotated[int, Field(ge=0, le=100)]
Curve = Annotated[list[Percent], Field(min_length=2, max_length=12)]

LAYER_POINTS = 6
BLOCK_POINTS = 5
KEPT_CHOICES = 6
MOST_KEPT = 3
MOST_CHANGES = 2
STEPS = (-20, -15, -10, -5, 5, 10, 15, 20)


class Profile(BaseModel):
    """An Initializer's proposal: rates in percent at evenly spaced depths, and units that stay whole."""

    keep: list[str] = Field(default_factory=list, max_length=20)
    profile: Curve | None = None
    attention: Curve | None = None
    mlp: Curve | None = None


class Change(BaseModel):
    """So many percent points more (or less) for the layers `first` to `last`."""

    block: Literal["attention", "mlp"] | None = None
    first: int
    last: int
    points: Annotated[int, Field(ge=-100, le=100)]


class Mutation(BaseModel):
    """A Mutator's proposal: one parent and a few changes."""

    parent: int
    changes: Annotated[list[Change], Field(min_length=1, max_length=8)]


class Mix(BaseModel):
    """A Crossover's proposal: `parents` is "1+3"; so many `layers`, from `first` on, come from the second of them.

    A number of layers, and not the last one, so that a schema can rule out mixes that are next to nothing.
    """

    parents: Annotated[str, Field(max_length=20)]
    block: Literal["attention", "mlp", "both"] | None = None
    first: int
    layers: Annotated[int, Field(ge=1)]


def profile_bounds(view: View) -> tuple[int, int]:
    """The lowest and highest percent that a profile's schema allows: from a third to twice the pruning rate."""
    spec = view.spec
    low = max(spec.lowest_rate, spec.rate / 3)
    high = min(spec.highest_rate, 2 * spec.rate, 0.95)
    return round(100 * low), max(round(100 * high), round(100 * low) + 1)


def anchors(view: View) -> list[int]:
    """The layers at a curve's control points, or those nearest to them."""
    last, steps = len(view.profile.shape.layers) - 1, points(view) - 1
    return [round(i * last / steps) for i in range(steps + 1)]


def points(view: View) -> int:
    """Control points of a curve; never more than there are layers."""
    wanted = LAYER_POINTS if view.spec.granularity == "layer" else BLOCK_POINTS
    return max(2, min(wanted, len(view.profile.shape.layers)))


def mix_bounds(view: View) -> tuple[int, int]:
    """The fewest and the most layers that a mix's schema lets come from the second parent: a sixth to two thirds."""
    layers = len(view.profile.shape.layers)
    return max(1, layers // 6), max(1, 2 * layers // 3)


def apply_profile(view: View, reply: Profile) -> Proposal:
    """The rates that a profile means; raises InvalidReply with the end of a sentence."""
    curves: dict[BlockKind, list[int] | None]
    curves = {"layer": reply.profile, "attention": reply.attention, "mlp": reply.mlp}
    last = max(1, len(view.profile.shape.layers) - 1)
    rates = []
    for unit in view.units:
        curve = curves[unit.kind]
        if curve is None:
            raise InvalidReply(f'has no "{"profile" if unit.kind == "layer" else unit.kind}"')
        rate = interpolate(curve, unit.layer / last) / 100
        rates.append(view.spec.lowest_rate if unit.name in reply.keep else rate)
    return Proposal(tuple(rates))


def apply_mutation(view: View, parents: Sequence[Member], reply: Mutation) -> Proposal:
    """The parent's rates with the changes; raises InvalidReply with the end of a sentence."""
    parent = _member(parents, reply.parent)
    rates = list(parent.candidate.rates)
    for change in reply.changes:
        first, last = _checked_range(view, change.first, change.last)
        touched = [i for i, unit in enumerate(view.units) if first <= unit.layer <= last and _meant(unit.kind, change)]
        for i in touched:
            rates[i] = min(max(rates[i] + change.points / 100, 0.0), 1.0)
    if tuple(rates) == parent.candidate.rates:
        raise InvalidReply("changes nothing")
    return Proposal(tuple(rates), (parent.candidate.id,))


def apply_mix(view: View, parents: Sequence[Member], reply: Mix) -> Proposal:
    """The first parent's rates, with a range from the second; raises InvalidReply with the end of a sentence."""
    numbers = reply.parents.split("+")
    if len(numbers) != 2 or not all(n.isascii() and n.isdigit() for n in numbers) or int(numbers[0]) == int(numbers[1]):
        raise InvalidReply('needs two different numbers in "parents", such as "1+2"')
    base, donor = (_member(parents, int(n)) for n in numbers)
    first, last = _checked_range(view, reply.first, min(reply.first + reply.layers, len(view.profile.shape.layers)) - 1)
    rates = tuple(
        theirs if first <= unit.layer <= last and _meant(unit.kind, reply) else ours
        for unit, ours, theirs in zip(view.units, base.candidate.rates, donor.candidate.rates, strict=True)
    )
    if rates in (base.candidate.rates, donor.candidate.rates):
        raise InvalidReply("is the same as one of its parents")
    return Proposal(rates, (base.candidate.id, donor.candidate.id))


def _meant(kind: BlockKind, reply: Change | Mix) -> bool:
    return kind == "layer" or reply.block in (None, "both", kind)


def _checked_range(view: View, first: int, last: int) -> tuple[int, int]:
    """The range, turned round where it was given backwards."""
    first, last = min(first, last), max(first, last)
    highest = len(view.profile.shape.layers) - 1
    if first < 0 or last > highest:
        raise InvalidReply(f"names layers outside 0 to {highest}")
    return first, last


def _member(members: Sequence[Member], number: int) -> Member:
    if not 1 <= number <= len(members):
        raise InvalidReply(f"names a configuration outside 1 to {len(members)}")
    return members[number - 1]
