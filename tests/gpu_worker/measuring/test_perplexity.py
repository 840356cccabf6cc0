import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_worker.measuring.corpora import load_roles
from gpu_worker.measuring.divergence import dense_predictions, divergence
from gpu_worker.measuring.perplexity import perplexity
from gpu_worker.models.errors import NotFiniteError
from gpu_worker.models.limits import LOGITS_CHUNK_BYTES
from gpu_worker.models.loading import load_model
from protocol.plans.spec import SearchSpec, TextSpec
from tests.support.real_model import need_smollm2
from tests.support.tiny_models import save_tiny_folder, tiny_llama, tiny_windows
from tests.support.tiny_specs import write_text


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
    monkeypatch.setitem(LOGITS_CHUNK_BYTES, "cpu", 7 * 4 * 320)
    assert perplexity(model.decoder, windows)[0] == pytest.approx(whole, rel=1e-6)


def test_windows_do_not_see_each_other() -> None:
    model, windows = tiny_llama(), tiny_windows(2, 16)
    apart = [math.log(perplexity(model.decoder, window[None])[0]) for window in windows]
    assert math.log(perplexity(model.decoder, windows)[0]) == pytest.approx(sum(apart) / 2, rel=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf, None])
def test_a_broken_model_has_no_perplexity(poison: float | None) -> None:
    """Nor has one whose loss is too large for a perplexity."""
    model = tiny_llama(tied=False)
    with torch.no_grad():
        if poison is None:
            model.decoder.head.weight.mul_(1e4)
        else:
            model.decoder.layers[1].down.weight[0, 0] = poison
    with pytest.raises(NotFiniteError):
        perplexity(model.decoder, tiny_windows(1, 8))


def as_the_papers_measure(causal_lm: Any, tokens: Tensor, seqlen: int) -> float:
    """SparseGPT's loop, after which Wanda, LLM-Pruner and FLAP evaluate: window by window, transformers' own loss."""
    windows = len(tokens) // seqlen
    losses = []
    for i in range(windows):
        window = tokens[None, i * seqlen : (i + 1) * seqlen]
        with torch.no_grad():
            losses.append(causal_lm(input_ids=window, labels=window).loss.item() * seqlen)
    return math.exp(sum(losses) / (windows * seqlen))


def test_a_whole_text_has_the_perplexity_that_the_papers_would_measure(tmp_path: Path) -> None:
    model = load_model(str(save_tiny_folder(tmp_path / "model", hidden_size=48)), "float32")
    report, other = write_text(tmp_path / "report.txt", 100), write_text(tmp_path / "other.txt", 50, seed=1)
    spec = SearchSpec(
        model="tiny",
        rate=0.3,
        calibration=TextSpec(source=other, windows=1, seqlen=16),
        fitness=TextSpec(source=other, windows=1, seqlen=16),
        report=TextSpec(source=report, windows=None, seqlen=64),
    )
    windows = load_roles(spec.texts, spec.seed, model.tokenizer, no_text_of_its_own)["report"]
    tokens = torch.tensor(model.tokenizer(Path(report).read_text())["input_ids"])
    assert len(tokens) % 64  # the last, incomplete window is left out, there and here
    value, counted = perplexity(model.decoder, windows)
    assert value == pytest.approx(as_the_papers_measure(model.causal_lm, tokens, 64), rel=1e-5)
    assert counted == len(tokens) // 64 * 63


def no_text_of_its_own(windows: int, length: int) -> Tensor:
    raise AssertionError("no role asks for text that the model writes")


@pytest.mark.model
def test_a_real_model_in_bfloat16_agrees_with_the_papers_way_within_a_thousandth() -> None:
    need_smollm2()
    model = load_model("smollm2", "bfloat16")
    ids = model.tokenizer("The history of the town begins with a river and a mill. " * 36)["input_ids"]
    tokens = torch.tensor(ids)[: 3 * 128]
    expected = as_the_papers_measure(model.causal_lm, tokens, 128)
    assert len(tokens) == 3 * 128
    assert perplexity(model.decoder, tokens.view(3, 128))[0] == pytest.approx(expected, rel=1e-3)
    dense, same_pass, _ = dense_predictions(model.decoder, tokens.view(3, 128))
    assert same_pass == pytest.approx(expected, rel=1e-3)
    assert divergence(model.decoder, tokens.view(3, 128), dense).perplexity == same_pass
