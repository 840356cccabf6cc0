"""KL divergence to the dense model, against a slow and obvious computation over the whole vocabulary."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_worker.measuring.divergence import DensePredictions, dense_predictions, divergence, kl_divergence
from gpu_worker.measuring.perplexity import perplexity
from gpu_worker.models.errors import NotFiniteError
from gpu_worker.models.limits import KL_TOP_K, LOGITS_CHUNK_BYTES
from gpu_worker.models.loading import LoadedModel
from tests.support.real_model import need_smollm2
from tests.support.tiny_models import VOCABULARY, tiny_llama, tiny_windows

WINDOWS = tiny_windows(3, 20)


def damaged(model: LoadedModel, share: float = 0.5) -> LoadedModel:
    """The model with one MLP weakened, in place: a fallback for a pruned one."""
    with torch.no_grad():
        model.decoder.layers[1].down.weight.mul_(share)
    return model


def log_probabilities(model: LoadedModel, windows: Tensor = WINDOWS) -> Tensor:
    """Of the whole vocabulary at each predicted place, fp64 [tokens, vocabulary], as transformers computes it."""
    with torch.no_grad():
        logits = model.causal_lm(input_ids=windows).logits[:, :-1]
    probabilities: Tensor = logits.double().log_softmax(-1).flatten(0, 1)
    return probabilities


def obvious_kl(dense: Tensor, pruned: Tensor) -> float:
    return F.kl_div(pruned, dense, log_target=True, reduction="batchmean").item()


def bucketed(dense: Tensor, pruned: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Both distributions, all but the `top` most probable tokens of each row of `dense` merged; one row at a time."""
    merged: tuple[list[Tensor], list[Tensor]] = ([], [])
    for p, q in zip(dense.exp(), pruned.exp(), strict=True):
        kept = set(p.argsort(descending=True)[:top].tolist())
        others = [i for i in range(len(p)) if i not in kept]
        for row, found in zip((p, q), merged, strict=True):
            found.append(torch.cat([row[sorted(kept)], row[others].sum()[None]]).log())
    return torch.stack(merged[0]), torch.stack(merged[1])


def predictions(model: LoadedModel, top: int = KL_TOP_K) -> DensePredictions:
    return dense_predictions(model.decoder, WINDOWS, top=top)[0]


@pytest.mark.parametrize("tied", [True, False])
def test_with_the_whole_vocabulary_the_divergence_is_exact(tied: bool) -> None:
    model = tiny_llama(tied=tied)
    dense, kept = log_probabilities(model), predictions(model)
    found = divergence(damaged(model).decoder, WINDOWS, kept)
    assert kept.tokens.shape == (3 * 19, VOCABULARY)
    assert found.kl == pytest.approx(obvious_kl(dense, log_probabilities(model)), rel=1e-5)
    assert found.kl > 0.01


@pytest.mark.parametrize("top", [1, 7, 100, VOCABULARY - 1])
def test_with_fewer_tokens_it_is_that_of_the_distributions_with_the_others_merged(top: int) -> None:
    model = tiny_llama()
    dense, kept = log_probabilities(model), predictions(model, top)
    found = divergence(damaged(model).decoder, WINDOWS, kept)
    assert found.kl == pytest.approx(obvious_kl(*bucketed(dense, log_probabilities(model), top)), rel=1e-5)


def test_it_is_a_lower_bound_that_rises_with_the_tokens_kept_and_comes_close() -> None:
    model = tiny_llama()
    kept = [predictions(model, top) for top in (1, 4, 16, 64, 256, VOCABULARY)]
    damaged(model)
    *bounds, whole = (divergence(model.decoder, WINDOWS, each).kl for each in kept)
    assert bounds == sorted(bounds) and bounds[-1] <= whole
    assert bounds[-1] == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top", [5, KL_TOP_K])
def test_the_dense_model_does_not_diverge_from_itself(dtype: torch.dtype, top: int) -> None:
    model = tiny_llama(dtype=dtype)
    kept = predictions(model, top)
    assert kept.logits.dtype == dtype
    assert divergence(model.decoder, WINDOWS, kept).kl == 0.0


def test_what_is_kept_of_a_model_in_bfloat16_is_what_it_computes() -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    dense, kept = log_probabilities(model), predictions(model, 9)
    expected, _ = bucketed(dense, dense, 9)
    found = kept.log_probabilities(slice(0, len(dense)), torch.device("cpu")).double()
    assert torch.allclose(found.exp().sum(-1), torch.ones(len(dense), dtype=torch.float64), atol=1e-6)
    assert torch.allclose(found.sort(-1).values, expected.sort(-1).values, atol=1e-5)


def test_a_tiny_change_gives_a_tiny_divergence_and_never_a_negative_one() -> None:
    model = tiny_llama()
    kept = predictions(model, 8)
    found = [divergence(damaged(model, 1 + 1e-6).decoder, WINDOWS, kept).kl for _ in range(20)]
    assert all(0 <= kl < 1e-6 for kl in found)


def test_the_same_pass_measures_the_perplexity() -> None:
    model = tiny_llama()
    kept, dense, tokens = dense_predictions(model.decoder, WINDOWS)
    assert dense == pytest.approx(perplexity(model.decoder, WINDOWS)[0], rel=1e-6)
    found = divergence(damaged(model).decoder, WINDOWS, kept)
    assert found.perplexity == pytest.approx(perplexity(model.decoder, WINDOWS)[0], rel=1e-6)
    assert found.tokens == tokens == 3 * 19
    assert found.perplexity != pytest.approx(dense, rel=1e-3)


def test_the_size_of_a_chunk_does_not_change_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    kept = predictions(model, 50)
    whole = divergence(damaged(model).decoder, WINDOWS, kept).kl
    monkeypatch.setitem(LOGITS_CHUNK_BYTES, "cpu", 7 * 4 * VOCABULARY)
    assert divergence(model.decoder, WINDOWS, kept).kl == pytest.approx(whole, rel=1e-6)


def test_what_is_kept_takes_the_promised_room_whatever_the_vocabulary() -> None:
    kept = predictions(tiny_llama(dtype=torch.bfloat16), 100)
    bytes_kept = sum(t.numel() * t.element_size() for t in (kept.tokens, kept.logits, kept.log_total, kept.log_rest))
    assert bytes_kept == 3 * 19 * (100 * (4 + 2) + 8)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_model_has_no_divergence(poison: float) -> None:
    model = tiny_llama()
    kept = predictions(model)
    with torch.no_grad():
        model.decoder.layers[1].down.weight[0, 0] = poison
    with pytest.raises(NotFiniteError):
        divergence(model.decoder, WINDOWS, kept)
    with pytest.raises(NotFiniteError):
        dense_predictions(model.decoder, WINDOWS)


def test_a_model_that_rules_out_what_is_expected_has_no_divergence() -> None:
    model = tiny_llama()
    kept = predictions(model)
    impossible = replace(kept, log_rest=torch.zeros_like(kept.log_rest))  # as if a token outside of the vocabulary came
    with pytest.raises(NotFiniteError, match="KL divergence"):
        divergence(model.decoder, WINDOWS, impossible)


def test_an_outcome_that_is_never_expected_adds_what_it_takes_from_the_others() -> None:
    expected = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert kl_divergence(expected, torch.tensor([[0.5, 0.5, 0.0]]).log()).item() == 0.0
    assert kl_divergence(expected, torch.tensor([[0.4, 0.4, 0.2]]).log()).item() == pytest.approx(math.log(1.25))


@pytest.mark.model
def test_the_real_models_divergence_is_that_of_the_whole_vocabulary_but_for_the_rarest_tokens() -> None:
    from gpu_worker.models.loading import load_model

    need_smollm2()
    model = load_model("smollm2", "bfloat16")
    text = "The history of the town begins with a river and a mill, and with a miller who could not swim. " * 5
    windows = torch.tensor(model.tokenizer(text)["input_ids"])[:96].view(2, 48)
    dense = log_probabilities(model, windows)
    kept, _, _ = dense_predictions(model.decoder, windows)
    assert divergence(model.decoder, windows, kept).kl == 0.0
    damaged(model)
    whole = obvious_kl(dense, log_probabilities(model, windows))
    assert divergence(model.decoder, windows, kept).kl == pytest.approx(whole, rel=0.1)
    assert divergence(model.decoder, windows, kept).kl <= whole
