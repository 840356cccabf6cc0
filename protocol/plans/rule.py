"""Rules: pruning rates as a formula over features of units, in a small language of its own. Pure.

A rule prints as one line that a person can read:

    rate - 0.4*attention - 0.1*sensitivity

Its values, one per unit, are clipped to 1 below and 1 above their median, shifted together until their mean is the
target rate, and then projected onto the budget.
So they become pruning rates on any model that has the features (protocol/plans/features.py). The language has numbers,
features, `+ - * /`, the functions in `FUNCTIONS`, and `where(x < y, …, …)`. A number may have a name:
`rate - a*attention with a = 0.4` is read as `rate - 0.4*attention`.

The reader below builds a tree that numpy evaluates: nothing is executed. Each formula has a value on all inputs,
because division, logarithm and square root are protected as in genetic programming (Koza, 1992) and values are bounded.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from protocol.errors import RuleError
from protocol.plans.features import FEATURES

MAX_CHARACTERS = 1000
MAX_NODES = 40
"""Limit of numbers, names, operators and functions in a formula."""
MAX_NUMBER = 1000.0
"""Limit of a number's size in a formula."""
TOO_LARGE = f"the formula of a rule has at most {MAX_NODES} numbers, names and operators"
LARGEST = 1e6
"""Values of all parts of a formula are clipped to ± this."""
SMALLEST = 1e-6
"""Divisors, with their sign, and arguments of `log` count as at least this large."""

Array = np.ndarray[Any, np.dtype[np.float64]]


def _divide(over: Array, under: Array) -> Array:
    divided: Array = over / np.where(np.abs(under) < SMALLEST, np.copysign(SMALLEST, under), under)
    return divided


def _choose(test: Array, yes: Array, no: Array) -> Array:
    chosen: Array = np.where(test != 0, yes, no)
    return chosen


FUNCTIONS: dict[str, tuple[int, Callable[..., Array]]] = {
    "abs": (1, np.abs),
    "exp": (1, lambda x: np.exp(np.minimum(x, math.log(LARGEST)))),
    "log": (1, lambda x: np.log(np.maximum(np.abs(x), SMALLEST))),
    "sqrt": (1, lambda x: np.sqrt(np.abs(x))),
    "tanh": (1, np.tanh),
    "min": (2, np.minimum),
    "max": (2, np.maximum),
}
"""Number of arguments and meaning of each function. `log` and `sqrt` take the absolute value."""
_OPERATORS: dict[str, tuple[int, Callable[..., Array]]] = {
    "+": (2, np.add),
    "-": (2, np.subtract),
    "*": (2, np.multiply),
    "/": (2, _divide),
    "negative": (1, np.negative),
    "<": (2, np.less),
    ">": (2, np.greater),
    "where": (3, _choose),
}
_MEANING = FUNCTIONS | _OPERATORS


@dataclass(frozen=True)
class Node:
    """A part of a formula: a number, a name, or a function or operator of other parts."""

    head: str | float
    parts: tuple["Node", ...] = ()

    def __iter__(self) -> Iterator["Node"]:
        """Yield this node and all below it."""
        yield self
        for part in self.parts:
            yield from part

    def evaluate(self, values: Mapping[str, Array], numbers: Iterator[Array]) -> Array:
        """Return the value per unit; `values` has an array for each name, `numbers` one for each number in turn."""
        if isinstance(self.head, float):
            return next(numbers)
        if not self.parts:
            return values[self.head]
        found = _MEANING[self.head][1](*[part.evaluate(values, numbers) for part in self.parts])
        bounded: Array = np.clip(np.nan_to_num(found.astype(float)), -LARGEST, LARGEST)
        return bounded


_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "negative": 3}


def _text(node: Node, within: int) -> str:
    """Return the text of a part that stands in a part of precedence `within`. Numbers have four digits."""
    if positive := _negated(node):
        return f"(-{_text(positive, 2)})" if within else f"-{_text(positive, 2)}"
    if isinstance(node.head, float):
        return f"{node.head:.4g}"
    if not node.parts:
        return node.head
    if node.head in ("<", ">"):
        return f"{_text(node.parts[0], 0)} {node.head} {_text(node.parts[1], 0)}"
    own = _PRECEDENCE.get(node.head)
    if own is None:
        return f"{node.head}({', '.join(_text(part, 0) for part in node.parts)})"
    if node.head == "negative":
        text = f"-{_text(node.parts[0], own)}"
    else:
        (left, right), sign = node.parts, node.head
        if own == 1 and (positive := _negated(right)):
            right, sign = positive, "+" if sign == "-" else "-"
        space = " " if own == 1 else ""
        text = f"{_text(left, own)}{space}{sign}{space}{_text(right, own + 1)}"
    return f"({text})" if own < within else text


def _negated(node: Node) -> Node | None:
    """Return the part with the opposite sign if it begins with a negative number, else None."""
    if isinstance(node.head, float):
        return Node(-node.head) if node.head < 0 else None
    if node.head in ("*", "/") and (first := _negated(node.parts[0])):
        return Node(node.head, (first, *node.parts[1:]))
    return None


_TOKEN = re.compile(
    r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([A-Za-z_]\w*)|([-+*/(),<>])|(\S))", re.A
)


class _Reader:
    """Reads a formula by recursive descent."""

    def __init__(self, text: str, numbers: Mapping[str, float]) -> None:
        if len(text) > MAX_CHARACTERS:
            raise RuleError(f"a rule has at most {MAX_CHARACTERS} characters")
        self._numbers, self._used = numbers, set[str]()
        self._tokens: list[str] = []
        for number, name, sign, other in _TOKEN.findall(text):
            if other:
                raise RuleError(f"a rule cannot contain {other!r}")
            self._tokens.append(number or name or sign)
        self._tokens.reverse()
        self._nodes = 0
        self._depth = 0

    def read(self) -> Node:
        """Return the whole formula."""
        found = self._sum()
        if self._tokens:
            raise RuleError(f"the formula of a rule cannot go on with {_short(self._tokens[-1])!r}")
        for name in self._numbers.keys() - self._used:
            raise RuleError(f"the rule gives the constant {_short(name)!r} a value, but does not use it")
        return found

    def _node(self, head: str | float, *parts: Node) -> Node:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise RuleError(TOO_LARGE)
        return Node(head, parts)

    def _next_is(self, *signs: str) -> bool:
        return bool(self._tokens) and self._tokens[-1] in signs

    def _take(self, sign: str) -> None:
        if not self._next_is(sign):
            found = repr(_short(self._tokens[-1])) if self._tokens else "the end"
            raise RuleError(f"the formula of a rule needs {sign!r} before {found}")
        self._tokens.pop()

    def _chain(self, signs: tuple[str, ...], part: Callable[[], Node]) -> Node:
        left = part()
        while self._next_is(*signs):
            left = self._node(self._tokens.pop(), left, part())
        return left

    def _sum(self) -> Node:
        return self._chain(("+", "-"), self._product)

    def _product(self) -> Node:
        return self._chain(("*", "/"), self._factor)

    def _factor(self) -> Node:
        self._depth += 1
        if self._depth > MAX_NODES:
            raise RuleError(f"the formula of a rule is nested at most {MAX_NODES} deep")
        found = self._signed()
        self._depth -= 1
        return found

    def _signed(self) -> Node:
        if self._next_is("-", "+"):
            sign = self._tokens.pop()
            part = self._factor()
            if sign == "+":
                return part
            return Node(-part.head) if isinstance(part.head, float) else self._node("negative", part)
        if self._next_is("("):
            self._take("(")
            found = self._sum()
            self._take(")")
            return found
        return self._atom()

    def _atom(self) -> Node:
        if not self._tokens or self._next_is("*", "/", ")", ",", "<", ">"):
            found = repr(self._tokens[-1]) if self._tokens else "the end"
            raise RuleError(f"the formula of a rule needs a number or a name before {found}")
        token = self._tokens.pop()
        if token[0].isdigit() or token[0] == ".":
            return self._node(_bounded(token, float(token)))
        return self._call(token) if self._next_is("(") else self._name(token)

    def _name(self, name: str) -> Node:
        if name in self._numbers:
            self._used.add(name)
            return self._node(self._numbers[name])
        if name not in FEATURES:
            raise RuleError(
                f"{_short(name)!r} is neither a feature nor a constant of the rule: the features are "
                f"{', '.join(FEATURES)}"
            )
        return self._node(name)

    def _call(self, name: str) -> Node:
        if name not in (*FUNCTIONS, "where"):
            raise RuleError(f"{_short(name)!r} is no function of rules: they are {', '.join(FUNCTIONS)} and where")
        self._take("(")
        parts = [self._comparison() if name == "where" else self._sum()]
        while self._next_is(","):
            self._take(",")
            parts.append(self._sum())
        self._take(")")
        needed = _MEANING[name][0]
        if len(parts) != needed:
            raise RuleError(f"{name} takes {needed} arguments, not {len(parts)}")
        return self._node(name, *parts)

    def _comparison(self) -> Node:
        left = self._sum()
        if not self._next_is("<", ">"):
            raise RuleError("where compares first, such as where(depth < 0.1, 0, 0.3)")
        return self._node(self._tokens.pop(), left, self._sum())


class Rule(BaseModel):
    """A formula over features of units, valid once made, in the form in which it prints."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    formula: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a rule from one line: the formula, then `with name = number, …` if it names numbers.

        Raises RuleError.
        """
        if len(text) > MAX_CHARACTERS:
            raise RuleError(f"a rule has at most {MAX_CHARACTERS} characters")
        formula, *rest = re.split(r"\bwith\b", text, maxsplit=1)
        return cls.of(_Reader(formula, _named_numbers("".join(rest))).read())

    @classmethod
    def of(cls, tree: Node) -> Self:
        """Return the rule of a tree. Raises RuleError for a tree that is too large."""
        if sum(1 for _ in tree) > MAX_NODES:
            raise RuleError(TOO_LARGE)
        return cls(formula=_text(tree, 0))

    @cached_property
    def tree(self) -> Node:
        """The parsed formula."""
        return _Reader(self.formula, {}).read()

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        _ = self.tree
        return self

    @property
    def features(self) -> frozenset[str]:
        """The features that the formula uses."""
        return frozenset(node.head for node in self.tree if isinstance(node.head, str) and node.head in FEATURES)

    @property
    def numbers(self) -> tuple[float, ...]:
        """The numbers in the formula, from left to right."""
        return tuple(node.head for node in self.tree if isinstance(node.head, float))

    def with_numbers(self, numbers: Sequence[float]) -> Self:
        """Return the formula with other numbers, one for each of `numbers`; each is clipped to ± MAX_NUMBER."""
        left = iter(numbers)
        return type(self).of(_renumbered(self.tree, left))

    def values(self, features: Mapping[str, Sequence[float]]) -> tuple[float, ...]:
        """Return the rule's value of each unit.

        Raises RuleError if `features` lacks a feature of the rule.
        """
        return tuple(self.values_with(features, np.array([self.numbers]))[0].tolist())

    def rates(self, features: Mapping[str, Sequence[float]]) -> tuple[float, ...]:
        """Return the values, shifted together so that their mean is the target rate; they may be out of bounds.

        A value counts as at most 1 above or below the median of all units. Otherwise a unit that a rule spares with a
        huge number would shift all others.

        `features` come from `unit_features`. Raises RuleError if a feature of the rule is missing.
        """
        return tuple(self.rates_with(features, np.array([self.numbers]))[0].tolist())

    def rates_with(self, features: Mapping[str, Sequence[float]], numbers: Array) -> Array:
        """Return `rates` [rules, units] of the formula with other numbers [rules, numbers of the formula]."""
        values, sizes = self.values_with(features, numbers), np.asarray(features["size"])
        median = np.median(values, axis=1, keepdims=True)
        values = np.clip(values, median - 1, median + 1)
        shifted: Array = values + (features["rate"][0] - values @ sizes / sizes.sum())[:, None]
        return shifted

    def values_with(self, features: Mapping[str, Sequence[float]], numbers: Array) -> Array:
        """Return `values` [rules, units] of the formula with other numbers [rules, numbers of the formula].

        Raises RuleError if `features` lacks a feature of the rule.
        """
        missing = sorted(self.features - set(features))
        if missing:
            raise RuleError(f"the rule needs the feature {missing[0]}, which was not measured")
        given = {name: np.nan_to_num(np.asarray(features[name], dtype=float)) for name in self.features}
        units = len(next(iter(features.values())))
        with np.errstate(all="ignore"):
            found = self.tree.evaluate(given, iter(np.clip(numbers, -MAX_NUMBER, MAX_NUMBER).T[:, :, None]))
        return np.broadcast_to(found, (len(numbers), units))

    def __str__(self) -> str:
        return self.formula


def _renumbered(node: Node, numbers: Iterator[float]) -> Node:
    if isinstance(node.head, float):
        return Node(min(max(float(next(numbers)), -MAX_NUMBER), MAX_NUMBER))
    return Node(node.head, tuple(_renumbered(part, numbers) for part in node.parts))


def _named_numbers(text: str) -> dict[str, float]:
    """Read `name = number, …`. Raises RuleError."""
    found = {}
    for entry in filter(str.strip, text.split(",")):
        parts = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*", entry, re.A)
        try:
            name, number = parts.groups() if parts else ("", "")
            found[name] = _bounded(name, float(number))
        except ValueError:
            raise RuleError(
                f"a constant of a rule is given as name = number, not as {_short(entry.strip())!r}"
            ) from None
        if name in FEATURES or name in FUNCTIONS:
            raise RuleError(f"{name!r} cannot be a constant of a rule, because it has another meaning")
    return found


def _bounded(name: str, value: float) -> float:
    if not abs(value) <= MAX_NUMBER:
        raise RuleError(f"the number {_short(name)!r} of a rule is larger than {MAX_NUMBER:g}")
    return value


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "…"


DEFAULT_RULE = Rule.parse("least_damage - max(0, 0.34 - 0.57*rate)*tanh(influence)*mlp - 0.04*first")
"""The rule of `--allocate rule`: the allocation by sensitivity, but the MLPs of layers that change their input much
lose less, most of all at low rates, and so does the first layer (docs/lab-notes/rules.md)."""
