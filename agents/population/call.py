"""One call of one agent, and its random seeds."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from agents.population.view import Member, View


@dataclass(frozen=True)
class Call:
    """One call of an agent in a round: `index` tells the calls apart, `count` is how many proposals it should make."""

    agent: str
    view: View
    index: int
    count: int

    def seed(self, attempt: int) -> int:
        """Return a seed of 31 bits, different for every question of a search."""
        key = f"{self.view.spec.seed}|{self.view.round}|{self.agent}|{self.index}|{self.count}|{attempt}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1

    def sample_members(self, members: Sequence[Member], count: int) -> tuple[Member, ...]:
        """Return at most `count` of `members`, in their order. Each call of a round sees different members."""
        first = [members[self.index % len(members)]]
        others = [member for member in members if member is not first[0]]
        sampled = first + self.rng.sample(others, min(count - 1, len(others)))
        return tuple(member for member in members if member in sampled)

    @property
    def rng(self) -> random.Random:
        """A new generator for the fallback and for the menus, seeded the same every time."""
        return random.Random(self.seed(-1))
