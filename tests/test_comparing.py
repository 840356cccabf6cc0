"""What benchmarks/compare_search.py measures, and keeps of it from call to call."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import comparing
from benchmarks.comparing import MeasuringWorker, plain_uniform
from gpu_worker.session import Session
from protocol.candidate import Candidate, Measured, Outcome, Provenance, candidate_id
from protocol.spec import SearchSpec
from tests.tiny_specs import tiny_spec, write_text


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


async def test_what_was_measured_is_kept_but_for_a_line_that_a_kill_has_torn(
    tmp_path: Path, spec: SearchSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def answer(session: Session, request: dict[str, Any]) -> Outcome:
        measured.append(request["text"])
        return real(session, request)

    real = comparing.answer
    monkeypatch.setattr(comparing, "answer", answer)
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


def test_uniform_as_in_the_paper_is_measured_once_for_each_text(
    tmp_path: Path, spec: SearchSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "plain-0.json"
    specs = [spec.model_copy(update={"reconstruction": "least-squares", "rate": rate}) for rate in (0.3, 0.5)]
    found = plain_uniform(specs, kept)
    session = Session(specs[0].model_copy(update={"reconstruction": "none"}), sensitivity=False)
    alone = session.evaluate(specs[0].uniform_plan(session.shape), "report")
    assert found[0] == pytest.approx(alone.perplexity) and found[1] != found[0]
    assert spec.report is not None
    other = spec.report.model_copy(update={"source": write_text(tmp_path / "other.txt", seed=5)})
    elsewhere = plain_uniform([specs[0].model_copy(update={"report": other})], kept)
    assert elsewhere[0] != found[0]
    kept.write_text(kept.read_text()[:30])
    assert plain_uniform(specs, kept) == found
    monkeypatch.setattr(comparing, "Target", None)
    assert plain_uniform(specs, kept) == found
