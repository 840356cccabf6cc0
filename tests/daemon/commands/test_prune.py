"""`selfpruner prune`: one command from a model to a smaller one that is loaded again and measured."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daemon.cli import main
from daemon.commands.prune import FinetuneFlags, SearchFlags, _best, finetune_recipe, prune_settings
from daemon.settings.settings import Settings
from gpu_worker.finetune.prune import check_disk
from gpu_worker.finetune.prune_records import Goal, Tuning, was_written_unrecorded
from gpu_worker.models.memory import Machine
from protocol.errors import SelfPrunerError
from protocol.results.formats import Destination
from protocol.runtime.signals import Interrupted
from tests.support.root import ROOT
from tests.support.samples import SHAPE
from tests.support.tiny_models import change_config, save_tiny_folder
from tests.support.tiny_specs import write_text


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    save_tiny_folder(folder / "model", hidden_size=48, layers=4)
    write_text(folder / "text.txt", words=1600)
    write_text(folder / "report.txt", words=400)
    rows = [{"instruction": f"say {i}", "input": "", "output": "abcd efgh " * 3} for i in range(12)]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    save_tiny_folder(folder / "far-sighted", hidden_size=48, layers=4)
    change_config(folder / "far-sighted", max_position_embeddings=1024)
    (folder / "latin1.txt").write_bytes("déjà vu ".encode("latin-1") * 900)
    (folder / "four-words.txt").write_text("abcd efgh abcd efgh")
    return folder


def settings_of(target: Path, *overrides: str) -> Settings:
    """The settings of a search for the folder `small`."""
    return prune_settings("m", 0.3, Path("small"), SearchFlags(8, config=settings_file(target), set_=list(overrides)))


def goal_of(settings: Settings, destination: Destination, **tuned: Any) -> Goal:
    """A model that is fine-tuned on alpaca.json as these flags say."""
    given: dict[str, Any] = {"data": "a/alpaca.json"} | tuned
    flags = FinetuneFlags(**{f"finetune_{name}": value for name, value in given.items()})
    assert flags.finetune_data is not None
    recipe = finetune_recipe(flags.finetune_data, flags, settings)
    tuning = Tuning(flags.finetune_data, recipe, flags.finetune_minutes)
    return Goal(settings.search.name, settings.folder, settings.spec(), destination, tuning)


def settings_file(target: Path) -> Path:
    """A search that needs no LLM and takes seconds."""
    settings = {
        "search": {"proposer": "evolution", "population": 4, "mutations": 4, "crossovers": 0, "rounds": 3},
        "target": {"dtype": "float32"},
        "data": {"calibration_windows": 4, "fitness_windows": 3, "report_windows": 2, "seqlen": 32},
        "http": {"enabled": False},
        "worker": {"lease_seconds": 2},
    }
    file = target / "search.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    return file


def arguments(target: Path, *options: str) -> list[str]:
    data = ["--data", str(target / "text.txt"), "--config", str(settings_file(target))]
    return ["prune", str(target / "model"), "--rate", "0.3", "--out", "small", *data, *options, "--json"]


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "daemon", *options]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def finished(folder: Path, *options: str) -> dict[str, Any]:
    """The answer of a command that has to end well."""
    done = subprocess.run(command(*options), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_model_becomes_a_folder_that_measures_what_it_did_in_memory(tmp_path: Path, target: Path) -> None:
    answer = finished(tmp_path, *arguments(target, "--budget", "8", "--format", "hf", "--format", "gguf"))
    assert answer["evaluations"] == 8
    exported = answer["exported"]
    assert answer["reloaded"] == pytest.approx(exported["perplexity"], rel=1e-3)
    assert exported["rate"] == pytest.approx(0.3, abs=0.01)
    files = {file.name for file in (tmp_path / "small").iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "selfpruner.json"} <= files
    assert any(name.endswith(".gguf") for name in files)
    assert answer["runs_in_llama_cpp"] is True
    report = json.loads((tmp_path / "small" / "prune.json").read_text())
    assert report.pop("exported") == answer["exported"] | {"folder": "small", "model": "model"}
    assert report.items() <= answer.items() and report["reloaded"] == answer["reloaded"]
    card = (tmp_path / "small" / "README.md").read_text()
    assert "| uniform, " in card and f"{answer['uniform_perplexity']:.4g}" in card
    assert f"8 evaluations in {answer['search_seconds']:,.0f} s" in card


def test_fine_tuning_begins_from_what_was_found_and_writes_the_formats(tmp_path: Path, target: Path) -> None:
    tuning = ["--finetune", "--finetune-data", str(target / "alpaca.json"), "--format", "padded", "--format", "gguf"]
    tuning += ["--report-data", str(target / "report.txt")]
    answer = finished(tmp_path, *arguments(target, "--budget", "4", *tuning))
    tuned = answer["finetuned"]
    assert tuned["formats"] == ["padded", "gguf"]
    perplexity = tuned["finetuning"]["perplexity"]
    assert perplexity["before"] == pytest.approx(answer["exported"]["perplexity"], rel=1e-3)
    assert answer["reloaded"] == pytest.approx(perplexity["after"], rel=1e-3)
    assert "runs" in Path(answer["exported"]["folder"]).parts
    report = tuned["finetuning"]["report_perplexity"]
    assert report["before"] == pytest.approx(answer["exported"]["report_perplexity"], rel=1e-3)
    facts = json.loads((tmp_path / "small" / "selfpruner.json").read_text())
    assert facts["searched"]["uniform_report_perplexity"] == answer["uniform_report_perplexity"]
    assert json.loads((tmp_path / "small" / "prune.json").read_text())["finetuned"]["folder"] == "small"
    assert facts["pruned_report"]["perplexity"] == report["after"]
    assert facts["dense_report"]["perplexity"] == pytest.approx(answer["dense_report_perplexity"], rel=1e-3)


def test_texts_may_share_a_file_name(tmp_path: Path, target: Path) -> None:
    options = ["--finetune", "--finetune-data", str(target / "alpaca.json")]
    for name, text in (("calibration", "report.txt"), ("fitness", "text.txt"), ("report", "text.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "wiki.txt").write_bytes((target / text).read_bytes())
        options += ["--set", f"data.{name}={name}/wiki.txt"]
    small = ["prune", str(target / "model"), "--rate", "0.3", "--out", "small", "--budget", "4", "--json"]
    answer = finished(tmp_path, *small, "--config", str(settings_file(target)), *options)
    tuned = answer["finetuned"]["finetuning"]
    assert tuned["perplexity"]["before"] == pytest.approx(answer["exported"]["perplexity"], rel=1e-3)
    assert tuned["report_perplexity"]["before"] == pytest.approx(answer["exported"]["report_perplexity"], rel=1e-3)
    assert answer["reloaded"] == pytest.approx(tuned["perplexity"]["after"], rel=1e-3)
    again = finished(tmp_path, "evaluate", "small", "--data", "fitness/wiki.txt", "--json")
    assert again["card_perplexity"] == tuned["perplexity"]["after"]


def test_killed_in_its_last_checks_the_same_command_goes_on_there(tmp_path: Path, target: Path) -> None:
    options = arguments(target, "--budget", "4")
    first = finished(tmp_path, *options)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "small").iterdir()}
    again = finished(tmp_path, *options)  # as if it had been killed when the folder was written
    assert {**again, "search_seconds": 0} == {**first, "search_seconds": 0}
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "small").iterdir()} == files
    other = subprocess.run(
        command(*options, "--format", "padded"), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert other.returncode == 2 and "--force to replace it" in other.stderr, "another format is another folder"
    finished(tmp_path, *arguments(target, "--budget", "4", "--set", "search.seed=1", "--force"))
    taken = subprocess.run(command(*options), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert taken.returncode == 2 and "--force to replace it" in taken.stderr, "another search's model stands there now"


def test_a_larger_budget_replaces_what_a_smaller_one_wrote(tmp_path: Path, target: Path) -> None:
    def rates(budget: int, evaluations: int) -> list[float]:
        answer = finished(tmp_path, *arguments(target, "--budget", str(budget)))
        assert answer["evaluations"] == evaluations
        (best,) = tmp_path.glob("runs/*/best.json")
        written: list[float] = json.loads((tmp_path / "small" / "selfpruner.json").read_text())["rates"]
        assert written == json.loads(best.read_text())["rates"]
        return written

    first = rates(4, 4)
    longer = rates(20, 20)  # more than the config's rounds have
    assert first != longer
    before = when_written(tmp_path)
    assert rates(8, 20) == longer and when_written(tmp_path) == before


def test_rounds_that_were_asked_for_are_not_added_to(target: Path) -> None:
    def rounds(budget: int, *overrides: str) -> int:
        file = settings_file(target)
        search = SearchFlags(budget=budget, config=file, set_=list(overrides))
        return prune_settings("m", 0.3, Path("out"), search).search.rounds

    assert [rounds(4), rounds(16), rounds(17)] == [3, 3, 4]
    assert rounds(17, "search.rounds=2") == 2
    assert rounds(17, "search.mutations=0") == 3


def killed(*_: object, **__: object) -> None:
    raise Interrupted(signal.SIGTERM)


def test_killed_before_it_could_tell_what_it_wrote_the_same_command_goes_on(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = arguments(target, "--budget", "4")
    with monkeypatch.context() as patched:
        patched.setattr("gpu_worker.finetune.prune.record", killed)
        assert main(options) == 128 + signal.SIGTERM
    assert (tmp_path / "small").exists() and not list(tmp_path.glob("runs/*/written.json"))
    assert main([*options, "--format", "padded"]) == 2, "this is another folder"
    assert main([*options, "--finetune", "--finetune-data", str(target / "alpaca.json")]) == 2, "and this"
    assert main(options) == 0


def test_only_a_call_with_the_same_flags_goes_on_with_what_was_not_recorded(target: Path, tmp_path: Path) -> None:
    settings = settings_of(target, f"run.folder={tmp_path}")
    destination = Destination(tmp_path / "small", ("hf", "gguf"), "q8_0")
    goal = goal_of(settings, destination)
    assert goal.tuning is not None
    tuning = {"recipe": goal.tuning.recipe.model_dump(mode="json"), "data": "alpaca.json"}
    method = f"search {settings.search.name}"
    facts = {"method": method, "rates": [0.3], "formats": ["hf", "gguf"], "finetunings": [tuning]}
    goal.out.mkdir()
    settings.folder.mkdir(parents=True)
    (goal.out / "selfpruner.json").write_text(json.dumps(facts))
    (settings.folder / "best.json").write_text('{"rates": [0.3]}')
    assert not was_written_unrecorded(goal), "nobody began to write it"
    (settings.folder / "begun.json").write_text(json.dumps(goal.flags))
    assert was_written_unrecorded(goal)
    for change in ({"data": "b/alpaca.json"}, {"minutes": 1.0}, {"micro_batch": 1}, {"batch": 2}):
        assert not was_written_unrecorded(goal_of(settings, destination, **change))
    assert not was_written_unrecorded(goal_of(settings, replace(destination, gguf_type="f16")))
    (goal.out / "selfpruner.json").write_text(json.dumps(facts | {"finetunings": [tuning | {"data": "b.json"}]}))
    assert not was_written_unrecorded(goal)


def test_a_disk_that_fills_beside_the_folder_is_one_sentence(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = arguments(target, "--budget", "4")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("gpu_worker.finetune.prune_records.write_atomically", full)
        assert main(options) == 1
    told = capfd.readouterr().err.splitlines()[-1]
    assert "cannot be written (No space left on device); fix that and run the same command again" in told
    assert main(options) == 0


def test_a_best_that_is_old_or_cannot_be_read_is_not_pruned_by(target: Path, tmp_path: Path) -> None:
    settings = settings_of(target, f"run.folder={tmp_path}")
    settings.folder.mkdir()
    rates = (0.25, 0.35)
    best = settings.folder / "best.json"
    with pytest.raises(SelfPrunerError, match=r"best\.json cannot be read \(.*No such file"):
        _best(settings, rates)
    best.write_text("[]")
    with pytest.raises(SelfPrunerError, match=r"best\.json cannot be read"):
        _best(settings, rates)
    best.write_text('{"rates": [0.3, 0.3]}')
    with pytest.raises(SelfPrunerError, match=r"best\.json does not hold the search's best"):
        _best(settings, rates)
    best.write_text('{"rates": [0.25, 0.35]}')
    assert _best(settings, rates) == {"rates": [0.25, 0.35]}


def test_a_longer_search_begins_its_training_anew(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tuning = ["--finetune", "--finetune-data", str(target / "alpaca.json")]
    with monkeypatch.context() as patched:
        patched.setattr("gpu_worker.finetune.finetune.write_output", killed)
        assert main(arguments(target, "--set", "search.rounds=0", *tuning)) == 128 + signal.SIGTERM
    assert (tmp_path / "small.checkpoint" / "checkpoint.pt").exists()
    assert main(arguments(target, "--set", "search.rounds=4", *tuning)) == 0


def test_force_replaces_what_was_checked_and_nothing_that_was_not(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tuning = ["--finetune", "--finetune-data", str(target / "alpaca.json"), "--force"]
    options = arguments(target, "--budget", "4", *tuning)
    with monkeypatch.context() as patched:
        patched.setattr("gpu_worker.finetune.prune._reload", killed)
        assert main(options) == 128 + signal.SIGTERM
    first = when_written(tmp_path)
    assert main(options) == 0 and when_written(tmp_path) == first, "what had been trained is thrown away"
    assert main(options) == 0 and when_written(tmp_path) != first, "what is finished is not replaced"


def when_written(folder: Path) -> int:
    return (folder / "small" / "model.safetensors").stat().st_mtime_ns


def test_the_disk_needs_room_for_both_models_where_they_share_it(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[int] = []

    def check(_folder: Path, needed: int, _what: str, freed: int = 0) -> None:
        asked.append(needed - freed)

    monkeypatch.setattr("gpu_worker.export.disk_space.check_disk", check)
    monkeypatch.setattr("gpu_worker.finetune.checkpoint.check_disk", check)
    settings = settings_of(target)
    goal = goal_of(settings, Destination(Path("small"), ("hf",)))
    check_disk(goal, SHAPE)
    pruned, both = asked
    pruned_folder = settings.folder / "pruned"
    pruned_folder.mkdir(parents=True)
    (pruned_folder / "selfpruner.json").touch()
    check_disk(goal, SHAPE)
    assert asked == [pruned, both, both - pruned]
    (pruned_folder / "selfpruner.json").unlink()
    monkeypatch.setattr("gpu_worker.export.disk_space.device_of", lambda folder: folder.name == "small")
    check_disk(goal, SHAPE)
    assert asked[3:] == [pruned, both - pruned]


def test_killed_in_its_search_the_same_command_goes_on(tmp_path: Path, target: Path) -> None:
    options = arguments(target, "--budget", "16")
    process = subprocess.Popen(
        command(*options),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while len(measured(tmp_path)) < 5:
            assert process.poll() is None and time.monotonic() < deadline, "the search ended, or never began"
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = measured(tmp_path)
    assert not (tmp_path / "small").exists()
    assert finished(tmp_path, *options)["evaluations"] == 16
    after = measured(tmp_path)
    assert after[: len(before)] == before and len(set(after)) == len(after), "nothing is measured twice"


def measured(folder: Path) -> list[str]:
    """Ids of whole lines of the search's evaluations."""
    lines = [line for file in folder.glob("runs/*/evaluations.jsonl") for line in file.read_text().splitlines()]
    return [json.loads(line)["id"] for line in lines if line.endswith("}")]


def test_the_name_of_the_search_follows_from_the_folder_and_from_what_decides_a_result(target: Path) -> None:
    def name(rate: float, out: str, *overrides: str) -> str:
        file = settings_file(target)
        return prune_settings("m", rate, Path(out), SearchFlags(8, config=file, set_=list(overrides))).search.name

    assert name(0.3, "a b/ c d") == name(0.3, "x/-c d")
    assert name(0.3, "small").startswith("prune-small-")
    assert name(0.3, "small") != name(0.4, "small")
    assert name(0.3, "small", "search.name=mine") == "mine"
    named = target / "named.yaml"
    named.write_text("search: {name: kept}")
    assert prune_settings("m", 0.3, Path("small"), SearchFlags(config=named)).search.name == "kept"


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
        (["--finetune", "--finetune-data", "TEXT"], "--finetune-data and data.fitness (--data) are the same file"),
        (
            ["--finetune", "--finetune-data", "TEXT", "--set", "data.fitness=self"],
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
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"TEXT": "text.txt"} | {name: name for name in ("report.txt", "latin1.txt", "four-words.txt")}
    options = [str(target / files[each]) if each in files else each for each in options]
    options = [each.replace("FAR", str(target / "far-sighted")) for each in options]
    assert main(arguments(target, *options)) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "options", "sentence"),
    [
        (10, [], "the export into hf needs about"),
        (10, ["--finetune", "--finetune-data", "alpaca.json"], "before it is fine-tuned, needs about"),
        (
            350_000,
            ["--finetune", "--finetune-data", "alpaca.json"],
            "with its checkpoints and the pruned model, needs about",
        ),
    ],
)
def test_a_disk_that_is_too_small_is_told_before_the_search(
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: int,
    options: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free})())
    options = [str(target / each) if each.endswith(".json") else each for each in options]
    assert main(arguments(target, *options)) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_memory_that_is_too_small_to_fine_tune_is_told_before_the_search(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    machine = Machine(gpus=(), main_memory=12 * 2**20)
    monkeypatch.setattr("gpu_worker.finetune.finetune.this_machine", lambda: machine)
    tuning = ["--finetune", "--finetune-data", str(target / "alpaca.json"), "--finetune-micro-batch"]
    assert main(arguments(target, *tuning, "64")) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "fine-tuning with --finetune-micro-batch 64: the model is too large for this machine" in told
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("daemon.commands.prune._searched", killed)
    assert main(arguments(target, *tuning, "1")) == 128 + signal.SIGTERM


def test_flags_of_fine_tuning_are_those_of_the_recipe(target: Path) -> None:
    settings = settings_of(target)
    usual = finetune_recipe("alpaca.json", FinetuneFlags(), settings)
    assert (usual.micro_batch, usual.batch, usual.learning_rate) == (4, 64, 3e-4)
    flags = FinetuneFlags(finetune_micro_batch=3, finetune_batch=6, finetune_learning_rate=2e-3)
    chosen = {"micro_batch": 3, "batch": 6, "learning_rate": 2e-3}
    assert finetune_recipe("alpaca.json", flags, settings) == usual.model_copy(update=chosen)


def test_an_output_that_is_taken_is_refused_before_the_search(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine.txt").write_text("mine")
    assert main(arguments(target)) == 2
    assert "is not an export of Self-Pruner" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
