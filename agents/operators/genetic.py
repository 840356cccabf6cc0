"""Genetic operators without an LLM: the fallback if no endpoint answers, and baselines of LLM search. Pure, seeded.

They return raw rates, one per unit. Projection restores the mean when the rates are made feasible.
"""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

SHIFT = 0.05
"""Rate that one step of `mutate` shifts from one unit to another, multiplied by ½, 1 or 2."""
CONTROL_POINTS = 5


def random_rates(rng: random.Random, units: int, mean: float, kinds: int = 1) -> tuple[float, ...]:
    """Return a random smooth profile over depth with some noise; rates are mostly between 0 and 2 × `mean`.

    If `kinds` of units alternate (attention, MLP, …), each kind has its own profile with its own mean.
    """
    profiles = []
    for _ in range(kinds):
        height = mean * (rng.uniform(0.0, 1.5) if kinds > 1 else 1.0)
        profiles.append([rng.uniform(0.3, 1.7) * height for _ in range(CONTROL_POINTS)])
    last = max(1, units // kinds - 1)
    return tuple(
        min(max(interpolate(profiles[i % kinds], i // kinds / last) + rng.gauss(0, 0.1 * mean), 0.0), 1.0)
        for i in range(units)
    )


def mutate(rng: random.Random, rates: Sequence[float]) -> tuple[float, ...]:
    """Return `rates` after one to three small shifts from one unit to another, as in EvoPress."""
    changed = list(rates)
    if len(changed) < 2:
        return tuple(changed)
    for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
        giver, taker = rng.sample(range(len(changed)), 2)
        step = rng.choice((0.5, 1.0, 2.0)) * SHIFT
        changed[giver] = max(0.0, changed[giver] - step)
        changed[taker] = min(1.0, changed[taker] + step)
    return tuple(changed)


def cross(rng: random.Random, first: Sequence[float], second: Sequence[float]) -> tuple[float, ...]:
    """Return `first` with one range of units taken from `second`; never all units."""
    units = len(first)
    length = rng.randint(1, max(1, units - 1))
    start = rng.randint(0, units - length)
    return (*first[:start], *second[start : start + length], *first[start + length :])


def tournament(rng: random.Random, ranked: Sequence[T], count: int, size: int = 3) -> tuple[T, ...]:
    """Return `count` different items of `ranked`, each the best of `size` random items.

    Both `ranked` and the result are sorted, best first.
    """
    left = list(range(len(ranked)))
    chosen: list[int] = []
    while left and len(chosen) < count:
        winner = min(rng.sample(left, min(size, len(left))))
        left.remove(winner)
        chosen.append(winner)
    return tuple(ranked[i] for i in sorted(chosen))


def interpolate(points: Sequence[float], position: float) -> float:
    """Return the piecewise linear curve through evenly spaced `points`, at `position` between 0 and 1."""
    if len(points) == 1:
        return points[0]
    index = position * (len(points) - 1)
    left = min(int(index), len(points) - 2)
    return points[left] + (points[left + 1] - points[left]) * (index - left)
