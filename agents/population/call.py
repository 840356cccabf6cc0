"""One call of one agent: its label and its seeds."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from agents.population.view import Member, View


@dataclass(frozen=True)
class Call:
    """Which call of which agent in which round: what seeds are made from."""

    agent: str
    view: View
    index: int
    count: int

    def seed(self, attempt: int) -> int:
        """31 bits that differ between all questions of a search."""
        key = f"{self.view.spec.seed}|{self.view.round}|{self.agent}|{self.index}|{self.count}|{attempt}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1

    def some_of(self, members: Sequence[Member], most: int) -> tuple[Member, ...]:
        """At most `most` of `members`, in their order: the calls of a round each see different ones."""
        first = [members[self.index % len(members)]]
        others = [member for member in members if member is not first[0]]
        drawn = first + self.rng.sample(others, min(most - 1, len(others)))
        return tuple(member for member in members if member in drawn)

    @property
    def rng(self) -> random.Random:
        """For the fallback."""
        return random.Random(self.seed(-1))
