"""The four places of a search that propose: initialize, select, mutate and cross over."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agents.population.view import Member, Selection, Submit, View


class Initializes(Protocol):
    """Who makes the first population."""

    async def propose(self, view: View, count: int, submit: Submit, /) -> int:
        """Get `count` candidates accepted; returns how many were."""
        ...


class Selects(Protocol):
    """Who chooses parents."""

    async def select(self, view: View, count: int, /) -> Selection:
        """About `count` parents, best first."""
        ...


class Breeds(Protocol):
    """Who makes offspring: a Mutator, a Crossover."""

    async def propose(self, view: View, parents: Sequence[Member], count: int, submit: Submit, /) -> int:
        """Get `count` offspring of `parents` accepted; returns how many were."""
        ...


@dataclass(frozen=True)
class Agents:
    """The agents that propose. Without a Selector everybody is a parent; without a Crossover the Mutator makes all."""

    initializer: Initializes
    selector: Selects | None
    mutator: Breeds
    crossover: Breeds | None
