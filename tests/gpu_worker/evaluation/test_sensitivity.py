import math

import pytest
import torch

from gpu_worker.evaluation import sensitivity
from gpu_worker.evaluation.sensitivity import beginnings, measure_sensitivity
from gpu_worker.measuring.divergence import dense_predictions, divergence
from gpu_worker.measuring.perplexity import perplexity
from gpu_worker.models.errors import NotFiniteError
from gpu_worker.pruning.ordered_model import OrderedModel
from protocol.plans.plan import LayerPlan, dense_plan
from protocol.plans.shape import Granularity
from protocol.plans.single_unit_pruning import single_unit_plan
from protocol.plans.spec import SearchSpec, TextSpec
from tests.support.pruned_models import scores_of
from tests.support.tiny_models import tiny_llama, tiny_windows

TEXT = TextSpec(source="self", windows=2, seqlen=24)


def spec_of(rate: float, granularity: Granularity) -> SearchSpec:
    return SearchSpec(model="tiny", rate=rate, granularity=granularity, calibration=TEXT, fitness=TEXT)


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_each_figure_is_the_divergence_when_that_unit_alone_is_pruned(
    granularity: Granularity, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "_stride", lambda decoder: 1)
    model, spec, windows = tiny_llama(), spec_of(rate, granularity), tiny_windows(2, 24)
    ordered, shape = OrderedModel(model.decoder, scores_of(model)), model.decoder.shape
    dense = dense_predictions(model.decoder, windows)[0]
    expected = []
    for unit in shape.units(granularity):
        ordered.apply_layer(unit.layer, single_unit_plan(unit, spec, shape))
        expected.append(divergence(model.decoder, windows, dense).kl)
        ordered.restore()
    assert measure_sensitivity(ordered, spec, windows) == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert min(expected) > 0


@pytest.mark.parametrize(
    ("windows", "seqlen", "used"), [(64, 256, (16, 64)), (4, 2048, (4, 256)), (2, 24, (2, 24)), (3000, 1, (16, 1))]
)
def test_as_many_tokens_are_used_of_few_windows_as_of_many(windows: int, seqlen: int, used: tuple[int, int]) -> None:
    text = torch.arange(windows * seqlen).reshape(windows, seqlen)
    assert beginnings(text).shape == used and torch.equal(beginnings(text)[:, 0], text[: used[0], 0])


def test_a_large_head_is_used_at_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """And still ranks the units as all tokens do."""
    model = tiny_llama(vocab_size=2000)
    ordered, windows = OrderedModel(model.decoder, scores_of(model)), tiny_windows(8, 64)
    spec, used = spec_of(0.3, "block"), 0

    def count(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal used
        used += inputs[0].numel() // inputs[0].shape[-1]

    model.decoder.head.register_forward_pre_hook(count)
    few = measure_sensitivity(ordered, spec, windows)
    at_few, used = used, 0
    monkeypatch.setattr(sensitivity, "_stride", lambda decoder: 1)
    all_ = measure_sensitivity(ordered, spec, windows)
    assert at_few < used / 3
    assert few == pytest.approx(all_, rel=0.5)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_a_block_is_pruned_alone_and_never_spared(rate: float) -> None:
    shape = tiny_llama().decoder.shape
    whole = dense_plan(shape).layers[0]
    for unit in shape.units("block"):
        kept = single_unit_plan(unit, spec_of(rate, "block"), shape)
        if unit.kind == "mlp":
            assert (kept.kv_heads, kept.queries_per_kv) == (whole.kv_heads, whole.queries_per_kv)
            assert kept.mlp_channels == pytest.approx((1 - rate) * whole.mlp_channels, abs=1)
        else:
            assert kept.query_heads < whole.query_heads
            assert kept.mlp_channels == whole.mlp_channels


def test_a_unit_that_breaks_the_model_is_as_far_as_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(layers=2)
    ordered = OrderedModel(model.decoder, scores_of(model))
    windows = tiny_windows(2, 24)
    prune = ordered.apply_layer

    def break_when_pruned(layer: int, plan: LayerPlan) -> None:
        prune(layer, plan)
        if plan.mlp_channels < 48:
            model.decoder.layers[layer].down.weight = torch.nn.Parameter(torch.full((36, plan.mlp_channels), math.nan))

    monkeypatch.setattr(ordered, "apply_layer", break_when_pruned)
    rises = measure_sensitivity(ordered, spec_of(0.5, "block"), windows)
    assert rises[1::2] == pytest.approx([math.log(320)] * 2)


def test_a_broken_dense_model_is_an_error() -> None:
    model = tiny_llama()
    ordered = OrderedModel(model.decoder, scores_of(model))
    with torch.no_grad():
        model.decoder.layers[0].down.weight.fill_(math.nan)
    with pytest.raises(NotFiniteError):
        measure_sensitivity(ordered, spec_of(0.5, "layer"), tiny_windows(2, 24))


def test_progress_counts_the_units_and_the_model_is_dense_afterwards() -> None:
    model, windows = tiny_llama(), tiny_windows(2, 24)
    told: list[tuple[int, int]] = []
    ordered = OrderedModel(model.decoder, scores_of(model))
    before = perplexity(model.decoder, windows)
    measure_sensitivity(ordered, spec_of(0.3, "block"), windows, lambda _, done, total: told.append((done, total)))
    assert told == [(i, 6) for i in range(7)]
    assert perplexity(model.decoder, windows) == before
