"""Fitness of one's own: files of prompts with answers, of which only the answers are predicted."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from gpu_worker.measuring.corpora import load_roles
from gpu_worker.measuring.divergence import dense_predictions, divergence
from gpu_worker.measuring.perplexity import checked_perplexity, perplexity
from gpu_worker.measuring.windows import on_device, predicted_counts, predicted_tokens, token_ids
from protocol.errors import DataError
from protocol.plans.spec import Role, TextSpec
from tests.support.tiny_models import byte_tokenizer, tiny_model

ROWS = [{"prompt": f"{i} and {i} is", "completion": f" {2 * i}." * (1 + i % 3)} for i in range(20)]
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write(folder: Path, *rows: Any, name: str = "tasks.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def load(texts: Mapping[Role, TextSpec], tokenizer: Any = None, start: int | None = None) -> dict[Role, Tensor]:
    def never(_windows: int, _length: int) -> Tensor:
        raise AssertionError

    return load_roles(texts, 0, tokenizer or byte_tokenizer(), never, start)


def answers(windows: Tensor) -> list[str]:
    """The predicted tokens of each window as text."""
    return [byte_tokenizer().decode(window[window >= 0]) for window in windows]


def test_only_answers_are_predicted_and_no_example_is_in_two_roles(tmp_path: Path) -> None:
    source = write(tmp_path, *ROWS)
    roles: dict[Role, TextSpec] = {
        "calibration": TextSpec(source=source, windows=2, seqlen=40),
        "fitness": TextSpec(source=source, windows=5, seqlen=40),
        "report": TextSpec(source=source, windows=None, seqlen=40),
    }
    found = load(roles)
    wanted = {row["completion"] + "<last>" for row in ROWS}
    measured = [*answers(found["fitness"]), *answers(found["report"])]
    assert set(measured) <= wanted and len(set(measured)) == len(measured)
    assert len(found["fitness"]) == 5 and found["calibration"].shape == (2, 40) and (found["calibration"] >= 0).all()
    joined = byte_tokenizer().decode(found["calibration"].flatten())
    assert len(measured) + joined.count(" and ") <= len(ROWS) and not any(answer in joined for answer in measured[:5])
    whole = byte_tokenizer().decode(token_ids(found["fitness"])[0])
    assert whole.startswith(tuple(row["prompt"] for row in ROWS))
    assert torch.equal(load(roles)["fitness"], found["fitness"])


def labels_loss(model: Any, windows: Tensor) -> tuple[float, int]:
    """The summed loss of transformers with `labels=`, and the number of tokens that count."""
    total, tokens = 0.0, 0
    for window in windows:
        labels = torch.where(window < 0, -100, window)
        count = int((labels[1:] >= 0).sum())
        total += model.causal_lm(input_ids=token_ids(window)[None], labels=labels[None]).loss.item() * count
        tokens += count
    return total, tokens


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_perplexity_is_that_of_transformers_with_labels(tmp_path: Path, family: str) -> None:
    model = replace(tiny_model(family), tokenizer=byte_tokenizer())
    source = write(tmp_path, *ROWS)
    spec = TextSpec(source=source, windows=6, seqlen=40)
    windows = load({"fitness": spec}, start=model.window_start)["fitness"]
    total, tokens = labels_loss(model, windows)
    value, counted = perplexity(model.decoder, windows)
    assert counted == tokens == predicted_tokens(windows) == sum(predicted_counts(windows))
    assert value == pytest.approx(torch.tensor(total / tokens).exp().item(), rel=1e-5)
    assert checked_perplexity(model.decoder, windows, lambda *_: None, "")[0] == pytest.approx(value, rel=1e-6)
    cut = on_device(windows, model.decoder.device)
    assert max(map(len, cut)) < windows.shape[1], "what follows the last answer is not computed"


def test_divergence_counts_answers_only(tmp_path: Path) -> None:
    dense, other = tiny_model("llama"), tiny_model("llama", seed=1)
    windows = load({"fitness": TextSpec(source=write(tmp_path, *ROWS), windows=6, seqlen=40)})["fitness"]
    kept, value, tokens = dense_predictions(dense.decoder, windows)
    assert tokens == len(kept.tokens) == predicted_tokens(windows)
    assert value == pytest.approx(perplexity(dense.decoder, windows)[0], rel=1e-6)
    assert divergence(dense.decoder, windows, kept).kl == pytest.approx(0, abs=1e-6)
    total = 0.0
    for window in windows:
        p, q = (m.causal_lm(input_ids=token_ids(window)[None]).logits[0, :-1].log_softmax(-1) for m in (dense, other))
        total += (p.exp() * (p - q)).sum(-1)[window[1:] >= 0].sum().item()
    assert divergence(other.decoder, windows, kept).kl == pytest.approx(total / tokens, rel=1e-4)


def test_a_chat_is_told_by_the_template_of_the_model(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    source = write(tmp_path, CHAT)
    spec: dict[Role, TextSpec] = {"fitness": TextSpec(source=source, windows=None, seqlen=64)}
    with pytest.raises(DataError, match="no chat template: give examples with prompt and completion"):
        load(spec, tokenizer)
    tokenizer.chat_template = TEMPLATE
    (window,) = load(spec, tokenizer)["fitness"]
    assert answers(window[None]) == ["hello\n"]
    assert tokenizer.decode(token_ids(window)).startswith("[user]hi\n[assistant]hello\n")
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="chat template refuses the messages: no system role"):
        load(spec, tokenizer)
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(DataError, match="changes the prompt"):
        load(spec, tokenizer)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (({"prompt": "a"},), "line 1 of .* has no 'completion': it must be an object with the strings prompt"),
        (({"prompt": "a", "completion": 3},), "line 1 of .* has an invalid 'completion'"),
        (({"text": "a"},), "line 1 of .* has no 'prompt'"),
        (({"messages": []},), "does not end with a message of the role assistant"),
        (({"messages": CHAT["messages"][:1]},), "does not end with a message of the role assistant"),
        (({"messages": [{"role": "assistant"}]},), "has no 'messages.0.content'"),
        ((ROWS[0], 5), "line 2 of .* is not an object"),
        ((), "holds no examples"),
        (({"prompt": "a", "completion": ""},), "line 1 of .* has an empty answer"),
        (({"prompt": "\ud800", "completion": "b"},), "line 1 of .* is not text in UTF-8"),
        (({"prompt": "a" * 50, "completion": "b"},), "no answer of .* starts within 40 tokens: increase seqlen"),
        (ROWS[:3], r"is too short: its 3 examples are too few \(fitness: 6 windows of 40\); ask for fewer"),
    ],
)
def test_what_holds_no_such_examples_is_refused(tmp_path: Path, rows: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        load({"fitness": TextSpec(source=write(tmp_path, *rows), windows=6, seqlen=40)})


def test_examples_that_do_not_fit_are_told_of(tmp_path: Path) -> None:
    rows = [ROWS[0], {"prompt": "a" * 50, "completion": "b"}, {"prompt": "a", "completion": "b" * 99}]
    with capture_logs() as logs:
        windows = load({"fitness": TextSpec(source=write(tmp_path, *rows), windows=None, seqlen=40)})["fitness"]
    assert len(windows) == 2
    assert [(each["left_out"], each["cut"], each["of"]) for each in logs] == [(1, 1, 3)]
