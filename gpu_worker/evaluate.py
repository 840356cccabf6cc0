"""One evaluation without a search: what `selfpruner evaluate` prints."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from gpu_worker.progress import Progress, no_progress
from gpu_worker.session import Session
from protocol.plan import Parameters, check_rates
from protocol.spec import SearchSpec


class EvaluationResult(BaseModel):
    """What one plan measures, beside what the dense model measures on the same tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    rate: float
    """Share of the decoder's parameters that is removed."""
    perplexity: float
    """On the fitness text."""
    dense_perplexity: float
    report_perplexity: float | None
    dense_report_perplexity: float | None
    parameters: Parameters
    seqlen: int
    tokens: int
    seconds: float
    """Wall time of the pruned model's measurement on the fitness text."""
    calibration: str
    data: str
    """The fitness text."""


def evaluate_once(
    spec: SearchSpec, rates: Sequence[float] | None, progress: Progress = no_progress
) -> EvaluationResult:
    """Prune by `rates`, one per unit and exactly as given, or uniformly (None), and measure.

    Raises UsageError for a model or a text that cannot be had and for rates of the wrong number or range.
    """
    session = Session(spec, progress, sensitivity=False)
    if rates is not None:
        check_rates(rates, session.shape, spec.rate, spec.granularity)
    plan = spec.uniform_plan(session.shape) if rates is None else spec.plan(list(rates), session.shape)
    measured = session.evaluate(plan)
    report = None if spec.report is None else session.evaluate(plan, "report").perplexity
    dense_report = session.card.dense_report
    parameters = measured.parameters
    return EvaluationResult(
        model=spec.model,
        rate=round(1 - parameters.decoder_after / parameters.decoder_before, 5),
        perplexity=measured.perplexity,
        dense_perplexity=session.card.dense.perplexity,
        report_perplexity=report,
        dense_report_perplexity=None if dense_report is None else dense_report.perplexity,
        parameters=parameters,
        seqlen=spec.fitness.seqlen,
        tokens=measured.tokens,
        seconds=measured.seconds,
        calibration=spec.calibration.source,
        data=spec.fitness.source,
    )
