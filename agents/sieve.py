"""A sieve: refuses proposals before they cost a GPU anything, and says why, so that the LLM can do better. Pure."""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from agents.view import Refused, View
from protocol.plan import Plan, removed_shares

LEAST_OUTCOMES = 12
"""Before so many outcomes a guess refuses nobody."""
LEAST_DOUBT = 0.02
"""In nats: what a guess is not trusted with, even where it was right so far."""
DOUBTS = 2.0
"""Root mean squares of the guesses' errors, each on an outcome that it had not seen, by which a proposal has to be
worse than the last of the population."""


class Guesses:
    """Refuses what a surrogate expects to be worse than the whole population; for the proposals of one round.

    Nobody is refused before the population is full, with so many members.
    """

    def __init__(self, view: View, population: int) -> None:
        self._surrogate = view.surrogate
        self._limit = math.inf
        errors = self._surrogate.errors
        if len(errors) >= LEAST_OUTCOMES and len(view.population) == population:
            # Those that matter: a guess may be far off among the bad ones.
            half = errors[: max(LEAST_OUTCOMES, len(errors) // 2)]
            doubt = max(float(np.sqrt(np.mean(half**2))), LEAST_DOUBT)
            self._limit = self._surrogate.rise(view.population[-1]) + DOUBTS * doubt

    def refusal(self, plan: Plan) -> Refused | None:
        """Why not, or None."""
        if self._surrogate.guess(plan) <= self._limit:
            return None
        return Refused("from what was measured so far it is expected to be worse than all that are kept")


class Neighbours:
    """Refuses what is nearly the same as a candidate that is there already."""

    def __init__(self, view: View, least_difference: float, plans: Iterable[Plan]) -> None:
        self._shape, self._least = view.card.shape, least_difference
        self._weights = np.array([unit.parameters for unit in self._shape.units("block")], dtype=float)
        self._known = np.empty((0, len(self._weights)))
        """A row for each plan, and room for more."""
        self._count = 0
        if least_difference:
            for plan in plans:
                self.add(plan)

    def add(self, plan: Plan) -> None:
        """One more that is there."""
        if not self._least:
            return
        if self._count == len(self._known):
            self._known = np.resize(self._known, (2 * self._count + 64, len(self._weights)))
        self._known[self._count] = self._removed(plan)
        self._count += 1

    def refusal(self, plan: Plan) -> Refused | None:
        """Why not, or None."""
        if self._count == 0:
            return None
        # What one has and the other has not: on the same budget that is half of what differs.
        apart = np.abs(self._known[: self._count] - self._removed(plan)).sum(axis=1).min() / 2 / self._weights.sum()
        if apart >= self._least:
            return None
        return Refused("it is nearly the same as an earlier configuration: change more")

    def _removed(self, plan: Plan) -> NDArray[np.float64]:
        """Parameters that go, by block."""
        removed: NDArray[np.float64] = np.array(removed_shares(plan, self._shape, "block")) * self._weights
        return removed
