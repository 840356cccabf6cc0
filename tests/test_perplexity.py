import math

import pytest
import torch

import gpu_worker.perplexity as module
from gpu_worker.perplexity import NotFiniteError, perplexity
from tests.tiny_models import tiny_llama, tiny_windows


@pytest.mark.parametrize("tied", [True, False])
def test_perplexity_is_that_of_transformers_own_loss(tied: bool) -> None:
    model, windows = tiny_llama(tied=tied), tiny_windows(3, 20)
    loss = model.causal_lm(input_ids=windows, labels=windows).loss.item()
    value, tokens = perplexity(model.decoder, windows)
    assert value == pytest.approx(math.exp(loss), rel=1e-5)
    assert tokens == 3 * 19


def test_the_size_of_a_chunk_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_llama(), tiny_windows(2, 33)
    whole, _ = perplexity(model.decoder, windows)
    monkeypatch.setitem(module.LOGITS_BYTES, "cpu", 7 * 4 * 320)
    assert perplexity(model.decoder, windows)[0] == pytest.approx(whole, rel=1e-6)


def test_windows_do_not_see_each_other() -> None:
    model, windows = tiny_llama(), tiny_windows(2, 16)
    apart = [math.log(perplexity(model.decoder, window[None])[0]) for window in windows]
    assert math.log(perplexity(model.decoder, windows)[0]) == pytest.approx(sum(apart) / 2, rel=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_model_has_no_perplexity(poison: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.decoder.layers[1].down.weight[0, 0] = poison
    with pytest.raises(NotFiniteError):
        perplexity(model.decoder, tiny_windows(1, 8))


def test_a_loss_too_large_for_a_perplexity_is_not_finite() -> None:
    model = tiny_llama(tied=False)
    with torch.no_grad():
        model.decoder.head.weight.mul_(1e4)
    with pytest.raises(NotFiniteError):
        perplexity(model.decoder, tiny_windows(1, 8))


@pytest.mark.model
def test_a_real_model_in_bfloat16_agrees_with_transformers_within_a_thousandth() -> None:
    from gpu_worker.models import load_model

    model = load_model("smollm2", "bfloat16")
    windows = torch.tensor(
        model.tokenizer("The history of the town begins with a river and a mill. " * 12)["input_ids"]
    )
    windows = windows[None, :128]
    loss = model.causal_lm(input_ids=windows, labels=windows).loss.item()
    assert perplexity(model.decoder, windows)[0] == pytest.approx(math.exp(loss), rel=1e-3)
