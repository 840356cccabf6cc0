"""What users of `selfpruner zero-shot` give wrong: one sentence and exit code 2, before any model is loaded."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Cli
from tests.support.tiny_tasks import items_of, write_task

NO_MODEL = "/nowhere/at/all"
"""A user who gets as far as the model says so."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_worker.evaluation.zero_shot_tasks.hub_reachable", lambda: False)
    # Named here so that they are put back.
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


Refused = Callable[..., str]


@pytest.fixture
def refused(cli: Cli) -> Refused:
    """The sentence for these flags."""
    return partial(cli.error, "zero-shot", NO_MODEL)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    write_task(tmp_path / "tasks", "boolq", "boolq", items_of("boolq"))
    return tmp_path / "tasks"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "piqa,squad"], "there is no task 'squad'; the tasks are hellaswag, winogrande, boolq, openbookqa"),
        (["--tasks", " , "], "--tasks names no task"),
        (["--limit", "0"], "--limit"),
        (["--batch-size", "0"], "--batch-size"),
        (["--rate", "0.3"], "either --rates FILE or --allocate"),
        (["--allocate", "owl"], "--allocate needs --rate"),
        (
            ["--calibration-data", "self", "--seqlen", "64"],
            "--seqlen has no effect here: the model is evaluated unchanged",
        ),
        (["--importance", "taylor"], "--importance has no effect here"),
        (["--seed", "3"], "--seed has no effect here"),
        (["--rates", "nowhere.json"], "the rates file 'nowhere.json' cannot be read"),
        (["--tasks-dir", "/nowhere/tasks"], "there is no folder '/nowhere/tasks' with tasks"),
    ],
)
def test_flags_that_cannot_be_are_named(refused: Refused, options: list[str], said: str) -> None:
    assert said in refused(*options)


@pytest.mark.usefixtures("offline")
def test_without_a_hub_the_sentence_says_what_to_give_instead(refused: Refused) -> None:
    told = refused("--tasks", "winogrande")
    assert "'winogrande' are not on this machine and the hub cannot be reached; give --tasks-dir" in told


@pytest.mark.usefixtures("offline")
def test_local_tasks_need_no_hub_and_come_before_the_model(tasks: Path, refused: Refused) -> None:
    assert f"there is no folder '{NO_MODEL}'" in refused("--tasks-dir", str(tasks))
    told = refused("--tasks-dir", str(tasks), "--tasks", "boolq,piqa")
    assert "the data of the task 'piqa' are not on this machine" in told
    assert "the hub cannot be reached; the folder of --tasks-dir has no such task, but boolq" in told


def test_a_task_that_neither_the_folder_nor_the_paper_has_is_named(tasks: Path, refused: Refused) -> None:
    write_task(tasks, "mine", "boolq", items_of("boolq"))
    told = refused("--tasks-dir", str(tasks), "--tasks", "mine,other")
    assert "there is no task 'other'; the tasks are boolq, mine, hellaswag" in told


@pytest.mark.parametrize(("package", "extra"), [("lm_eval", "eval"), ("torch", "worker")])
def test_a_package_that_is_missing_comes_with_the_line_that_installs_it(
    tasks: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    find: Any = importlib.util.find_spec
    monkeypatch.setattr("daemon.settings.packages.find_spec", lambda name: None if name == package else find(name))
    told = refused("--tasks-dir", str(tasks))
    assert f"this needs the package {package}: pip install '.[{extra}]'" in told


def test_a_folder_without_tasks_is_told_of(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "template.yaml").write_text("output_type: multiple_choice\n")
    assert "there is no task in" in refused("--tasks-dir", str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task: boolq": "task: [boolq"}, "cannot be read as YAML"),
        ({"task: boolq": "task: boolq\ninclude: nowhere.yaml"}, "does it include a file that is not there?"),
        ({"boolq.jsonl": "other.jsonl"}, "boolq.yaml cannot be loaded ("),
        ({"{{passage}}": "{{passage"}, "boolq.yaml cannot be loaded ("),
        ({"doc_to_target: label": "doc_to_target: nothing"}, "gives 'nothing' as the answer of item 0,"),
        ({'["no", "yes"]': '["no"]'}, "boolq.yaml cannot be loaded ("),
        ({"multiple_choice": "generate_until"}, "the task 'boolq' has no accuracy by likelihood"),
        ({"metric: acc": "metric: f1"}, "and `acc` among its metrics"),
    ],
)
def test_a_task_file_that_is_wrong_is_named(tasks: Path, refused: Refused, changes: dict[str, str], said: str) -> None:
    """And not left out, as lm-eval does."""
    write_task(tasks, "piqa", "piqa", items_of("piqa"))
    file = tasks / "boolq.yaml"
    for old, new in changes.items():
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    told = refused("--tasks-dir", str(tasks))
    assert said in told and "boolq" in told


def test_two_files_with_one_task_are_named(tasks: Path, refused: Refused) -> None:
    (tasks / "copy.yaml").write_text((tasks / "boolq.yaml").read_text())
    assert "is in two files" in refused("--tasks-dir", str(tasks))


@pytest.mark.parametrize("label", [2, -1])
def test_an_item_without_a_right_answer_is_named(tasks: Path, refused: Refused, label: int) -> None:
    """It would count as wrong, whatever the model says; past the limit nobody looks."""
    items = items_of("boolq")
    items[3]["label"] = label
    write_task(tasks, "boolq", "boolq", items)
    assert f"gives {label} as the answer of item 3, which has 2 choices" in refused("--tasks-dir", str(tasks))
    assert f"there is no folder '{NO_MODEL}'" in refused("--tasks-dir", str(tasks), "--limit", "3")
