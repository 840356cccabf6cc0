"""`selfpruner zero-shot`: accuracies are those worked out by hand, dense, pruned in memory and exported."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from daemon.cli import main
from gpu_worker.evaluation.zero_shot import Questions, answer_tasks
from gpu_worker.evaluation.zero_shot_tasks import find_sources, load_tasks
from gpu_worker.models.errors import NotFiniteError
from gpu_worker.models.loading import LoadedModel
from protocol.results.zero_shot import PAPER_TASKS, paper_task
from tests.support.exports import pruned
from tests.support.tiny_models import byte_tokenizer, save_tiny_folder, tiny_model
from tests.support.tiny_specs import write_text
from tests.support.tiny_tasks import FORMS, ITEMS, expected_accuracies, write_task, write_tasks

pytestmark = pytest.mark.usefixtures("restored_logs")
COUNTED = {"piqa": "acc", "arc-c": "acc_norm", "winogrande": "acc", "boolq": "acc"}
HARNESS_NAMES = {"arc-c": "arc_challenge"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    save_tiny_folder(folder / "model", hidden_size=48, layers=4)
    write_text(folder / "calibration.txt", seed=2)
    write_tasks(folder / "tasks")
    return folder


def ask(target: Path, *options: str, model: Path | None = None) -> int:
    tasks = ["--tasks-dir", str(target / "tasks"), "--dtype", "float32"]
    return main(["zero-shot", str(model or target / "model"), *tasks, *options, "--json"])


def asked(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The answer, which is all that is on stdout."""
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def expected_by_task(folder: Path, limit: int = ITEMS) -> dict[str, tuple[float, float]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: expected_accuracies(model, HARNESS_NAMES.get(name, name), limit) for name in COUNTED}


def check(answer: dict[str, Any], expected: dict[str, tuple[float, float]], items: int = ITEMS) -> None:
    found = {task["task"]: task for task in answer["tasks"]}
    assert found.keys() == COUNTED.keys()
    for name, (acc, acc_norm) in expected.items():
        task = found[name]
        has_norm = FORMS[HARNESS_NAMES.get(name, name)] is FORMS["piqa"]
        assert (task["items"], task["metric"]) == (items, COUNTED[name])
        assert task["acc"] == pytest.approx(acc)
        assert task["acc_norm"] == (pytest.approx(acc_norm) if has_norm else None)
        assert task["accuracy"] == task[COUNTED[name]]
    assert answer["mean"] == pytest.approx(sum(task["accuracy"] for task in found.values()) / len(found))


def test_no_more_text_is_needed_than_is_scored_on(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--calibration-data", str(target / "calibration.txt"), "--seqlen", "32"]
    options = [*text, "--allocate", "uniform", "--rate", "0.3", "--limit", "1"]
    assert ask(target, *options, "--calibration-windows", str(3999 // 32)) == 0
    assert asked(capsys)["rate"] == pytest.approx(0.3, abs=0.02)
    assert ask(target, *options, "--calibration-windows", str(3999 // 32 + 1)) == 2


@pytest.mark.parametrize("batch_size", ["1", "5"])
def test_accuracies_are_those_worked_out_by_hand_in_every_form_of_answer(
    target: Path, capsys: pytest.CaptureFixture[str], batch_size: str
) -> None:
    expected = expected_by_task(target / "model")
    assert expected["arc-c"][0] != expected["arc-c"][1], "else nobody sees which of them is which"
    assert len({acc for acc, _ in expected.values()}) > 1
    assert ask(target, "--batch-size", batch_size) == 0
    check(asked(capsys), expected)


def test_batches_that_main_memory_cannot_hold_are_refused_before_they_are_run(
    target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_worker.evaluation.zero_shot.main_memory", lambda: 400_000)
    assert ask(target, "--batch-size", "1") == 0
    capsys.readouterr()
    assert ask(target, "--batch-size", "4000") == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert re.search(
        r"batches of \d+ texts of up to \d+ tokens take .* give a smaller --batch-size", err.splitlines()[-1]
    )


def test_a_limit_takes_the_first_items(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(target, "--limit", "7") == 0
    answer = asked(capsys)
    check(answer, expected_by_task(target / "model", limit=7), items=7)
    assert answer["limit"] == 7


def test_some_tasks_are_asked_by_whatever_name_people_know(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(target, "--tasks", "PIQA, ARC_challenge", "--tasks", "piqa", "--limit", "2") == 0
    assert [task["title"] for task in asked(capsys)["tasks"]] == ["PIQA", "ARC-c"]


@pytest.mark.parametrize("format_", ["hf", "padded"])
def test_pruned_in_memory_answers_as_its_exported_folder(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format_: str
) -> None:
    sizes = ["--calibration-windows", "4", "--seqlen", "32"]
    how = ["--allocate", "owl", "--rate", "0.4", "--calibration-data", str(target / "calibration.txt"), *sizes]
    out = ["--out", str(tmp_path / "out"), "--format", format_, "--windows", "3", "--dtype", "float32", "--json"]
    assert main(["export", "--model", str(target / "model"), *how, *out]) == 0
    exported = asked(capsys)
    assert ask(target, *how) == 0
    in_memory = asked(capsys)
    assert ask(target, model=tmp_path / "out") == 0
    loaded = asked(capsys)
    assert in_memory["tasks"] == loaded["tasks"]
    assert in_memory["parameters"] == exported["parameters"] and in_memory["rate"] == exported["rate"]
    assert (in_memory["method"], loaded["method"]) == ("owl", None)
    if format_ == "padded":  # which plain transformers loads
        expected = expected_by_task(tmp_path / "out")
        assert expected != expected_by_task(target / "model")
        check(loaded, expected)


def test_rates_of_a_file_prune_too(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rates.json").write_text(json.dumps({"rates": [0.0, 0.4, 0.4, 0.4], "spec": {"rate": 0.3}}))
    text = ["--calibration-data", str(target / "calibration.txt"), "--calibration-windows", "4", "--seqlen", "32"]
    assert ask(target, "--rates", str(tmp_path / "rates.json"), *text, "--tasks", "boolq") == 0
    answer = asked(capsys)
    assert answer["rates"] == [0.0, 0.4, 0.4, 0.4] and answer["method"] == "rates of rates.json"
    assert answer["rate"] == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "phi3"])
def test_models_with_other_heads_in_every_layer_answer(target: Path, family: str) -> None:
    model = pruned(tiny_model(family))
    told = LoadedModel(model.causal_lm, byte_tokenizer(), model.decoder, model.identity)
    questions = Questions(("piqa",), target / "tasks")
    (answer,) = answer_tasks(told, load_tasks(questions.names, questions.folder, None), questions)
    assert (answer.acc, answer.acc_norm) == pytest.approx(expected_accuracies(model.causal_lm, "piqa"))


def test_a_model_that_does_not_compute_has_no_accuracy(target: Path) -> None:
    model = tiny_model("llama")
    model.decoder.head.weight[7] = torch.nan
    told = LoadedModel(model.causal_lm, byte_tokenizer(), model.decoder, model.identity)
    questions = Questions(("piqa",), target / "tasks", limit=2)
    with pytest.raises(NotFiniteError, match="in PIQA is nan"):
        answer_tasks(told, load_tasks(questions.names, questions.folder, 2), questions)


def test_texts_longer_than_the_model_reads_are_told_of(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [{"passage": "x" * length, "question": "y", "label": 0} for length in (300, 20)]
    write_task(tmp_path / "tasks", "long", "boolq", items)
    assert ask(tmp_path, model=target / "model") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "texts_too_long" in line]
    assert len(told) == 1 and json.loads(told[0])["texts"] == 2  # one for each answer


def test_what_the_code_of_tasks_prints_is_not_in_the_answer(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path / "tasks", "loud", "boolq", [{"passage": "a", "question": "b", "label": 1}])
    (tmp_path / "tasks" / "loud.py").write_text(
        "def text(item):\n    print('hear, hear')\n    return item['passage']\n"
    )
    file = tmp_path / "tasks" / "loud.yaml"
    lines = [line for line in file.read_text().splitlines() if "doc_to_text" not in line]
    file.write_text("\n".join([*lines, "doc_to_text: !function loud.text"]))
    assert ask(tmp_path, model=target / "model") == 0
    assert asked(capsys)["tasks"][0]["title"] == "loud"


def test_people_get_a_table(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zero-shot", str(target / "model"), "--tasks-dir", str(target / "tasks"), "--limit", "4"]) == 0
    out = capsys.readouterr().out
    assert "WinoGrande" in out and "mean accuracy: " in out
    assert "the first 4 items of each task" in out


def test_the_mean_is_the_papers() -> None:
    """Its row of the dense LLaMA-7B, in the order of its columns."""
    row = {"HellaSwag": 76.19, "WinoGrande": 69.85, "BoolQ": 75.11, "OpenBookQA": 44.40, "PIQA": 78.62}
    row |= {"ARC-e": 75.25, "ARC-c": 44.71}
    assert [task.title for task in PAPER_TASKS] == list(row)
    assert round(sum(row.values()) / len(row), 2) == 66.30


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_every_task_is_known_by_all_its_names(task: Any) -> None:
    assert {paper_task(name) for name in (task.name, task.title, task.harness_name)} == {task}
    assert paper_task(task.name + "x") is None


def test_lm_eval_ships_the_seven_with_the_accuracy_that_counts() -> None:
    for source, task in zip(find_sources((), None), PAPER_TASKS, strict=True):
        metrics = {metric["metric"] for metric in source.config["metric_list"]}
        assert task.metric in metrics and source.config["output_type"] == "multiple_choice"
