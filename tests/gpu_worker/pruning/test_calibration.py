from typing import Any

import pytest
import torch

from gpu_worker.models.loading import LoadedModel
from gpu_worker.pruning.calibration import calibrate, calibrate_layer_by_layer, calibrate_products
from tests.support.tiny_models import tiny_llama, tiny_windows


def _inputs(model: LoadedModel, windows: torch.Tensor, layer: int, part: str) -> torch.Tensor:
    """Everything that enters `part` of a layer, [tokens, columns], by a plain forward pass with logits."""
    seen: list[torch.Tensor] = []
    module = getattr(model.decoder.layers[layer], part)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    model.causal_lm(input_ids=windows)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(6, 3), (4, 4)])
def test_the_statistics_are_the_mean_squares_of_all_tokens(query_heads: int, kv_heads: int) -> None:
    model = tiny_llama(query_heads=query_heads, kv_heads=kv_heads)
    windows = tiny_windows(5, 16)
    for i, seen in enumerate(calibrate(model.decoder, windows)):
        output, down = _inputs(model, windows, i, "output"), _inputs(model, windows, i, "down")
        assert torch.allclose(seen.attention_output, output.double().square().mean(dim=0), rtol=1e-5)
        assert torch.allclose(seen.mlp_output, down.double().square().mean(dim=0), rtol=1e-5)


def test_a_low_precision_model_is_summed_in_more_than_its_own_precision() -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    windows = tiny_windows(4, 64)
    down = _inputs(model, windows, 0, "down").double()
    assert torch.allclose(calibrate(model.decoder, windows)[0].mlp_output, down.square().mean(dim=0), rtol=2e-2)


@pytest.mark.parametrize("strip", [5, 256])
def test_products_are_those_of_all_tokens_however_they_are_added_up(
    strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_worker.pruning.calibration.STRIP", strip)
    model, windows = tiny_llama(query_heads=6, kv_heads=3), tiny_windows(5, 16)
    for i, seen in enumerate(calibrate_products(model.decoder, windows)[1]):
        for part, products in (("output", seen.attention_output), ("down", seen.mlp_output)):
            inputs = _inputs(model, windows, i, part)
            assert torch.allclose(products, inputs.t() @ inputs / len(inputs), rtol=1e-4, atol=1e-6)


def test_calibrating_layer_by_layer_finds_the_same() -> None:
    model, windows = tiny_llama(), tiny_windows(5, 16)
    expected, found = calibrate_products(model.decoder, windows), calibrate_layer_by_layer(model.decoder, windows)
    for ones, others in zip(expected, found, strict=True):
        for one, other in zip(ones, others, strict=True):
            assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def test_calibrating_does_not_change_what_the_model_computes() -> None:
    model, windows = tiny_llama(), tiny_windows(1, 16)
    before = model.decoder.body(input_ids=windows).last_hidden_state
    during: list[torch.Tensor] = []
    handle = model.decoder.body.register_forward_hook(lambda *args: during.append(args[2].last_hidden_state))
    calibrate(model.decoder, windows)
    handle.remove()
    assert torch.equal(during[0], before)


def test_progress_counts_the_windows() -> None:
    told: list[tuple[int, int]] = []
    calibrate(tiny_llama().decoder, tiny_windows(3, 8), lambda stage, done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_no_hook_stays_even_when_calibration_is_interrupted() -> None:
    model = tiny_llama()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model.decoder, tiny_windows(2, 8), interrupt)
    assert not any(module._forward_pre_hooks for module in model.causal_lm.modules())
