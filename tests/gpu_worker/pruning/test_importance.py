"""Each importance against a slow, obvious re-computation: loops over heads and channels, gradients all at once."""

import pytest
import torch
from torch import Tensor

from gpu_worker.models.limits import GRADIENT_SAMPLES, GRADIENT_TOKENS
from gpu_worker.models.loading import LoadedModel, load_model
from gpu_worker.pruning import importance
from gpu_worker.pruning.calibration import LayerActivations, calibrate
from gpu_worker.pruning.importance import LayerImportance, column_scores, gradient_salience, grouped
from protocol.plans.shape import LayerShape
from tests.support.real_model import need_smollm2
from tests.support.tiny_models import tiny_llama, tiny_model, tiny_windows

ATTENTIONS = [
    pytest.param({"query_heads": 6, "kv_heads": 3}, id="grouped-query"),
    pytest.param({"query_heads": 4, "kv_heads": 4, "bias": True}, id="multi-head"),
]


def test_a_column_scores_its_mean_weight_times_the_root_mean_square_of_its_input() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    assert column_scores(weight, torch.tensor([4.0, 9.0])).tolist() == [2 * 2, 1 * 3]
    assert column_scores(torch.ones(2, 2), torch.tensor([0.0, 1.0])).tolist() == [0, 1], "without input it is nothing"


def test_a_query_head_is_worth_the_sum_of_its_columns() -> None:
    columns = torch.arange(8.0)
    scores = importance.by_head(columns, LayerShape(query_heads=4, kv_heads=2, mlp_channels=1))
    assert scores.tolist() == [[0 + 1, 2 + 3], [4 + 5, 6 + 7]]


def slow_wanda_sp(model: LoadedModel, layer: int, seen: LayerActivations) -> LayerImportance:
    """Wanda-sp, one column at a time."""
    part, shape, width = model.decoder.layers[layer], model.decoder.shape.layers[layer], model.decoder.shape.head_dim

    def column(weight: Tensor, squares: Tensor, j: int) -> float:
        return float(sum(abs(w) for w in weight[:, j].double()) / len(weight) * squares[j] ** 0.5)

    heads = torch.zeros(shape.kv_heads, shape.queries_per_kv, dtype=torch.float64)
    for j in range(shape.query_heads * width):
        kv, query = divmod(j // width, shape.queries_per_kv)
        heads[kv, query] += column(part.output.weight, seen.attention_output, j)
    channels = [column(part.down.weight, seen.mlp_output, j) for j in range(shape.mlp_channels)]
    return LayerImportance(heads, heads.sum(dim=1), torch.tensor(channels, dtype=torch.float64))


def slow_groups(model: LoadedModel, layer: int, salience: dict[str, Tensor]) -> LayerImportance:
    """Sums over coupled weights, one head and one channel at a time."""
    shape, width = model.decoder.shape.layers[layer], model.decoder.shape.head_dim
    heads = torch.zeros(shape.kv_heads, shape.queries_per_kv, dtype=torch.float64)
    shared = torch.zeros(shape.kv_heads, dtype=torch.float64)
    for kv in range(shape.kv_heads):
        own = slice(kv * width, (kv + 1) * width)
        shared[kv] = (salience["key"][own].double().sum() + salience["value"][own].double().sum()).item()
        for query in range(shape.queries_per_kv):
            first = (kv * shape.queries_per_kv + query) * width
            rows = salience["query"][first : first + width].double().sum()
            heads[kv, query] = rows + salience["output"][:, first : first + width].double().sum()
    channels = [
        (salience["gate"][c].sum() + salience["up"][c].sum() + salience["down"][:, c].sum()).item()
        for c in range(shape.mlp_channels)
    ]
    return LayerImportance(heads, heads.sum(dim=1) + shared, torch.tensor(channels, dtype=torch.float64))


NAMES = ("query", "key", "value", "output", "gate", "up", "down")


def slow_gradients(model: LoadedModel, layer: int, tokens: Tensor) -> dict[str, Tensor]:
    """|w · ∂L/∂w|, with transformers' own loss and the gradients of all weights at once."""
    model.causal_lm.requires_grad_(True)
    model.causal_lm(input_ids=tokens, labels=tokens).loss.backward()
    weights = {name: getattr(model.decoder.layers[layer], name).weight for name in NAMES}
    found = {name: (weight.float() * weight.grad.float()).abs().detach() for name, weight in weights.items()}
    model.causal_lm.requires_grad_(False)
    model.causal_lm.zero_grad()
    return found


def assert_same(scores: LayerImportance, expected: LayerImportance, rtol: float = 1e-4) -> None:
    for name in ("query_heads", "kv_heads", "channels"):
        torch.testing.assert_close(getattr(scores, name), getattr(expected, name), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("options", ATTENTIONS)
def test_wanda_sp_is_what_the_slow_way_computes(options: dict[str, int]) -> None:
    model = tiny_llama(**options)
    for i, seen in enumerate(calibrate(model.decoder, tiny_windows(3, 16))):
        scores = importance.wanda_sp(model.decoder.layers[i], seen, model.decoder.shape.layers[i])
        assert_same(scores, slow_wanda_sp(model, i, seen))


@pytest.mark.parametrize("options", ATTENTIONS)
def test_magnitude_is_what_the_slow_way_computes(options: dict[str, int]) -> None:
    model = tiny_llama(**options)
    for i, layer in enumerate(model.decoder.layers):
        sizes = {name: getattr(layer, name).weight.abs() for name in NAMES}
        assert_same(importance.magnitude(layer, model.decoder.shape.layers[i]), slow_groups(model, i, sizes))


@pytest.mark.parametrize("options", ATTENTIONS)
def test_taylor_is_what_the_slow_way_computes(options: dict[str, int]) -> None:
    model, windows = tiny_llama(**options), tiny_windows(3, 32)
    for i, salience in enumerate(gradient_salience(model.decoder, windows)):
        expected = slow_groups(model, i, slow_gradients(model, i, windows))
        assert_same(grouped(salience, model.decoder.shape.layers[i]), expected)


def test_taylor_reads_ten_samples_of_sixty_four_tokens() -> None:
    model, windows = tiny_llama(), tiny_windows(GRADIENT_SAMPLES + 2, GRADIENT_TOKENS + 16)
    all_of_it = gradient_salience(model.decoder, windows)
    what_counts = gradient_salience(model.decoder, windows[:GRADIENT_SAMPLES, :GRADIENT_TOKENS])
    assert all(torch.equal(a["query"], b["query"]) for a, b in zip(all_of_it, what_counts, strict=True))


def test_taking_gradients_leaves_none_behind() -> None:
    model = tiny_model("phi3")
    gradient_salience(model.decoder, tiny_windows(2, 16))
    assert all(p.grad is None and not p.requires_grad for p in model.causal_lm.parameters())


@pytest.mark.model
def test_the_importances_of_the_real_model_are_what_the_slow_way_computes() -> None:
    need_smollm2()
    model = load_model("smollm2", "float32")
    windows = torch.randint(1000, 40_000, (1, 24), generator=torch.Generator().manual_seed(0))
    layer, shape = 17, model.decoder.shape.layers[17]
    seen = calibrate(model.decoder, windows)[layer]
    assert_same(importance.wanda_sp(model.decoder.layers[layer], seen, shape), slow_wanda_sp(model, layer, seen))
    taylor = grouped(gradient_salience(model.decoder, windows)[layer], shape)
    assert_same(taylor, slow_groups(model, layer, slow_gradients(model, layer, windows)), rtol=1e-3)
