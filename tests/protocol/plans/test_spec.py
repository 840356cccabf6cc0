"""The spec, candidates and outcomes: fingerprints, JSON, and invalid values."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from protocol.plans.candidate import OUTCOME, Candidate, Failed, Measured
from protocol.plans.rates import weighted_mean
from protocol.plans.spec import SearchSpec, TextSpec
from tests.support.samples import SHAPE, SPEC, candidate, measured


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"rate": 0.31},
        {"granularity": "block"},
        {"split": "mlp-first"},
        {"lowest_rate": 0.1},
        {"highest_rate": 0.9},
        {"multiple_of": 8},
        {"seed": 1},
        {"dtype": "float32"},
        {"measure": "kl"},
        {"fitness": TextSpec(source="self", windows=3, seqlen=32)},
        {"report": TextSpec(source="self", windows=2, seqlen=32)},
    ],
)
def test_whatever_decides_a_result_changes_the_fingerprint(change: dict[str, Any]) -> None:
    changed = SPEC.model_copy(update=change)
    assert changed.fingerprint != SPEC.fingerprint
    assert candidate((0.3,) * 4).id != candidate((0.3,) * 8 if "granularity" in change else (0.3,) * 4, spec=changed).id


def test_a_spec_survives_json() -> None:
    again = SearchSpec.model_validate_json(SPEC.model_dump_json())
    assert again == SPEC
    assert again.fingerprint == SPEC.fingerprint
    weights = [unit.parameters for unit in SHAPE.units("layer")]
    assert weighted_mean(again.uniform_rates(SHAPE), weights) == pytest.approx(0.3, abs=1e-9)


@pytest.mark.parametrize("bad", [{"rate": 0.0}, {"rate": 1.0}, {"rate": math.nan}, {"multiple_of": 0}, {"beta": 0.3}])
def test_a_spec_that_cannot_be_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SearchSpec.model_validate({**SPEC.model_dump(), **bad})


def test_candidates_and_outcomes_survive_json() -> None:
    made = candidate((0.4, 0.2, 0.3, 0.3))
    assert Candidate.model_validate_json(made.model_dump_json()) == made
    for outcome in (measured(12.5), Failed(reason="timeout", detail="after 5 s")):
        assert OUTCOME.validate_json(OUTCOME.dump_json(outcome)) == outcome


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_a_perplexity_that_is_no_perplexity_is_refused(bad: float) -> None:
    """Nor may a rate of a candidate be no number."""
    with pytest.raises(ValidationError):
        Measured.model_validate({**measured(12.5).model_dump(), "perplexity": bad})
    if not math.isfinite(bad):
        with pytest.raises(ValidationError):
            Candidate.model_validate({**candidate((0.3,) * 4).model_dump(), "rates": (0.3, bad, 0.3, 0.3)})
