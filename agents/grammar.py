"""JSON schemas as grammars for llama.cpp (GBNF) that leave no room for blanks and hold decimals to their range. Pure.

llama.cpp makes a grammar of a schema by itself. That one lets a model write as many blanks as it likes, which small
models do, for a third of their tokens; and it keeps integers to their ranges, but not decimals.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

DECIMALS = 3
"""Of numbers that need not be whole."""
MOST_WORDS = 20_000
"""Numbers that a range may have."""


def compact_grammar(schema: dict[str, object]) -> str | None:
    """GBNF for the texts that fit the schema and have no blanks; None where the schema is of a kind not known here.

    Known is what the agents ask for: objects with all properties required, arrays of so many to so many items, enums,
    and numbers with both bounds, of which those that need not be whole may not be negative.
    """
    rules = _Rules()
    try:
        root = rules.expression(schema)
    except (KeyError, ValueError):
        return None
    return "".join(f"{name} ::= {body}\n" for body, name in [(root, "root"), *rules.names.items()])


class _Rules:
    """Expressions of schemas; what may be used in several places gets a rule of its own."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        """By their bodies."""

    def expression(self, schema: dict[str, Any]) -> str:
        if "enum" in schema:
            return self._named(_any_of(json.dumps(value) for value in schema["enum"]))
        if schema["type"] == "object":
            return self._object(schema["properties"], schema["required"])
        if schema["type"] == "array":
            return self._array(self.expression(schema["items"]), schema["minItems"], schema["maxItems"])
        return self._named(_any_of(_numbers(schema["type"], schema["minimum"], schema["maximum"])))

    def _object(self, properties: dict[str, dict[str, Any]], required: list[str]) -> str:
        if list(properties) != required:
            raise ValueError("not all properties are required")
        parts = [f"{_literal(json.dumps(name) + ':')} {self.expression(each)}" for name, each in properties.items()]
        return f'"{{" {f" {COMMA} ".join(parts)} "}}"'

    def _array(self, item: str, fewest: int, most: int) -> str:
        item = self._named(item)
        several = f"{item} ({COMMA} {item}){{{max(0, fewest - 1)},{most - 1}}}" if most > 0 else ""
        return f'"[" {several} "]"' if fewest > 0 else f'"[" ({several})? "]"'

    def _named(self, body: str) -> str:
        return self.names.setdefault(body, f"part{len(self.names)}")


COMMA = '","'


def _numbers(kind: str, low: float, high: float) -> Iterator[str]:
    """All numbers from low to high as JSON writes them."""
    if kind == "integer":
        if high - low > MOST_WORDS:
            raise ValueError("too wide a range")
        yield from map(str, range(int(low), int(high) + 1))
    elif kind == "number" and low >= 0 and high * 10**DECIMALS <= MOST_WORDS:
        for places in range(DECIMALS + 1):
            for number in range(int(high) * 10**places + 10**places):
                if low <= number / 10**places <= high:
                    yield f"{number / 10**places:.{places}f}"
    else:
        raise ValueError("not a range of numbers")


def _any_of(words: Iterable[str]) -> str:
    """An expression for one of these words, which branches at characters: the fewer ways are open, the faster it is."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for character in word:
            node = node.setdefault(character, {})
        node[_END] = {}
    return _branches(tree)


_END = ""


def _branches(node: dict[str, Any]) -> str:
    """An expression for what may follow at a node of the tree of words."""
    characters: dict[str, list[str]] = {}
    for character, child in node.items():
        if character != _END:
            characters.setdefault(_branches(child), []).append(character)
    ways = [f"{_class(same)} {rest}".rstrip() for rest, same in characters.items()]
    if not ways:
        return ""
    joined = ways[0] if len(ways) == 1 and _END not in node else f"({' | '.join(ways)})"
    return f"{joined}?" if _END in node else joined


def _class(characters: list[str]) -> str:
    if len(characters) == 1:
        return _literal(characters[0])
    return "[" + "".join(f"\\{c}" if c in '\\]^-"[' else c for c in characters) + "]"


def _literal(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
