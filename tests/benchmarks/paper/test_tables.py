"""benchmarks.paper with a scripted `selfpruner`: the tables made of its cells."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper import paper_figures
from benchmarks.paper.cells import CellStore
from benchmarks.paper.runner import Failure, load_outcomes
from benchmarks.paper.settings import read_settings
from benchmarks.paper.table_layouts import table_layouts
from benchmarks.paper.tables import fill_table
from tests.support.paper import ALL, LLAMA, ONE_TEXT, SMALL, Paper
from tests.support.scripted_runner import says_to, search, setting_of, speed, value_of


def test_the_tables_are_written_as_markdown(paper: Paper) -> None:
    paper.make(
        SMALL | {"models": ["tiny", LLAMA], "reconstruction": ["none", "least-squares"]},
        says_to("run", Failure("there is no LLM")),
        code=1,
    )
    assert paper.markdown == (Path(__file__).parent / "golden" / "paper_tables.md").read_text()


def test_wanda_sp_with_any_heads_stands_beside_it_in_table_1_alone(paper: Paper) -> None:
    methods = ["wanda-sp", "wanda-sp-any-heads"]
    settings = {"models": [LLAMA], "tables": [1, 2], "rates": [0.5], "methods": methods, "zero_shot": {}}
    runner = paper.make(settings)
    with_flag = [each for each in runner.asked if "--heads" in each]
    assert [each[0] for each in with_flag] == ["evaluate"]
    assert with_flag[0][with_flag[0].index("--heads") + 1] == "any"
    assert paper.table(1)["50%", "Wanda-sp (any heads)"] == [(13.0, 249.18)]
    assert paper.table(2)["50%", "Wanda-sp (any heads)"][0][0] is None


def test_table_1_has_a_row_for_each_rate_and_method(paper: Paper) -> None:
    paper.make({"models": [LLAMA], "rates": [0.2, 0.5]})
    rows = paper.table(1)
    assert rows["0%", "Dense"] == [(10.0, 5.12)]
    assert rows["20%", "LLM-Pruner"] == [(14.0, 10.48)]
    assert rows["20%", "OWL"] == [(12.0, None)]
    assert rows["50%", "Wanda-sp"] == [(13.0, 249.18)]
    assert rows["50%", "Self-Pruner"] == [(11.0, 53.63)]
    assert len(rows) == 1 + 2 * 4


@pytest.mark.parametrize(
    ("texts", "figure", "said"),
    [
        ({"report": "wikitext2"}, 53.63, False),
        ({"report": None}, 53.63, False),
        ({"report": __file__}, 53.63, True),
        ({"report": "c4"}, None, False),
        ({"report": None, "fitness": "self"}, None, False),
    ],
)
def test_the_papers_perplexities_stand_beside_their_own_text(
    paper: Paper, texts: dict[str, Any], figure: float | None, said: bool
) -> None:
    settings = {"models": [LLAMA], "rates": [0.5], "texts": ONE_TEXT | texts}
    paper.make(settings)
    assert paper.table(1)["50%", "Self-Pruner"] == [(11.0, figure)]
    assert ("The paper's perplexities are of WikiText-2." in paper.markdown) == said


def test_the_papers_accuracies_stand_beside_its_own_tasks(tmp_path: Path, paper: Paper) -> None:
    settings = {"models": [LLAMA], "tables": [2], "rates": [0.3], "zero_shot": {"tasks_dir": str(tmp_path)}}
    paper.make(settings)
    assert paper.table(2)["30%", "Self-Pruner"] == [(50.0, None)]


def test_table_7_says_what_measured_it(paper: Paper) -> None:
    paper.make({"models": [LLAMA], "tables": [7], "rates": [0.5]})
    how = "transformers on cpu, weights bfloat16"
    assert f"Measured by {how}." in paper.markdown
    written = json.loads((paper.out / "tables.json").read_text())["tables"]
    assert written[0]["measured_by"] == [how]


def test_accuracies_are_in_percent_and_told_by_task(paper: Paper) -> None:
    settings = {"models": [LLAMA], "tables": [2], "rates": [0.3], "zero_shot": {"limit": 5}}
    runner = paper.make(settings)
    assert paper.table(2)["30%", "Self-Pruner"] == [(50.0, 60.79)]
    assert "| LLaMA-2-7B | 30% | OWL | 50.00 | 50.00 |" in paper.markdown
    (pruned,) = (a for a in runner.asked if a[0] == "zero-shot" and "--rates" in a)
    assert pruned[1] == LLAMA and (value_of(pruned, "--rates") or "").endswith("best.json")
    assert value_of(pruned, "--limit") == "5"


def test_ablations_are_the_search_without_one_part(paper: Paper) -> None:
    def say(arguments: Sequence[str]) -> dict[str, Any]:
        assert arguments[0] == "run"
        changed = (setting_of(arguments, "search.initializer"), setting_of(arguments, "search.mutations"))
        without_crossover = setting_of(arguments, "search.crossovers") == "0"
        return search({('"random"', None): 21.0, (None, "0"): 22.0}.get(changed, 23.0 if without_crossover else 20.0))

    paper.make({"models": [LLAMA], "tables": [3]}, say)
    assert paper.table(3) == {
        ("LLaMA-2-7B", "w/o initialization"): [(21.0, 17.43)],
        ("LLaMA-2-7B", "w/o mutation"): [(22.0, 17.65)],
        ("LLaMA-2-7B", "w/o crossover"): [(23.0, 17.59)],
        ("LLaMA-2-7B", "Self-Pruner"): [(20.0, 16.25)],
    }


def test_each_llm_of_table_4_has_a_search_of_its_own_settings(paper: Paper) -> None:
    endpoints = [{"base_url": "http://127.0.0.1:1/v1", "model": "other"}]
    llms = [{"name": "gpt-4o"}, {"name": "other", "set": {"llm.endpoints": endpoints}}]
    settings = {"models": [LLAMA], "tables": [4], "llms": llms}

    def say(arguments: Sequence[str]) -> dict[str, Any] | None:
        if arguments[0] != "run":
            return None
        return search(20.0 if setting_of(arguments, "llm.endpoints") is None else 30.0)

    paper.make(settings, say)
    assert paper.table(4) == {
        ("LLaMA-2-7B", "Dense", "0%"): [(10.0, 5.12)],
        ("LLaMA-2-7B", "gpt-4o", "30%"): [(20.0, 16.25)],
        ("LLaMA-2-7B", "other", "30%"): [(30.0, None)],
    }


def test_table_5_compares_with_owl(paper: Paper) -> None:
    paper.make({"models": [LLAMA], "tables": [5], "zero_shot": {}})
    rows = paper.table(5)
    assert rows["LLaMA-2-7B", "OWL", "30%"] == [(12.0, 21.40), (50.0, 59.08)]
    assert rows["LLaMA-2-7B", "Self-Pruner", "50%"] == [(11.0, 53.63), (50.0, 51.35)]


def test_table_6_measures_the_exported_folder_after_lora(paper: Paper) -> None:
    def say(arguments: Sequence[str]) -> dict[str, Any] | None:
        if arguments[0] != "evaluate":
            return None
        assert "--model" not in arguments and Path(arguments[1]).name.startswith("finetune-")
        return {"perplexity": 9.5, "parameters": {"total_before": 7}}

    runner = paper.make({"models": [LLAMA], "tables": [6], "compared_rates": [0.5]}, say)
    assert runner.commands() == ["run", "export", "finetune", "evaluate"]
    run, export, finetune, evaluate = runner.asked
    assert setting_of(run, "search.name") == value_of(export, "--search")
    assert setting_of(run, "run.folder") == value_of(export, "--folder")
    assert value_of(export, "--out") == finetune[1] and value_of(finetune, "--out") == evaluate[1]
    assert paper.table(6)["LLaMA-2-7B", "w. LoRA", "50%"] == [(9.5, 25.32)]


def test_table_7_shows_the_first_engine_that_measured(paper: Paper) -> None:
    def say(arguments: Sequence[str]) -> dict[str, Any] | None:
        return speed(80.0, "llama.cpp", "vllm") if arguments[0] == "speed" else None

    runner = paper.make({"models": [LLAMA], "tables": [7], "rates": [0.3]}, say)
    rows = paper.table(7)
    assert [ours and round(ours, 2) for ours, _ in rows["LLaMA-2-7B", "0%"]] == [6.74, 12.55, 50.0, 1.0]
    assert [ours and round(ours, 2) for ours, _ in rows["LLaMA-2-7B", "30%"]] == [4.77, 8.88, 80.0, 1.6]
    assert [paper for _, paper in rows["LLaMA-2-7B", "30%"]] == [4.77, 8.88, 123.66, 1.48]
    assert value_of(runner.asked[-1], "--baseline") == LLAMA


def test_table_7_has_the_dense_model_from_whatever_rate_was_measured(paper: Paper) -> None:
    def say(arguments: Sequence[str]) -> Failure | None:
        return Failure("no memory") if arguments[0] == "export" and "-0.2-" in " ".join(arguments) else None

    settings = {"models": [LLAMA], "tables": [7], "rates": [0.2, 0.3]}
    paper.make(settings, say, code=1)
    rows = paper.table(7)
    assert rows["LLaMA-2-7B", "0%"][2][0] == 50.0 and rows["LLaMA-2-7B", "20%"][2][0] is None
    (written,) = json.loads((paper.out / "tables.json").read_text())["tables"]
    assert written["rows"][0]["entries"][0]["cell"].startswith("speed-llama-2-7b-hf-self-pruner-0.3-")


def test_where_no_engine_measured_the_table_says_why(paper: Paper) -> None:
    nothing = {"engines": [], "skipped": {"vllm": "not installed"}}
    paper.make({"models": [LLAMA], "tables": [7], "rates": [0.3]}, says_to("speed", nothing), code=1)
    assert "no engine measured its speed (vllm: not installed)" in paper.markdown


def test_tables_share_their_cells(paper: Paper) -> None:
    runner = paper.make(ALL)
    assert len({tuple(arguments) for arguments in runner.asked}) == len(runner.asked)
    # One for each rate, and three ablations; Tables 4 to 7 add none.
    assert runner.commands().count("run") == 4 + 3
    # Dense, three methods at four rates, and two folders after LoRA.
    assert runner.commands().count("evaluate") == 1 + 12 + 2
    assert (runner.commands().count("export"), runner.commands().count("speed")) == (4, 4)


def test_plots_have_our_curve_and_the_papers_from_dense_on(tmp_path: Path, paper: Paper) -> None:
    settings = {"models": [LLAMA], "rates": [0.2, 0.3], "methods": ["dense", "wanda-sp", "owl"]}
    paper.make(settings)
    plots = pytest.importorskip("benchmarks.paper.plots")
    assert (paper.out / "perplexity-LLaMA-2-7B.png").stat().st_size > 10_000
    read = read_settings(tmp_path / "tables.yaml")
    (wanted,) = table_layouts(read)
    curves = plots.curves_of(fill_table(wanted, load_outcomes(wanted.cells, CellStore(paper.out))), 0)
    assert curves == {
        "Wanda-sp": ([(0, 10.0), (20, 13.0), (30, 13.0)], [(0, 5.12), (20, 12.01), (30, 24.53)]),
        "OWL": ([(0, 10.0), (20, 12.0), (30, 12.0)], []),
    }


def test_the_papers_figures_stand_beside_the_same_model_alone(paper: Paper) -> None:
    models = [{"name": "meta-llama/llama-2-7B-HF"}, {"name": "/models/a", "hub_name": LLAMA}, {"name": "x/llama-2-7b"}]
    paper.make({"models": models, "rates": [0.3], "methods": ["wanda-sp"]})
    assert paper.table(1) == {("30%", "Wanda-sp"): [(13.0, 24.53), (13.0, 24.53), (13.0, None)]}
    paper.make({"models": [LLAMA.replace("7", "13")], "tables": [5]})
    assert all(paper is None for row in paper.table(5).values() for _, paper in row)


def test_the_papers_figures_are_of_models_without_reconstruction(paper: Paper) -> None:
    settings = {"models": [LLAMA], "rates": [0.3], "reconstruction": ["none", "least-squares"]}
    runner = paper.make(settings)
    assert paper.table(1)["30%", "Wanda-sp"] == [(13.0, 24.53), (13.0, None)]
    fitted = [arguments for arguments in runner.asked if value_of(arguments, "--reconstruction") == "least-squares"]
    assert len(fitted) == 3


@pytest.mark.parametrize("method", ["self-pruner", "self-pruner-best"])
def test_searches_are_those_of_their_settings_files(paper: Paper, method: str) -> None:
    settings = {"models": [LLAMA], "rates": [0.3], "methods": [method], "texts": {"seqlen": 96}}
    (run,) = paper.make(settings).asked
    assert Path(run[1]).name == {"self-pruner": "paper.yaml", "self-pruner-best": "best.yaml"}[method]
    assert setting_of(run, "target.model") == f'"{LLAMA}"' and setting_of(run, "target.rate") == "0.3"
    assert setting_of(run, "data.seqlen") == "96" and setting_of(run, "data.fitness_windows") == "null"
    assert setting_of(run, "search.reconstruction") == '"none"'


def test_the_papers_numbers_are_copied_right() -> None:
    grids = {"PERPLEXITY": paper_figures.PERPLEXITY, "ACCURACY": paper_figures.ACCURACY}
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
        assert paper_figures.figure_in(paper_figures.PERPLEXITY, model, method, rate) == perplexity
        assert paper_figures.figure_in(paper_figures.ACCURACY, model, method, rate) == accuracy
    for grid in grids.values():
        assert sorted(grid) == [0, 0.2, 0.3, 0.4, 0.5]
        assert all(len(row) == len(paper_figures.MODELS) for rows in grid.values() for row in rows.values())
    assert (
        paper_figures.paper_model("lmsys/vicuna-13b-v1.5") == "Vicuna-13B" and paper_figures.paper_model("gpt2") is None
    )


def test_the_papers_speed_ups_are_ratios_but_for_one() -> None:
    for model, rows in paper_figures.SPEED.items():
        wrong = [rate for rate, (_, _, speed, up) in rows.items() if abs(speed / rows[0.0][2] - up) > 0.006]
        assert wrong == ([0.2] if model == "LLaMA-2-7B" else [])
        assert all(parameters * 2e9 / 2**30 == pytest.approx(gib, rel=0.02) for parameters, gib, _, _ in rows.values())
