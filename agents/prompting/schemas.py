"""JSON schemas of the replies that agents ask for, and the choices that replies make."""

from collections.abc import Sequence
from typing import Annotated, TypeVar

from pydantic import BaseModel, Field

from agents.operators.edits import (
    KEPT_CHOICES,
    MAX_CHANGES,
    MAX_KEPT,
    STEPS,
    control_points,
    member_at,
    mix_bounds,
    profile_bounds,
)
from agents.population.view import Member, View
from protocol.errors import InvalidReply
from protocol.plans.candidate import Step

Schema = dict[str, object]
MIXED = "mixed"
"""The Selector's choice that lets each offspring decide what makes it."""
T = TypeVar("T")


class MoveChoice(BaseModel):
    """A Mutator's choice: numbers of moves."""

    moves: Annotated[list[int], Field(min_length=1, max_length=20)]


class MixChoice(BaseModel):
    """A Crossover's choice: the number of a mix."""

    mix: int


class Choice(BaseModel):
    """A Selector's choice: numbers of parents, and what makes the offspring; anything unknown lets each one decide."""

    parents: Annotated[list[int], Field(min_length=1, max_length=1000)]
    step: str | None = None


def lists_schema(units: int, count: int) -> Schema:
    """Return the schema of `count` configurations with a rate for each of `units`."""
    rates = _array({"type": "number", "minimum": 0, "maximum": 1}, units, units)
    return _object({"configurations": _array(rates, count, count)})


def profile_schema(view: View, count: int) -> Schema:
    """Return the schema of `count` profiles: one curve over the layers, or one each for attention and MLP."""
    low, high = profile_bounds(view)
    points = control_points(view)
    curve = _array(_integer(low, high), points, points)
    curves = {"profile": curve} if view.spec.granularity == "layer" else {"attention": curve, "mlp": curve}
    return _proposals({**_kept(view), **curves}, count)


def mutation_schema(view: View, shown: int, count: int) -> Schema:
    """Return the schema of `count` mutations, each of one of `shown` parents."""
    change = {**_range(view), "points": {"type": "integer", "enum": list(STEPS)}}
    if view.spec.granularity == "block":
        change = {"block": {"enum": ["attention", "mlp"]}, **change}
    return _proposals({"parent": _integer(1, shown), "changes": _array(_object(change), 1, MAX_CHANGES)}, count)


def mix_schema(view: View, shown: int, count: int) -> Schema:
    """Return the schema of `count` mixes, each of two different parents out of `shown`."""
    pairs = [f"{a}+{b}" for a in range(1, shown + 1) for b in range(1, shown + 1) if a != b]
    fewest, most = mix_bounds(view)
    start = _integer(0, len(view.profile.shape.layers) - fewest)
    block: Schema = {"block": {"enum": ["both", "attention", "mlp"]}} if view.spec.granularity == "block" else {}
    return _proposals({"parents": {"enum": pairs}, **block, "first": start, "layers": _integer(fewest, most)}, count)


def moves_schema(shown: int, max_moves: int, count: int) -> Schema:
    """Return the schema of `count` choices, each of up to `max_moves` of `shown` moves."""
    return _proposals({"moves": _array(_integer(1, shown), 1, min(max_moves, shown))}, count)


def mixes_schema(shown: int, count: int) -> Schema:
    """Return the schema of `count` choices, each the number of one of `shown` mixes."""
    return _proposals({"mix": _integer(1, shown)}, count)


def rules_schema(pattern: str, count: int) -> Schema:
    """Return the schema of `count` rules, each a text that matches `pattern`."""
    return _proposals({"rule": {"type": "string", "pattern": pattern}}, count)


def pick(items: Sequence[T], numbers: Sequence[int], max_items: int, name: str) -> tuple[T, ...]:
    """Return the items with these numbers (from 1), each once and at most `max_items`.

    Raise InvalidReply for a number out of range; `name` is the word for an item in that message.
    """
    for number in numbers:
        if not 1 <= number <= len(items):
            raise InvalidReply(f"names a {name} outside 1 to {len(items)}")
    return tuple(items[number - 1] for number in dict.fromkeys(numbers))[:max_items]


def choice_schema(shown: int, wanted: int, steps: Sequence[Step]) -> Schema:
    """Return the schema of a choice of up to `wanted` out of `shown` parents, by number, and of one of the `steps`."""
    chosen: Schema = {"step": {"enum": [*steps, MIXED]}} if steps else {}
    return _object({"parents": _array(_integer(1, shown), min(2, wanted), wanted), **chosen})


def apply_choice(population: Sequence[Member], wanted: int, reply: Choice) -> tuple[Member, ...]:
    """Return `wanted` members, best first: the chosen members and, if they are too few, the best of the others.

    Small models often repeat a number, which then counts once. Raise InvalidReply for fewer than two different numbers.
    """
    chosen = {member_at(population, number).candidate.id for number in reply.parents[: 2 * wanted]}
    if len(chosen) < min(2, wanted):
        raise InvalidReply("names fewer than two different configurations")
    others = [member for member in population if member.candidate.id not in chosen]
    taken = [member for member in population if member.candidate.id in chosen][:wanted]
    filled = {member.candidate.id for member in taken + others[: wanted - len(taken)]}
    return tuple(member for member in population if member.candidate.id in filled)


def _kept(view: View) -> Schema:
    """Return the property `keep`, a few of the most fragile units; empty if no sensitivity is known."""
    choices = [unit.name for unit in view.by_fragility[:KEPT_CHOICES]]
    return {"keep": _array({"enum": choices}, 0, MAX_KEPT)} if choices else {}


def _proposals(properties: Schema, count: int) -> Schema:
    return _object({"proposals": _array(_object(properties), count, count)})


def _array(items: Schema, fewest: int, most: int) -> Schema:
    return {"type": "array", "items": items, "minItems": fewest, "maxItems": most}


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
    last = len(view.profile.shape.layers) - 1
    return {"first": _integer(0, last), "last": _integer(0, last)}
