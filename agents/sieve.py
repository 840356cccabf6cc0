"""A sieve: refuses proposals before they cost a GPU anything, and says why, so that the LLM can do better. Pure."""

import math
import statistics
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from agents.surrogate import Surrogate
from agents.view import Refused, View
from protocol.plan import Plan, removed_shares

LEAST_OUTCOMES = 12
"""Before so many outcomes a guess refuses nobody."""
LEAST_DOUBT = 0.02
"""In nats: what a guess is not trusted with, even where it was right so far."""
DOUBTS = 2.0
"""Standard deviations of the guesses so far by which a proposal has to be worse than the last of the population."""


class Guesses:
    """Refuses what a surrogate expects to be worse than the whole population; for the proposals of one round."""

    def __init__(self, view: View) -> None:
        self._surrogate = Surrogate(view)
        self._limit = math.inf
        rises = [self._surrogate.rise(member) for member in view.measured]
        if len(rises) >= LEAST_OUTCOMES and view.population:
            # Those that matter: a guess may be far off among the bad ones.
            half = view.measured[: max(LEAST_OUTCOMES, len(rises) // 2)]
            off = [self._surrogate.guess(m.candidate.plan) - self._surrogate.rise(m) for m in half]
            doubt = max(statistics.pstdev(off), LEAST_DOUBT)
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
        self._known: list[NDArray[np.float64]] = [self._removed(plan) for plan in plans] if least_difference else []

    def add(self, plan: Plan) -> None:
        """One more that is there."""
        if self._least:
            self._known.append(self._removed(plan))

    def refusal(self, plan: Plan) -> Refused | None:
        """Why not, or None."""
        if not self._known:
            return None
        # What one has and the other has not: on the same budget that is half of what differs.
        apart = np.abs(np.array(self._known) - self._removed(plan)).sum(axis=1).min() / 2 / self._weights.sum()
        if apart >= self._least:
            return None
        return Refused("it is nearly the same as an earlier configuration: change more")

    def _removed(self, plan: Plan) -> NDArray[np.float64]:
        """Parameters that go, by block."""
        removed: NDArray[np.float64] = np.array(removed_shares(plan, self._shape, "block")) * self._weights
        return removed
