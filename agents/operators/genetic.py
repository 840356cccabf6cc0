"""Classical operators: what stands in for the LLM when no endpoint answers, and what it is compared with. Pure, seeded.

They return raw rates, one per unit; the mean is restored by projection where the rates are made feasible.
"""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

SHIFT = 0.05
"""Rate moved from one unit to another by one step of `mutate`."""
CONTROL_POINTS = 5


def random_rates(rng: random.Random, units: int, mean: float, kinds: int = 1) -> tuple[float, ...]:
    """A random profile over depth, smooth, with some noise on it; rates mostly between 0 and 2 × `mean`.

    Where `kinds` of units take turns (attention, MLP, …), each has a profile of its own, about a mean of its own.
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
    """`rates` with a little moved between units: one to three times, after EvoPress, from one unit to another."""
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
    """`first` with one range of units taken from `second`; never all of them."""
    units = len(first)
    length = rng.randint(1, max(1, units - 1))
    start = rng.randint(0, units - length)
    return (*first[:start], *second[start : start + length], *first[start + length :])


def tournament(rng: random.Random, ranked: Sequence[T], count: int, size: int = 3) -> tuple[T, ...]:
    """`count` different items of `ranked` (best first), each the best of `size` drawn; still best first."""
    left = list(range(len(ranked)))
    chosen: list[int] = []
    while left and len(chosen) < count:
        winner = min(rng.sample(left, min(size, len(left))))
        left.remove(winner)
        chosen.append(winner)
    return tuple(ranked[i] for i in sorted(chosen))


def interpolate(points: Sequence[float], position: float) -> float:
    """The piecewise linear curve through evenly spaced `points`, at `position` between 0 and 1."""
    if len(points) == 1:
        return points[0]
    place = position * (len(points) - 1)
    left = min(int(place), len(points) - 2)
    return points[left] + (points[left + 1] - points[left]) * (place - left)
