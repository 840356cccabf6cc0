"""Distillation: the pruned model learns the dense model's predictions, chunk by chunk, with any data."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_worker.export.exported_folder import read_exported
from gpu_worker.finetune.loss import Teacher, summed_loss
from gpu_worker.measuring.examples import Example
from gpu_worker.models import limits
from gpu_worker.models.loading import load_model
from protocol.errors import ModelError
from protocol.results.finetuning import Recipe
from tests.support.finetunes import QUICK, WORDS, exported, finetuned
from tests.support.tiny_models import save_tiny_folder, tiny_model, tiny_windows

DISTIL = QUICK.model_copy(update={"distilled": 1.0})
EXAMPLES = [Example(tiny_windows(1, 20)[0], 1), Example(tiny_windows(1, 12, seed=1)[0], 5)]


def log_shares(folder: Path) -> Tensor:
    """The log-probabilities that a folder's model predicts for the text that is learnt from."""
    model = load_model(str(folder), "float32")
    tokens = torch.tensor([model.tokenizer(WORDS)["input_ids"]])
    with torch.no_grad():
        return F.log_softmax(model.causal_lm(input_ids=tokens).logits, -1)


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected ‖ found), summed over the predicted tokens of EXAMPLES; both are logits [examples, tokens, …]."""
    total = torch.zeros(())
    for row, example in enumerate(EXAMPLES):
        rows = slice(example.first - 1, len(example.tokens) - 1)
        p, q = F.log_softmax(expected[row, rows], -1), F.log_softmax(found[row, rows], -1)
        total = total + (p.exp() * (p - q)).sum()
    return total


@pytest.mark.parametrize("chunk", [10**9, 3000])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
def test_loss_and_gradient_are_those_of_the_whole_vocabulary(
    chunk: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(limits.LOGITS_CHUNK_BYTES, "cpu", chunk)
    model, teacher = tiny_model("llama", hidden_size=48), tiny_model("llama", seed=3, layers=2)
    tokens = torch.zeros(2, 20, dtype=torch.long)
    for row, example in enumerate(EXAMPLES):
        tokens[row, : len(example.tokens)] = example.tokens
    weight = model.decoder.layers[0].down.weight.requires_grad_(True)

    loss = summed_loss(model.decoder, EXAMPLES, Teacher(teacher.decoder, share))
    loss.backward()  # type: ignore[no-untyped-call]
    mine = cast("Tensor", weight.grad).clone()
    weight.grad = None
    logits = model.causal_lm(input_ids=tokens).logits
    wanted = share * divergence(teacher.causal_lm(input_ids=tokens).logits, logits)
    for row, example in enumerate(EXAMPLES):
        wanted = (
            wanted
            + (1 - share)
            * F.cross_entropy(logits[row, :-1], tokens[row, 1:], reduction="none")[
                example.first - 1 : len(example.tokens) - 1
            ].sum()
        )
    wanted.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5) and loss.item() > 0
    assert torch.allclose(mine, cast("Tensor", weight.grad), rtol=1e-4, atol=1e-6)


def test_a_model_that_predicts_as_its_teacher_has_nothing_to_learn() -> None:
    model = tiny_model("llama")
    weight = model.decoder.layers[0].down.weight.requires_grad_(True)
    loss = summed_loss(model.decoder, EXAMPLES, Teacher(model.decoder, 1.0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert cast("Tensor", weight.grad).abs().max() < 1e-6


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_pruned_model_comes_nearer_to_its_teacher_and_says_so(tmp_path: Path, method: Any) -> None:
    folder, dense = exported(tmp_path / "pruned"), save_tiny_folder(tmp_path / "dense")
    recipe = Recipe(**DISTIL.model_dump() | {"method": method, "learning_rate": 0.01 if method == "lora" else 0.003})
    result = finetuned(folder, tmp_path / "out", recipe, teacher=str(dense))
    tuned = result.finetuning
    assert 0 < tuned.last_loss < 0.8 * tuned.first_loss and tuned.teacher == "dense"
    wanted = log_shares(dense)
    before, after = (
        F.kl_div(log_shares(each), wanted, log_target=True, reduction="sum").item()
        for each in (folder, tmp_path / "out")
    )
    assert after < 0.9 * before
    assert "partly from the predictions of dense; " in (tmp_path / "out" / "README.md").read_text()
    assert read_exported(tmp_path / "out").facts.finetunings[-1].teacher == "dense"


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dense = exported(tmp_path / "pruned"), save_tiny_folder(tmp_path / "dense")

    def loaded(name: str, *rest: Any) -> Any:
        model = load_model(name, *rest)
        other = SimpleNamespace(get_vocab=lambda: {"other": 0})
        return replace(model, tokenizer=other) if name == str(dense) else model

    monkeypatch.setattr("gpu_worker.finetune.finetune.load_model", loaded)
    with pytest.raises(ModelError, match="cannot teach this model: it has another vocabulary"):
        finetuned(folder, tmp_path / "out", DISTIL, teacher=str(dense))
