"""`import selfpruner`: searches and models from Python, also while an event loop runs."""

import asyncio
import json
import logging
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import selfpruner
from gpu_worker.measuring.half_precision import products_in_float32


@pytest.fixture(scope="module")
def settings(target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A search that needs no LLM and takes seconds."""
    windows = {"calibration_windows": 4, "fitness_windows": 3, "seqlen": 32}
    return {
        "search": {"name": "lib", "proposer": "evolution", "population": 4, "mutations": 3, "rounds": 2},
        "search.crossovers": 0,
        "target": {"model": str(target / "model"), "rate": 0.3, "dtype": "float32"},
        "data": {"calibration": str(target / "calibration.txt"), "fitness": str(target / "data.txt"), **windows},
        "http.enabled": False,
        "run.folder": str(tmp_path_factory.mktemp("runs")),
    }


@pytest.fixture(scope="module")
def found(settings: dict[str, Any]) -> tuple[selfpruner.Run, list[selfpruner.Progress]]:
    """A search that was run while an event loop runs, and its progress."""
    seen: list[selfpruner.Progress] = []

    async def in_a_notebook() -> selfpruner.Run:
        return selfpruner.search(settings, progress=seen.append, search__seed=3)

    return asyncio.run(in_a_notebook()), seen


Found = tuple[selfpruner.Run, list[selfpruner.Progress]]


def test_a_search_runs_beside_an_event_loop_and_is_read_from_its_folder(found: Found) -> None:
    run, _ = found
    again = selfpruner.run(run.folder)
    assert again.spec.seed == 3 and again.summary is not None and again.summary.finished
    assert len(again.proposals) == 4 + 2 * 3
    assert again.best is not None and again.rates == again.best.candidate.rates
    assert again.uniform is not None and again.summary.uniform.perplexity == again.uniform.perplexity
    assert again.status is not None and again.status.finished
    assert "10 candidates" in repr(again)


def test_progress_goes_from_the_model_to_the_last_candidate(found: Found) -> None:
    _, seen = found
    assert seen[0].figures is None
    assert seen[-1].stage == "searching" and seen[-1].done == seen[-1].total == 10
    assert seen[-1].figures is not None and seen[-1].figures.ratio is not None


def test_the_callers_logging_is_left_as_it_was(settings: dict[str, Any], found: Found) -> None:
    before = list(logging.getLogger().handlers)
    assert selfpruner.search(settings, search__seed=3).folder == found[0].folder  # it has ended: nothing is measured
    assert logging.getLogger().handlers == before


def test_an_error_of_the_callers_progress_does_not_end_the_search(settings: dict[str, Any]) -> None:
    def broken(_: selfpruner.Progress) -> None:
        raise RuntimeError("a plot was closed")

    run = selfpruner.search(settings, progress=broken, search__name="broken", search__rounds=0)
    assert run.summary is not None and run.summary.finished
    assert "progress_not_reported" in (run.folder / "log.jsonl").read_text()


def test_a_frame_has_a_row_for_each_evaluation(found: Found) -> None:
    run, _ = found
    frame = run.frame()
    assert len(frame) == len(run.evaluations)
    proposed = frame[frame.agent != "baseline"]
    assert run.best is not None and proposed.perplexity.min() == run.best.outcome.perplexity  # type: ignore[union-attr]
    assert set(frame.outcome) == {"measured"}


def test_its_charts_and_its_report_are_drawn(found: Found, tmp_path: Path) -> None:
    run, _ = found
    for drawing in (run.plot(), run.plot_rates(), run.plot_population()):
        assert drawing.save(tmp_path / "chart.svg").read_text().startswith("<svg")
    assert all(f">{name} " in run.plot().svg for name in ("best", "uniform")) and 'class="dots"' in run.plot().svg
    assert "<h1>Pruning" in run.report(tmp_path / "report.html").read_text()


def test_a_model_is_exported_and_loaded_without_code_of_its_folder(found: Found, tmp_path: Path) -> None:
    run, _ = found
    exported = run.export(tmp_path / "small")
    model, tokenizer = selfpruner.load(tmp_path / "small", dtype="float32")
    with torch.inference_mode(), products_in_float32():
        logits = model(input_ids=torch.tensor([tokenizer("abcd efgh")["input_ids"]])).logits
    assert logits.isfinite().all()
    assert exported.parameters.decoder_after < exported.parameters.decoder_before


def test_a_model_is_made_smaller_by_one_call(settings: dict[str, Any], target: Path, tmp_path: Path) -> None:
    chosen = {name: value for name, value in settings.items() if name != "target"}
    own = {"name": "pruned", "initializer": "llm", "selector": "llm", "seeds": [], "mutator": "llm"}
    chosen["search"] = chosen["search"] | own
    out = tmp_path / "small"
    made = selfpruner.prune(
        str(target / "model"), rate=0.3, out=out, settings=chosen | {"target.dtype": "float32"}, budget=4
    )
    assert made.reloaded == pytest.approx(made.exported.perplexity, rel=0.02)
    assert json.loads((out / "prune.json").read_text())["search"] == made.search


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: selfpruner.run("nowhere"), "there is no search in the folder 'nowhere'"),
        (lambda: selfpruner.search({"target.model": "smollm2", "target.rate": 30}), "0.3 for 30 %"),
        (lambda: selfpruner.search("nowhere.yaml"), "nowhere.yaml"),
        (lambda: selfpruner.load("nowhere/at/all"), "nowhere/at/all"),
        (lambda: selfpruner.prune("smollm2", 0.3, out="x", formats=["onnx"]), "onnx"),
    ],
)
def test_a_mistake_is_one_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(selfpruner.UsageError) as raised:
        call()
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_ctrl_c_saves_the_search_and_the_same_call_ends_it(settings: dict[str, Any], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
        import os, signal, selfpruner
        def progress(p):
            if p.stage == "searching" and p.done >= 2:
                os.kill(os.getpid(), signal.SIGINT)
        try:
            selfpruner.search({settings!r}, progress=progress, search__name="stopped", search__rounds=40)
        except KeyboardInterrupt:
            print("interrupted")
        """)
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "interrupted\n", done.stderr
    folder = Path(settings["run.folder"]) / "stopped"
    kept = len(selfpruner.run(folder).proposals)
    assert kept >= 2
    # Rounds are no part of what is searched, so that a shorter search may end what was begun.
    ended = selfpruner.search(settings, search__name="stopped", search__rounds=3)
    assert ended.summary is not None and ended.summary.finished and len(ended.proposals) >= kept


def test_importing_it_loads_neither_torch_nor_pandas() -> None:
    program = "import sys, selfpruner; print({'torch', 'pandas', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
