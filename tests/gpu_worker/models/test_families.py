"""Every supported family, on a tiny random model of its real classes."""

from typing import Any

import pytest
import torch
import transformers

from gpu_worker.models.families import FAMILIES, extract_decoder, family_of, head_dim_of
from gpu_worker.pruning.ordered_model import OrderedModel
from protocol.errors import ModelError
from protocol.plans.plan import Plan, count_parameters, dense_plan, make_plan
from protocol.plans.shape import ModelShape
from tests.support.pruned_models import keep, logits_of, masked_logits, scores_of
from tests.support.tiny_models import tiny_causal_lm, tiny_llama, tiny_model

HEADS: dict[str, dict[str, Any]] = {
    "grouped-query": {},
    "multi-head": {"query_heads": 4, "kv_heads": 4},
    "multi-query": {"kv_heads": 1},
}
every_family = pytest.mark.parametrize("family", sorted(FAMILIES))


def uneven_plan(shape: ModelShape) -> Plan:
    """Fewer heads of both kinds in the first layer, few channels in the second, one KV head in the last."""
    kv, each = shape.layers[0].kv_heads, shape.layers[0].queries_per_kv
    return keep((max(1, kv - 1), max(1, each - 1), 20), (kv, each, 5), (1, each, 48))


@every_family
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_sliced_model_is_the_dense_one_with_the_rest_masked(family: str, heads: str, tied: bool) -> None:
    options = {"tied": tied, **HEADS[heads]}
    model, masked = tiny_model(family, **options), tiny_model(family, **options)
    plan, importance = uneven_plan(model.decoder.shape), scores_of(model)
    OrderedModel(model.decoder, importance).apply(plan)
    assert torch.allclose(logits_of(model), masked_logits(masked, plan, importance), atol=1e-4)


@every_family
@pytest.mark.parametrize("heads", HEADS)
def test_a_rate_of_nought_is_the_identity(family: str, heads: str) -> None:
    model = tiny_model(family, **HEADS[heads])
    shape = model.decoder.shape
    nothing = make_plan([0.0] * 3, shape)
    assert nothing == dense_plan(shape)
    before = logits_of(model)
    OrderedModel(model.decoder, scores_of(model)).apply(nothing)
    assert torch.allclose(logits_of(model), before, atol=1e-4)


@pytest.mark.parametrize(("family", "bias"), [*((family, False) for family in sorted(FAMILIES)), ("llama", True)])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_parameters_that_stay_are_those_the_plan_counts(family: str, bias: bool, tied: bool) -> None:
    model = tiny_model(family, tied=tied, bias=bias)
    shape = model.decoder.shape
    assert shape.total_parameters == sum(p.numel() for p in model.causal_lm.parameters())
    plan = uneven_plan(shape)
    OrderedModel(model.decoder, scores_of(model)).apply(plan)
    assert sum(p.numel() for p in model.causal_lm.parameters()) == count_parameters(plan, shape).total_after


@every_family
def test_heads_may_be_wider_or_narrower_than_the_hidden_size_by_their_number(family: str) -> None:
    for head_dim in (4, 16):
        shape = tiny_model(family, head_dim=head_dim).decoder.shape
        assert (shape.head_dim, shape.hidden_size) == (head_dim, 36)
        assert [(s.query_heads, s.kv_heads, s.mlp_channels) for s in shape.layers] == [(6, 3, 48)] * 3


@every_family
def test_an_exported_model_belongs_to_its_family(family: str) -> None:
    assert family_of(transformers.PreTrainedConfig.from_dict({"model_type": f"pruned_{family}"})) is FAMILIES[family]


def test_splitting_fused_projections_changes_nothing() -> None:
    model = tiny_causal_lm("phi3")
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        before = model(input_ids=tokens).logits
        extract_decoder(model)
        assert torch.allclose(model(input_ids=tokens).logits, before, atol=1e-5)


def test_an_unsupported_family_is_refused_with_the_supported_ones() -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)
    with pytest.raises(
        ModelError,
        match=f"'gpt2'.*{', '.join(sorted(FAMILIES))}",
    ):
        extract_decoder(transformers.GPT2LMHeadModel(config))


def test_a_model_with_an_adapter_is_refused() -> None:
    model = tiny_llama().causal_lm
    model.model.layers[0].self_attn.register_parameter("adapter", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ModelError, match="without adapters"):
        extract_decoder(model)


def test_capped_logits_are_refused_rather_than_left_uncapped() -> None:
    model = tiny_model("gemma3_text").causal_lm
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        extract_decoder(model)


def test_a_config_without_head_dim_means_hidden_size_by_heads() -> None:
    config = transformers.LlamaConfig(hidden_size=32, num_attention_heads=4)
    config.head_dim = None
    assert head_dim_of(config) == 8
