"""`selfpruner prune`: one command from a model to a smaller one that is loaded again and measured."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from daemon.cli import main
from daemon.commands.prune import FinetuneFlags, SearchFlags, _best, finetune_recipe, prune_settings
from daemon.settings.settings import Settings
from gpu_worker.models.machine import Machine
from protocol.errors import SelfPrunerError
from protocol.runtime.signals import Interrupted
from tests.support.cli import Cli
from tests.support.root import ROOT
from tests.support.tiny_models import change_config, save_tiny_folder
from tests.support.tiny_specs import write_text


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    save_tiny_folder(folder / "model", hidden_size=48, layers=4)
    shutil.copytree(folder / "model", folder / "far-sighted")
    change_config(folder / "far-sighted", max_position_embeddings=1024)
    write_text(folder / "text.txt", words=1600)
    write_text(folder / "report.txt", words=400)
    rows = [{"instruction": f"say {i}", "input": "", "output": "abcd efgh " * 3} for i in range(12)]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    (folder / "latin1.txt").write_bytes("déjà vu ".encode("latin-1") * 900)
    (folder / "four-words.txt").write_text("abcd efgh abcd efgh")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, in which `small` is made."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], restored_logs: None) -> Cli:
    """With files for what the processes of a search write."""
    return Cli(capfd)


def settings_file(target: Path) -> Path:
    """A search that needs no LLM and takes seconds."""
    chosen = {
        "search": {"proposer": "evolution", "population": 4, "mutations": 4, "crossovers": 0, "rounds": 3},
        "target": {"dtype": "float32"},
        "data": {"calibration_windows": 4, "fitness_windows": 3, "report_windows": 2, "seqlen": 32},
        "http": {"enabled": False},
        "worker": {"lease_seconds": 2},
    }
    file = target / "search.yaml"
    file.write_text(json.dumps(chosen))  # JSON is YAML
    return file


def settings(target: Path, *overrides: str, out: str | Path = "small", rate: float = 0.3, budget: int = 8) -> Settings:
    search = SearchFlags(budget, config=settings_file(target), set_=list(overrides))
    return prune_settings("m", {"rate": rate}, Path(out), search)


def arguments(target: Path, *options: str) -> list[str]:
    data = ["--data", str(target / "text.txt"), "--config", str(settings_file(target))]
    return ["prune", str(target / "model"), "--rate", "0.3", "--out", "small", *data, *options]


def tuned(target: Path, *options: str) -> list[str]:
    return arguments(target, "--finetune", "--finetune-data", str(target / "alpaca.json"), *options)


def killed(*_: object, **__: object) -> None:
    raise Interrupted(signal.SIGTERM)


def killed_at(monkeypatch: pytest.MonkeyPatch, step: str, arguments: list[str]) -> None:
    """Run the command up to this step."""
    with monkeypatch.context() as patched:
        patched.setattr(step, killed)
        assert main(arguments) == 128 + signal.SIGTERM


def when_written(folder: Path) -> int:
    return (folder / "small" / "model.safetensors").stat().st_mtime_ns


def process(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """A command as a person starts it."""
    command = [sys.executable, "-m", "daemon", *arguments, "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, start_new_session=True)


def test_a_model_becomes_a_folder_that_measures_what_it_did_in_memory(tmp_path: Path, target: Path) -> None:
    with process(tmp_path, *arguments(target, "--budget", "8", "--format", "hf", "--format", "gguf")) as pruning:
        answer = json.loads(pruning.communicate(timeout=240)[0])
    assert pruning.returncode == 0
    assert answer["evaluations"] == 8
    exported = answer["exported"]
    assert answer["reloaded"] == pytest.approx(exported["perplexity"], rel=1e-3)
    assert exported["rate"] == pytest.approx(0.3, abs=0.01)
    files = {file.name for file in (tmp_path / "small").iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "selfpruner.json"} <= files
    assert any(name.endswith(".gguf") for name in files) and answer["runs_in_llama_cpp"] is True
    report = json.loads((tmp_path / "small" / "prune.json").read_text())
    assert report.pop("exported") == answer["exported"] | {"folder": "small", "model": "model"}
    assert report.items() <= answer.items() and report["reloaded"] == answer["reloaded"]
    card = (tmp_path / "small" / "README.md").read_text()
    assert "| uniform, " in card and f"{answer['uniform_perplexity']:.4g}" in card
    assert f"8 evaluations in {answer['search_seconds']:,.0f} s" in card
    for chart, title in (("search.svg", "Progress of prune-small-"), ("rates.svg", "Rates of prune-small-")):
        drawn = ElementTree.parse(tmp_path / "small" / chart).getroot()
        assert f"]({chart})" in card and str(drawn[0].text).startswith(title)


def test_fine_tuning_begins_from_what_was_found_and_writes_the_formats(here: Path, target: Path, cli: Cli) -> None:
    """The texts share a file name, and no figure is of another text than its own."""
    options = ["--budget", "4", "--format", "padded", "--format", "gguf"]
    for name, text in (("calibration", "report.txt"), ("fitness", "text.txt"), ("report", "text.txt")):
        (here / name).mkdir()
        (here / name / "wiki.txt").write_bytes((target / text).read_bytes())
        options += ["--set", f"data.{name}={name}/wiki.txt"]
    answer = cli.answer(*tuned(target, *options))
    tuning = answer["finetuned"]["finetuning"]
    assert answer["finetuned"]["formats"] == ["padded", "gguf"]
    perplexity, report = tuning["perplexity"], tuning["report_perplexity"]
    assert perplexity["before"] == pytest.approx(answer["exported"]["perplexity"], rel=1e-3)
    assert answer["reloaded"] == pytest.approx(perplexity["after"], rel=1e-3)
    assert "runs" in Path(answer["exported"]["folder"]).parts
    assert report["before"] == pytest.approx(answer["exported"]["report_perplexity"], rel=1e-3)
    facts = json.loads((here / "small" / "selfpruner.json").read_text())
    assert facts["searched"]["uniform_report_perplexity"] == answer["uniform_report_perplexity"]
    assert {"search.svg", "rates.svg"} <= {file.name for file in (here / "small").iterdir()}
    assert json.loads((here / "small" / "prune.json").read_text())["finetuned"]["folder"] == "small"
    assert facts["pruned_report"]["perplexity"] == report["after"]
    assert facts["dense_report"]["perplexity"] == pytest.approx(answer["dense_report_perplexity"], rel=1e-3)
    again = cli.answer("evaluate", "small", "--data", "fitness/wiki.txt")
    assert again["card_perplexity"] == perplexity["after"]


def test_a_size_in_place_of_a_rate_is_kept(here: Path, target: Path, cli: Cli) -> None:
    size = (target / "model" / "model.safetensors").stat().st_size
    options = arguments(target, "--budget", "4")
    at = options.index("--rate")
    options[at : at + 2] = ["--memory", f"{int(0.8 * size)}B"]
    answer = cli.answer(*options)
    weights = 4 * answer["exported"]["parameters"]["total_after"]
    assert 0.7 * size < weights <= 0.8 * size
    assert (here / "small" / "model.safetensors").stat().st_size < size
    assert "give one of --rate, --memory and --parameters" in cli.error(*options, "--rate", "0.3")


def test_killed_in_its_last_checks_the_same_command_goes_on_there(here: Path, target: Path, cli: Cli) -> None:
    options = arguments(target, "--budget", "4")
    first = cli.answer(*options)
    files = {file: file.stat().st_mtime_ns for file in (here / "small").iterdir()}
    again = cli.answer(*options)  # as if it had been killed when the folder was written
    assert {**again, "search_seconds": 0} == {**first, "search_seconds": 0}
    assert {file: file.stat().st_mtime_ns for file in (here / "small").iterdir()} == files
    code, _, err = cli.run(*options, "--format", "padded")
    assert code == 2 and "--force to replace it" in err, "another format is another folder"
    cli.answer(*options, "--set", "search.seed=1", "--force")
    code, _, err = cli.run(*options)
    assert code == 2 and "--force to replace it" in err, "another search's model stands there now"


def test_a_larger_budget_replaces_what_a_smaller_one_wrote(here: Path, target: Path, cli: Cli) -> None:
    def rates(budget: int, evaluations: int) -> list[float]:
        answer = cli.answer(*arguments(target, "--budget", str(budget)))
        assert answer["evaluations"] == evaluations
        (best,) = here.glob("runs/*/best.json")
        written: list[float] = json.loads((here / "small" / "selfpruner.json").read_text())["rates"]
        assert written == json.loads(best.read_text())["rates"]
        return written

    first, longer = rates(4, 4), rates(20, 20)  # more than the config's rounds have
    assert first != longer
    before = when_written(here)
    assert rates(8, 20) == longer and when_written(here) == before


def test_rounds_that_were_asked_for_are_not_added_to(target: Path) -> None:
    assert [settings(target, budget=budget).search.rounds for budget in (4, 16, 17)] == [3, 3, 4]
    assert settings(target, "search.rounds=2", budget=17).search.rounds == 2
    assert settings(target, "search.mutations=0", budget=17).search.rounds == 3


def test_killed_before_it_could_tell_what_it_wrote_the_same_command_goes_on(
    here: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = arguments(target, "--budget", "4")
    killed_at(monkeypatch, "gpu_worker.finetune.prune.record", options)
    assert (here / "small").exists() and not list(here.glob("runs/*/written.json"))
    assert main([*options, "--format", "padded"]) == 2, "this is another folder"
    assert main(tuned(target, "--budget", "4")) == 2, "and this"
    assert main(options) == 0


def test_a_disk_that_fills_beside_the_folder_is_one_sentence(
    here: Path, target: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = arguments(target, "--budget", "4")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("gpu_worker.finetune.prune_records.write_atomically", full)
        code, _, err = cli.run(*options)
    assert code == 1
    assert "cannot be written (No space left on device); fix that and run the same command again" in err
    assert main(options) == 0


def test_a_best_that_is_old_or_cannot_be_read_is_not_pruned_by(target: Path, tmp_path: Path) -> None:
    chosen = settings(target, f"run.folder={tmp_path}")
    chosen.folder.mkdir()
    rates, best = (0.25, 0.35), chosen.folder / "best.json"
    with pytest.raises(SelfPrunerError, match=r"best\.json cannot be read \(.*No such file"):
        _best(chosen, rates)
    for content, says in (("[]", "cannot be read"), ('{"rates": [0.3, 0.3]}', "does not hold the search's best")):
        best.write_text(content)
        with pytest.raises(SelfPrunerError, match=rf"best\.json {says}"):
            _best(chosen, rates)
    best.write_text('{"rates": [0.25, 0.35]}')
    assert _best(chosen, rates) == {"rates": [0.25, 0.35]}


def test_a_longer_search_begins_its_training_anew(here: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at(monkeypatch, "gpu_worker.finetune.finetune.write_output", tuned(target, "--set", "search.rounds=0"))
    assert (here / "small.checkpoint" / "checkpoint.pt").exists()
    assert main(tuned(target, "--set", "search.rounds=4")) == 0


def test_force_replaces_what_was_checked_and_nothing_that_was_not(
    here: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = tuned(target, "--budget", "4", "--force")
    killed_at(monkeypatch, "gpu_worker.finetune.prune._reload", options)
    first = when_written(here)
    assert main(options) == 0 and when_written(here) == first, "what had been trained is thrown away"
    assert main(options) == 0 and when_written(here) != first, "what is finished is not replaced"


def test_killed_in_its_search_the_same_command_goes_on(here: Path, target: Path, cli: Cli) -> None:
    with process(here, *arguments(target, "--budget", "16")) as pruning:
        deadline = time.monotonic() + 120
        while len(measured(here)) < 5 and pruning.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(pruning.pid, signal.SIGKILL)
    before = measured(here)
    assert len(before) >= 5 and not (here / "small").exists()
    assert cli.answer(*arguments(target, "--budget", "16"))["evaluations"] == 16
    after = measured(here)
    assert after[: len(before)] == before and len(set(after)) == len(after), "nothing is measured twice"


def measured(folder: Path) -> list[str]:
    """Ids of whole lines of the search's evaluations."""
    lines = [line for file in folder.glob("runs/*/evaluations.jsonl") for line in file.read_text().splitlines()]
    return [json.loads(line)["id"] for line in lines if line.endswith("}")]


def test_the_name_of_the_search_follows_from_the_folder_and_from_what_decides_a_result(target: Path) -> None:
    def name(rate: float, out: str, *overrides: str) -> str:
        return settings(target, *overrides, rate=rate, out=out).search.name

    assert name(0.3, "a b/ c d") == name(0.3, "x/-c d")
    assert name(0.3, "small").startswith("prune-small-") and name(0.3, "small") != name(0.4, "small")
    assert name(0.3, "small", "search.name=mine") == "mine"
    named = target / "named.yaml"
    named.write_text("search: {name: kept}")
    assert prune_settings("m", {"rate": 0.3}, Path("small"), SearchFlags(config=named)).search.name == "kept"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--format", "gguf", "--finetune"], "add --format hf"),
        (["--finetune-data", "x.json"], "--finetune-data needs --finetune"),
        (["--finetune-learning-rate", "1e-3"], "--finetune-learning-rate needs --finetune"),
        (["--finetune", "--finetune-data", "report.txt", "--finetune-learning-rate", "0"], "learning_rate cannot be"),
        (["--finetune", "--finetune-minutes", "0"], "--finetune-minutes 0.0 is not a positive time"),
        (["--finetune", "--finetune-minutes", "nan"], "is not a positive time"),
        (["--finetune", "--finetune-data", "self"], "there is no file 'self'"),
        (["--finetune"], "cannot be reached"),
        (["--finetune", "--finetune-data", "text.txt"], "--finetune-data and data.fitness (--data) are the same file"),
        (
            ["--finetune", "--finetune-data", "text.txt", "--set", "data.fitness=self"],
            "--finetune-data and data.report (--report-data) are the same file",
        ),
        (["--finetune", "--set", "target.dtype=float16"], "gradients overflow in float16"),
        (["--finetune", "--finetune-data", "nowhere.json"], "nowhere.json"),
        (["--finetune", "--finetune-data", "latin1.txt", "--set", "target.model=FAR"], "is not UTF-8 text"),
        (["--finetune", "--finetune-data", "four-words.txt", "--set", "target.model=FAR"], "is too short"),
        (["--finetune", "--finetune-data", "report.txt"], "windows of 512 tokens are longer than the 256 positions"),
        (["--budget", "2"], "--budget (2) is smaller than the first population"),
        (["--set", "search.nonsense=1"], "nonsense"),
        (["--format", "hf", "--format", "padded"], "would write the same files"),
        (["--gguf-type", "f16"], "--gguf-type f16 has no effect here"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_anything_is_begun(
    here: Path, target: Path, cli: Cli, options: list[str], sentence: str
) -> None:
    files = {name: str(target / name) for name in ("text.txt", "report.txt", "latin1.txt", "four-words.txt")}
    options = [files.get(each, each).replace("FAR", str(target / "far-sighted")) for each in options]
    assert sentence in cli.error(*arguments(target, *options))
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "make", "sentence"),
    [
        (10, arguments, "the export into hf needs about"),
        (10, tuned, "before it is fine-tuned, needs about"),
        (350_000, tuned, "with its checkpoints and the pruned model, needs about"),
    ],
)
def test_a_disk_that_is_too_small_is_told_before_the_search(
    here: Path, target: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, free: int, make: Any, sentence: str
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free})())
    assert sentence in cli.error(*make(target))
    assert list(here.iterdir()) == []


def test_memory_that_is_too_small_to_fine_tune_is_told_before_the_search(
    here: Path, target: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(gpus=(), main_memory=12 * 2**20)
    monkeypatch.setattr("gpu_worker.finetune.finetune.this_machine", lambda: machine)
    told = cli.error(*tuned(target, "--finetune-micro-batch", "64"))
    assert "fine-tuning with --finetune-micro-batch 64: the model is too large for this machine" in told
    assert list(here.iterdir()) == []
    killed_at(monkeypatch, "daemon.commands.prune._searched", tuned(target, "--finetune-micro-batch", "1"))


def test_flags_of_fine_tuning_are_those_of_the_recipe(target: Path) -> None:
    usual = finetune_recipe("alpaca.json", FinetuneFlags(), settings(target))
    assert (usual.micro_batch, usual.batch, usual.learning_rate) == (4, 64, 3e-4)
    flags = FinetuneFlags(finetune_micro_batch=3, finetune_batch=6, finetune_learning_rate=2e-3)
    chosen = {"micro_batch": 3, "batch": 6, "learning_rate": 2e-3}
    assert finetune_recipe("alpaca.json", flags, settings(target)) == usual.model_copy(update=chosen)


def test_an_output_that_is_taken_is_refused_before_the_search(here: Path, target: Path, cli: Cli) -> None:
    (here / "small").mkdir()
    (here / "small" / "mine.txt").write_text("mine")
    assert "is not an export of Self-Pruner" in cli.error(*arguments(target))
    assert not (here / "runs").exists()
