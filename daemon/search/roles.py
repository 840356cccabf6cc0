"""The four roles of a search, as protocols: initialize, select, mutate and cross over."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agents.population.view import Member, Selection, Submit, View


class InitializerRole(Protocol):
    """Makes the first population."""

    async def propose(self, view: View, count: int, submit: Submit, /) -> int:
        """Propose until `count` candidates are accepted or no new plan is found. Returns the number accepted."""
        ...


class SelectorRole(Protocol):
    """Selects parents."""

    async def select(self, view: View, count: int, /) -> Selection:
        """Return about `count` parents, best first."""
        ...


class OffspringRole(Protocol):
    """Makes offspring: a Mutator or a Crossover."""

    async def propose(self, view: View, parents: Sequence[Member], count: int, submit: Submit, /) -> int:
        """Propose offspring of `parents`, as InitializerRole.propose does. Returns the number accepted."""
        ...


@dataclass(frozen=True)
class Agents:
    """The agents of a search.

    Without a Selector all members are parents. Without a Crossover the Mutator makes all offspring.
    """

    initializer: InitializerRole
    selector: SelectorRole | None
    mutator: OffspringRole
    crossover: OffspringRole | None
