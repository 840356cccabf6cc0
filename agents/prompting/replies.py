"""Reply text -> pruning rates or choices, or InvalidReply with the sentence that the LLM gets back. Pure.

The parser tolerates prose and code fences around the JSON, a list wrapped in an object, a list given as an object with
one entry per unit, more configurations than requested (the first ones count), and a mean that is off by up to
MEAN_TOLERANCE (projection corrects it, and local models never meet it). It tolerates nothing else and guesses no
numbers.

The sentences contain only numbers and our own words; a model's words are never quoted back to it. Parsing takes time
linear in the length of the text, which is bounded.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from agents.llm.responses import LONGEST_REPLY
from protocol.errors import InvalidReply
from protocol.plans.rates import weighted_mean
from protocol.plans.shape import Unit

MEAN_TOLERANCE = 0.2
"""Largest tolerated difference between the mean of a list and the pruning rate."""
DEEPEST_NESTING = 20
MAX_BLOCKS = 2_000
"""Maximum number of brackets in a reply that are tried as the beginning of JSON, and of lists that are checked."""
MAX_READINGS = 20
"""Limit on reading broken blocks, as a multiple of the text's length. After a broken block, reading restarts at the
next bracket in it, so without a limit a hostile text of unclosed blocks could take hours."""

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_RATES = TypeAdapter(list[Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]])
_OPENING = re.compile(r"[\[{]")
_NOT_WORD = re.compile(r"[^a-z0-9]+")
_DECODER = json.JSONDecoder()
_TOO_DEEP = "Your reply is nested too deep."


@dataclass(frozen=True)
class Parsed(Generic[T]):
    """The valid items of a reply, and a sentence for each invalid part."""

    good: tuple[T, ...]
    names: tuple[str, ...]
    """The name of each valid item in sentences to the LLM: `Configuration 2`."""
    problems: tuple[str, ...] = ()


def json_blocks(text: str) -> list[object]:
    """Return the outermost JSON arrays and objects in `text`, in order; of a broken block, the whole blocks inside it.

    Raise InvalidReply if the text is too long, is nested too deep, is too broken, or has no JSON.
    """
    if len(text) > LONGEST_REPLY:
        raise InvalidReply(f"Your reply is longer than {LONGEST_REPLY} characters.")
    if not text.strip():
        raise InvalidReply("Your reply is empty.")
    blocks: list[object] = []
    position = tried = wasted = 0
    while match := _OPENING.search(text, position):
        tried += 1
        if tried > MAX_BLOCKS or wasted > MAX_READINGS * len(text):
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
    """Return where the decoder stopped; if that is unknown (an unclosed string, a huge number), the text's end."""
    if isinstance(error, json.JSONDecodeError) and not error.msg.startswith("Unterminated"):
        return error.pos
    return len(text)


def _is_deeper(value: object, levels: int) -> bool:
    if not isinstance(value, list | dict):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(each, levels - 1) for each in inner)


def parse_lists(text: str, units: Sequence[Unit], mean: float, count: int) -> Parsed[tuple[float, ...]]:
    """Return up to `count` lists of one rate per unit. Raise InvalidReply if no list is valid."""
    good: dict[tuple[float, ...], str] = {}
    problems: list[str] = []
    lists = _lists_in(json_blocks(text), [_plain(unit.name) for unit in units])
    for number, found in enumerate(islice(lists, MAX_BLOCKS), start=1):
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
    """Return `found` as rates. Raise InvalidReply with the end of a sentence that begins "Configuration 2".

    `mean` is weighted by the parameters of the units.
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
    """Yield every configuration in `values`: a list without lists and objects, or an object with one entry per unit."""
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
    """Return the rates of an object in the order of the units; None if its keys are not the units' names."""
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
    """Return up to `count` proposals, validated as `model`, from the only JSON block in `text` with valid proposals.

    `use` converts a validated proposal, or raises InvalidReply. If two blocks have different proposals, they are two
    answers, and neither is accepted.
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
