"""benchmarks/search/compare_search.py: its measurements, and what it keeps between calls."""

import argparse
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.search import compare_search
from benchmarks.search import searches as comparing
from benchmarks.search.searches import MeasuringWorker, plain_uniform
from gpu_worker.evaluation import outcomes as answering
from gpu_worker.evaluation.session import Session
from gpu_worker.pruning.importance import any_heads_plan
from protocol.plans.candidate import Candidate, Measured, Outcome, Provenance, candidate_id
from protocol.plans.spec import SearchSpec
from tests.support.schema_answers import value_of
from tests.support.scripted_llm import ScriptedLlm
from tests.support.tiny_specs import tiny_spec, write_text

pytestmark = pytest.mark.usefixtures("restored_logs")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SearchSpec:
    return tiny_spec(tmp_path_factory.mktemp("tiny"))


def _candidates(session: Session) -> list[Candidate]:
    spec, made = session.spec, []
    for change in (0.0, 0.2, 0.3):
        rates = spec.feasible([spec.rate + change, spec.rate - change, spec.rate], session.shape)
        plan = spec.plan(rates, session.shape)
        who = Provenance(agent="mutator", source="classical", round=0)
        made.append(Candidate(id=candidate_id(plan, spec.fingerprint), rates=tuple(rates), plan=plan, provenance=who))
    return made


def _arguments(spec: SearchSpec, out: Path, *more: str) -> list[str]:
    """Settings of a comparison that takes seconds: two searches of eight candidates."""
    text = spec.fitness.source
    given = ["--model", spec.model, "--fitness", text, "--report", text, "--out", str(out), "--seeds", "1"]
    given += ["--windows", "4", "--seqlen", "32", "--report-windows", "4", "--calibration-windows", "4"]
    return [*given, "--budget", "8", "--methods", "random", "evolution", *more]


def _counted(monkeypatch: pytest.MonkeyPatch, happens: Callable[[int], None] = lambda _: None) -> list[int]:
    """Counts measurements. Before each, `happens` is called with the count, in the measuring thread."""
    asked: list[int] = []

    def answer(session: Session, request: dict[str, Any]) -> Outcome:
        asked.append(len(asked))
        happens(len(asked))
        return answering.answer(session, request)

    monkeypatch.setattr(comparing, "answer", answer)
    return asked


def test_a_comparison_measures_alike_candidates_once_and_is_not_made_twice(
    tmp_path: Path, spec: SearchSpec, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figures, asked = tmp_path / "out", tmp_path / "figures.json", _counted(monkeypatch)
    assert compare_search.main(_arguments(spec, out, "--json", str(figures))) == 0
    shown = capsys.readouterr()
    told = json.loads(figures.read_text())
    assert told == json.loads((out / "comparison.json").read_text())
    drawn, evolution = told["results"]
    assert (drawn["method"], evolution["method"]) == ("random", "evolution")
    assert 8 < len(asked) == len((out / "measured-0.jsonl").read_text().splitlines()) < 20  # the seeds are shared
    for result in (drawn, evolution):
        assert result["budget"] == result["candidates"] == 8 and result["tokens"] == 8 * 4 * 31
        so_far = result["best_so_far"]
        assert so_far["fitness"] == sorted(so_far["fitness"], reverse=True) and so_far["evaluations"][0] == 1
        assert so_far["fitness"][-1] <= result["uniform"]
        assert result["report"] > 1 and len(result["rates"]) == 6  # blocks
        assert result["by_llm"] == result["asked"] == 0
        assert 0 < result["busy"] < 1
    plain, masked = json.loads((out / "plain-0.json").read_text()).values()
    assert drawn["plain_report"] == evolution["plain_report"] == plain
    assert drawn["any_heads_report"] == evolution["any_heads_report"] == masked
    assert drawn["uniform_report"] == evolution["uniform_report"] != plain
    for method in ("random", "evolution"):
        (folder,) = out.glob(f"{method}-block-0.3-0-*")
        assert json.loads((folder / "result.json").read_text())["result"] == told["results"][method == "evolution"]
        assert f"{folder.name} …" in shown.err
    before = len(asked)
    assert compare_search.main(_arguments(spec, out)) == 0
    again = capsys.readouterr()
    assert len(asked) == before and json.loads((out / "comparison.json").read_text())["results"] == told["results"]
    assert again.out == shown.out and "…" not in again.err


def test_where_measuring_fails_the_comparison_ends_with_a_sentence_and_goes_on_when_called_again(
    tmp_path: Path, spec: SearchSpec, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(count: int) -> None:
        if count == 7:
            raise OSError("no space left")

    asked = _counted(monkeypatch, full)
    assert compare_search.main(_arguments(spec, tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert "compare_search: measuring for random-block-0.3-0-" in said
    assert said.endswith("failed: no space left; run the same command again to resume\n")
    assert compare_search.main(_arguments(spec, tmp_path / "out")) == 0
    assert len(asked) == 1 + len((tmp_path / "out" / "measured-0.jsonl").read_text().splitlines())


def test_a_comparison_that_is_interrupted_says_so_and_goes_on_when_called_again(
    tmp_path: Path, spec: SearchSpec, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(count: int) -> None:
        if count == 7:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # measuring takes longer than to hear of it

    asked = _counted(monkeypatch, interrupt)
    assert compare_search.main(_arguments(spec, tmp_path / "out")) == 128 + signal.SIGTERM
    said = capsys.readouterr()
    assert said.err.endswith("compare_search: interrupted; run the same command again to resume\n") and not said.out
    assert not (tmp_path / "out" / "comparison.json").exists() and len(asked) <= 8
    assert compare_search.main(_arguments(spec, tmp_path / "out")) == 0


async def test_replies_are_counted_as_readable_and_as_accepted(tmp_path: Path, spec: SearchSpec) -> None:
    """Every third reply is not JSON. All others are equal: readable, but accepted only the first time in each place."""
    replies: list[str] = []

    def answer(body: dict[str, Any]) -> str:
        replies.append(body["model"])
        schema = body["response_format"]["json_schema"]["schema"]
        return "Sorry." if len(replies) % 3 == 0 else json.dumps(value_of(schema, random.Random(1)))

    def given(url: str, model: str) -> argparse.Namespace:
        arguments = _arguments(spec, tmp_path, "--llm-url", url, "--llm-model", model, "--granularity", "layer")
        return compare_search._parser().parse_args([*arguments, "--methods", "best-of-n", "--allocations"])

    async with ScriptedLlm(answer) as llm:
        (result,) = await compare_search.compare(given(llm.base_url, "one"))
        assert result.accepted is not None and result.readable is not None
        assert 0 < result.accepted == result.by_llm < result.readable < result.asked <= len(replies)
        before = len(replies)
        assert await compare_search.compare(given(llm.base_url, "one")) == [result] and len(replies) == before
        await compare_search.compare(given(llm.base_url, "other"))
        assert "other" in replies[before:]


async def test_what_was_measured_is_kept_but_for_a_line_that_a_kill_has_torn(
    tmp_path: Path, spec: SearchSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = _counted(monkeypatch)
    session, kept = Session(spec, sensitivity=False), tmp_path / "measured-0.jsonl"
    first, second, third = _candidates(session)
    worker = MeasuringWorker("unix:///nowhere", kept)
    before = [await worker._outcome(candidate, session, "one") for candidate in (first, second)]
    assert all(isinstance(outcome, Measured) for outcome in before)
    kept.write_bytes(kept.read_bytes()[:-40])
    again = MeasuringWorker("unix:///nowhere", kept)
    assert again.measured_by == {first.id: "one"}
    assert await again._outcome(first, session, "two") == before[0] and len(measured) == 2
    await again._outcome(second, session, "two")
    await again._outcome(third, session, "two")
    assert len(measured) == 4
    assert MeasuringWorker("unix:///nowhere", kept).measured_by == {first.id: "one", second.id: "two", third.id: "two"}


def test_uniform_with_nothing_fitted_is_measured_once_for_each_text(
    tmp_path: Path, spec: SearchSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "plain-0.json"
    specs = [spec.model_copy(update={"reconstruction": "least-squares", "rate": rate}) for rate in (0.3, 0.5)]
    found = plain_uniform(specs, kept)
    session = Session(specs[0].model_copy(update={"reconstruction": "none"}), sensitivity=False)
    alone = session.evaluate(specs[0].uniform_plan(session.shape), "report")
    assert found[0].rectangular == pytest.approx(alone.perplexity) and found[1] != found[0]
    masked = any_heads_plan([0.3] * 3, session.target.importance, session.shape)
    assert found[0].any_heads == pytest.approx(session.evaluate(masked, "report").perplexity)
    assert spec.report is not None
    other = spec.report.model_copy(update={"source": write_text(tmp_path / "other.txt", seed=5)})
    elsewhere = plain_uniform([specs[0].model_copy(update={"report": other})], kept)
    assert elsewhere[0] != found[0]
    kept.write_text(kept.read_text()[:30])
    assert plain_uniform(specs, kept) == found
    monkeypatch.setattr(comparing, "Target", None)
    assert plain_uniform(specs, kept) == found
