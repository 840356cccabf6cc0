"""JSON schemas as grammars for llama.cpp (GBNF) that leave no room for blanks and hold decimals to their range. Pure.

llama.cpp makes a grammar of a schema by itself. That one lets a model write as many blanks as it likes, which is half
of what small models write; and it keeps integers to their ranges, but not decimals.
"""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

MOST_WORDS = 20_000
"""Numbers that a range may have."""
DECIMALS = 3
"""Of numbers that need not be whole."""
_COMMA = '","'
_END = ""
"""In a tree of words: one ends here."""


def compact_grammar(schema: dict[str, object]) -> str | None:
    """GBNF for the texts that fit the schema and have no blanks; None where the schema is of a kind not known here.

    Known is what the agents ask for: objects with all properties required, arrays of so many to so many items, enums of
    strings and numbers, and numbers with both bounds: whole ones of either sign, and decimals from nought on.
    """
    rules = _Rules()
    try:
        root = rules.expression(schema)
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return "".join(f"{name} ::= {body}\n" for body, name in [(root, "root"), *rules.names.items()])


class _Rules:
    """Expressions of schemas; what may be used in several places gets a rule of its own."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        """By their bodies."""

    def expression(self, schema: dict[str, Any]) -> str:
        if "enum" in schema:
            return self._named(_any_of(map(json.dumps, schema["enum"])))
        if schema["type"] == "object":
            return self._object(schema["properties"], schema["required"])
        if schema["type"] == "array":
            return self._array(self._named(self.expression(schema["items"])), schema["minItems"], schema["maxItems"])
        return self._named(_any_of(_numbers(schema["type"], schema["minimum"], schema["maximum"])))

    def _object(self, properties: dict[str, dict[str, Any]], required: list[str]) -> str:
        if not properties or list(properties) != required:
            raise ValueError("not all properties are required")
        parts = [f"{_literal(json.dumps(name) + ':')} {self.expression(each)}" for name, each in properties.items()]
        return f'"{{" {f" {_COMMA} ".join(parts)} "}}"'

    def _array(self, item: str, fewest: int, most: int) -> str:
        if not 0 <= fewest <= most:
            raise ValueError("not a number of items")
        several = f"{item} ({_COMMA} {item}){{{max(0, fewest - 1)},{most - 1}}}" if most > 0 else ""
        return f'"[" {several} "]"' if fewest > 0 else f'"[" ({several})? "]"' if several else '"[" "]"'

    def _named(self, body: str) -> str:
        """The name of the rule with that body, which may be a rule's name already."""
        return body if body in self.names.values() else self.names.setdefault(body, f"part{len(self.names)}")


def _numbers(kind: str, low: float, high: float) -> Iterator[str]:
    """All numbers from low to high as JSON writes them."""
    places = {"integer": 0, "number": DECIMALS}.get(kind)
    if places is None or (places and low < 0) or (high - low) * 10**places > MOST_WORDS:
        raise ValueError("not a range of numbers")
    for after in range(places + 1):
        for number in range(math.ceil(low * 10**after), math.floor(high * 10**after) + 1):
            yield f"{number / 10**after:.{after}f}" if after else str(number)


def _any_of(words: Iterable[str]) -> str:
    """An expression for one of these words, which branches at characters: the fewer ways are open, the faster it is."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for character in word:
            node = node.setdefault(character, {})
        node[_END] = {}
    if not tree:
        raise ValueError("no word to choose")
    return _branches(tree)


def _branches(node: dict[str, Any]) -> str:
    """An expression for what may follow at a node of the tree of words."""
    alike: dict[str, list[str]] = {}
    for character, child in node.items():
        if character != _END:
            alike.setdefault(_branches(child), []).append(character)
    ways = [f"{_one_of(characters)} {rest}".rstrip() for rest, characters in alike.items()]
    if not ways:
        return ""
    joined = ways[0] if len(ways) == 1 and _END not in node else f"({' | '.join(ways)})"
    return f"{joined}?" if _END in node else joined


def _one_of(characters: list[str]) -> str:
    """A class of characters; those that mean something in it are written by their numbers."""
    if len(characters) == 1:
        return _literal(characters[0])
    return "[" + "".join(c if c.isalnum() else f"\\x{ord(c):02X}" for c in characters) + "]"


def _literal(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
