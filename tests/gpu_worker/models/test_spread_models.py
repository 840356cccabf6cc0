"""Models whose modules carry accelerate's hooks, as those that are spread over several GPUs do."""

from typing import Any

import accelerate
import pytest
import torch

from gpu_worker.evaluation.sensitivity import measure_sensitivity
from gpu_worker.measuring.perplexity import perplexity
from gpu_worker.measuring.self_text import sample
from gpu_worker.models.families import FAMILIES
from gpu_worker.models.loading import LoadedModel, load_model
from gpu_worker.progress import no_progress
from gpu_worker.pruning.importance import gradient_salience
from gpu_worker.pruning.ordered_model import OrderedModel
from gpu_worker.pruning.sequential import prune_sequentially
from protocol.plans.plan import Plan
from protocol.plans.spec import SearchSpec, TextSpec
from tests.support.pruned_models import keep, logits_of, scores_of
from tests.support.tiny_models import save_tiny_folder, tiny_model, tiny_windows

PLAN = keep((2, 1, 20), (3, 2, 48), (1, 2, 7))
WINDOWS = tiny_windows(3, 24)


def spread(model: LoadedModel) -> LoadedModel:
    """`model` with a hook on each module that a device map names, as if each lay on a device of its own."""
    parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    parts += [f"model.layers.{i}" for i in range(len(model.decoder.layers))]
    accelerate.dispatch_model(
        model.causal_lm, device_map=dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True
    )
    for part in parts:
        assert hasattr(model.causal_lm.get_submodule(part), "_hf_hook")
    return model


def everything_measured(model: LoadedModel, plan: Plan) -> dict[str, Any]:
    """Whatever is computed with a model on its way to a pruned one, and with that."""
    text = TextSpec(source="self", windows=2, seqlen=24)
    spec = SearchSpec(model="tiny", rate=0.4, granularity="block", calibration=text, fitness=text)
    salience = gradient_salience(model.decoder, WINDOWS)
    ordered = OrderedModel(model.decoder, scores_of(model))
    found = {
        "gradients": torch.cat([layer["down"] for layer in salience]),
        "dense": perplexity(model.decoder, WINDOWS)[0],
        "sensitivity": torch.tensor(measure_sensitivity(ordered, spec, WINDOWS)),
    }
    ordered.apply(plan)
    found |= {"pruned": logits_of(model), "pruned perplexity": perplexity(model.decoder, WINDOWS)[0]}
    prune_sequentially(ordered, plan, WINDOWS)
    return found | {"sequential": logits_of(model)}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_spread_model_computes_what_the_same_model_on_one_device_does(family: str) -> None:
    expected = everything_measured(tiny_model(family), PLAN)
    found = everything_measured(spread(tiny_model(family)), PLAN)
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


def test_a_spread_model_writes_the_same_text(tmp_path: Any) -> None:
    folder = str(save_tiny_folder(tmp_path, hidden_size=48))
    whole, parts = load_model(folder, "float32"), spread(load_model(folder, "float32"))
    assert torch.equal(sample(parts, 3, 16, 0, no_progress), sample(whole, 3, 16, 0, no_progress))
