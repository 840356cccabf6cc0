from typing import Any

import pytest
import torch

from gpu_worker.pruning.importance import LayerImportance
from gpu_worker.pruning.ordered_model import OrderedModel, PlanMismatchError
from protocol.plans.plan import LayerPlan
from tests.support.pruned_models import keep, logits_of, masked_logits, scores_of
from tests.support.tiny_models import tiny_llama

MODELS = [
    pytest.param({"query_heads": 6, "kv_heads": 3}, id="grouped-query"),
    pytest.param({"query_heads": 6, "kv_heads": 2, "bias": True, "tied": False}, id="biases, untied"),
    pytest.param({"query_heads": 4, "kv_heads": 4}, id="multi-head"),
    pytest.param({"query_heads": 6, "kv_heads": 1}, id="multi-query"),
]


@pytest.mark.parametrize("options", MODELS)
@pytest.mark.parametrize("attention", ["fewer KV heads", "fewer query heads", "fewer of both", "one of each"])
def test_a_pruned_model_is_the_dense_one_with_the_rest_masked(options: dict[str, Any], attention: str) -> None:
    model, masked = tiny_llama(**options), tiny_llama(**options)
    whole = model.decoder.shape.layers[0]
    kv, each = whole.kv_heads, whole.queries_per_kv
    fewer = (max(1, kv - 1), max(1, each - 1))
    heads = {
        "fewer KV heads": (fewer[0], each),
        "fewer query heads": (kv, fewer[1]),
        "fewer of both": fewer,
        "one of each": (1, 1),
    }[attention]
    plan = keep((*heads, 20), (kv, each, 1), (*heads, 48))
    importance = scores_of(model)
    OrderedModel(model.decoder, importance).apply(plan)
    assert torch.allclose(logits_of(model), masked_logits(masked, plan, importance), atol=1e-4)


def test_eager_attention_takes_the_plan_as_well() -> None:
    model, masked = tiny_llama(), tiny_llama()
    for each in (model, masked):
        each.causal_lm.set_attn_implementation("eager")
    plan = keep((2, 1, 20), (3, 1, 48), (1, 2, 7))
    importance = scores_of(model)
    OrderedModel(model.decoder, importance).apply(plan)
    assert torch.allclose(logits_of(model), masked_logits(masked, plan, importance), atol=1e-4)


def test_one_layer_can_be_pruned_alone() -> None:
    model = tiny_llama()
    ordered = OrderedModel(model.decoder, scores_of(model))
    ordered.apply_layer(1, LayerPlan(kv_heads=1, queries_per_kv=2, mlp_channels=5))
    assert [layer.gate.out_features for layer in model.decoder.layers] == [48, 5, 48]


def test_a_plan_is_made_of_views_where_query_heads_stay_whole() -> None:
    model = tiny_llama()
    ordered = OrderedModel(model.decoder, scores_of(model))
    names = ("query", "key", "value", "output", "gate", "up", "down")
    layer = model.decoder.layers[0]
    before = {name: getattr(layer, name).weight.untyped_storage().data_ptr() for name in names}
    ordered.apply(keep((2, 2, 20), (3, 2, 48), (1, 2, 7)))
    assert {name: getattr(layer, name).weight.untyped_storage().data_ptr() for name in names} == before
    ordered.apply(keep((2, 1, 20), (3, 2, 48), (1, 2, 7)))
    gathered = {name for name in names if getattr(layer, name).weight.untyped_storage().data_ptr() != before[name]}
    assert gathered == {"query", "output"}


def test_pieces_of_equal_importance_keep_their_order() -> None:
    model = tiny_llama()
    weights = [layer.gate.weight.clone() for layer in model.decoder.layers]
    equal = [LayerImportance(torch.ones(3, 2), torch.ones(3), torch.ones(48)) for _ in weights]
    OrderedModel(model.decoder, equal).apply(keep((3, 2, 10), (3, 2, 10), (3, 2, 10)))
    for layer, weight in zip(model.decoder.layers, weights, strict=True):
        assert torch.equal(layer.gate.weight, weight[:10])


def test_a_plan_of_another_model_is_refused_and_nothing_is_changed() -> None:
    model = tiny_llama()
    ordered = OrderedModel(model.decoder, scores_of(model))
    before = logits_of(model)
    for plan in (keep((3, 2, 48)), keep((1, 1, 1), (3, 2, 49), (3, 2, 48)), keep((1, 1, 1), (4, 2, 48), (3, 2, 48))):
        with pytest.raises(PlanMismatchError):
            ordered.apply(plan)
    assert torch.equal(logits_of(model), before)
