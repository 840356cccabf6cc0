"""What fine-tuning learns from: Alpaca's form, or text; and what of it is predicted."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpu_worker.finetune.data import TrainingData, prepare_data, read_instructions
from gpu_worker.finetune.eval_texts import EvalText
from gpu_worker.finetune.loss import summed_loss
from gpu_worker.finetune.overlap import shared_share
from gpu_worker.measuring import corpora
from gpu_worker.measuring.examples import Instruction
from gpu_worker.measuring.windows import given
from protocol.errors import DataError
from protocol.results.finetuning import Recipe, form_of
from tests.support.finetunes import exported, finetuned
from tests.support.tiny_models import byte_tokenizer, tiny_llama, tiny_model

ROWS = [{"instruction": "Add.", "input": "1 1", "output": "2"}, {"instruction": "Sing.", "output": "La", "text": "x"}]
RECIPE = Recipe(seqlen=400)


def written(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content)
    return str(folder / name)


def prepared(source: str, recipe: Recipe = RECIPE, family: str = "llama") -> TrainingData:
    model = replace(tiny_model(family), tokenizer=byte_tokenizer())
    return prepare_data(source, read_instructions(source, recipe), model, recipe)


def test_the_suffix_says_what_a_file_is() -> None:
    assert [form_of(name) for name in ("a.json", "a.JSONL", "alpaca-gpt4")] == ["alpaca"] * 3
    assert [form_of(name) for name in ("a.txt", "json", "wikitext2")] == ["text"] * 3


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_only_the_answer_is_predicted_and_the_end_of_the_text(tmp_path: Path, name: str) -> None:
    lines = json.dumps(ROWS) if name.endswith("json") else "\n".join(json.dumps(row) for row in ROWS) + "\n\n"
    data = prepared(written(tmp_path, name, lines))
    tokenizer = byte_tokenizer()
    first = data.examples[0].first
    asked, told = data.examples[0].tokens[:first], data.examples[0].tokens[first:]
    assert tokenizer.decode(told) == "2<last>"
    assert tokenizer.decode(asked).endswith("### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n")
    assert "### Input" not in tokenizer.decode(data.examples[1].tokens)
    assert (data.name, data.form) == (name, "alpaca")


def test_long_examples_are_cut_and_those_without_an_answer_left_are_dropped(tmp_path: Path) -> None:
    first = len(Instruction.model_validate(ROWS[1]).parts()[0])
    source = written(tmp_path, "rows.json", json.dumps([ROWS[1], {**ROWS[1], "instruction": "Sing " * 99}]))
    data = prepared(source, Recipe(seqlen=first + 1))
    assert [example.predicted for example in data.examples] == [1]
    with pytest.raises(DataError, match="nothing"):
        prepared(source, Recipe(seqlen=16))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_text_is_cut_into_windows_of_which_all_but_the_first_token_is_predicted(tmp_path: Path, family: str) -> None:
    data = prepared(written(tmp_path, "a.txt", "abcdefgh" * 20), Recipe(seqlen=16), family)
    assert len(data.examples) == 10 and {(len(e.tokens), e.first) for e in data.examples} == {(16, 1)}
    begins = byte_tokenizer().decode(data.examples[0].tokens)
    assert begins == ("<first>" + "bcdefgh" + "abcdefgh" if family == "gemma3_text" else "abcdefgh" * 2)


def test_of_a_text_of_the_hub_what_is_learned_is_not_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(_name: str, _config: str, *, split: str, data_files: object) -> dict[str, list[str]]:
        assert data_files is None
        return {"text": [split * 20]}

    monkeypatch.setattr(corpora, "hub_reachable", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = prepared("wikitext2", Recipe(seqlen=16))
    assert byte_tokenizer().decode(data.examples[0].tokens) == "traintraintraint"


def test_a_model_that_needs_a_first_token_gets_it_before_instructions_too(tmp_path: Path) -> None:
    data = prepared(written(tmp_path, "rows.json", json.dumps(ROWS)), family="gemma3_text")
    assert byte_tokenizer().decode(data.examples[0].tokens).startswith("<first>Below is")


GOOD = '{"instruction": "a", "output": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", f'{GOOD}\n{{"instruction": "a"}}', "line 2 of .* has no 'output': it must"),
        ("a.jsonl", '\n{"instruction": "a", "output": 3}', "line 2 of .* has an invalid 'output'"),
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n\n{oh', "line 3 of .*not valid JSON"),
        ("a.jsonl", "[1]", "line 1 of .*not an object"),
        ("a.json", '[{"instruction": "a", "output": "b"}, 7]', "entry 2 of .*not an object"),
        ("a.json", '[\n{"instruction": "a", "output": null}]', "entry 1 of .*output"),
        ("a.json", '[\n{"instruction": }]', "line 2 of .*not valid JSON"),
        ("a.json", '{"instruction": "a", "output": "b"}', "not a JSON list"),
        ("a.json", "[]", "no examples"),
        ("a.jsonl", "", "no examples"),
        ("a.json", "[" * 100_000, "line 1 of .*not valid JSON"),
    ],
)
def test_the_first_bad_line_is_named(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read_instructions(written(tmp_path, name, content), RECIPE)


def test_so_many_examples_are_picked_by_the_seed(tmp_path: Path) -> None:
    rows = [{"instruction": str(i), "output": "b"} for i in range(50)]
    source = written(tmp_path, "rows.json", json.dumps(rows))
    picked = (read_instructions(source, Recipe(examples=5, seed=seed)) for seed in (1, 1, 2))
    some, same, others = ([row.instruction for row in rows or () if isinstance(row, Instruction)] for rows in picked)
    assert len(some) == 5 and some == same and some != others
    assert len(prepared(written(tmp_path, "a.txt", "abcdefgh" * 20), Recipe(seqlen=16, examples=3)).examples) == 3


@pytest.mark.usefixtures("no_hub")
def test_without_a_hub_it_is_said_what_to_pass() -> None:
    with pytest.raises(DataError, match="pass a file with --data"):
        read_instructions("alpaca-gpt4", RECIPE)


def test_the_loss_of_a_batch_is_that_of_its_examples_one_by_one_with_the_gradient_of_torch(tmp_path: Path) -> None:
    data = prepared(written(tmp_path, "rows.json", json.dumps(ROWS)), Recipe(seqlen=250))
    model = tiny_llama()
    weight = model.decoder.layers[0].gate.weight.requires_grad_(True)
    summed_loss(model.decoder, data.examples).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    ours = weight.grad.clone()
    weight.grad.zero_()
    total = 0.0
    for example in data.examples:
        labels = example.tokens.clone()
        labels[: example.first] = -100
        mean = model.causal_lm(input_ids=example.tokens[None], labels=labels[None]).loss
        (mean * example.predicted).backward()
        total += mean.item() * example.predicted
    assert summed_loss(model.decoder, data.examples).item() == pytest.approx(total, rel=1e-5)
    assert ours.allclose(weight.grad, rtol=1e-3, atol=1e-4)


def test_text_that_is_trained_on_is_not_measured(tmp_path: Path) -> None:
    folder = exported(tmp_path / "pruned")
    document = "".join(random.Random(0).choices("abcdefgh ", k=4000))
    train, test = written(tmp_path, "train.txt", document), written(tmp_path, "test.txt", f"other words, {document}")
    with pytest.raises(DataError, match=r"\d\d% of the evaluation text '.*test.txt' is also in the training data"):
        finetuned(folder, tmp_path / "out", data=train, eval_text=EvalText(test, 4, 64))
    parts = written(tmp_path, "a.txt", document[:2000]), written(tmp_path, "b.txt", document[2000:])
    finetuned(folder, tmp_path / "out", data=parts[0], eval_text=EvalText(parts[1], 4, 64))


def test_shared_passages_are_counted() -> None:
    tokens = torch.randint(1000, (200,), generator=torch.Generator().manual_seed(0))
    windows = torch.stack([tokens[:64], tokens[100:164]])
    assert shared_share([tokens[:80]], windows) == 0.5
    alike = torch.cat([given(windows[:, :32]), windows[:, 32:]], dim=1)
    assert shared_share([tokens[:32], tokens[100:132]], alike) == 0, "the prompts alone"
    assert shared_share([tokens[:80]], alike) == 0.5
    filled = torch.cat([windows, given(torch.zeros(2, 500, dtype=torch.long))], dim=1)
    assert shared_share([tokens[:80], torch.zeros(99, dtype=torch.long)], filled) == 0.5, "not what fills a window up"
    assert shared_share([tokens[:12]], windows) == shared_share([], windows) == 0
    assert shared_share([tokens], windows[:, :12]) == 0
