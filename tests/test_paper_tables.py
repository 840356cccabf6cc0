"""benchmarks/paper_tables.py with a scripted `selfpruner`: which cells it runs, and the tables that come of them."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.paper import numbers
from benchmarks.paper.cells import Cell, CellStore, Failed, Measured, with_needs
from benchmarks.paper.commands import command
from benchmarks.paper.costs import LOADING, STARTING, UTILISATION, CostModel
from benchmarks.paper.making import CellMaker
from benchmarks.paper.running import Failure, SubprocessRunner, load_outcomes
from benchmarks.paper.settings import PaperSettings, read_settings
from benchmarks.paper.tables import filled
from benchmarks.paper.wanted import wanted_tables
from benchmarks.paper_tables import main
from tests.scripted_runner import ScriptedRunner, search, setting_of, speed, value_of

LLAMA = "meta-llama/Llama-2-7b-hf"
SMALL = {"models": ["tiny"], "rates": [0.3], "methods": ["dense", "wanda-sp", "self-pruner"]}
ALL = {"models": [LLAMA], "tables": [1, 2, 3, 4, 5, 6, 7], "zero_shot": {}}
ONE_TEXT = {"calibration_windows": 4, "fitness_windows": 2, "report_windows": 2, "seqlen": 64}


def write(folder: Path, settings: dict[str, Any]) -> Path:
    file = folder / "tables.yaml"
    file.write_text(yaml.safe_dump({"texts": ONE_TEXT, **settings}))
    return file


def make(folder: Path, settings: dict[str, Any], runner: ScriptedRunner, *flags: str) -> int:
    return main([str(write(folder, settings)), "--out", str(folder / "out"), *flags], runner)


def markdown(folder: Path) -> str:
    return (folder / "out" / "tables.md").read_text()


def table(folder: Path, number: int) -> dict[tuple[str, ...], list[tuple[float | None, float | None]]]:
    """The rows of a written table: labels -> (ours, the paper's) of each column."""
    tables = json.loads((folder / "out" / "tables.json").read_text())["tables"]
    (found,) = (each for each in tables if each["table"] == number)
    return {tuple(row["labels"]): [(e["ours"], e["paper"]) for e in row["entries"]] for row in found["rows"]}


def test_the_tables_are_written_as_markdown(tmp_path: Path) -> None:
    runner = ScriptedRunner(lambda arguments: Failure("there is no LLM") if arguments[0] == "run" else None)
    assert make(tmp_path, SMALL | {"models": ["tiny", LLAMA], "reconstruction": ["none", "least-squares"]}, runner) == 1
    assert markdown(tmp_path) == (Path(__file__).parent / "golden" / "paper_tables.md").read_text()


def test_table_1_has_a_row_for_each_rate_and_method(tmp_path: Path) -> None:
    assert make(tmp_path, {"models": [LLAMA], "rates": [0.2, 0.5]}, ScriptedRunner()) == 0
    rows = table(tmp_path, 1)
    assert rows["0%", "Dense"] == [(10.0, 5.12)]
    assert rows["20%", "LLM-Pruner"] == [(14.0, 10.48)]
    assert rows["20%", "OWL"] == [(12.0, None)]
    assert rows["50%", "Wanda-sp"] == [(13.0, 249.18)]
    assert rows["50%", "Self-Pruner"] == [(11.0, 53.63)]
    assert len(rows) == 1 + 2 * 4


def test_accuracies_are_in_percent_and_told_by_task(tmp_path: Path) -> None:
    settings = {"models": [LLAMA], "tables": [2], "rates": [0.3], "zero_shot": {"limit": 5}}
    runner = ScriptedRunner()
    assert make(tmp_path, settings, runner) == 0
    assert table(tmp_path, 2)["30%", "Self-Pruner"] == [(50.0, 60.79)]
    assert "| LLaMA-2-7B | 30% | OWL | 50.00 | 50.00 |" in markdown(tmp_path)
    (pruned,) = (a for a in runner.asked if a[0] == "zero-shot" and "--rates" in a)
    assert pruned[1] == LLAMA and (value_of(pruned, "--rates") or "").endswith("best.json")
    assert value_of(pruned, "--limit") == "5"


def test_ablations_are_the_search_without_one_part(tmp_path: Path) -> None:
    def say(arguments: Sequence[str]) -> dict[str, Any]:
        assert arguments[0] == "run"
        changed = (setting_of(arguments, "search.initializer"), setting_of(arguments, "search.mutations"))
        without_crossover = setting_of(arguments, "search.crossovers") == "0"
        return search({('"random"', None): 21.0, (None, "0"): 22.0}.get(changed, 23.0 if without_crossover else 20.0))

    assert make(tmp_path, {"models": [LLAMA], "tables": [3]}, ScriptedRunner(say)) == 0
    assert table(tmp_path, 3) == {
        ("LLaMA-2-7B", "w/o initialization"): [(21.0, 17.43)],
        ("LLaMA-2-7B", "w/o mutation"): [(22.0, 17.65)],
        ("LLaMA-2-7B", "w/o crossover"): [(23.0, 17.59)],
        ("LLaMA-2-7B", "Self-Pruner"): [(20.0, 16.25)],
    }


def test_each_llm_of_table_4_has_a_search_of_its_own_settings(tmp_path: Path) -> None:
    endpoints = [{"base_url": "http://127.0.0.1:1/v1", "model": "other"}]
    llms = [{"name": "gpt-4o"}, {"name": "other", "set": {"llm.endpoints": endpoints}}]
    settings = {"models": [LLAMA], "tables": [4], "llms": llms}

    def say(arguments: Sequence[str]) -> dict[str, Any] | None:
        if arguments[0] != "run":
            return None
        return search(20.0 if setting_of(arguments, "llm.endpoints") is None else 30.0)

    assert make(tmp_path, settings, ScriptedRunner(say)) == 0
    assert table(tmp_path, 4) == {
        ("LLaMA-2-7B", "Dense", "0%"): [(10.0, 5.12)],
        ("LLaMA-2-7B", "gpt-4o", "30%"): [(20.0, 16.25)],
        ("LLaMA-2-7B", "other", "30%"): [(30.0, None)],
    }


def test_table_5_compares_with_owl(tmp_path: Path) -> None:
    assert make(tmp_path, {"models": [LLAMA], "tables": [5], "zero_shot": {}}, ScriptedRunner()) == 0
    rows = table(tmp_path, 5)
    assert rows["LLaMA-2-7B", "OWL", "30%"] == [(12.0, 21.40), (50.0, 59.08)]
    assert rows["LLaMA-2-7B", "Self-Pruner", "50%"] == [(11.0, 53.63), (50.0, 51.35)]


def test_table_6_measures_the_exported_folder_after_lora(tmp_path: Path) -> None:
    def say(arguments: Sequence[str]) -> dict[str, Any] | None:
        if arguments[0] != "evaluate":
            return None
        assert "--model" not in arguments and Path(arguments[1]).name.startswith("finetune-")
        return {"perplexity": 9.5, "parameters": {"total_before": 7}}

    runner = ScriptedRunner(say)
    assert make(tmp_path, {"models": [LLAMA], "tables": [6], "compared_rates": [0.5]}, runner) == 0
    assert runner.commands() == ["run", "export", "finetune", "evaluate"]
    run, export, finetune, evaluate = runner.asked
    assert setting_of(run, "search.name") == value_of(export, "--search")
    assert setting_of(run, "run.folder") == value_of(export, "--folder")
    assert value_of(export, "--out") == finetune[1] and value_of(finetune, "--out") == evaluate[1]
    assert table(tmp_path, 6)["LLaMA-2-7B", "w. LoRA", "50%"] == [(9.5, 25.32)]


def test_table_7_shows_the_first_engine_that_measured(tmp_path: Path) -> None:
    def say(arguments: Sequence[str]) -> dict[str, Any] | None:
        return speed(80.0, "llama.cpp", "vllm") if arguments[0] == "speed" else None

    runner = ScriptedRunner(say)
    assert make(tmp_path, {"models": [LLAMA], "tables": [7], "rates": [0.3]}, runner) == 0
    rows = table(tmp_path, 7)
    assert [ours and round(ours, 2) for ours, _ in rows["LLaMA-2-7B", "0%"]] == [6.74, 12.55, 50.0, 1.0]
    assert [ours and round(ours, 2) for ours, _ in rows["LLaMA-2-7B", "30%"]] == [4.77, 8.88, 80.0, 1.6]
    assert [paper for _, paper in rows["LLaMA-2-7B", "30%"]] == [4.77, 8.88, 123.66, 1.48]
    assert value_of(runner.asked[-1], "--baseline") == LLAMA


def test_where_no_engine_measured_the_table_says_why(tmp_path: Path) -> None:
    nothing = {"engines": [], "skipped": {"vllm": "not installed"}}
    runner = ScriptedRunner(lambda arguments: nothing if arguments[0] == "speed" else None)
    assert make(tmp_path, {"models": [LLAMA], "tables": [7], "rates": [0.3]}, runner) == 1
    assert "no engine measured its speed (vllm: not installed)" in markdown(tmp_path)


def test_tables_share_their_cells(tmp_path: Path) -> None:
    runner = ScriptedRunner()
    assert make(tmp_path, ALL, runner) == 0
    assert len({tuple(arguments) for arguments in runner.asked}) == len(runner.asked)
    # One for each rate, and three ablations; Tables 4 to 7 add none.
    assert runner.commands().count("run") == 4 + 3
    # Dense, three methods at four rates, and two folders after LoRA.
    assert runner.commands().count("evaluate") == 1 + 12 + 2
    assert (runner.commands().count("export"), runner.commands().count("speed")) == (4, 4)


def test_what_has_been_run_is_not_run_again(tmp_path: Path) -> None:
    assert make(tmp_path, SMALL, ScriptedRunner()) == 0
    first = markdown(tmp_path)
    again = ScriptedRunner()
    assert make(tmp_path, SMALL, again) == 0
    assert not again.asked and markdown(tmp_path) == first
    further = ScriptedRunner()
    assert make(tmp_path, SMALL | {"rates": [0.3, 0.4]}, further) == 0
    assert len(further.asked) == 2


def test_other_texts_are_other_cells(tmp_path: Path) -> None:
    assert make(tmp_path, SMALL, ScriptedRunner()) == 0
    other = ScriptedRunner()
    assert make(tmp_path, SMALL, other, "--set", "texts.seqlen=128") == 0
    assert len(other.asked) == 3


def test_a_failed_cell_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    failing = ScriptedRunner(lambda arguments: Failure("out of luck") if "owl" in arguments else None)
    settings = {"models": ["tiny"], "rates": [0.3]}
    assert make(tmp_path, settings, failing) == 1
    assert len(failing.asked) == 5
    assert "| 30% | OWL | failed (1) |" in markdown(tmp_path) and "1. out of luck" in markdown(tmp_path)
    assert "| 30% | Self-Pruner | 11.00 |" in markdown(tmp_path)
    mended = ScriptedRunner()
    assert make(tmp_path, settings, mended) == 0
    assert [value_of(arguments, "--allocate") for arguments in mended.asked] == ["owl"]
    assert "| 30% | OWL | 12.00 |" in markdown(tmp_path)


def test_what_needs_a_failed_cell_is_not_run(tmp_path: Path) -> None:
    runner = ScriptedRunner(lambda arguments: Failure("no memory") if arguments[0] == "export" else None)
    assert make(tmp_path, {"models": ["tiny"], "tables": [7], "rates": [0.3]}, runner) == 1
    assert runner.commands() == ["run", "export"]
    assert "failed before it: no memory" in markdown(tmp_path)


@pytest.mark.parametrize("answer", [search(3.0, finished=False), {"best": None, "finished": True}, {}])
def test_an_answer_without_its_figure_is_a_failure(tmp_path: Path, answer: dict[str, Any]) -> None:
    runner = ScriptedRunner(lambda arguments: answer if arguments[0] == "run" else None)
    assert make(tmp_path, SMALL | {"methods": ["self-pruner"]}, runner) == 1
    assert "failed (1)" in markdown(tmp_path)


def test_a_half_written_cell_is_run_again(tmp_path: Path) -> None:
    assert make(tmp_path, SMALL, ScriptedRunner()) == 0
    (cell,) = (tmp_path / "out" / "cells").glob("run-*.json")
    cell.write_text(cell.read_text()[:40])
    again = ScriptedRunner()
    assert make(tmp_path, SMALL, again) == 0
    assert again.commands() == ["run"]


def test_an_interrupted_call_writes_its_tables_and_the_same_command_goes_on(tmp_path: Path) -> None:
    def say(arguments: Sequence[str]) -> None:
        if arguments[0] == "run":
            os.kill(os.getpid(), signal.SIGINT)

    assert make(tmp_path, SMALL, ScriptedRunner(say)) == 128 + signal.SIGINT
    assert "| 30% | Wanda-sp | 13.00 |" in markdown(tmp_path) and "| 30% | Self-Pruner | – |" in markdown(tmp_path)
    again = ScriptedRunner()
    assert make(tmp_path, SMALL, again) == 0
    assert again.commands() == ["run"]


def test_progress_says_which_cell_and_how_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = SMALL | {"models": [{"name": "tiny", "billions": 1}], "reconstruction": ["none", "least-squares"]}
    assert make(tmp_path, settings, ScriptedRunner()) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("paper_tables: 1 of 5: evaluate tiny, dense; about 12 s, with all that is left ")
    assert said[4].startswith("paper_tables: 5 of 5: run tiny, self-pruner at 30%, least-squares; about ")


def test_plots_have_our_curve_and_the_papers_from_dense_on(tmp_path: Path) -> None:
    settings = {"models": [LLAMA], "rates": [0.2, 0.3], "methods": ["dense", "wanda-sp", "owl"]}
    assert make(tmp_path, settings, ScriptedRunner()) == 0
    plots = pytest.importorskip("benchmarks.paper.plots")
    assert (tmp_path / "out" / "perplexity-LLaMA-2-7B.png").stat().st_size > 10_000
    read = read_settings(tmp_path / "tables.yaml")
    (wanted,) = wanted_tables(read)
    curves = plots.curves_of(filled(wanted, load_outcomes(wanted.cells, CellStore(tmp_path / "out"))), 0)
    assert curves == {
        "Wanda-sp": ([(0, 10.0), (20, 13.0), (30, 13.0)], [(0, 5.12), (20, 12.01), (30, 24.53)]),
        "OWL": ([(0, 10.0), (20, 12.0), (30, 12.0)], []),
    }


def test_render_runs_nothing(tmp_path: Path) -> None:
    runner = ScriptedRunner()
    assert make(tmp_path, SMALL, runner, "--render") == 0
    assert not runner.asked and "| 0% | Dense | – |" in markdown(tmp_path)


def test_the_papers_figures_stand_beside_the_same_model_alone(tmp_path: Path) -> None:
    models = [{"name": "meta-llama/llama-2-7B-HF"}, {"name": "/models/a", "hub_name": LLAMA}, {"name": "x/llama-2-7b"}]
    assert make(tmp_path, {"models": models, "rates": [0.3], "methods": ["wanda-sp"]}, ScriptedRunner()) == 0
    assert table(tmp_path, 1) == {("30%", "Wanda-sp"): [(13.0, 24.53), (13.0, 24.53), (13.0, None)]}
    assert make(tmp_path, {"models": [LLAMA.replace("7", "13")], "tables": [5]}, ScriptedRunner()) == 0
    assert all(paper is None for row in table(tmp_path, 5).values() for _, paper in row)


def test_the_papers_figures_are_of_models_without_reconstruction(tmp_path: Path) -> None:
    settings = {"models": [LLAMA], "rates": [0.3], "reconstruction": ["none", "least-squares"]}
    runner = ScriptedRunner()
    assert make(tmp_path, settings, runner) == 0
    assert table(tmp_path, 1)["30%", "Wanda-sp"] == [(13.0, 24.53), (13.0, None)]
    fitted = [arguments for arguments in runner.asked if value_of(arguments, "--reconstruction") == "least-squares"]
    assert len(fitted) == 3


@pytest.mark.parametrize("method", ["self-pruner", "self-pruner-best"])
def test_searches_are_those_of_their_settings_files(tmp_path: Path, method: str) -> None:
    runner = ScriptedRunner()
    assert (
        make(tmp_path, {"models": [LLAMA], "rates": [0.3], "methods": [method], "texts": {"seqlen": 96}}, runner) == 0
    )
    (run,) = runner.asked
    assert Path(run[1]).name == {"self-pruner": "paper.yaml", "self-pruner-best": "best.yaml"}[method]
    assert setting_of(run, "target.model") == f'"{LLAMA}"' and setting_of(run, "target.rate") == "0.3"
    assert setting_of(run, "data.seqlen") == "96" and setting_of(run, "data.fitness_windows") == "null"
    assert setting_of(run, "search.reconstruction") == '"none"'


def test_a_cells_id_may_name_a_search_and_depends_on_what_is_run() -> None:
    settings = PaperSettings.model_validate({"models": ["An/Extremely-Long.Name_of_a_model-that-goes-on"]})
    maker = CellMaker(settings)
    cells = [maker.search(settings.models[0], "self-pruner-best", rate, "none") for rate in (0.3, 0.12345)]
    assert len({cell.id for cell in cells}) == 2 and all(len(cell.id) <= 64 for cell in cells)
    for cell in cells:
        assert cell.id == Cell.model_validate_json(cell.model_dump_json()).id
    assert cells[0].model_copy(update={"tokens": 1.0, "note": "other"}).id == cells[0].id


def test_an_estimate_says_hours_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = ScriptedRunner()
    assert make(tmp_path, ALL, runner, "--estimate", "--tflops", "100") == 0
    said = capsys.readouterr().out
    assert not runner.asked and not (tmp_path / "out").exists()
    assert "speed meta-llama/Llama-2-7b-hf, self-pruner at 50%" in said and "assumed" in said
    assert make(tmp_path, SMALL, runner, "--estimate") == 0
    assert "3 of models of unknown size: give `billions` of these" in capsys.readouterr().out


def test_before_any_cell_the_estimate_is_the_peaks() -> None:
    settings = PaperSettings.model_validate({"models": [{"name": "m", "billions": 1}], "texts": ONE_TEXT})
    cell = CellMaker(settings).perplexity(settings.models[0], "dense", 0.0, "none")
    assert cell.tokens == 2 * 64 + 2 * 64
    cost = CostModel(settings.models, [cell], {}, tflops=50)
    work = 1e9 * 256 * 2 / (UTILISATION * 50e12)
    assert cost.seconds(cell) == pytest.approx(STARTING + 2e9 / LOADING + work)
    assert cost.basis(cell) == "assumed"


def test_finished_cells_calibrate_the_estimate_of_other_models() -> None:
    models = [{"name": "small", "billions": 1}, {"name": "large", "billions": 10}]
    settings = PaperSettings.model_validate({"models": models, "texts": ONE_TEXT, "rates": [0.5]})
    maker = CellMaker(settings)
    done, same, larger, searched = (
        maker.perplexity(settings.models[0], "dense", 0.0, "none"),
        maker.perplexity(settings.models[0], "wanda-sp", 0.5, "none"),
        maker.perplexity(settings.models[1], "dense", 0.0, "none"),
        maker.search(settings.models[0], "self-pruner", 0.5, "none"),
    )
    start = STARTING + 2e9 / LOADING
    outcome = Measured(answer={"perplexity": 1.0, "parameters": {"total_before": 1}}, seconds=start + 30)
    cost = CostModel(settings.models, [done, same, larger, searched], {done.id: outcome})
    # Dense and pruned on 256 tokens each, the second time in half the time, and 256 calibration tokens.
    assert cost.seconds(same) == pytest.approx(start + 30 * (256 + 128 + 256) / 256)
    assert cost.seconds(larger) == pytest.approx(STARTING + 20 + 300)
    assert (cost.basis(same), cost.basis(searched)) == ("1 of its kind", "1 of other kinds")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"models": []}, "models cannot be '[]'"),
        ({"models": ["m"], "rate": [0.3]}, "there is no setting 'rate'; did you mean 'rates'?"),
        ({"models": ["m"], "texts": {"seqlength": 64}}, "did you mean 'texts.seqlen'?"),
        ({"models": ["m"], "rates": [1.5]}, "a pruning rate is above 0 and at most 0.9"),
        ({"models": ["m"], "methods": ["luck"]}, "methods.0 cannot be 'luck'"),
        ({"models": ["m"], "tables": [8]}, "tables.0 cannot be '8'"),
        ({"models": ["m"], "tables": [2]}, "give the section zero_shot"),
        ({"models": ["m"], "texts": {"fitness": "self"}}, "give fitness_windows"),
        ({"models": ["m"], "tables": [6], "texts": {**ONE_TEXT, "report": "self"}}, "give no text `self`"),
        ({"models": ["m"], "searches": {"self-pruner": {"config": "configs/none.yaml"}}}, "there is no settings file"),
        (
            {"models": ["m"], "searches": {"self-pruner": {"config": "configs/paper.yaml", "set": {"search.pop": 3}}}},
            "there is no setting 'search.pop'",
        ),
        (
            {"models": ["m"], "tables": [4], "llms": [{"name": "a", "set": {"llm.endpoints": [{"api_key": "s3"}]}}]},
            "give keys of LLM endpoints as api_key_file",
        ),
    ],
)
def test_bad_settings_are_told_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], sentence: str
) -> None:
    runner = ScriptedRunner()
    assert make(tmp_path, settings, runner) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and "s3" not in said
    assert not runner.asked and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["models: [", "just words", "- a", "\0"])
def test_what_is_no_yaml_mapping_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    file = tmp_path / "tables.yaml"
    file.write_text(text)
    assert main([str(file)], ScriptedRunner()) == 2
    assert main([str(tmp_path / "none.yaml")], ScriptedRunner()) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("override", ["texts", "=3", "models.name=3", "rates=["])
def test_a_bad_override_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str) -> None:
    assert make(tmp_path, SMALL, ScriptedRunner(), "--set", override) == 2
    assert "--set" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["smollm2", "llama-2-7b", "llama-2-70b"])
def test_the_files_beside_the_harness_can_be_run(name: str) -> None:
    settings = read_settings(Path(__file__).parent.parent / "benchmarks" / "paper" / f"{name}.yaml")
    tables = wanted_tables(settings)
    assert [found.number for found in tables] == list(settings.tables)
    for cell in with_needs(each for found in tables for each in found.cells):
        assert command(cell, Path("out"))[0] == cell.what


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def say(arguments: Sequence[str]) -> None:
        assert make(tmp_path, SMALL, ScriptedRunner()) == 2

    assert make(tmp_path, SMALL, ScriptedRunner(say)) == 0
    assert "are being made by another process" in capsys.readouterr().err


def test_the_outcomes_are_kept_with_what_was_run(tmp_path: Path) -> None:
    assert make(tmp_path, SMALL, ScriptedRunner()) == 0
    settings = read_settings(tmp_path / "tables.yaml")
    cells = [cell for table in wanted_tables(settings) for cell in table.cells]
    store = CellStore(tmp_path / "out")
    outcomes = load_outcomes(cells, store)
    assert {outcome.kind for outcome in outcomes.values()} == {"measured"}
    store.keep(cells[0], Failed(sentence="later"))
    assert store.load(cells[0]) == Failed(sentence="later")
    kept = json.loads((tmp_path / "out" / "cells" / f"{cells[0].id}.json").read_text())
    assert kept["cell"]["model"] == "tiny"


def test_a_command_that_fails_is_its_one_sentence(tmp_path: Path) -> None:
    answer = SubprocessRunner().run(["evaluate", "--model", "no/such/folder", "--json"], tmp_path / "log")
    assert answer == Failure("give --data, the text to measure on")


def test_a_command_that_is_killed_says_by_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert SubprocessRunner().run(["evaluate"], tmp_path / "log") == Failure(
        "ended by SIGKILL: memory may have run out"
    )


def test_the_papers_numbers_are_copied_right() -> None:
    grids = {"PERPLEXITY": numbers.PERPLEXITY, "ACCURACY": numbers.ACCURACY}
    for model, method, rate, perplexity, accuracy in (
        ("LLaMA-1-7B", "Dense", 0.0, 5.68, 66.30),
        ("LLaMA-2-70B", "Dense", 0.0, 3.12, 73.81),
        ("Vicuna-13B", "Dense", 0.0, 5.94, 69.73),
        ("LLaMA-1-13B", "LLM-Pruner", 0.2, 7.72, 64.34),
        ("LLaMA-3-8B", "Wanda-sp", 0.3, 37.46, 40.91),
        ("LLaMA-2-13B", "Wanda-sp", 0.4, 69.86, 38.81),
        ("LLaMA-3.1-8B", "Self-Pruner", 0.4, 41.46, 53.88),
        ("LLaMA-2-7B", "LLM-Pruner", 0.5, 253.13, 40.45),
        ("Vicuna-13B", "Self-Pruner", 0.5, 46.47, 54.64),
        ("LLaMA-2-70B", "LLM-Pruner", 0.3, None, None),
    ):
        assert numbers.of_grid(numbers.PERPLEXITY, model, method, rate) == perplexity
        assert numbers.of_grid(numbers.ACCURACY, model, method, rate) == accuracy
    for grid in grids.values():
        assert sorted(grid) == [0, 0.2, 0.3, 0.4, 0.5]
        assert all(len(row) == len(numbers.MODELS) for rows in grid.values() for row in rows.values())
    assert numbers.paper_model("lmsys/vicuna-13b-v1.5") == "Vicuna-13B" and numbers.paper_model("gpt2") is None


def test_the_papers_speed_ups_are_ratios_but_for_one() -> None:
    for model, rows in numbers.SPEED.items():
        wrong = [rate for rate, (_, _, speed, up) in rows.items() if abs(speed / rows[0.0][2] - up) > 0.006]
        assert wrong == ([0.2] if model == "LLaMA-2-7B" else [])
        assert all(parameters * 2e9 / 2**30 == pytest.approx(gib, rel=0.02) for parameters, gib, _, _ in rows.values())
