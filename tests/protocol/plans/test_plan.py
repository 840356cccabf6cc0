"""Plans: within one channel of the budget, valid grouped-query layers, and never more than the layer has."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import BudgetError
from protocol.plans.candidate import candidate_id
from protocol.plans.plan import Plan, Split, count_parameters, dense_plan, feasible_rates, make_plan
from protocol.plans.shape import Granularity, LayerShape, ModelShape
from tests.support.samples import SHAPE, SPEC
from tests.support.shapes import model_shapes, some_rates


@settings(max_examples=150, deadline=None)
@given(
    st.data(),
    model_shapes(),
    st.sampled_from(["layer", "block"]),
    st.sampled_from(["equal", "mlp-first"]),
    st.sampled_from([1, 4, 8]),
    st.sampled_from([0.05, 0.2, 0.3, 0.5, 0.7]),
)
def test_a_plan_meets_the_budget_and_leaves_working_layers(
    data: st.DataObject, shape: ModelShape, granularity: Granularity, split: Split, multiple_of: int, mean: float
) -> None:
    proposed = data.draw(some_rates(len(shape.units(granularity))))
    try:
        rates = feasible_rates(proposed, shape, mean, granularity=granularity)
        plan = make_plan(rates, shape, granularity=granularity, split=split, multiple_of=multiple_of)
    except BudgetError:
        return
    budget = shape.decoder_parameters - sum(
        rate * unit.parameters for rate, unit in zip(rates, shape.units(granularity), strict=True)
    )
    assert budget == pytest.approx((1 - mean) * shape.decoder_parameters, rel=1e-8)
    assert abs(plan.decoder_parameters(shape) - budget) <= multiple_of * shape.channel_parameters
    for kept, whole in zip(plan.layers, shape.layers, strict=True):
        assert 1 <= kept.kv_heads <= whole.kv_heads
        assert 1 <= kept.queries_per_kv <= whole.queries_per_kv
        assert 1 <= kept.mlp_channels <= whole.mlp_channels
        assert kept.query_heads % kept.kv_heads == 0
        assert (whole.mlp_channels - kept.mlp_channels) % multiple_of == 0
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert count_parameters(plan, shape).decoder_after == plan.decoder_parameters(shape)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(["layer", "block"]))
def test_a_roomy_shape_always_gets_a_plan(data: st.DataObject, granularity: Granularity) -> None:
    rates = feasible_rates(
        data.draw(some_rates(len(SHAPE.units(granularity)))), SHAPE, 0.3, granularity=granularity, high=0.95
    )
    make_plan(rates, SHAPE, granularity=granularity)


@given(model_shapes(), st.sampled_from(["layer", "block"]))
@settings(max_examples=50, deadline=None)
def test_rates_of_zero_leave_the_dense_model(shape: ModelShape, granularity: Granularity) -> None:
    rates = [0.0] * len(shape.units(granularity))
    for multiple_of in (1, 7):
        assert make_plan(rates, shape, granularity=granularity, multiple_of=multiple_of) == dense_plan(shape)


@given(model_shapes())
@settings(max_examples=50, deadline=None)
def test_the_parameters_of_the_units_are_those_of_the_decoder(shape: ModelShape) -> None:
    for granularity in ("layer", "block"):
        units = shape.units(granularity)
        assert sum(unit.parameters for unit in units) == shape.decoder_parameters
        assert all(0 <= unit.highest_rate < 1 for unit in units)
    assert ModelShape.model_validate_json(shape.model_dump_json()) == shape


@pytest.mark.parametrize(
    ("rates", "multiple_of", "sentence"),
    [
        *(([0.3, bad, 0.3, 0.3], 1, "layer 1") for bad in (math.nan, math.inf, -0.1, 1.0)),
        ([0.3] * 3, 1, "3 pruning rates were given for 4 units"),
        ([0.3] * 4, 100_000, "multiples of 100000: the narrowest MLP has 64"),
    ],
)
def test_rates_that_cannot_be_are_refused(rates: list[float], multiple_of: int, sentence: str) -> None:
    with pytest.raises(BudgetError, match=sentence):
        make_plan(rates, SHAPE, multiple_of=multiple_of)


def test_equal_plans_are_one_candidate_and_others_are_not() -> None:
    plan = make_plan([0.3] * 4, SHAPE)
    assert candidate_id(plan, "f") == candidate_id(Plan.model_validate_json(plan.model_dump_json()), "f")
    others = {candidate_id(make_plan([0.4, 0.2, 0.3, 0.3], SHAPE), "f"), candidate_id(plan, "g")}
    assert len(others | {candidate_id(plan, "f"), candidate_id(plan, "f", "report")}) == 4


def test_heads_go_where_coarse_widths_leave_too_little_to_take() -> None:
    """With widths of 32 and 64 only, an MLP can lose half of its channels."""
    plan = make_plan([0.6] * 4, SHAPE, multiple_of=32)
    left = plan.decoder_parameters(SHAPE)
    assert abs(left - 0.4 * SHAPE.decoder_parameters) <= 32 * SHAPE.channel_parameters
    assert min(layer.query_heads for layer in plan.layers) < 2


@pytest.mark.parametrize("rate", [0.5, 0.6, 0.7, 0.75])
def test_block_plans_take_more_heads_where_the_mlps_have_too_little_to_give(rate: float) -> None:
    shape = SHAPE.model_copy(update={"layers": (LayerShape(query_heads=4, kv_heads=4, mlp_channels=8),) * 4})
    plan = make_plan(feasible_rates([rate] * 8, shape, rate, granularity="block"), shape, granularity="block")
    left = plan.decoder_parameters(shape)
    assert abs(left - (1 - rate) * shape.decoder_parameters) <= shape.channel_parameters


def test_plans_share_their_equal_layers_also_when_they_are_read() -> None:
    """A search of days holds a hundred thousand plans."""
    plan = SPEC.plan(SPEC.feasible((0.1, 0.3, 0.3, 0.5), SHAPE), SHAPE)
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan and all(one is other for one, other in zip(plan.layers, again.layers, strict=True))
