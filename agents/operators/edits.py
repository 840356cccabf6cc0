"""The `edits` replies: small decisions in whole numbers, and the rates that they stand for. Pure.

All numbers are integers or enums, because the grammar that llama.cpp makes of a schema enforces ranges of integers but
not of decimals. The narrow ranges of the schema guide a small model. This file refuses only values that make no sense.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from agents.operators.genetic import interpolate
from agents.population.view import Member, Proposal, View
from protocol.errors import InvalidReply
from protocol.plans.shape import BlockKind

Percent = Annotated[int, Field(ge=0, le=100)]
Curve = Annotated[list[Percent], Field(min_length=2, max_length=12)]

LAYER_POINTS = 6
BLOCK_POINTS = 5
KEPT_CHOICES = 6
MAX_KEPT = 3
MAX_CHANGES = 2
STEPS = (-20, -15, -10, -5, 5, 10, 15, 20)


class Profile(BaseModel):
    """An Initializer's proposal: rates in percent at evenly spaced depths, and units that are not pruned."""

    keep: list[str] = Field(default_factory=list, max_length=20)
    profile: Curve | None = None
    attention: Curve | None = None
    mlp: Curve | None = None


class Change(BaseModel):
    """A change of the rates of the layers `first` to `last` by `points` percentage points."""

    block: Literal["attention", "mlp"] | None = None
    first: int
    last: int
    points: Annotated[int, Field(ge=-100, le=100)]


class Mutation(BaseModel):
    """A Mutator's proposal: one parent and a few changes."""

    parent: int
    changes: Annotated[list[Change], Field(min_length=1, max_length=8)]


class Mix(BaseModel):
    """A Crossover's proposal. `parents` "1+3" is parent 1 with `layers` layers, from `first` on, of parent 3.

    The range is given by its number of layers and not by its last layer, so that a schema can exclude mixes of very few
    layers.
    """

    parents: Annotated[str, Field(max_length=20)]
    block: Literal["attention", "mlp", "both"] | None = None
    first: int
    layers: Annotated[int, Field(ge=1)]


def profile_bounds(view: View) -> tuple[int, int]:
    """Return the lowest and highest percent that a profile may have: from a third to twice the pruning rate."""
    spec = view.spec
    low = max(spec.lowest_rate, spec.rate / 3)
    high = min(spec.highest_rate, 2 * spec.rate, 0.95)
    return round(100 * low), max(round(100 * high), round(100 * low) + 1)


def anchor_layers(view: View) -> list[int]:
    """Return the layers nearest to a curve's control points."""
    last, steps = len(view.profile.shape.layers) - 1, control_points(view) - 1
    return [round(i * last / steps) for i in range(steps + 1)]


def control_points(view: View) -> int:
    """Return the number of control points of a curve, at most the number of layers."""
    wanted = LAYER_POINTS if view.spec.granularity == "layer" else BLOCK_POINTS
    return max(2, min(wanted, len(view.profile.shape.layers)))


def mix_bounds(view: View) -> tuple[int, int]:
    """Return the minimum and maximum number of layers from the second parent: a sixth and two thirds of all."""
    layers = len(view.profile.shape.layers)
    return max(1, layers // 6), max(1, 2 * layers // 3)


def apply_profile(view: View, reply: Profile) -> Proposal:
    """Return the rates of a profile. Raise InvalidReply, whose message completes "Proposal 2 …"."""
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
    """Return the parent's rates with the changes. Raise InvalidReply, whose message completes "Proposal 2 …"."""
    parent = member_at(parents, reply.parent)
    rates = list(parent.candidate.rates)
    for change in reply.changes:
        first, last = _checked_range(view, change.first, change.last)
        changed = [
            i for i, unit in enumerate(view.units) if first <= unit.layer <= last and _concerns(change, unit.kind)
        ]
        for i in changed:
            rates[i] = min(max(rates[i] + change.points / 100, 0.0), 1.0)
    if tuple(rates) == parent.candidate.rates:
        raise InvalidReply("changes nothing")
    return Proposal(tuple(rates), (parent.candidate.id,))


def apply_mix(view: View, parents: Sequence[Member], reply: Mix) -> Proposal:
    """Return the first parent's rates with a range of layers from the second parent.

    Raise InvalidReply, whose message completes "Proposal 2 …".
    """
    numbers = reply.parents.split("+")
    if len(numbers) != 2 or not all(n.isascii() and n.isdigit() for n in numbers) or int(numbers[0]) == int(numbers[1]):
        raise InvalidReply('needs two different numbers in "parents", such as "1+2"')
    base, donor = (member_at(parents, int(n)) for n in numbers)
    first, last = _checked_range(view, reply.first, min(reply.first + reply.layers, len(view.profile.shape.layers)) - 1)
    rates = tuple(
        theirs if first <= unit.layer <= last and _concerns(reply, unit.kind) else ours
        for unit, ours, theirs in zip(view.units, base.candidate.rates, donor.candidate.rates, strict=True)
    )
    if rates in (base.candidate.rates, donor.candidate.rates):
        raise InvalidReply("is the same as one of its parents")
    return Proposal(rates, (base.candidate.id, donor.candidate.id))


def _concerns(reply: Change | Mix, kind: BlockKind) -> bool:
    return kind == "layer" or reply.block in (None, "both", kind)


def _checked_range(view: View, first: int, last: int) -> tuple[int, int]:
    """Return the range, swapped if it was given backwards."""
    first, last = min(first, last), max(first, last)
    highest = len(view.profile.shape.layers) - 1
    if first < 0 or last > highest:
        raise InvalidReply(f"names layers outside 0 to {highest}")
    return first, last


def member_at(members: Sequence[Member], number: int) -> Member:
    """Return a member by its number, from 1. Raise InvalidReply, whose message completes "Proposal 2 …"."""
    if not 1 <= number <= len(members):
        raise InvalidReply(f"names a configuration outside 1 to {len(members)}")
    return members[number - 1]
