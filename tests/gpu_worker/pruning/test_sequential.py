import pytest
import torch
from torch import Tensor

from gpu_worker.models.loading import LoadedModel
from gpu_worker.pruning.calibration import calibrate
from gpu_worker.pruning.importance import wanda_sp
from gpu_worker.pruning.layerwise import LayerRun
from gpu_worker.pruning.ordered_model import OrderedModel, PlanMismatchError
from gpu_worker.pruning.sequential import prune_sequentially
from protocol.plans.plan import Plan
from tests.support.pruned_models import keep, logits_of, mask, scores_of
from tests.support.tiny_models import LAYOUTS, tiny_llama, tiny_model, tiny_windows

PLAN = keep((2, 1, 20), (3, 2, 48), (1, 2, 7))
TEXT = tiny_windows(3, 16, seed=1)


def slow_sequential_logits(model: LoadedModel, plan: Plan) -> Tensor:
    """Calibrate the whole model anew for each layer, then mask what the plan removes from it."""
    for i, kept in enumerate(plan.layers):
        layer, seen = model.decoder.layers[i], calibrate(model.decoder, TEXT)[i]
        mask(layer, kept, wanda_sp(layer, seen, model.decoder.shape.layers[i]), model.decoder.shape.head_dim)
    return logits_of(model)


@pytest.mark.parametrize("family", LAYOUTS)
def test_each_layer_is_scored_on_what_the_pruned_layers_below_it_compute(family: str) -> None:
    model, slow = tiny_model(family), tiny_model(family)
    prune_sequentially(OrderedModel(model.decoder, scores_of(model)), PLAN, TEXT)
    assert torch.allclose(logits_of(model), slow_sequential_logits(slow, PLAN), atol=1e-4)


def test_the_result_does_not_depend_on_what_was_applied_before() -> None:
    model = tiny_llama(bias=True)
    ordered = OrderedModel(model.decoder, scores_of(model))
    prune_sequentially(ordered, PLAN, TEXT)
    first = logits_of(model)
    ordered.apply(keep((1, 1, 1), (1, 1, 1), (1, 1, 1)))
    prune_sequentially(ordered, keep((3, 1, 9), (2, 2, 30), (3, 2, 2)), TEXT)
    prune_sequentially(ordered, PLAN, TEXT)
    assert torch.equal(logits_of(model), first)


def test_the_original_order_comes_back_bit_by_bit() -> None:
    model = tiny_llama(bias=True)
    before = {name: tensor.clone() for name, tensor in model.causal_lm.state_dict().items()}
    ordered = OrderedModel(model.decoder, scores_of(model))
    prune_sequentially(ordered, PLAN, TEXT)
    for i in range(3):
        ordered.restore_order(i)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.causal_lm.state_dict().items())


def test_a_plan_of_another_model_is_refused_before_anything_is_scored() -> None:
    model = tiny_llama()
    ordered = OrderedModel(model.decoder, scores_of(model))
    before = logits_of(model)
    with pytest.raises(PlanMismatchError):
        prune_sequentially(ordered, keep((3, 2, 48)), TEXT)
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("family", LAYOUTS)
def test_layer_by_layer_a_model_computes_what_it_does_at_once(family: str) -> None:
    model = tiny_model(family)
    run = LayerRun(model.decoder, TEXT)
    for i in range(3):
        run.advance(i)
    whole = model.decoder.body(input_ids=TEXT, use_cache=False).last_hidden_state
    assert torch.allclose(model.decoder.norm(torch.cat(run.states)), whole, atol=1e-5)
