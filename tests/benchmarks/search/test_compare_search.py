"""benchmarks/search/compare_search.py: its tables of finished searches."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.search import compare_search
from benchmarks.search.searches import RESULT, BestSoFar, SearchResult, keep_result, result_before
from daemon.local.folder_lock import lock_folder
from protocol.errors import SearchExistsError

pytest.importorskip("matplotlib")


def _result(method: str, seed: int, fitness: list[float]) -> dict[str, Any]:
    return SearchResult(
        method=method,
        granularity="block",
        rate=0.3,
        seed=seed,
        budget=20,
        tokens=5100,
        candidates=20,
        best_so_far=BestSoFar(evaluations=[1, 7][: len(fitness)], tokens=[255, 1785][: len(fitness)], fitness=fitness),
        report=60.0,
        uniform=0.5,
        uniform_report=80.0,
        plain_report=120.0,
        any_heads_report=110.0,
        dense_report=30.0,
        rates=[0.3] * 6,
        by_llm=10,
        asked=10,
        readable=10,
        accepted=9,
        prompt_tokens=1000,
        completion_tokens=450,
        seconds=100.0,
        busy=0.8,
    ).model_dump()


def _figures(folder: Path, *results: dict[str, Any], **arguments: Any) -> str:
    folder.mkdir()
    every = {"model": "smollm2", "minimise": "kl", "fitness": f"{folder}/text", "report": "self"}
    every |= {"reconstruction": "least-squares", **arguments}
    file = folder / "comparison.json"
    file.write_text(json.dumps({"arguments": every, "results": results}))
    return str(file)


pytestmark = pytest.mark.usefixtures("restored_logs")


def test_the_figures_of_several_calls_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evolution = _figures(tmp_path / "a", _result("evolution", 0, [0.4, 0.3]))
    llm = _figures(tmp_path / "b", _result("llm", 0, [0.3, 0.2]), first_seed=0)
    out = tmp_path / "joined"
    assert compare_search.main(["--methods", "--beside", llm, evolution, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    rows = {name: cells for name, *cells in reversed(lines)}  # those of the first table
    assert rows["evolution"][:4] == ["0.750", "0.3000", "60.00", "7"]
    assert rows["llm"] == ["0.750", "0.2000", "60.00", "1", "1.00", "0.90", "45", "100", "0.80", "5,100"]
    assert rows["uniform, fitted"][:3] == ["1.000", "0.5000", "80.00"]
    assert rows["uniform, rectangular"][:3] == ["1.500", "", "120.00"]
    assert rows["uniform, any heads (masked)"][:3] == ["1.375", "", "110.00"]
    assert rows["dense"][:3] == ["0.375", "", "30.00"]
    assert "one seed" in shown
    assert [r["method"] for r in json.loads((out / "comparison.json").read_text())["results"]] == ["evolution", "llm"]
    assert (out / "convergence-0.3.png").stat().st_size and (out / "rates-0.3.png").stat().st_size


def test_figures_of_other_searches_are_not_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = _figures(tmp_path / "a", _result("evolution", 0, [0.4]))
    other = _figures(tmp_path / "b", _result("llm", 0, [40.0]), minimise="perplexity")
    assert compare_search.main(["--methods", "--beside", one, other, "--out", str(tmp_path / "joined")]) == 2
    assert "is of other searches: they differ in minimise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--methods",), "there is nothing to do"),
        (("--methods", "--beside", "none.json"), "none.json cannot be read: No such file"),
        (("--methods", "--beside", "list.json"), "list.json holds no figures of a comparison"),
        (("--methods", "--beside", "half.json"), "half.json holds no figures of a comparison: results: Field required"),
        (("--methods", "--beside", "other.json"), "other.json does not say what was minimised"),
        (("--methods", "--beside", "some.json"), "some.json does not say what was reconstructed"),
        (("--rate", "1.5"), "target.rate cannot be '1.5'"),
        (("--rate", "0.3", "0.95"), "target.rate cannot be '0.95'"),
        (("--budget", "3"), "--budget cannot be 3: the first population takes 4"),
        (("--seeds", "0"), "--seeds cannot be 0"),
        (("--first-seed", "-1"), "search.seed cannot be '-1'"),
        (("--windows", "0"), "data.fitness_windows cannot be '0'"),
        (("--fitness", "/nosuch.txt"), "there is no text file '/nosuch.txt'"),
        (("--report", "/nosuch.txt"), "there is no text file '/nosuch.txt'"),
        (("--methods", "random", "evolution-multi", "--windows", "2"), "search.first_windows (2) must be fewer"),
        (("--methods", "llm", "--llm-url", "ftp://x:secret@y"), "it is not a URL such as http://"),
        (("--methods", "llm", "--gguf", "/nosuch.gguf"), "there is no GGUF file '/nosuch.gguf'"),
        (("--json", "no/such/folder/figures.json"), "there is no folder 'no/such/folder'"),
        (("--methods", "random", "--out", "list.json"), "--out list.json cannot be created"),
    ],
)
def test_bad_input_is_a_sentence_before_anything_is_loaded(
    arguments: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    half: dict[str, Any] = {"arguments": {}}
    some = {"arguments": {"minimise": "kl"}, "results": []}
    for name, figures in {"list": [], "half": half, "other": half | {"results": []}, "some": some}.items():
        Path(f"{name}.json").write_text(json.dumps(figures))
    monkeypatch.setattr(compare_search, "compare", None)
    assert compare_search.main(["--out", "out", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("compare_search: ") and says in said and said.count("\n") == 1
    assert "secret" not in said and not Path("out").exists()


def test_two_calls_in_one_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lock_folder(tmp_path):
        assert compare_search.main(["--methods", "random", "--out", str(tmp_path)]) == 2
    assert f"the comparison in {tmp_path} is being made by another process" in capsys.readouterr().err
    assert not (tmp_path / "server").exists()


def test_what_is_wrong_with_a_search_is_not_taken_for_a_second_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def compare(_: argparse.Namespace) -> list[SearchResult]:
        raise SearchExistsError("it has other settings")

    monkeypatch.setattr(compare_search, "compare", compare)
    assert compare_search.main(["--methods", "random", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "compare_search: it has other settings\n"


def _given(folder: Path, *arguments: str) -> argparse.Namespace:
    return compare_search._parser().parse_args(["--budget", "20", "--out", str(folder), *arguments])


def test_a_search_that_has_ended_is_not_searched_again(tmp_path: Path) -> None:
    given = _given(tmp_path)
    settings = compare_search.settings_of(given, "llm", 0.3, 0)
    assert result_before(settings.folder) is None
    settings.folder.mkdir()
    kept = SearchResult.model_validate(_result("llm", 0, [0.3, 0.2]))
    keep_result(kept, settings.folder, {})
    elsewhere = _given(tmp_path, "--rate", "0.3", "0.5", "--seeds", "1", "--methods", "llm")
    again = compare_search.settings_of(elsewhere, "llm", 0.3, 0)
    assert again.search.name == settings.search.name
    assert result_before(again.folder) == kept


@pytest.mark.parametrize(
    ("other", "of_all"),
    [
        (("--budget", "40"), True),
        (("--report", "test.txt"), True),
        (("--minimise", "perplexity"), True),
        (("--gguf", "larger.gguf"), False),
        (("--llm-url", "http://127.0.0.1:1/v1"), False),
        (("--llm-url", "http://127.0.0.1:1/v1", "--llm-model", "larger"), False),
    ],
)
def test_with_other_arguments_it_is_another_search_of_another_name(
    tmp_path: Path, other: tuple[str, ...], of_all: bool
) -> None:
    """The server still has a search of that name, which with new arguments would end at once with its old result."""

    def name(method: str, *arguments: str) -> str:
        return compare_search.settings_of(_given(tmp_path, *arguments), method, 0.3, 0).search.name

    assert name("llm", *other) != name("llm")
    assert (name("evolution", *other) != name("evolution")) == of_all
    if "--llm-model" in other:
        assert name("llm", *other) != name("llm", *other[:2])


@pytest.mark.parametrize("torn", ["", "{", "[]", "{}"])
def test_a_result_that_cannot_be_read_is_made_again(tmp_path: Path, torn: str) -> None:
    (tmp_path / RESULT).write_text(torn)
    assert result_before(tmp_path) is None
