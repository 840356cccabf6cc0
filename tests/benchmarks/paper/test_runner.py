"""benchmarks.paper with a scripted `selfpruner`: which cells run, and the state after a failure or a kill."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest

from benchmarks.paper.cell_maker import CellMaker
from benchmarks.paper.cells import Cell, CellStore, Failed
from benchmarks.paper.runner import Failure, SubprocessRunner, load_outcomes
from benchmarks.paper.settings import PaperSettings, read_settings
from benchmarks.paper.table_layouts import table_layouts
from tests.support.disks import LimitedFiles, mounted
from tests.support.paper import ONE_TEXT, SMALL, Paper
from tests.support.scripted_runner import says_to, search, value_of
from tests.support.tiny_models import save_tiny_folder


def test_what_has_been_run_is_not_run_again(paper: Paper) -> None:
    paper.make(SMALL)
    first = paper.markdown
    again = paper.make(SMALL)
    assert not again.asked and paper.markdown == first
    further = paper.make(SMALL | {"rates": [0.3, 0.4]})
    assert len(further.asked) == 2


def test_other_texts_are_other_cells(paper: Paper) -> None:
    paper.make(SMALL)
    other = paper.make(SMALL, flags=["--set", "texts.seqlen=128"])
    assert len(other.asked) == 3


def test_a_failed_cell_stops_no_other_and_is_tried_again(paper: Paper) -> None:
    settings = {"models": ["tiny"], "rates": [0.3]}
    failing = paper.make(settings, lambda arguments: Failure("out of luck") if "owl" in arguments else None, code=1)
    assert len(failing.asked) == 5
    assert "| 30% | OWL | failed (1) |" in paper.markdown and "1. out of luck" in paper.markdown
    assert "| 30% | Self-Pruner | 11.00 |" in paper.markdown
    working = paper.make(settings)
    assert [value_of(arguments, "--allocate") for arguments in working.asked] == ["owl"]
    assert "| 30% | OWL | 12.00 |" in paper.markdown


def test_what_needs_a_failed_cell_is_not_run(paper: Paper) -> None:
    runner = paper.make(
        {"models": ["tiny"], "tables": [7], "rates": [0.3]}, says_to("export", Failure("no memory")), code=1
    )
    assert runner.commands() == ["run", "export"]
    assert "failed before it: no memory" in paper.markdown


TUNED: dict[str, Any] = {"models": ["tiny"], "tables": [6], "rates": [0.3], "compared_rates": [0.3]}


def test_what_a_further_table_needs_is_made_again_where_it_is_gone(paper: Paper) -> None:
    paper.make(TUNED)
    rmtree(paper.out / "models")
    nothing = paper.make(TUNED)
    assert not nothing.asked
    further = paper.make(TUNED | {"tables": [6, 7]})
    assert further.commands() == ["export", "speed"]
    rmtree(paper.out / "searches")
    again = paper.make(TUNED | {"zero_shot": {}})
    # The folder after LoRA is gone since the beginning; its export is there, so no search is needed for it.
    assert again.commands() == ["run", "zero-shot", "finetune", "zero-shot"]


def test_a_measured_cell_stays_measured_where_it_fails_to_make_its_files_again(paper: Paper) -> None:
    settings = TUNED | {"tables": [1], "methods": ["self-pruner"]}
    paper.make(settings)
    rmtree(paper.out / "searches")
    failing = paper.make(settings | {"tables": [1, 7]}, says_to("run", Failure("no LLM")), code=1)
    assert failing.commands() == ["run"]
    said = paper.markdown
    assert "| 30% | Self-Pruner | 11.00 |" in said and "failed before it: no LLM" in said
    paper.make(settings)


@pytest.mark.parametrize("answer", [search(3.0, finished=False), {"best": None, "finished": True}, {}])
def test_an_answer_without_its_figure_is_a_failure(paper: Paper, answer: dict[str, Any]) -> None:
    paper.make(SMALL | {"methods": ["self-pruner"]}, says_to("run", answer), code=1)
    assert "failed (1)" in paper.markdown


def test_a_half_written_cell_is_run_again(paper: Paper) -> None:
    paper.make(SMALL)
    (cell,) = (paper.out / "cells").glob("run-*.json")
    cell.write_text(cell.read_text()[:40])
    again = paper.make(SMALL)
    assert again.commands() == ["run"]


def test_an_interrupted_call_writes_its_tables_and_the_same_command_goes_on(paper: Paper) -> None:
    def say(arguments: Sequence[str]) -> None:
        if arguments[0] == "run":
            os.kill(os.getpid(), signal.SIGINT)

    paper.make(SMALL, say, code=128 + signal.SIGINT)
    assert "| 30% | Wanda-sp | 13.00 |" in paper.markdown and "| 30% | Self-Pruner | – |" in paper.markdown
    again = paper.make(SMALL)
    assert again.commands() == ["run"]


def test_the_tables_are_written_after_every_cell_and_another_call_may_render_them(paper: Paper) -> None:
    def say(arguments: Sequence[str]) -> None:
        if arguments[0] == "run":
            assert "| 30% | Wanda-sp | 13.00 |" in paper.markdown
            (paper.out / "tables.md").unlink()
            paper.make(SMALL, flags=["--render"])
            assert "| 30% | Wanda-sp | 13.00 |" in paper.markdown
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        paper.make(SMALL, say)
    assert "| 30% | Wanda-sp | 13.00 |" in paper.markdown
    assert not list(paper.out.glob(".*"))


def test_a_folder_that_cannot_be_made_is_told(paper: Paper, capsys: pytest.CaptureFixture[str]) -> None:
    paper.out.write_text("a file")
    for flags in ([], ["--render"]):
        paper.make(SMALL, flags=[*flags], code=2)
        assert "cannot be created: File exists" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(
    tmp_path: Path, paper: Paper, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(LimitedFiles(tmp_path / "disk")) as disk:
        assert disk is not None

        def say(arguments: Sequence[str]) -> None:
            if "--allocate" in arguments:
                disk.fill()

        paper.make(SMALL, say, code=2)
        disk.free()
    told = capsys.readouterr().err.splitlines()[-1]
    assert "cells/evaluate-tiny-wanda-sp-0.3-" in told and told.endswith(".json cannot be written: File too large")
    assert "| 0% | Dense | 10.00 |" in paper.markdown
    again = paper.make(SMALL)
    assert again.commands() == ["evaluate", "run"]


def test_progress_says_which_cell_and_how_many(paper: Paper, capsys: pytest.CaptureFixture[str]) -> None:
    settings = SMALL | {"models": [{"name": "tiny", "billions": 1}], "reconstruction": ["none", "least-squares"]}
    paper.make(settings)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("benchmarks.paper: 1 of 5: evaluate tiny, dense; about 12 s, all remaining cells ")
    assert said[4].startswith("benchmarks.paper: 5 of 5: run tiny, self-pruner at 30%, least-squares; about ")


def test_render_runs_nothing(paper: Paper) -> None:
    runner = paper.make(SMALL, flags=["--render"])
    assert not runner.asked and "| 0% | Dense | – |" in paper.markdown


def test_a_cells_id_may_name_a_search_and_depends_on_what_is_run() -> None:
    settings = PaperSettings.model_validate({"models": ["An/Extremely-Long.Name_of_a_model-that-goes-on"]})
    maker = CellMaker(settings)
    cells = [maker.search(settings.models[0], "self-pruner-best", rate, "none") for rate in (0.3, 0.12345)]
    assert len({cell.id for cell in cells}) == 2 and all(len(cell.id) <= 64 for cell in cells)
    for cell in cells:
        assert cell.id == Cell.model_validate_json(cell.model_dump_json()).id
    assert cells[0].model_copy(update={"tokens": 1.0, "note": "other"}).id == cells[0].id


def test_two_at_once_in_one_folder_are_refused(paper: Paper, capsys: pytest.CaptureFixture[str]) -> None:
    def say(arguments: Sequence[str]) -> None:
        paper.make(SMALL, code=2)

    paper.make(SMALL, say)
    assert "another process is making the tables in" in capsys.readouterr().err


def test_the_outcomes_are_kept_with_what_was_run(tmp_path: Path, paper: Paper) -> None:
    paper.make(SMALL)
    settings = read_settings(tmp_path / "tables.yaml")
    cells = [cell for table in table_layouts(settings) for cell in table.cells]
    store = CellStore(paper.out)
    outcomes = load_outcomes(cells, store)
    assert {outcome.kind for outcome in outcomes.values()} == {"measured"}
    store.keep(cells[0], Failed(sentence="later"))
    assert store.load(cells[0]) == Failed(sentence="later")
    kept = json.loads((paper.out / "cells" / f"{cells[0].id}.json").read_text())
    assert kept["cell"]["model"] == "tiny"


@pytest.mark.parametrize(
    ("ending", "sentence"),
    [
        ("echo 'selfpruner: give --data' >&2; exit 2", "give --data"),
        ("kill -9 $$", "ended by SIGKILL: memory may have run out"),
    ],
    ids=["by itself", "killed"],
)
def test_a_command_that_fails_is_its_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, sentence: str
) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{ending}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert SubprocessRunner().run(["evaluate"], tmp_path / "log") == Failure(sentence)


def test_a_sentence_of_the_real_command_is_kept(tmp_path: Path) -> None:
    answer = SubprocessRunner().run(["evaluate", "--model", "no/such/folder", "--json"], tmp_path / "log")
    assert answer == Failure("give --data, the text to measure on")


def test_a_real_cell_of_a_tiny_model_becomes_its_table(tmp_path: Path, paper: Paper) -> None:
    (tmp_path / "text.txt").write_text("What is measured here is no more than a few windows of bytes. " * 40)
    text = str(tmp_path / "text.txt")
    settings = {
        "models": [str(save_tiny_folder(tmp_path / "tiny"))],
        "rates": [0.3],
        "methods": ["wanda-sp"],
        "texts": ONE_TEXT | {"calibration": text, "fitness": text, "report": text},
        "dtype": "float32",
    }
    assert paper.run(settings, SubprocessRunner()) == 0
    ((ours, _),) = paper.table(1)["30%", "Wanda-sp"]
    assert ours is not None and 1 < ours < 1e6
    assert f"| 30% | Wanda-sp | {ours:,.2f} |" in paper.markdown
    paper.make(settings)
    assert paper.table(1)["30%", "Wanda-sp"] == [(ours, None)]
