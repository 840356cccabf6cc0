"""Rules: pruning rates as a formula over features of units, in a small language of its own. Pure.

A rule prints as one line that a person can read:

    rate - a*attention - b*log(sensitivity) with a = 0.4, b = 0.1

Its values, one per unit, are projected onto the budget, and so become pruning rates on any model that has the features
(protocol/plans/features.py). The language has numbers, features, named constants, `+ - * /`, the functions in
`FUNCTIONS`, and `where(x < y, …, …)`. The reader below builds a tree that numpy evaluates: nothing is executed, and
each formula has a value on all inputs, because division, logarithm and square root are protected as in genetic
programming (Koza, 1992) and values are bounded.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from protocol.errors import RuleError
from protocol.plans.features import FEATURES

MOST_CHARACTERS = 1000
MOST_NODES = 40
"""Limit of numbers, names, operators and functions in a formula."""
MOST_CONSTANT = 1000.0
"""Limit of a number's size in a formula."""
LARGEST = 1e6
"""Values of all parts of a formula are clipped to ± this."""
SMALLEST = 1e-6
"""Divisors and arguments of `log` count as at least this large, with their sign."""

Array = np.ndarray[Any, np.dtype[np.float64]]


def _divide(over: Array, under: Array) -> Array:
    return over / np.where(np.abs(under) < SMALLEST, np.copysign(SMALLEST, under), under)


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
    "where": (3, lambda test, yes, no: np.where(test != 0, yes, no)),
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

    def evaluate(self, values: Mapping[str, Array]) -> Array:
        """Return the value per unit; `values` has an array for each name."""
        if isinstance(self.head, float):
            return np.asarray(self.head)
        if not self.parts:
            return values[self.head]
        found = _MEANING[self.head][1](*(part.evaluate(values) for part in self.parts))
        return np.clip(np.nan_to_num(found.astype(float)), -LARGEST, LARGEST)


_TOKEN = re.compile(
    r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([A-Za-z_]\w*)|([-+*/(),<>])|(\S))", re.A
)


class _Reader:
    """Reads a formula by recursive descent."""

    def __init__(self, text: str) -> None:
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
            raise RuleError(f"the formula of a rule cannot go on with {self._tokens[-1]!r}")
        return found

    def _node(self, head: str | float, *parts: Node) -> Node:
        self._nodes += 1
        if self._nodes > MOST_NODES:
            raise RuleError(f"the formula of a rule has at most {MOST_NODES} numbers, names and operators")
        return Node(head, parts)

    def _next_is(self, *signs: str) -> bool:
        return bool(self._tokens) and self._tokens[-1] in signs

    def _take(self, sign: str) -> None:
        if not self._next_is(sign):
            found = repr(self._tokens[-1]) if self._tokens else "the end"
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
        if self._depth > MOST_NODES:
            raise RuleError(f"the formula of a rule is nested at most {MOST_NODES} deep")
        found = self._signed()
        self._depth -= 1
        return found

    def _signed(self) -> Node:
        if self._next_is("-", "+"):
            sign = self._tokens.pop()
            part = self._factor()
            return self._node("negative", part) if sign == "-" else part
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
            return self._node(_constant(token, float(token)))
        return self._call(token) if self._next_is("(") else self._node(token)

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
    """A formula over features of units with its named constants, valid once made."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    formula: str = Field(max_length=MOST_CHARACTERS)
    constants: dict[str, float] = {}
    """Constants are named, so that they can be tuned while the formula stays."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a rule from one line: the formula, then `with name = number, …` if it has constants.

        Raises RuleError.
        """
        if len(text) > 2 * MOST_CHARACTERS:
            raise RuleError(f"a rule has at most {2 * MOST_CHARACTERS} characters")
        formula, *rest = re.split(r"\bwith\b", text, maxsplit=1)
        constants = {}
        for entry in filter(str.strip, ",".join(rest).split(",")):
            found = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*", entry, re.A)
            try:
                name, number = found.groups() if found else (None, "")
                constants[str(name)] = float(number)
            except ValueError:
                raise RuleError(
                    f"a constant of a rule is given as name = number, not as {_short(entry.strip())!r}"
                ) from None
        return cls(formula=formula.strip(), constants=constants)

    @field_validator("formula", mode="before")
    @classmethod
    def _is_short(cls, formula: object) -> object:
        if isinstance(formula, str) and len(formula) > MOST_CHARACTERS:
            raise RuleError(f"the formula of a rule has at most {MOST_CHARACTERS} characters")
        return formula

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        names = {node.head for node in self.tree if isinstance(node.head, str) and not node.parts}
        for name, value in self.constants.items():
            if name in FEATURES or name in FUNCTIONS:
                raise RuleError(f"{name} cannot be a constant of a rule, because it has another meaning")
            if name not in names:
                raise RuleError(f"the rule gives the constant {_short(name)} a value, but does not use it")
            _constant(name, value)
        for name in sorted(names - set(FEATURES) - set(self.constants)):
            raise RuleError(
                f"{_short(name)!r} is neither a feature nor a constant of the rule: the features are "
                f"{', '.join(FEATURES)}"
            )
        return self

    @cached_property
    def tree(self) -> Node:
        """The parsed formula. Raises RuleError."""
        return _Reader(self.formula).read()

    @property
    def features(self) -> frozenset[str]:
        """The features that the formula uses."""
        return frozenset(node.head for node in self.tree if isinstance(node.head, str) and node.head in FEATURES)

    def values(self, features: Mapping[str, Sequence[float]]) -> tuple[float, ...]:
        """Return the rule's value of each unit, before it is projected onto the budget.

        Raises RuleError if `features` lacks a feature of the rule.
        """
        missing = sorted(self.features - set(features))
        if missing:
            raise RuleError(f"the rule needs the feature {missing[0]}, which was not measured")
        given = {name: np.nan_to_num(np.asarray(features[name], dtype=float)) for name in self.features}
        units = len(next(iter(features.values())))
        with np.errstate(all="ignore"):
            found = self.tree.evaluate(given | {name: np.asarray(value) for name, value in self.constants.items()})
        return tuple(np.broadcast_to(found, units).tolist())

    def __str__(self) -> str:
        constants = ", ".join(f"{name} = {value:.4g}" for name, value in self.constants.items())
        return f"{self.formula} with {constants}" if constants else self.formula


def _constant(name: str, value: float) -> float:
    if not abs(value) <= MOST_CONSTANT:
        raise RuleError(f"the number {_short(name)} of a rule is larger than {MOST_CONSTANT:g}")
    return value


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "…"
