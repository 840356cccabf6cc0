"""Reply text -> pruning rates or choices, or InvalidReply with the sentence that the LLM gets back. Pure.

What is tolerated, and nothing else: prose and code fences around the JSON, a list wrapped in an object, a list given
as an object with one entry per unit, more configurations than asked for (the first count), and a mean that is off by
up to MEAN_TOLERANCE (projection repairs it; local models are always off). Numbers are never guessed.

Sentences carry numbers and our own words only: nothing that a model wrote is quoted back to it.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from protocol.errors import InvalidReply
from protocol.rates import weighted_mean
from protocol.shape import Unit

MEAN_TOLERANCE = 0.2
"""How far the mean of a list may be from the pruning rate asked for, in rate."""
LONGEST_REPLY = 400_000
"""Characters; thirty lists of 160 rates are 50,000."""
DEEPEST_NESTING = 20

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_RATES = TypeAdapter(list[Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]])
_OPENING = re.compile(r"[\[{]")
_NOT_WORD = re.compile(r"[^a-z0-9]+")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Parsed(Generic[T]):
    """What a reply holds that can be used, and a sentence for each part that cannot."""

    good: tuple[T, ...]
    names: tuple[str, ...]
    """What the LLM is told that each of the good ones is: `Configuration 2`."""
    problems: tuple[str, ...] = ()


def json_blocks(text: str) -> list[object]:
    """The outermost JSON arrays and objects in `text`, in order; of a broken one, the whole ones inside it.

    Raises InvalidReply for text that is too long, nested too deep, or holds none.
    """
    if len(text) > LONGEST_REPLY:
        raise InvalidReply(f"Your reply is too long: {len(text)} characters.")
    if not text.strip():
        raise InvalidReply("Your reply is empty.")
    _check_nesting(text)
    blocks: list[object] = []
    position = 0
    while match := _OPENING.search(text, position):
        try:
            value, position = _DECODER.raw_decode(text, match.start())
            blocks.append(value)
        except (ValueError, RecursionError):
            position = match.start() + 1
    if not blocks:
        raise InvalidReply("Your reply holds no JSON.")
    return blocks


def _check_nesting(text: str) -> None:
    depth = 0
    for character in text:
        if character in "[{":
            depth += 1
            if depth > DEEPEST_NESTING:
                raise InvalidReply("Your reply is nested too deep.")
        elif character in "]}":
            depth = max(0, depth - 1)


def parse_lists(text: str, units: Sequence[Unit], mean: float, count: int) -> Parsed[tuple[float, ...]]:
    """Up to `count` lists of one rate per unit. Raises InvalidReply where not one can be used."""
    good: dict[tuple[float, ...], str] = {}
    problems: list[str] = []
    for number, found in enumerate(_lists_in(json_blocks(text), [unit.name for unit in units]), start=1):
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


def _lists_in(blocks: Sequence[object], unit_names: Sequence[str]) -> list[object]:
    """Every configuration in `blocks`: a list with a number in it, or an object with one entry per unit."""
    wanted = [_plain(name) for name in unit_names]
    found: list[object] = []

    def visit(value: object) -> None:
        if isinstance(value, dict):
            named = {_plain(key): rate for key, rate in value.items()}
            # "layer 3" may also be called "3".
            short = {f"layer {key}" if key.isdigit() else key: rate for key, rate in named.items()}
            if len(short) == len(value) and set(short) == set(wanted):
                found.append([short[name] for name in wanted])
            else:
                for inner in value.values():
                    visit(inner)
        elif isinstance(value, list):
            if value and any(isinstance(inner, list | dict) for inner in value):
                for inner in value:
                    visit(inner)
            elif value:
                found.append(value)

    for block in blocks:
        visit(block)
    return found


def _plain(name: str) -> str:
    words = _NOT_WORD.sub(" ", re.sub(r"(?<=[a-z])(?=[0-9])", " ", name.lower()))
    return words.strip()


def parse_objects(text: str, model: type[M], use: Callable[[M], T], count: int) -> Parsed[T]:
    """Up to `count` proposals in the one JSON block of `text` that holds any, each validated as `model` and then used.

    `use` turns one into what is wanted, or raises InvalidReply. Two different blocks with proposals are two answers,
    and neither is taken.
    """
    answers: list[Parsed[T]] = []
    complaint = "Your reply holds no JSON of the form asked for."
    for block in json_blocks(text):
        parsed = _read_block(block, model, use, count)
        if parsed.good and parsed.good not in [answer.good for answer in answers]:
            answers.append(parsed)
        elif parsed.problems:
            complaint = " ".join(parsed.problems[:5])
    if len(answers) > 1:
        raise InvalidReply("Your reply holds more than one answer: give exactly one.")
    if not answers:
        raise InvalidReply(complaint)
    return answers[0]


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
