"""The classical operators."""

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from agents.operators.genetic import cross, interpolate, mutate, random_rates, tournament

SEEDS = st.integers(0, 2**32)
RATES = st.lists(st.floats(0, 1), min_size=1, max_size=60)


@given(SEEDS, st.integers(1, 160), st.floats(0.05, 0.9))
def test_random_rates_are_rates(seed: int, units: int, mean: float) -> None:
    rates = random_rates(random.Random(seed), units, mean)
    assert len(rates) == units and all(0 <= rate <= 1 for rate in rates)


def test_random_rates_scatter_around_the_mean_asked_for() -> None:
    means = [sum(random_rates(random.Random(seed), 30, 0.3)) / 30 for seed in range(200)]
    assert abs(sum(means) / len(means) - 0.3) < 0.02


def test_each_kind_of_unit_has_its_own_profile_and_mean() -> None:
    apart = []
    for seed in range(200):
        rates = random_rates(random.Random(seed), 60, 0.3, kinds=2)
        assert len(rates) == 60 and all(0 <= rate <= 1 for rate in rates)
        apart.append(sum(rates[1::2]) / 30 - sum(rates[::2]) / 30)
    assert min(apart) < -0.1 and max(apart) > 0.1


@given(SEEDS, RATES)
def test_a_mutation_touches_at_most_six_units_and_leaves_rates(seed: int, rates: list[float]) -> None:
    changed = mutate(random.Random(seed), rates)
    assert len(changed) == len(rates) and all(0 <= rate <= 1 for rate in changed)
    assert sum(a != b for a, b in zip(changed, rates, strict=True)) <= 6


@given(SEEDS, st.integers(2, 60))
def test_a_cross_takes_one_range_from_the_second_and_keeps_some_of_the_first(seed: int, units: int) -> None:
    child = cross(random.Random(seed), [0.0] * units, [1.0] * units)
    assert 0 < sum(child) < units
    assert sum(a != b for a, b in pairwise(child)) <= 2


@given(SEEDS, st.integers(0, 30), st.integers(0, 40))
def test_a_tournament_chooses_different_members_best_first(seed: int, members: int, count: int) -> None:
    chosen = tournament(random.Random(seed), range(members), count)
    assert list(chosen) == sorted(set(chosen)) and len(chosen) == min(count, members)


def test_a_tournament_prefers_the_better() -> None:
    places = [i for seed in range(200) for i in tournament(random.Random(seed), range(20), 5)]
    assert sum(places) / len(places) < 8


def test_the_same_seed_gives_the_same_offspring() -> None:
    rates = [0.3] * 30
    assert mutate(random.Random(7), rates) == mutate(random.Random(7), rates)
    assert mutate(random.Random(7), rates) != mutate(random.Random(8), rates)


def test_interpolation_meets_every_control_point() -> None:
    assert [interpolate([1, 5, 3], i / 2) for i in range(3)] == [1, 5, 3]
    assert interpolate([1, 5, 3], 0.25) == 3
    assert interpolate([2], 0.7) == 2
