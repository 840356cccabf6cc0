"""Log events of candidates' outcomes."""

import structlog

from agents.population.population import Evaluation
from protocol.plans.candidate import Measured, Stopped

WHO = {"agent", "source", "round"}
"""The fields of a candidate's provenance in the log."""

log = structlog.get_logger()


def log_outcome(evaluation: Evaluation, *, is_best: bool) -> None:
    """Log that an outcome was applied."""
    candidate, outcome = evaluation.candidate, evaluation.outcome
    who = candidate.provenance.model_dump(include=WHO)
    if isinstance(outcome, Measured):
        log.info(
            "candidate_measured", candidate=candidate.id, text=candidate.text, **outcome.figures(4), best=is_best, **who
        )
    elif isinstance(outcome, Stopped):
        figures = outcome.model_dump(include={"windows", "of_windows"})
        log.info("candidate_stopped", candidate=candidate.id, behind=round(outcome.behind, 4), **figures, **who)
    else:
        log.warning("candidate_failed", candidate=candidate.id, reason=outcome.reason, detail=outcome.detail, **who)
