"""Projection and rounding of pruning rates, against their definitions."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import BudgetError
from protocol.plans.rates import MEAN_TOLERANCE, feasible, project, round_rates, weighted_mean

Problem = tuple[list[float], list[int], float, list[tuple[float, float]]]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Rates, weights (two sizes), a mean that can be reached, and bounds."""
    count = draw(st.integers(1, 16))
    sizes = draw(st.lists(st.integers(1000, 10**8), min_size=1, max_size=2))
    weights = draw(st.lists(st.sampled_from(sizes), min_size=count, max_size=count))
    low = draw(st.sampled_from([0.0, 0.05, 0.1]))
    bounds = [(low, draw(st.sampled_from([0.5, 0.9, 0.99]))) for _ in weights]
    lowest, highest = (math.fsum(b[k] * w for b, w in zip(bounds, weights, strict=True)) / sum(weights) for k in (0, 1))
    mean = draw(st.integers(math.ceil((lowest + 0.01) * 100), math.floor((highest - 0.01) * 100))) / 100
    return draw(st.lists(st.floats(-2, 3), min_size=count, max_size=count)), weights, mean, bounds


def within(rates: tuple[float, ...], bounds: list[tuple[float, float]]) -> bool:
    return all(low - 1e-12 <= rate <= high + 1e-12 for rate, (low, high) in zip(rates, bounds, strict=True))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_a_projection_is_feasible_and_its_own_projection(problem: Problem) -> None:
    rates, weights, mean, bounds = problem
    projected = project(rates, weights, mean, bounds)
    assert within(projected, bounds)
    assert weighted_mean(projected, weights) == pytest.approx(mean, abs=1e-11)
    assert project(projected, weights, mean, bounds) == pytest.approx(projected, abs=1e-9)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_a_projection_is_the_nearest_feasible_vector(problem: Problem) -> None:
    """No exchange between two units that keeps the mean is nearer. That is sufficient, for the problem is convex."""
    rates, weights, mean, bounds = problem
    projected = project(rates, weights, mean, bounds)
    pull = [(p - r) / w for p, r, w in zip(projected, rates, weights, strict=True)]  # minus the multiplier, if inside
    for i, j in itertools.permutations(range(len(rates)), 2):
        can_rise = projected[i] < bounds[i][1] - 1e-9
        can_fall = projected[j] > bounds[j][0] + 1e-9
        if can_rise and can_fall:
            assert (pull[i] - pull[j]) * min(weights[i], weights[j]) >= -1e-7


@settings(max_examples=150, deadline=None)
@given(problems())
def test_rounding_keeps_five_decimals_the_bounds_and_the_mean(problem: Problem) -> None:
    rates, weights, mean, bounds = problem
    try:
        rounded = feasible(rates, weights, mean, bounds)
    except BudgetError:
        # Two sizes with few units of one and no common measure cannot always meet the mean at five decimals.
        assert len(set(weights)) == 2
        return
    assert within(rounded, bounds)
    assert all(rate == round(rate, 5) for rate in rounded)
    assert abs(weighted_mean(rounded, weights) - mean) <= MEAN_TOLERANCE
    assert feasible(rounded, weights, mean, bounds) == rounded


def test_rounding_stays_near() -> None:
    weights = [3_540_096] * 30
    rates = project([0.1 + 0.017 * i for i in range(30)], weights, 0.3, [(0.0, 0.9)] * 30)
    rounded = round_rates(rates, weights, 0.3, [(0.0, 0.9)] * 30)
    assert max(abs(a - b) for a, b in zip(rates, rounded, strict=True)) <= 1.5e-5


@pytest.mark.parametrize("mean", [-0.1, 0.04, 0.6, 1.0])
def test_a_mean_out_of_reach_is_an_error(mean: float) -> None:
    with pytest.raises(BudgetError, match="cannot be reached"):
        project([0.3, 0.3], [1, 1], mean, [(0.05, 0.5)] * 2)


def test_a_mean_that_five_decimals_cannot_have_is_an_error() -> None:
    with pytest.raises(BudgetError, match="decimals"):
        round_rates([0.3], [1], 0.3000001, [(0.0, 0.9)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_rate_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(BudgetError, match="finite"):
        project([0.3, bad], [1, 1], 0.3, [(0.0, 0.9)] * 2)
