"""Features of units, compared with slow computations."""

import itertools

import pytest
import torch
from pydantic import ValidationError

from gpu_worker.evaluation.features import measure_features
from gpu_worker.pruning.calibration import calibrate_products
from gpu_worker.pruning.ordered_model import OrderedModel
from gpu_worker.pruning.reconstruction import DAMPING, damped
from protocol.plans.profile import ModelProfile
from protocol.plans.shape import Granularity
from protocol.plans.single_unit_pruning import single_unit_plan
from protocol.plans.spec import SearchSpec, TextSpec
from tests.support.pruned_models import logits_of, scores_of
from tests.support.samples import PROFILE
from tests.support.tiny_models import tiny_llama, tiny_windows

TEXT = TextSpec(source="self", windows=4, seqlen=48)
WINDOWS = tiny_windows(4, 48)


def spec_of(granularity: Granularity, rate: float = 0.4) -> SearchSpec:
    return SearchSpec(model="tiny", rate=rate, granularity=granularity, calibration=TEXT, fitness=TEXT)


def test_influence_is_the_angle_between_a_layers_input_and_output() -> None:
    model = tiny_llama()
    with torch.inference_mode():
        hidden = model.decoder.body(input_ids=WINDOWS, output_hidden_states=True).hidden_states
    # The last hidden states are normed, so that the last layer is left out.
    expected = [1 - torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in itertools.pairwise(hidden[:-1])]
    found = measure_features(OrderedModel(model.decoder, scores_of(model)), scores_of(model), spec_of("layer"), WINDOWS)
    assert found["influence"][: len(expected)] == pytest.approx(expected, rel=1e-3)
    assert "fit_error" not in found


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_the_fits_error_is_the_energy_that_the_fitted_outputs_lack(
    granularity: Granularity, heads: tuple[int, int]
) -> None:
    model, spec = tiny_llama(query_heads=heads[0], kv_heads=heads[1]), spec_of(granularity)
    products = list(calibrate_products(model.decoder, WINDOWS)[1])
    ordered = OrderedModel(model.decoder, scores_of(model))
    for i, each in enumerate(products):
        ordered.fit(i, ordered.in_order(i, each), damping=DAMPING)
    found = measure_features(ordered, scores_of(model), spec, WINDOWS)["fit_error"]
    for unit, error in zip(model.decoder.shape.units(granularity), found, strict=True):
        layer = model.decoder.layers[unit.layer]
        in_order = ordered.in_order(unit.layer, products[unit.layer])
        lost = whole = 0.0
        before = (layer.output.weight.clone(), layer.down.weight.clone())
        plan = single_unit_plan(unit, spec, model.decoder.shape)
        ordered.apply_layer(unit.layer, plan)
        grid = torch.zeros(heads[1], heads[0] // heads[1], model.decoder.shape.head_dim, dtype=torch.bool)
        grid[: plan.kv_heads, : plan.queries_per_kv] = True
        channels = torch.arange(before[1].shape[1]) < plan.mlp_channels
        for linear, dense, inputs, kept in (
            (layer.output, before[0], in_order.attention_output, grid.flatten()),
            (layer.down, before[1], in_order.mlp_output, channels),
        ):
            if kept.all():
                continue
            difference = dense.clone()
            difference[:, kept] -= linear.weight
            energy = damped(inputs)
            lost += torch.trace(difference @ energy @ difference.t()).item()
            whole += torch.trace(dense @ energy @ dense.t()).item()
        ordered.restore()
        assert error == pytest.approx(lost / whole, rel=1e-3)
        assert 0 < error < 1


def test_more_is_lost_at_a_higher_rate_and_the_model_stays_dense() -> None:
    model = tiny_llama()
    before, scores = logits_of(model), scores_of(model)
    ordered = OrderedModel(model.decoder, scores)
    low, high = (measure_features(ordered, scores, spec_of("block", rate), WINDOWS) for rate in (0.2, 0.8))
    assert all(0 < a < b < 1 for a, b in zip(low["lost_score"], high["lost_score"], strict=True))
    assert low["weight"] == high["weight"] and low["influence"] == high["influence"]
    assert torch.allclose(logits_of(model), before, atol=1e-5)
    mlp = [linear.weight for linear in model.decoder.layers[1].linears[4:]]
    size = sum(weight.abs().sum() for weight in mlp) / sum(weight.numel() for weight in mlp)
    assert low["weight"][3] == pytest.approx(float(size), rel=1e-5)


def test_a_block_that_computes_nothing_loses_nothing() -> None:
    model, spec = tiny_llama(), spec_of("block")
    for linear in (model.decoder.layers[1].output, model.decoder.layers[1].down):
        linear.weight.data.zero_()
    ordered = OrderedModel(model.decoder, scores_of(model))
    for i, each in enumerate(calibrate_products(model.decoder, WINDOWS)[1]):
        ordered.fit(i, ordered.in_order(i, each), damping=DAMPING)
    found = measure_features(ordered, scores_of(model), spec, WINDOWS)["fit_error"]
    assert found[2:4] == (0.0, 0.0) and all(found[:2])


def test_a_profile_has_a_feature_value_for_each_unit() -> None:
    with pytest.raises(ValidationError, match="one value per unit"):
        ModelProfile.model_validate(PROFILE.model_dump() | {"features": {"weight": (1.0,)}})
