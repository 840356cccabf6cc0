"""Uniform pruning that may remove any query heads: what it computes, what it counts, and that nothing exports it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from daemon.cli import main
from gpu_worker.evaluation.session import Session
from gpu_worker.models.loading import LoadedModel
from gpu_worker.pruning.importance import LayerImportance, any_heads_plan
from gpu_worker.pruning.ordered_model import OrderedModel, PlanMismatchError
from protocol.errors import BudgetError
from protocol.plans.any_heads import AnyHeadsPlan, make_any_heads_plan
from protocol.plans.plan import dense_plan, make_plan
from tests.support.pruned_models import logits_of, scores_of
from tests.support.tiny_models import save_tiny_folder, tiny_causal_lm, tiny_model, tiny_windows
from tests.support.tiny_specs import tiny_spec, write_text

FAMILIES = [
    pytest.param("llama", {"query_heads": 6, "kv_heads": 3}, id="grouped-query"),
    pytest.param("llama", {"query_heads": 4, "kv_heads": 4}, id="multi-head"),
    pytest.param("qwen2", {"query_heads": 6, "kv_heads": 2}, id="biases"),
    pytest.param("phi3", {"query_heads": 6, "kv_heads": 3}, id="fused projections"),
]


def plan_of(model: LoadedModel, importance: list[LayerImportance], rate: float) -> AnyHeadsPlan:
    return any_heads_plan([rate] * len(importance), importance, model.decoder.shape)


def hooked_logits(model: Any, scores: list[Tensor], channels: list[Tensor], rate: float, counts: list[int]) -> Tensor:
    """The plain model with forward hooks that put zeros where heads and channels are removed.

    `scores` are those of the query heads [query heads] and `channels` those of the MLP, by layer. `counts` is how many
    channels each layer keeps.
    """

    def zeroing(gone: list[int], width: int) -> Any:
        def before(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states = inputs[0].clone()
            for piece in gone:
                states[..., piece * width : (piece + 1) * width] = 0
            return (states,)

        return before

    for layer, heads, mlp, count in zip(model.model.layers, scores, channels, counts, strict=True):
        weakest = sorted(range(len(heads)), key=lambda head: float(heads[head]))
        lost = sorted(range(len(mlp)), key=lambda channel: float(mlp[channel]))[: len(mlp) - count]
        width = layer.self_attn.o_proj.in_features // len(heads)
        layer.self_attn.o_proj.register_forward_pre_hook(zeroing(weakest[: int(rate * len(heads))], width))
        layer.mlp.down_proj.register_forward_pre_hook(zeroing(lost, 1))
    logits: Tensor = model(input_ids=tiny_windows(2, 24)).logits
    return logits


@pytest.mark.parametrize(("family", "options"), FAMILIES)
@pytest.mark.parametrize("rate", [0.2, 0.4, 0.55])
def test_a_masked_model_is_the_dense_one_with_hooks_that_zero_the_heads(
    family: str, options: dict[str, Any], rate: float
) -> None:
    model = tiny_model(family, **options)
    importance = scores_of(model)
    plan = plan_of(model, importance, rate)
    OrderedModel(model.decoder, importance).mask(plan)
    heads, channels = [each.query_heads.flatten() for each in importance], [each.channels for each in importance]
    counts = [layer.mlp_channels for layer in plan.layers]
    expected = hooked_logits(tiny_causal_lm(family, **options), heads, channels, rate, counts)
    assert torch.allclose(logits_of(model), expected, atol=1e-5)
    assert len({layer.query_heads for layer in plan.layers}) == 1


def test_masks_alone_change_no_digit() -> None:
    """Without an order and without channels removed, both ways are the same products in the same order."""
    model = tiny_model("llama")
    shape = model.decoder.shape
    falling = [
        LayerImportance(torch.arange(6.0, 0, -1).view(3, 2), torch.tensor([3.0, 2, 1]), torch.arange(48.0, 0, -1))
        for _ in shape.layers
    ]
    plan = make_any_heads_plan([0.5] * 3, [each.query_heads.tolist() for each in falling], shape)
    whole = plan.model_copy(update={"layers": tuple(x.model_copy(update={"mlp_channels": 48}) for x in plan.layers)})
    OrderedModel(model.decoder, falling).mask(whole)
    heads = [torch.arange(6.0, 0, -1)] * 3
    expected = hooked_logits(tiny_causal_lm("llama"), heads, [torch.ones(48)] * 3, 0.5, [48] * 3)
    assert torch.equal(logits_of(model), expected)


def test_any_heads_leave_as_many_parameters_as_rectangular_ones() -> None:
    model = tiny_model("llama", query_heads=9, kv_heads=3, channels=128)
    importance, shape = scores_of(model), model.decoder.shape
    for rate in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        rectangular = make_plan([rate] * 3, shape).decoder_parameters(shape)
        left = plan_of(model, importance, rate).decoder_parameters(shape)
        assert abs(left - rectangular) <= 2 * shape.channel_parameters
        assert left == pytest.approx((1 - rate) * shape.decoder_parameters, abs=shape.channel_parameters)


def test_a_kv_head_counts_as_removed_only_when_all_its_query_heads_are() -> None:
    shape = tiny_model("llama", query_heads=6, kv_heads=3, layers=2).decoder.shape
    scattered = [[1.0, 9.0], [2.0, 8.0], [7.0, 6.0]]
    together = [[1.0, 2.0], [9.0, 8.0], [7.0, 6.0]]
    plan = make_any_heads_plan([0.4, 0.4], [scattered, together], shape)
    assert [(layer.query_heads, layer.kv_heads) for layer in plan.layers] == [(4, 3), (4, 2)]
    assert plan.layers[0].kept == ((False, True), (False, True), (True, True))
    assert plan.layers[1].mlp_channels > plan.layers[0].mlp_channels  # the keys and values pay for channels
    attention = [shape.attention_parameters(4, 3), shape.attention_parameters(4, 2)]
    mlp = sum(shape.mlp_parameters(layer.mlp_channels) for layer in plan.layers)
    assert plan.decoder_parameters(shape) == sum(attention) + mlp


def test_a_layer_keeps_a_head_and_a_budget_that_the_mlp_cannot_fill_is_refused() -> None:
    shape = tiny_model("llama", query_heads=2, kv_heads=2, channels=256).decoder.shape
    scores = [[[1.0], [2.0]]] * 3
    assert [layer.query_heads for layer in make_any_heads_plan([0.95] * 3, scores, shape).layers] == [1] * 3
    narrow = tiny_model("llama", query_heads=6, kv_heads=6, channels=2).decoder.shape
    with pytest.raises(BudgetError, match="the plan misses its budget"):
        make_any_heads_plan([0.9] * 3, [[[1.0]] * 6] * 3, narrow)


def test_with_one_query_head_a_kv_head_any_heads_are_the_rectangular_plan() -> None:
    model, same = (tiny_model("llama", query_heads=4, kv_heads=4) for _ in range(2))
    importance = scores_of(model)
    OrderedModel(model.decoder, importance).mask(plan_of(model, importance, 0.5))
    OrderedModel(same.decoder, importance).apply(make_plan([0.5] * 3, same.decoder.shape))
    assert torch.allclose(logits_of(model), logits_of(same), atol=1e-5)


def test_a_mask_leaves_no_trace_and_one_for_another_model_is_refused() -> None:
    model = tiny_model("llama")
    importance = scores_of(model)
    ordered = OrderedModel(model.decoder, importance)
    dense = logits_of(model)
    ordered.mask(plan_of(model, importance, 0.5))
    assert not torch.allclose(logits_of(model), dense, atol=1e-3)
    ordered.apply(dense_plan(model.decoder.shape))
    assert torch.equal(logits_of(model), dense)
    other = tiny_model("llama", query_heads=4, kv_heads=2)
    with pytest.raises(PlanMismatchError):
        ordered.mask(plan_of(other, scores_of(other), 0.5))
    assert torch.equal(logits_of(model), dense)


def test_what_stays_of_any_heads_is_fitted_where_the_spec_says_so(tmp_path: Path) -> None:
    """The columns of the heads that stay are the ridge solution; those of the others are zero."""
    spec = tiny_spec(tmp_path)
    plain, fitted = (
        Session(spec.model_copy(update={"reconstruction": how}), sensitivity=False) for how in ("none", "least-squares")
    )
    rates = [spec.rate] * 3
    plan = any_heads_plan(rates, plain.target.importance, plain.shape)
    assert plan == any_heads_plan(rates, fitted.target.importance, fitted.shape)
    for session in (plain, fitted):
        session.evaluate(plan)
    for i, layer in enumerate(plan.layers):
        as_it_was, refitted = (s.target.model.decoder.layers[i].output.weight for s in (plain, fitted))
        gone = (as_it_was == 0).all(dim=0)
        assert torch.equal((refitted == 0).all(dim=0), gone)
        assert int(gone.sum()) == (6 - layer.query_heads) * plain.shape.head_dim
        assert not torch.allclose(as_it_was, refitted)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    save_tiny_folder(folder / "model", hidden_size=48, layers=4)
    write_text(folder / "text.txt")
    return folder


def evaluate(target: Path, *flags: str) -> int:
    sizes = ["--windows", "3", "--calibration-windows", "4", "--seqlen", "32"]
    return main(["evaluate", "--model", str(target / "model"), "--data", str(target / "text.txt"), *sizes, *flags])


UNIFORM = ("--allocate", "uniform", "--rate", "0.4")


def test_evaluate_measures_any_heads_beside_rectangular_ones(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for heads in ("rectangular", "any"):
        assert evaluate(target, *UNIFORM, "--heads", heads, "--json") == 0
        found[heads] = json.loads(capsys.readouterr().out)
        assert found[heads]["heads"] == heads
    assert found["any"]["perplexity"] != found["rectangular"]["perplexity"]
    left = [each["parameters"]["decoder_after"] for each in found.values()]
    assert abs(left[0] - left[1]) <= 2 * 3 * 48
    assert {"perplexity", "report_perplexity", "parameters", "seqlen", "tokens"} <= set(found["any"])


def test_people_read_which_heads_went_and_that_the_model_is_masked(
    target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(target, *UNIFORM) == 0
    assert "removed by uniform, rectangular\n" in capsys.readouterr().out
    assert evaluate(target, *UNIFORM, "--reconstruction", "least-squares") == 0
    assert "removed by uniform, fitted\n" in capsys.readouterr().out
    assert evaluate(target, *UNIFORM, "--heads", "any") == 0
    said = capsys.readouterr().out
    assert "removed by uniform, any heads\n" in said
    assert "query heads are masked, for comparison only: no export format supports such a model" in said


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([*UNIFORM, "--heads", "some"], "'some' is not one of 'rectangular', 'any'"),
        (["--heads", "any"], "--heads has no effect here: the model is measured unchanged"),
        ([*UNIFORM, "--heads", "any", "--split", "mlp-first"], "--heads any needs --split equal, not 'mlp-first'"),
        ([*UNIFORM, "--heads", "any", "--granularity", "block"], "--heads any needs --granularity layer, not 'block'"),
        ([*UNIFORM, "--heads", "any", "--scoring", "sequential"], "--heads any needs --scoring dense"),
    ],
)
def test_what_does_not_go_with_any_heads_is_one_sentence(
    target: Path, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    assert evaluate(target, *flags) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err.splitlines()[-1] and captured.out == ""


@pytest.mark.parametrize(
    "command", ["export --model smollm2 --out out", "prune smollm2 --out out", "zero-shot smollm2 --allocate uniform"]
)
def test_no_other_command_takes_any_heads(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--rate", "0.4", "--heads", "any"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    refusal = (
        "--heads is for `selfpruner evaluate` only: such heads are masked, and cannot be exported or searched over"
    )
    assert refusal in said
