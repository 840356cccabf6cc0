"""Backward elimination against a slow one: every piece that is left is tried out, by a library's least squares."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gpu_worker.models.errors import NotFiniteError
from gpu_worker.pruning.calibration import LayerProducts, calibrate_products
from gpu_worker.pruning.elimination import STEPS, optimal_brain_surgeon
from gpu_worker.pruning.reconstruction import damped
from protocol.plans.shape import LayerShape
from tests.support.tiny_models import tiny_llama, tiny_windows


def fitted_error(weight: Tensor, products: Tensor, left: Sequence[int]) -> float:
    """How far, in mean square, the inputs that are `left` are from what all of them compute, once they are fitted."""
    root = torch.linalg.cholesky(
        damped(products).double()
    ).t()  # as data, for xᵀG⁻¹x needs only GramMatrix G = rootᵀ·root
    wanted = root @ weight.t().double()
    found = torch.linalg.lstsq(root[:, list(left)], wanted).solution
    return float((root[:, list(left)] @ found - wanted).square().sum())


def slow_steps(weight: Tensor, products: Tensor, pieces: int) -> list[int]:
    """For each piece the step in which it goes: the one without which the error is least."""
    width = weight.shape[1] // pieces
    left, gone = list(range(pieces)), [pieces - 1] * pieces
    for step in range(pieces - 1):

        def without(piece: int) -> float:
            stays = [p * width + j for p in left if p != piece for j in range(width)]
            return fitted_error(weight, products, stays)

        going = min(left, key=without)
        left.remove(going)
        gone[going] = step
    return gone


@pytest.mark.parametrize(
    "attention",
    [
        pytest.param({"query_heads": 6, "kv_heads": 3}, id="grouped-query"),
        pytest.param({"query_heads": 4, "kv_heads": 4, "bias": True}, id="multi-head"),
    ],
)
def test_heads_go_in_the_order_in_which_they_are_missed_least(attention: dict[str, int]) -> None:
    model = tiny_llama(**attention)
    layer, shape = model.decoder.layers[1], model.decoder.shape.layers[1]
    products = list(calibrate_products(model.decoder, tiny_windows(6, 64, seed=1))[1])[1]
    found = optimal_brain_surgeon(layer, products, shape)
    expected = slow_steps(layer.output.weight, products.attention_output, shape.query_heads)
    assert found.query_heads.flatten().tolist() == expected
    assert found.kv_heads.tolist() == slow_steps(layer.output.weight, products.attention_output, shape.kv_heads)


def test_channels_go_in_that_order_too_where_there_are_few() -> None:
    model = tiny_llama(channels=STEPS)  # one a step
    layer, shape = model.decoder.layers[0], model.decoder.shape.layers[0]
    products = next(calibrate_products(model.decoder, tiny_windows(6, 64, seed=1))[1])
    found = optimal_brain_surgeon(layer, products, shape).channels.tolist()
    assert found == slow_steps(layer.down.weight, products.mlp_output, STEPS)


def test_of_two_that_say_the_same_one_goes_first() -> None:
    """Wanda-sp would keep both of the loudest pair."""
    model = tiny_llama(query_heads=2, kv_heads=2)
    layer = model.decoder.layers[0]
    loud = torch.randn(64, 24, generator=torch.Generator().manual_seed(0)) * torch.linspace(4, 1, 24)
    inputs = torch.cat([loud, loud + 0.01 * torch.randn(64, 24, generator=torch.Generator().manual_seed(1))], dim=1)
    products = LayerProducts(torch.eye(layer.output.in_features), inputs.t() @ inputs / 64)
    shape = LayerShape(query_heads=2, kv_heads=2, mlp_channels=48)
    steps = optimal_brain_surgeon(layer, products, shape).channels
    first_half = set(steps.argsort()[:20].tolist())
    assert not {channel for channel in first_half if (channel + 24) % 48 in first_half}


def test_products_that_are_no_numbers_are_refused() -> None:
    model = tiny_llama()
    layer, shape = model.decoder.layers[0], model.decoder.shape.layers[0]
    products = next(calibrate_products(model.decoder, tiny_windows(2, 16))[1])
    broken = LayerProducts(products.attention_output * torch.nan, products.mlp_output)
    with pytest.raises(NotFiniteError, match="not finite"):
        optimal_brain_surgeon(layer, broken, shape)
