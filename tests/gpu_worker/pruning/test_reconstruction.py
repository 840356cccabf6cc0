from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_worker.evaluation.session import Session
from gpu_worker.models.loading import LoadedModel
from gpu_worker.pruning.calibration import calibrate_products
from gpu_worker.pruning.importance import LayerImportance
from gpu_worker.pruning.ordered_model import OrderedModel
from gpu_worker.pruning.reconstruction import DAMPING, FittedColumns, damping_for
from gpu_worker.pruning.sequential import prune_sequentially
from protocol.plans.spec import SearchSpec
from tests.support.pruned_models import keep, logits_of, masked_logits, scores_of
from tests.support.tiny_models import tiny_llama, tiny_model, tiny_windows
from tests.support.tiny_specs import tiny_spec

CALIBRATION = tiny_windows(6, 64, seed=1)


def fitted(model: LoadedModel, importance: Sequence[LayerImportance] | None = None) -> OrderedModel:
    """The model with reconstruction for all its layers."""
    ordered = OrderedModel(model.decoder, importance or scores_of(model))
    for i, products in enumerate(calibrate_products(model.decoder, CALIBRATION)[1]):
        ordered.fit(i, products, damping=DAMPING)
    return ordered


@pytest.mark.parametrize("heads", [(6, 3), (4, 4)])
def test_products_of_the_model_as_it_was_are_those_of_the_ordered_one(heads: tuple[int, int]) -> None:
    model = tiny_llama(query_heads=heads[0], kv_heads=heads[1])
    before = list(calibrate_products(model.decoder, CALIBRATION)[1])
    ordered = OrderedModel(model.decoder, scores_of(model))
    after = calibrate_products(model.decoder, CALIBRATION)[1]
    moved = 0
    for i, (dense, expected) in enumerate(zip(before, after, strict=True)):
        found = ordered.in_order(i, dense)
        for name in ("attention_output", "mlp_output"):
            assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-6)
            moved += not torch.allclose(getattr(dense, name), getattr(expected, name), rtol=1e-2)
        ordered.restore_order(i)
        assert ordered.in_order(i, dense) is dense
    assert moved > len(before)  # else there was nothing to order


def random_columns(*pieces: int, outputs: int = 5, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """Stored columns [pieces, ..., outputs], and correlated inputs of them [tokens, columns]."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(*pieces, outputs, generator=generator)
    columns = stored[..., 0].numel()
    inputs = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return stored, inputs


@pytest.mark.parametrize(
    ("pieces", "counts"),
    [
        pytest.param((12,), (7,), id="channels"),
        pytest.param((3, 2, 4), (2, 2), id="fewer KV heads"),
        pytest.param((3, 2, 4), (3, 1), id="fewer query heads, which do not lie next to each other"),
        pytest.param((3, 2, 4), (2, 1), id="fewer of both"),
    ],
)
@pytest.mark.parametrize("damping", [DAMPING, 0.1])
def test_what_stays_is_the_ridge_solution_around_its_old_weights(
    pieces: tuple[int, ...], counts: tuple[int, ...], damping: float
) -> None:
    stored, inputs = random_columns(*pieces)
    products = inputs.t() @ inputs / len(inputs)
    kept = torch.zeros(pieces, dtype=torch.bool)
    kept[tuple(slice(count) for count in counts)] = True
    where = kept.flatten()
    old = stored.flatten(0, -2)
    # The same by a library's least squares: rows of data, and below them rows that hold each weight where it was.
    held = (len(inputs) * damping * products.diagonal().mean()).sqrt() * torch.eye(int(where.sum()))
    data, wanted = torch.cat([inputs[:, where], held]), torch.cat([inputs @ old, held @ old[where]])
    expected = torch.linalg.lstsq(data.double(), wanted.double()).solution
    found = FittedColumns(stored, products, damping=damping).first(*counts)
    assert torch.allclose(found.t().double(), expected, rtol=1e-3, atol=1e-4)


def test_the_ridge_is_worth_as_many_tokens_whatever_the_text() -> None:
    assert damping_for(100) == damping_for(8000) == DAMPING
    assert [n * damping_for(n) for n in (16_000, 64_000, 1_000_000)] == pytest.approx([80, 80, 80])


def test_where_all_stays_the_weight_is_the_old_one() -> None:
    stored, inputs = random_columns(3, 2, 4)
    whole = FittedColumns(stored, inputs.t() @ inputs).first(3, 2)
    assert whole.data_ptr() == stored.data_ptr() and torch.equal(whole, stored.flatten(0, -2).t())


def test_inputs_that_are_always_nought_are_survived() -> None:
    stored, _ = random_columns(6)
    assert FittedColumns(stored, torch.zeros(6, 6)).first(4).isfinite().all()


def test_what_others_can_say_as_well_is_not_missed() -> None:
    """Every channel twice: one of each pair can do the work of both, and without reconstruction does not."""
    model, plain, masked = tiny_llama(), tiny_llama(), tiny_llama()
    with torch.no_grad():
        for layer in (*model.decoder.layers, *plain.decoder.layers, *masked.decoder.layers):
            for linear in (layer.gate, layer.up):
                linear.weight[24:] = linear.weight[:24]
    dense = logits_of(model)
    importance = [replace(scores, channels=torch.arange(48, 0, -1)) for scores in scores_of(model)]
    plan = keep((3, 2, 24), (3, 2, 24), (3, 2, 24))
    fitted(model, importance).apply(plan)
    assert torch.allclose(logits_of(model), dense, atol=0.02 * float(dense.abs().max()))
    without = masked_logits(masked, plan, importance)
    assert (without - dense).abs().max() > 0.1 * dense.abs().max()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_every_projection_comes_nearer_to_what_it_computed(family: str) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    plan = keep((2, 2, 20), (3, 1, 30), (1, 2, 40))
    ordered, bare = fitted(model), OrderedModel(plain.decoder, scores_of(plain))
    seen = [_inputs(model, i) for i in range(3)]
    for i, kept in enumerate(plan.layers):
        heads, down = seen[i]
        columns = torch.zeros(model.decoder.shape.layers[i].kv_heads, model.decoder.shape.layers[i].queries_per_kv, 8)
        columns[: kept.kv_heads, : kept.queries_per_kv] = 1
        layer, other = model.decoder.layers[i], plain.decoder.layers[i]
        dense_output, dense_down = heads @ layer.output.weight.t(), down @ layer.down.weight.t()
        ordered.apply_layer(i, kept)
        bare.apply_layer(i, kept)
        stays = columns.flatten().bool()
        for inputs, dense, ours, theirs in (
            (heads[:, stays], dense_output, layer.output.weight, other.output.weight),
            (down[:, : kept.mlp_channels], dense_down, layer.down.weight, other.down.weight),
        ):
            if ours.shape[1] < dense.shape[1] or not torch.equal(ours, theirs):
                assert (inputs @ ours.t() - dense).norm() < (inputs @ theirs.t() - dense).norm()


def _inputs(model: LoadedModel, i: int) -> tuple[Tensor, Tensor]:
    """All that enters o and down of a layer on the calibration text, [tokens, columns] each."""
    seen: dict[str, list[Tensor]] = {"output": [], "down": []}
    layer = model.decoder.layers[i]
    handles = [
        getattr(layer, name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name in seen
    ]
    model.decoder.body(input_ids=CALIBRATION)
    for handle in handles:
        handle.remove()
    return torch.cat(seen["output"]).flatten(0, 1), torch.cat(seen["down"]).flatten(0, 1)


@pytest.mark.parametrize("reconstructs", [False, True])
def test_plans_leave_no_traces_and_the_dense_model_comes_back(reconstructs: bool) -> None:
    model = tiny_llama(bias=True)
    ordered = fitted(model) if reconstructs else OrderedModel(model.decoder, scores_of(model))
    dense = logits_of(model)
    plan = keep((2, 1, 20), (3, 1, 48), (1, 2, 7))
    ordered.apply(plan)
    pruned = logits_of(model)
    ordered.apply(keep((1, 1, 1), (1, 1, 1), (1, 1, 1)))
    ordered.apply(plan)
    assert torch.equal(logits_of(model), pruned)
    ordered.restore()
    assert torch.equal(logits_of(model), dense)


def test_sequential_scoring_fits_to_what_the_pruned_layers_below_give() -> None:
    plan = keep((3, 2, 30), (3, 2, 48), (2, 2, 24))
    models = [tiny_llama(), tiny_llama()]
    for model, reconstruct in zip(models, (False, True), strict=True):
        ordered = OrderedModel(model.decoder, scores_of(model))
        prune_sequentially(ordered, plan, CALIBRATION, reconstruct=reconstruct)
    plain, ours = (model.decoder.layers for model in models)
    assert torch.equal(plain[0].gate.weight, ours[0].gate.weight)
    assert not torch.equal(plain[0].down.weight, ours[0].down.weight)
    assert torch.equal(plain[1].down.weight, ours[1].down.weight), "a layer that loses nothing is left alone"
    assert not any(isinstance(kept, FittedColumns) for each in ordered._layers for kept in vars(each).values())


@pytest.mark.parametrize("scoring", ["dense", "sequential"])
def test_a_search_measures_reconstructed_models(scoring: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    plain = tiny_spec(tmp_path_factory.mktemp("plain")).model_copy(update={"scoring": scoring})
    spec = SearchSpec.model_validate(plain.model_dump() | {"reconstruction": "least-squares"})
    assert spec.fingerprint != plain.fingerprint
    sessions = [Session(each, sensitivity=False) for each in (plain, spec)]
    assert sessions[0].profile.dense.perplexity == pytest.approx(sessions[1].profile.dense.perplexity, rel=1e-6)
    first, second = (each.evaluate(each.spec.uniform_plan(each.shape)).perplexity for each in sessions)
    assert first != pytest.approx(second, rel=1e-6)
