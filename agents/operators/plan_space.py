"""The plans that meet the budget of a search, in batches, for optimisers that predict thousands of plans. Pure.

`spec.feasible` and `spec.plan` are exact, and take milliseconds for each plan. Here a batch of values becomes the
shares that such plans remove, to within the rounding of MLP channels and of decimals.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.population.view import View
from protocol.plans.plan import attention_levels, unit_bounds

Array = NDArray[np.floating[Any]]

BISECTIONS = 35
"""Steps that find the multiplier of a projection, each of which halves its error."""


class PlanSpace:
    """The plans of one search."""

    def __init__(self, view: View) -> None:
        spec, shape = view.spec, view.profile.shape
        sizes = np.array([unit.parameters for unit in view.units], dtype=float)
        self._rate = spec.rate
        self._weights: Array = sizes / sizes.sum()
        """Each unit's share of the decoder's parameters [units]."""
        bounds = np.array(unit_bounds(shape, spec.granularity, spec.lowest_rate, spec.highest_rate))
        self._low, self._high = bounds.T
        self._highest: Array = np.array([unit.highest_rate for unit in view.units])
        self._attention = [i for i, unit in enumerate(view.units) if unit.kind == "attention"]
        self._mlps = [i for i, unit in enumerate(view.units) if unit.kind == "mlp"]
        self._levels = [
            np.array([share for share, _ in attention_levels(shape, view.units[i].layer)]) for i in self._attention
        ]
        """The shares that can be removed from each attention block."""

    def rates(self, values: Array) -> Array:
        """Return the rates [plans, units] within the bounds and the budget that are nearest to `values`."""
        return _projected(values, self._weights, np.full(len(values), self._rate), self._low, self._high)

    def shares(self, values: Array) -> Array:
        """Return the removed shares [plans, units] of the plans nearest to `values` [plans, units]."""
        rates = self.rates(values)
        if not self._attention:
            return rates
        for i, levels in zip(self._attention, self._levels, strict=True):
            rates[:, i] = levels[np.abs(levels[None] - rates[:, i, None]).argmin(axis=1)]
        mlps = self._mlps
        left = self._rate - rates[:, self._attention] @ self._weights[self._attention]
        # As in make_plan, the MLPs share what the rounding of heads leaves, beyond the bounds of the settings too.
        rates[:, mlps] = _projected(rates[:, mlps], self._weights[mlps], left, np.zeros(len(mlps)), self._highest[mlps])
        return rates


def _projected(values: Array, weights: Array, totals: Array, low: Array, high: Array) -> Array:
    """Return clip(values − λ·weights, low, high), with the λ for which the sum of weights · rates is `totals` [plans].

    A total that cannot be reached gives the bounds.
    """
    ends = np.stack([(values - high) / weights, (values - low) / weights])
    above, below = ends.min(axis=(0, 2)), ends.max(axis=(0, 2))
    for _ in range(BISECTIONS):
        middle = (above + below) / 2
        # Faster than numpy.clip on arrays as small as these.
        is_more = np.minimum(np.maximum(values - middle[:, None] * weights, low), high) @ weights > totals
        above, below = np.where(is_more, middle, above), np.where(is_more, below, middle)
    found: Array = np.clip(values - below[:, None] * weights, low, high)
    return found


@functools.lru_cache(maxsize=2)
def plan_space_of(view: View) -> PlanSpace:
    """Return the plans of a view's search."""
    return PlanSpace(view)
