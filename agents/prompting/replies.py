"""Reply text -> pruning rates or choices, or InvalidReply with the sentence that the LLM gets back. Pure.

What is tolerated, and nothing else: prose and code fences around the JSON, a list wrapped in an object, a list given
as an object with one entry per unit, more configurations than asked for (the first count), and a mean that is off by
up to MEAN_TOLERANCE (projection repairs it; local models are always off). Numbers are never guessed.

Sentences carry numbers and our own words only: nothing that a model wrote is quoted back to it. The time that any text
takes is linear in its length, which is bounded.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from agents.llm.completion import LONGEST_REPLY
from protocol.errors import InvalidReply
from protocol.plans.rates import weighted_mean
from protocol.plans.shape import Unit

MEAN_TOLERANCE = 0.2
"""How far the mean of a list may be from the pruning rate asked for, in rate."""
DEEPEST_NESTING = 20
MOST_BLOCKS = 2_000
"""Brackets that may begin a block of JSON, and lists or proposals that are looked at, in one reply."""
MOST_READINGS = 20
"""Times that the text may be read on account of blocks that turn out to be broken: each is read anew from its next
bracket, so that a hostile text of blocks without end could keep us busy for hours."""

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_RATES = TypeAdapter(list[Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]])
_OPENING = re.compile(r"[\[{]")
_NOT_WORD = re.compile(r"[^a-z0-9]+")
_DECODER = json.JSONDecoder()
_TOO_DEEP = "Your reply is nested too deep."


@dataclass(frozen=True)
class Parsed(Generic[T]):
    """What a reply holds that can be used, and a sentence for each part that cannot."""

    good: tuple[T, ...]
    names: tuple[str, ...]
    """What the LLM is told that each of the good ones is: `Configuration 2`."""
    problems: tuple[str, ...] = ()


def json_blocks(text: str) -> list[object]:
    """The outermost JSON arrays and objects in `text`, in order; of a broken one, the whole ones inside it.

    Raises InvalidReply for text that is too long, nested too deep, too broken, or holds none.
    """
    if len(text) > LONGEST_REPLY:
        raise InvalidReply(f"Your reply is longer than {LONGEST_REPLY} characters.")
    if not text.strip():
        raise InvalidReply("Your reply is empty.")
    blocks: list[object] = []
    position = tried = wasted = 0
    while match := _OPENING.search(text, position):
        tried += 1
        if tried > MOST_BLOCKS or wasted > MOST_READINGS * len(text):
            raise InvalidReply("Your reply holds too many brackets that are no JSON: give the JSON and nothing else.")
        try:
            value, position = _DECODER.raw_decode(text, match.start())
        except RecursionError:
            raise InvalidReply(_TOO_DEEP) from None
        except ValueError as error:
            wasted += _read_until(error, text) - match.start()
            position = match.start() + 1
            continue
        if _is_deeper(value, DEEPEST_NESTING):
            raise InvalidReply(_TOO_DEEP)
        blocks.append(value)
    if not blocks:
        raise InvalidReply("Your reply holds no JSON.")
    return blocks


def _read_until(error: ValueError, text: str) -> int:
    """How far the decoder has read the text; to its end where it does not say (a string without end, a huge number)."""
    if isinstance(error, json.JSONDecodeError) and not error.msg.startswith("Unterminated"):
        return error.pos
    return len(text)


def _is_deeper(value: object, levels: int) -> bool:
    if not isinstance(value, list | dict):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(each, levels - 1) for each in inner)


def parse_lists(text: str, units: Sequence[Unit], mean: float, count: int) -> Parsed[tuple[float, ...]]:
    """Up to `count` lists of one rate per unit. Raises InvalidReply where not one can be used."""
    good: dict[tuple[float, ...], str] = {}
    problems: list[str] = []
    lists = _lists_in(json_blocks(text), [_plain(unit.name) for unit in units])
    for number, found in enumerate(islice(lists, MOST_BLOCKS), start=1):
        if len(good) == count:
            break
        try:
            rates = check_rates(found, units, mean)
        except InvalidReply as error:
            problems.append(f"Configuration {number} {error}.")
            continue
        if rates in good:
            problems.append(f"Configuration {number} is not distinct: it repeats another.")
            continue
        good[rates] = f"Configuration {number}"
    if not good:
        raise InvalidReply(" ".join(problems[:5]) or f"Your reply holds no list of {len(units)} numbers.")
    return Parsed(tuple(good), tuple(good.values()), tuple(problems))


def check_rates(found: object, units: Sequence[Unit], mean: float) -> tuple[float, ...]:
    """`found` as rates; raises InvalidReply with the end of a sentence that begins "Configuration 2".

    The `mean` is that of the parameters: units count by their size.
    """
    if isinstance(found, list) and len(found) != len(units):
        raise InvalidReply(f"has {len(found)} numbers instead of {len(units)}")
    try:
        rates = tuple(_RATES.validate_python(found))
    except ValidationError as error:
        place = error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"]
        which = f"number {place[0] + 1}" if place and isinstance(place[0], int) else "it"
        raise InvalidReply(f"is not made of decimals between 0 and 1: look at {which}") from None
    average = weighted_mean(rates, [unit.parameters for unit in units])
    if abs(average - mean) > MEAN_TOLERANCE:
        raise InvalidReply(f"has the average {average:.5f} instead of {mean:.5f}")
    return rates


def _lists_in(values: Iterable[object], names: Sequence[str]) -> Iterator[object]:
    """Every configuration in `values`: a list with a number in it, or an object with one entry per plain unit name."""
    for value in values:
        if isinstance(value, dict):
            named = _by_unit(value, names)
            if named is None:
                yield from _lists_in(value.values(), names)
            else:
                yield named
        elif isinstance(value, list) and any(isinstance(inner, list | dict) for inner in value):
            yield from _lists_in(value, names)
        elif isinstance(value, list) and value:
            yield value


def _by_unit(found: dict[str, object], names: Sequence[str]) -> list[object] | None:
    """The rates of an object in the order of the units' names; None where its keys are others."""
    if len(found) != len(names):
        return None
    named = {_plain(key): rate for key, rate in found.items()}
    # "layer 3" may also be called "3".
    full = {f"layer {key}" if key.isdigit() else key: rate for key, rate in named.items()}
    return [full[name] for name in names] if set(full) == set(names) else None


def _plain(name: str) -> str:
    words = _NOT_WORD.sub(" ", re.sub(r"(?<=[a-z])(?=[0-9])", " ", name.lower()))
    return words.strip()


def parse_objects(text: str, model: type[M], use: Callable[[M], T], count: int) -> Parsed[T]:
    """Up to `count` proposals in the one JSON block of `text` that holds any, each validated as `model` and then used.

    `use` turns one into what is wanted, or raises InvalidReply. Two different blocks with proposals are two answers,
    and neither is taken.
    """
    answer: Parsed[T] | None = None
    complaint = "Your reply holds no JSON of the form asked for."
    for block in json_blocks(text):
        parsed = _read_block(block, model, use, count)
        if not parsed.good:
            complaint = " ".join(parsed.problems[:5]) or complaint
        elif answer is None:
            answer = parsed
        elif parsed.good != answer.good:
            raise InvalidReply("Your reply holds more than one answer: give exactly one.")
    if answer is None:
        raise InvalidReply(complaint)
    return answer


def _read_block(block: object, model: type[M], use: Callable[[M], T], count: int) -> Parsed[T]:
    if isinstance(block, dict) and isinstance(block.get("proposals"), list):
        block = block["proposals"]
    items = block if isinstance(block, list) else [block]
    good: list[T] = []
    names: list[str] = []
    problems: list[str] = []
    for number, item in enumerate(items[:count], start=1):
        try:
            proposal = use(model.model_validate(item, strict=True))
        except ValidationError as error:
            problems.append(f"Proposal {number} has a wrong or missing {_where(error, model)}.")
            continue
        except InvalidReply as error:
            problems.append(f"Proposal {number} {error}.")
            continue
        good.append(proposal)
        names.append(f"Proposal {number}")
    return Parsed(tuple(good), tuple(names), tuple(problems))


def _where(error: ValidationError, model: type[BaseModel]) -> str:
    place = error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"]
    return f'"{place[0]}"' if place and place[0] in model.model_fields else "form"
