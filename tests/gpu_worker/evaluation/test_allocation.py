from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.evaluation.allocation import allocate, prepare
from gpu_worker.evaluation.one_shot import allocate_once
from gpu_worker.pruning.calibration import calibrate
from gpu_worker.pruning.importance import outlier_share
from protocol.errors import BudgetError
from protocol.plans import allocation as allocations
from protocol.plans.allocation import Allocation, Method, PruningRequest, llm_pruner_rates, owl_rates
from protocol.plans.budget import sensitivity_rates
from protocol.plans.plan import make_plan
from protocol.plans.rates import weighted_mean
from protocol.plans.shape import Granularity, LayerShape, ModelShape
from protocol.plans.spec import SearchSpec, TextSpec
from tests.support.samples import SHAPE
from tests.support.tiny_models import tiny_llama, tiny_windows
from tests.support.tiny_specs import tiny_spec

SMOLLM2 = ModelShape(
    family="llama",
    hidden_size=576,
    head_dim=64,
    layers=(LayerShape(query_heads=9, kv_heads=3, mlp_channels=1536),) * 30,
    query_head_parameters=2 * 64 * 576,
    kv_head_parameters=2 * 64 * 576,
    channel_parameters=3 * 576,
    attention_fixed=576,
    mlp_fixed=576,
    other_parameters=49152 * 576 + 576,
)
LLAMA_7B = SMOLLM2.model_copy(update={"layers": (LayerShape(query_heads=9, kv_heads=3, mlp_channels=1536),) * 32})
granularities = st.sampled_from(get_args(Granularity))


def test_an_allocation_takes_no_more_text_than_it_scores_on(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path)
    whole = TextSpec(source=spec.calibration.source, windows=3999 // 32, seqlen=32)
    spec = spec.model_copy(update={"calibration": whole, "fitness": whole, "report": None})
    for method in ("sensitivity", "owl"):
        assert len(allocate_once(spec, Allocation(method=method)).rates) == 3


def mean_of(rates: tuple[float, ...], shape: ModelShape, granularity: Granularity) -> float:
    return weighted_mean(rates, [unit.parameters for unit in shape.units(granularity)])


@given(st.lists(st.floats(0, 20), min_size=4, max_size=4), st.floats(0.05, 0.5), granularities)
def test_owl_is_exactly_on_budget(outliers: list[float], rate: float, granularity: Granularity) -> None:
    rate = round(rate, 5)
    rates = owl_rates(outliers, 0.08, SHAPE, rate, granularity)
    assert mean_of(rates, SHAPE, granularity) == pytest.approx(rate, abs=1e-9)


@given(st.lists(st.floats(-0.1, 5), min_size=4, max_size=4), st.floats(0.05, 0.7))
def test_sensitivity_is_exactly_on_budget(sensitivity: list[float], rate: float) -> None:
    rate = round(rate, 5)
    rates = sensitivity_rates(sensitivity, [rate] * 4, SHAPE, rate, "layer")
    assert mean_of(rates, SHAPE, "layer") == pytest.approx(rate, abs=1e-9)


def test_owl_spreads_the_kept_share_over_twice_lambda_around_what_is_left() -> None:
    rates = owl_rates([1.0, 2.0, 3.0, 4.0], 0.08, SHAPE, 0.3, "layer")
    # By hand: kept = 0.16 · (D − 1) / 3, less its mean of 0.08, plus 0.7.
    assert rates == pytest.approx([0.38, 0.32667, 0.27333, 0.22], abs=1e-5)


def test_owl_without_differences_is_uniform() -> None:
    assert (
        owl_rates([2.0] * 4, 0.08, SHAPE, 0.3, "layer") == allocations.uniform_rates(SHAPE, 0.3, "layer") == (0.3,) * 4
    )


def test_llm_pruner_prunes_the_layers_that_its_readme_names() -> None:
    rates = llm_pruner_rates(None, None, LLAMA_7B, 0.2, "layer")
    # Layers 4 to 29 of 32, at about 25 % for 20 % on the whole.
    assert [i for i, rate in enumerate(rates) if rate > 0] == list(range(4, 30))
    assert rates[4:30] == pytest.approx([0.2 * 32 / 26] * 26, abs=2e-5)


def test_first_layer_spares_that_alone() -> None:
    """And so does LLM-Pruner where it is told to."""
    first_layer = allocations.allocation_rates(
        Allocation(method="first-layer"), allocations.DenseMeasurements(), SHAPE, 0.3, "block"
    )
    for rates in (first_layer, llm_pruner_rates(1, 0, SHAPE, 0.3, "block")):
        assert rates[:2] == (0, 0) and rates[2:] == pytest.approx([0.4] * 6, abs=2e-5)


def test_llm_pruner_says_so_where_the_middle_cannot_give_that_much() -> None:
    with pytest.raises(BudgetError, match=r"0\.6 cannot be reached"):
        llm_pruner_rates(1, 1, SHAPE, 0.6, "layer")
    with pytest.raises(BudgetError, match="no layer is left to prune"):
        llm_pruner_rates(2, 2, SHAPE, 0.3, "layer")


def test_sensitivity_takes_most_from_what_matters_least() -> None:
    rates = sensitivity_rates([0.4, 0.1, 0.1, 0.2], [0.3] * 4, SHAPE, 0.3, "layer")
    # p ∝ 1 / (s + median of 0.15): 1 / 0.55, 1 / 0.25, 1 / 0.25, 1 / 0.35.
    pulls = [1 / 0.55, 4.0, 4.0, 1 / 0.35]
    assert rates == pytest.approx([1.2 * pull / sum(pulls) for pull in pulls], abs=1e-5)


def test_a_unit_that_measured_as_harmless_is_not_removed_for_that() -> None:
    rates = sensitivity_rates([0.2, 0.2, 0.2, -0.1], [0.1] * 4, SHAPE, 0.1, "layer")
    # It counts as zero, to which the median is added: twice the others' rate.
    assert rates == pytest.approx([0.08] * 3 + [0.16], abs=1e-5)


@pytest.mark.parametrize("granularity", get_args(Granularity))
def test_sensitivity_allocates_where_a_unit_alone_would_lose_nothing(
    spec: SearchSpec, granularity: Granularity
) -> None:
    """At a low rate, and with coarse widths, rounding would leave every unit whole."""
    sensitivity = Allocation(method="sensitivity")
    for change in ({"rate": 0.005}, {"rate": 0.1, "multiple_of": 24}):
        changed = spec.model_copy(update={"granularity": granularity, **change})
        target = prepare(PruningRequest(changed, sensitivity))
        rates = allocate(target, sensitivity)
        assert mean_of(rates, target.shape, granularity) == pytest.approx(changed.rate, abs=1e-9)


def test_an_outlier_exceeds_the_mean_of_its_layer_m_times() -> None:
    model = tiny_llama(layers=1)
    layer, windows = model.decoder.layers[0], tiny_windows(2, 16)
    seen = calibrate(model.decoder, windows)[0]
    inputs = [seen.attention_input] * 3 + [seen.attention_output] + [seen.mlp_input] * 2 + [seen.mlp_output]
    entries = [
        abs(weight) * squares.item() ** 0.5
        for linear, columns in zip(layer.linears, inputs, strict=True)
        for row in linear.weight.tolist()
        for weight, squares in zip(row, columns, strict=True)
    ]
    mean = sum(entries) / len(entries)
    share = 100 * sum(entry > 3 * mean for entry in entries) / len(entries)
    assert share > 0
    assert outlier_share(layer, seen, 3) == pytest.approx(share)


@pytest.mark.parametrize("granularity", get_args(Granularity))
@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_ends_within_a_channel_of_the_same_budget(
    spec: SearchSpec, method: Method, granularity: Granularity
) -> None:
    spec = spec.model_copy(update={"granularity": granularity})
    allocation = Allocation(method=method, first_layers=1, last_layers=0, outlier_threshold=2)
    target = prepare(PruningRequest(spec, allocation))
    rates = allocate(target, allocation)
    shape = target.shape
    assert mean_of(rates, shape, granularity) == pytest.approx(spec.rate, abs=1e-9)
    left = make_plan(rates, shape, granularity=granularity).decoder_parameters(shape)
    assert abs(left - (1 - spec.rate) * shape.decoder_parameters) <= shape.channel_parameters
    if method != "uniform":
        assert len(set(rates)) > 1
