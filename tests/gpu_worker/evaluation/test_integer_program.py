"""Allocation by integer programming: the sizes with the least summed damage that meet the budget."""

import itertools
import random

import pytest

from gpu_worker.evaluation import sensitivity
from gpu_worker.evaluation.integer_program import _least_cost, levels_of, measure_levels, mip_rates
from gpu_worker.evaluation.sensitivity import measure_sensitivity
from gpu_worker.progress import no_progress
from gpu_worker.pruning.ordered_model import OrderedModel
from protocol.errors import BudgetError
from protocol.plans.plan import Plan, dense_plan, removed_shares
from protocol.plans.rates import weighted_mean
from protocol.plans.shape import Granularity
from tests.gpu_worker.evaluation.test_sensitivity import spec_of
from tests.support.pruned_models import scores_of
from tests.support.tiny_models import tiny_llama, tiny_windows


def test_the_choice_is_the_best_of_all_choices() -> None:
    rng = random.Random(0)
    for _ in range(20):
        costs = [[0.0, *sorted(rng.random() for _ in range(3))] for _ in range(4)]
        gains = [[0.0, *sorted(rng.random() for _ in range(3))] for _ in range(4)]
        least = 0.5 * sum(each[-1] for each in gains)
        found = _least_cost(costs, gains, least)

        def total(values: list[list[float]], choice: tuple[int, ...]) -> float:
            return sum(each[i] for each, i in zip(values, choice, strict=True))

        allowed = [c for c in itertools.product(range(4), repeat=4) if total(gains, c) >= least]
        assert total(costs, tuple(found)) == pytest.approx(min(total(costs, c) for c in allowed), rel=1e-3)
    with pytest.raises(BudgetError, match="lower the rate"):
        _least_cost([[0.0, 1.0]], [[0.0, 1.0]], 2.0)


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_rates_meet_the_budget_and_spare_what_is_harmed_most(granularity: Granularity) -> None:
    model, spec = tiny_llama(layers=4), spec_of(0.3, granularity)
    shape = model.decoder.shape
    units = shape.units(granularity)
    harm = {unit.name: tuple(level.rate**2 for level in levels_of(unit, spec, shape)) for unit in units}
    harm[units[-1].name] = tuple(100.0 for _ in harm[units[-1].name])
    rates = mip_rates(harm, spec, shape)
    assert weighted_mean(rates, [unit.parameters for unit in units]) == pytest.approx(0.3, abs=1e-6)
    assert rates[-1] < 0.15 < min(rates[i] for i, unit in enumerate(units[:-1]) if unit.kind != "attention")


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_sizes_are_measured_as_sensitivity_is(granularity: Granularity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "_stride", lambda decoder: 1)
    model, windows = tiny_llama(), tiny_windows(2, 24)
    ordered, shape = OrderedModel(model.decoder, scores_of(model)), model.decoder.shape
    spec = spec_of(0.3, granularity)
    found = measure_levels(ordered, spec, windows, no_progress)
    alone = measure_sensitivity(ordered, spec, windows)
    for unit, harm in zip(shape.units(granularity), alone, strict=True):
        levels = levels_of(unit, spec, shape)
        assert len(found[unit.name]) == len(levels) > 1
        if unit.kind != "attention":
            assert found[unit.name][[level.rate for level in levels].index(0.3)] == pytest.approx(harm, rel=1e-4)
        for level in levels:
            layers = [level.plan if i == unit.layer else dense for i, dense in enumerate(dense_plan(shape).layers)]
            shares = removed_shares(Plan(layers=tuple(layers)), shape, granularity)
            assert shares[list(shape.units(granularity)).index(unit)] == pytest.approx(level.rate, abs=0.06)
