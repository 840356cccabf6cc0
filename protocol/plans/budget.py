"""Rates on a budget: the nearest feasible rates, and the rates with the least damage by measured sensitivity. Pure."""

import statistics
from collections.abc import Sequence

from protocol.plans.plan import unit_bounds
from protocol.plans.rates import feasible
from protocol.plans.shape import Granularity, ModelShape, Unit

SENSITIVITY_FLOOR = 1.0
"""This multiple of the median is added to every sensitivity. Most units have about the same low sensitivity, and their
differences are noise. Without the floor, the unit with the lowest value would be pruned away. A unit that is ten times
as sensitive is still spared."""


def on_budget(
    rates: Sequence[float],
    shape: ModelShape,
    rate: float,
    granularity: Granularity,
    *,
    spared: Sequence[bool] = (),
) -> tuple[float, ...]:
    """Return the nearest feasible rates; `spared` units keep a rate of zero."""
    bounds = list(unit_bounds(shape, granularity))
    for i, keep in enumerate(spared):
        if keep:
            bounds[i] = (0.0, 0.0)
    return feasible(rates, [unit.parameters for unit in shape.units(granularity)], rate, bounds)


def sensitivity_rates(
    sensitivity: Sequence[float], removed: Sequence[float], shape: ModelShape, rate: float, granularity: Granularity
) -> tuple[float, ...]:
    """Return the rates with the least damage, assuming that damage grows with the square of a unit's rate.

    `sensitivity` is each unit's divergence from the dense model when only this unit loses the share `removed`.
    Minimises Σ s_i · (p_i / removed_i)² for the given budget: p_i ∝ w_i · removed_i² / s_i, with w the parameters,
    clipped at the bounds. `SENSITIVITY_FLOOR` medians are added to each s_i, and negative s_i count as zero.
    """
    units = shape.units(granularity)
    floor = SENSITIVITY_FLOOR * max(statistics.median(sensitivity), 1e-6)
    pull = [
        unit.parameters * share**2 / (max(s, 0.0) + floor)
        for unit, share, s in zip(units, removed, sensitivity, strict=True)
    ]
    return on_budget(_fill(pull, units, shape, rate, granularity), shape, rate, granularity)


def _fill(
    pull: Sequence[float], units: Sequence[Unit], shape: ModelShape, rate: float, granularity: Granularity
) -> list[float]:
    """Return rates proportional to `pull`, clipped at the units' bounds, that use up the budget."""
    bounds = unit_bounds(shape, granularity)
    budget = rate * sum(unit.parameters for unit in units)

    def at(level: float) -> list[float]:
        return [min(level * p, high) for p, (_, high) in zip(pull, bounds, strict=True)]

    # A unit that cannot be pruned has a pull of zero.
    low, high = 0.0, 1 / min((p for p in pull if p > 0), default=1.0)
    for _ in range(200):
        middle = (low + high) / 2
        spent = sum(r * unit.parameters for r, unit in zip(at(middle), units, strict=True))
        low, high = (middle, high) if spent < budget else (low, middle)
    return at(high)
