"""Pruning rates that meet the budget exactly: projection and rounding. Pure arithmetic.

A vector of pruning rates is feasible when every rate lies within its unit's bounds and the parameter-weighted
mean is β. Every proposal of an LLM or an operator is projected onto the nearest feasible vector, then rounded to five
decimals with the mean unchanged.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field

from protocol.errors import BudgetError

DECIMALS = 5
SCALE = 10**DECIMALS
ROUNDING = 1 / SCALE
"""Maximum distance of a rate from its bounds; such a rate is made feasible later."""
MEAN_TOLERANCE = 1e-9

Bounds = Sequence[tuple[float, float]]


def _no_percentage(rate: object) -> object:
    """Refuse a rate that was meant as a percentage, with the share to write instead."""
    try:
        percent = float(rate)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return rate  # which is refused for another reason
    if 1 < percent <= 100:
        raise ValueError(f"it is a share: write {percent / 100:g} for {percent:g} %")
    return rate


HIGHEST_RATE = 0.9
TargetRate = Annotated[float, Field(gt=0, le=HIGHEST_RATE), BeforeValidator(_no_percentage)]
"""β: the share of the decoder's parameters to remove."""


def weighted_mean(rates: Sequence[float], weights: Sequence[int]) -> float:
    """Return the share of all parameters that `rates` remove; `weights` are the units' parameter counts."""
    return math.fsum(r * w for r, w in zip(rates, weights, strict=True)) / sum(weights)


def check_reachable(weights: Sequence[int], mean: float, bounds: Bounds) -> None:
    """Raise BudgetError unless some rates within `bounds` have this weighted mean."""
    lowest = weighted_mean([low for low, _ in bounds], weights)
    highest = weighted_mean([high for _, high in bounds], weights)
    if not lowest - MEAN_TOLERANCE <= mean <= highest + MEAN_TOLERANCE:
        raise BudgetError(
            f"a pruning rate of {mean:g} cannot be reached: the bounds allow a mean of {lowest:.5f} to {highest:.5f}"
        )


def project(rates: Sequence[float], weights: Sequence[int], mean: float, bounds: Bounds) -> tuple[float, ...]:
    """Return the feasible vector nearest to `rates` (Euclidean), with weighted mean `mean`.

    The solution is clip(r_i − λ·w_i, bounds_i) for one λ. The mean falls monotonically and piecewise linearly in λ, so
    λ is found exactly between two breakpoints. Raises BudgetError if no feasible vector exists or a rate is NaN.
    """
    if not all(map(math.isfinite, rates)):
        raise BudgetError(f"pruning rates must be finite numbers, not {list(rates)}")
    check_reachable(weights, mean, bounds)
    total = sum(weights)
    share = [w / total for w in weights]

    def clipped(multiplier: float) -> list[float]:
        return [min(max(r - multiplier * s, low), high) for r, s, (low, high) in zip(rates, share, bounds, strict=True)]

    def negative_mean(multiplier: float) -> float:
        return -math.fsum(r * s for r, s in zip(clipped(multiplier), share, strict=True))

    points = sorted({(r - edge) / s for r, s, edges in zip(rates, share, bounds, strict=True) if s for edge in edges})
    right = min(max(bisect_left(points, -mean, key=negative_mean), 1), len(points) - 1)
    a, b = (points[right - 1], points[right]) if len(points) > 1 else (points[0], points[0])
    mean_a, mean_b = -negative_mean(a), -negative_mean(b)
    multiplier = a if mean_a == mean_b else a + (b - a) * (mean_a - mean) / (mean_a - mean_b)
    return tuple(clipped(multiplier))


def round_rates(rates: Sequence[float], weights: Sequence[int], mean: float, bounds: Bounds) -> tuple[float, ...]:
    """Round `rates` to five decimals within `bounds`, with the weighted mean kept to 1e-9.

    Works in steps of 1e-5. Rounds each rate to the nearest step, then spreads the missing (or surplus) steps over the
    units with the largest rounding errors. Units of different sizes are combined to meet even a remainder smaller than
    one step of the smallest unit. Raises BudgetError if that is impossible (bounds narrower than a step).
    """
    low = [math.ceil(lo * SCALE - 1e-6) for lo, _ in bounds]
    high = [math.floor(hi * SCALE + 1e-6) for _, hi in bounds]
    steps = [min(max(round(r * SCALE), lo), hi) if lo <= hi else lo for r, lo, hi in zip(rates, low, high, strict=True)]
    target = mean * SCALE * sum(weights)
    tolerance = MEAN_TOLERANCE / 2 * SCALE * sum(weights)

    missing = target - sum(s * w for s, w in zip(steps, weights, strict=True))
    for weight in sorted(set(weights), reverse=True):
        if abs(missing) <= tolerance:
            break  # feasible rates are not changed
        count = round(missing / weight)
        missing -= weight * _spread(steps, count, [w == weight for w in weights], rates, low, high)
    if abs(missing) > tolerance:
        missing = _combine(missing, tolerance, steps, weights, rates, low, high)
    if abs(missing) > tolerance:
        raise BudgetError(
            f"no rates with {DECIMALS} decimals within the bounds have a mean of {mean!r}; "
            f"give the pruning rate at most {DECIMALS} decimals, or widen the bounds"
        )
    return tuple(s / SCALE for s in steps)


def feasible(rates: Sequence[float], weights: Sequence[int], mean: float, bounds: Bounds) -> tuple[float, ...]:
    """Return the five-decimal feasible vector nearest to `rates`: `project`, then `round_rates`."""
    return round_rates(project(rates, weights, mean, bounds), weights, mean, bounds)


def _spread(
    steps: list[int],
    count: int,
    eligible: Sequence[bool],
    rates: Sequence[float],
    low: Sequence[int],
    high: Sequence[int],
) -> int:
    """Add `count` steps (negative: subtract) to eligible units, in place. Returns how many steps were added."""
    sign = 1 if count > 0 else -1
    left = abs(count)
    while left:
        open_units = [
            i for i, ok in enumerate(eligible) if ok and (steps[i] < high[i] if sign > 0 else steps[i] > low[i])
        ]
        if not open_units:
            break
        open_units.sort(key=lambda i: sign * (steps[i] - rates[i] * SCALE))
        for i in open_units[:left]:
            steps[i] += sign
        left -= min(left, len(open_units))
    return sign * (abs(count) - left)


def _combine(
    missing: float,
    tolerance: float,
    steps: list[int],
    weights: Sequence[int],
    rates: Sequence[float],
    low: Sequence[int],
    high: Sequence[int],
) -> float:
    """Meet a remainder below one step by steps up in units of one size and down in another; return what is left."""
    sizes = sorted(set(weights))
    for small in sizes:
        for large in reversed(sizes):
            if large == small:
                continue
            # Beyond large/gcd steps the remainders repeat.
            for k in range(1, min(20_000, large // math.gcd(small, large) + 1)):
                for count in (k, -k):
                    rest = missing - count * small
                    other = round(rest / large)
                    if abs(rest - other * large) > tolerance:
                        continue
                    trial = list(steps)
                    is_small = [w == small for w in weights]
                    is_large = [w == large for w in weights]
                    if (
                        _spread(trial, count, is_small, rates, low, high) == count
                        and _spread(trial, other, is_large, rates, low, high) == other
                    ):
                        steps[:] = trial
                        return rest - other * large
    return missing
