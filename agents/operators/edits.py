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

Schema = dict[str, object]
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


class TradeChoice(BaseModel):
    """A Mutator's choice: numbers of trades."""

    trades: Annotated[list[int], Field(min_length=1, max_length=20)]


class MixChoice(BaseModel):
    """A Crossover's choice: the number of a mix."""

    mix: int


class Choice(BaseModel):
    """A Selector's proposal: numbers of parents."""

    parents: Annotated[list[int], Field(min_length=1, max_length=1000)]


def profile_bounds(view: View) -> tuple[int, int]:
    """The lowest and highest percent that a profile's schema allows: from a third to twice the pruning rate."""
    spec = view.spec
    low = max(spec.lowest_rate, spec.rate / 3)
    high = min(spec.highest_rate, 2 * spec.rate, 0.95)
    return round(100 * low), max(round(100 * high), round(100 * low) + 1)


def anchors(view: View) -> list[int]:
    """The layers at a curve's control points, or those nearest to them."""
    last, steps = len(view.card.shape.layers) - 1, points(view) - 1
    return [round(i * last / steps) for i in range(steps + 1)]


def points(view: View) -> int:
    """Control points of a curve; never more than there are layers."""
    wanted = LAYER_POINTS if view.spec.granularity == "layer" else BLOCK_POINTS
    return max(2, min(wanted, len(view.card.shape.layers)))


def mix_bounds(view: View) -> tuple[int, int]:
    """The fewest and the most layers that a mix's schema lets come from the second parent: a sixth to two thirds."""
    layers = len(view.card.shape.layers)
    return max(1, layers // 6), max(1, 2 * layers // 3)


def profile_schema(view: View, count: int) -> Schema:
    """For `count` profiles: one curve over the layers, or one each for attention and MLP."""
    low, high = profile_bounds(view)
    curve = {"type": "array", "items": _integer(low, high), "minItems": points(view), "maxItems": points(view)}
    curves = {"profile": curve} if view.spec.granularity == "layer" else {"attention": curve, "mlp": curve}
    return _proposals({**_kept(view), **curves}, count)


def mutation_schema(view: View, shown: int, count: int) -> Schema:
    """For `count` mutations of one of `shown` parents."""
    change = {**_range(view), "points": {"type": "integer", "enum": list(STEPS)}}
    if view.spec.granularity == "block":
        change = {"block": {"enum": ["attention", "mlp"]}, **change}
    changes = {"type": "array", "items": _object(change), "minItems": 1, "maxItems": MOST_CHANGES}
    return _proposals({"parent": _integer(1, shown), "changes": changes}, count)


def mix_schema(view: View, shown: int, count: int) -> Schema:
    """For `count` mixes of two different ones of `shown` parents."""
    pairs = [f"{a}+{b}" for a in range(1, shown + 1) for b in range(1, shown + 1) if a != b]
    fewest, most = mix_bounds(view)
    start = _integer(0, len(view.card.shape.layers) - fewest)
    block: Schema = {"block": {"enum": ["both", "attention", "mlp"]}} if view.spec.granularity == "block" else {}
    return _proposals({"parents": {"enum": pairs}, **block, "first": start, "layers": _integer(fewest, most)}, count)


def trades_schema(shown: int, most: int, count: int) -> Schema:
    """For `count` choices of up to `most` of `shown` trades."""
    trades = {"type": "array", "items": _integer(1, shown), "minItems": 1, "maxItems": min(most, shown)}
    return _proposals({"trades": trades}, count)


def mixes_schema(shown: int, count: int) -> Schema:
    """For the numbers of `count` of `shown` mixes."""
    return _proposals({"mix": _integer(1, shown)}, count)


def chosen_of(items: Sequence[T], numbers: Sequence[int], most: int, what: str) -> tuple[T, ...]:
    """The items with these numbers (from 1), each once and at most `most`; raises InvalidReply for one out of range."""
    for number in numbers:
        if not 1 <= number <= len(items):
            raise InvalidReply(f"names a {what} outside 1 to {len(items)}")
    return tuple(items[number - 1] for number in dict.fromkeys(numbers))[:most]


def choice_schema(shown: int, wanted: int) -> Schema:
    """For the numbers of `wanted` of `shown` parents."""
    numbers = {"type": "array", "items": _integer(1, shown), "minItems": min(2, wanted), "maxItems": wanted}
    return _object({"parents": numbers})


def apply_profile(view: View, reply: Profile) -> Proposal:
    """The rates that a profile means; raises InvalidReply with the end of a sentence."""
    curves: dict[BlockKind, list[int] | None]
    curves = {"layer": reply.profile, "attention": reply.attention, "mlp": reply.mlp}
    last = max(1, len(view.card.shape.layers) - 1)
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
    first, last = _checked_range(view, reply.first, min(reply.first + reply.layers, len(view.card.shape.layers)) - 1)
    rates = tuple(
        theirs if first <= unit.layer <= last and _meant(unit.kind, reply) else ours
        for unit, ours, theirs in zip(view.units, base.candidate.rates, donor.candidate.rates, strict=True)
    )
    if rates in (base.candidate.rates, donor.candidate.rates):
        raise InvalidReply("is the same as one of its parents")
    return Proposal(rates, (base.candidate.id, donor.candidate.id))


def apply_choice(population: Sequence[Member], wanted: int, reply: Choice) -> tuple[Member, ...]:
    """`wanted` members, best first: those chosen, and the best of the others in the places left.

    Small models like to repeat a number, which counts once. Raises InvalidReply for fewer than two different ones.
    """
    chosen = {_member(population, number).candidate.id for number in reply.parents[: 2 * wanted]}
    if len(chosen) < min(2, wanted):
        raise InvalidReply("names fewer than two different configurations")
    others = [member for member in population if member.candidate.id not in chosen]
    taken = [member for member in population if member.candidate.id in chosen][:wanted]
    filled = {member.candidate.id for member in taken + others[: wanted - len(taken)]}
    return tuple(member for member in population if member.candidate.id in filled)


def _meant(kind: BlockKind, reply: Change | Mix) -> bool:
    return kind == "layer" or reply.block in (None, "both", kind)


def _checked_range(view: View, first: int, last: int) -> tuple[int, int]:
    """The range, turned round where it was given backwards."""
    first, last = min(first, last), max(first, last)
    highest = len(view.card.shape.layers) - 1
    if first < 0 or last > highest:
        raise InvalidReply(f"names layers outside 0 to {highest}")
    return first, last


def _member(members: Sequence[Member], number: int) -> Member:
    if not 1 <= number <= len(members):
        raise InvalidReply(f"names a configuration outside 1 to {len(members)}")
    return members[number - 1]


def _kept(view: View) -> Schema:
    """Up to a few of the most fragile units; nothing where none is known to be fragile."""
    choices = [unit.name for unit in view.by_fragility[:KEPT_CHOICES]]
    kept: Schema = {"type": "array", "items": {"enum": choices}, "minItems": 0, "maxItems": MOST_KEPT}
    return {"keep": kept} if choices else {}


def _proposals(properties: Schema, count: int) -> Schema:
    items = {"type": "array", "items": _object(properties), "minItems": count, "maxItems": count}
    return _object({"proposals": items})


def _object(properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _integer(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _range(view: View) -> Schema:
    last = len(view.card.shape.layers) - 1
    return {"first": _integer(0, last), "last": _integer(0, last)}
