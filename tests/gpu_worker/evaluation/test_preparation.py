"""Preparation measures nothing twice, and what it reads from the cache is what it had measured."""

from pathlib import Path
from typing import Any

import pytest

from gpu_worker.evaluation.session import Session
from protocol.plans.candidate import Measured
from protocol.plans.profile import ModelProfile
from protocol.plans.spec import SearchSpec
from tests.support.tiny_specs import write_text

pytestmark = pytest.mark.usefixtures("own_cache")
SLOW = {"calibrating", "measuring dense", "measuring dense on the report text", "measuring sensitivity"}


class Prepared:
    """A session, and the slow stages that it went through."""

    def __init__(self, spec: SearchSpec, **changed: Any) -> None:
        self.stages: set[str] = set()
        spec = spec.model_copy(update=changed)
        self.session = Session(spec, lambda stage, _, __: self.stages.add(stage))
        self.slow = self.stages & SLOW

    @property
    def found(self) -> tuple[ModelProfile, Measured, Measured]:
        """Everything that is measured, without times."""
        profile, spec = self.session.profile, self.session.spec
        assert profile.dense_report is not None
        timeless = {
            name: value.model_copy(update={"seconds": 0.0})
            for name, value in (("dense", profile.dense), ("dense_report", profile.dense_report))
        }
        plan = spec.uniform_plan(self.session.shape)
        outcomes = [self.session.evaluate(plan, text) for text in ("fitness", "report")]
        first, second = (outcome.model_copy(update={"seconds": 0.0}) for outcome in outcomes)
        return profile.model_copy(update=timeless), first, second


@pytest.mark.parametrize("importance", ["wanda-sp", "taylor", "magnitude", "obs"])
@pytest.mark.parametrize("reconstruction", ["none", "least-squares"])
def test_a_second_session_measures_nothing_of_the_dense_model_and_finds_the_same(
    spec: SearchSpec, importance: str, reconstruction: str
) -> None:
    how = {"importance": importance, "reconstruction": reconstruction, "measure": "kl"}
    first, second = Prepared(spec, **how), Prepared(spec, **how)
    assert first.slow == SLOW and not second.slow
    assert first.found == second.found


def test_perplexity_alone_is_remembered_apart_from_predictions(spec: SearchSpec) -> None:
    Prepared(spec, measure="kl")
    first, second = Prepared(spec), Prepared(spec)
    assert first.slow == {"measuring dense", "measuring dense on the report text"} and not second.slow
    assert first.found == second.found


def test_another_rate_needs_the_sensitivity_only(spec: SearchSpec) -> None:
    Prepared(spec)
    assert Prepared(spec, rate=0.2).slow == {"measuring sensitivity"}


def test_another_calibration_text_needs_everything_anew(spec: SearchSpec, tmp_path: Path) -> None:
    Prepared(spec)
    other = spec.calibration.model_copy(update={"source": write_text(tmp_path / "other.txt", seed=7)})
    assert Prepared(spec, calibration=other).slow == SLOW


def test_other_code_measures_everything_anew(spec: SearchSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    Prepared(spec)
    monkeypatch.setattr("gpu_worker.evaluation.preparation._code_digest", lambda: "other")
    assert Prepared(spec).slow == SLOW


def test_outliers_are_the_same_from_the_cache(spec: SearchSpec) -> None:
    assert Prepared(spec).session.profile.outliers == Prepared(spec).session.profile.outliers != ()
