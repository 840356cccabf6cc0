"""JSON schemas -> grammars for llama.cpp (GBNF) that allow no whitespace and enforce the range of decimals. Pure.

llama.cpp can convert a schema into a grammar itself. That grammar allows any amount of whitespace, and half of the text
of small models is then whitespace. It enforces the ranges of integers, but not the ranges of decimals.
"""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

MAX_WORDS = 20_000
"""Maximum number of numbers in a range; larger ranges are not converted."""
DECIMALS = 3
"""Decimal places of a `number`."""
_COMMA = '","'
_END = ""
"""Marks the end of a word in a tree of words."""


def compact_grammar(schema: dict[str, object]) -> str | None:
    """Return GBNF for the texts without whitespace that match the schema; None if the schema is not supported.

    Supported are the schemas of the agents: objects with all properties required, arrays with both bounds on their
    length, enums of strings and numbers, integers with both bounds, and non-negative decimals with both bounds.
    """
    rules = _Rules()
    try:
        root = rules.expression(schema)
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return "".join(f"{name} ::= {body}\n" for body, name in [(root, "root"), *rules.names.items()])


class _Rules:
    """Converts schemas into expressions; parts that may be used several times get rules of their own."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        """Names of the rules by body."""

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
        """Return the name of the rule with that body; a body that is the name of a rule is returned unchanged."""
        return body if body in self.names.values() else self.names.setdefault(body, f"part{len(self.names)}")


def _numbers(kind: str, low: float, high: float) -> Iterator[str]:
    """Yield all numbers from `low` to `high` as JSON writes them."""
    places = {"integer": 0, "number": DECIMALS}.get(kind)
    if places is None or (places and low < 0) or (high - low) * 10**places > MAX_WORDS:
        raise ValueError("not a range of numbers")
    for after in range(places + 1):
        for number in range(math.ceil(low * 10**after), math.floor(high * 10**after) + 1):
            yield f"{number / 10**after:.{after}f}" if after else str(number)


def _any_of(words: Iterable[str]) -> str:
    """Return an expression for any of these words, as a tree of characters, which is faster than a list of words."""
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
    """Return an expression for the rest of the words at a node of the tree."""
    by_rest: dict[str, list[str]] = {}
    for character, child in node.items():
        if character != _END:
            by_rest.setdefault(_branches(child), []).append(character)
    branches = [f"{_one_of(characters)} {rest}".rstrip() for rest, characters in by_rest.items()]
    if not branches:
        return ""
    joined = branches[0] if len(branches) == 1 and _END not in node else f"({' | '.join(branches)})"
    return f"{joined}?" if _END in node else joined


def _one_of(characters: list[str]) -> str:
    """Return a character class; characters with a special meaning in it are escaped."""
    if len(characters) == 1:
        return _literal(characters[0])
    return "[" + "".join(c if c.isalnum() else f"\\x{ord(c):02X}" for c in characters) + "]"


def _literal(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
