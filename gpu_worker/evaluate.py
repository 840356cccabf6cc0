"""Evaluations without a search: what `selfpruner evaluate` and `selfpruner allocate` print."""

import time
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from gpu_worker.allocation import allocate, prepare
from gpu_worker.corpora import SELF, load_roles
from gpu_worker.memory import Workload
from gpu_worker.models import load_model
from gpu_worker.perplexity import watched_perplexity
from gpu_worker.progress import Progress, no_progress
from gpu_worker.self_text import self_text
from gpu_worker.session import Session
from gpu_worker.target import Target
from protocol.allocation import Allocation
from protocol.errors import BudgetError
from protocol.plan import LayerPlan, Parameters, check_rates, count_parameters, dense_plan
from protocol.shape import ModelShape
from protocol.spec import Dtype, Role, SearchSpec, TextSpec


class EvaluationResult(BaseModel):
    """What one model measures, and where it was pruned, what the dense model does on the same tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    method: str | None
    """The allocation, or where the rates come from; None for a model as it is."""
    rate: float
    """Share of the decoder's parameters that is removed."""
    perplexity: float
    """On the fitness text."""
    dense_perplexity: float | None
    kl: float | None
    """Divergence from the dense model in nats, where it was asked for."""
    report_perplexity: float | None
    dense_report_perplexity: float | None
    parameters: Parameters
    seqlen: int
    tokens: int
    seconds: float
    """Wall time of the measurement on the fitness text."""
    calibration: str | None
    data: str
    """The fitness text."""
    card_perplexity: float | None = None
    """What an exported folder's own card says of the same tokens."""
    rates: tuple[float, ...]


class AllocationResult(BaseModel):
    """Rates without a search, with all that is needed to prune by them: a file of rates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    method: str
    rates: tuple[float, ...]
    parameters: Parameters
    plan: tuple[LayerPlan, ...]
    shape: ModelShape
    spec: SearchSpec


def evaluate_once(
    spec: SearchSpec,
    choice: tuple[float, ...] | Allocation,
    *,
    shape: ModelShape | None = None,
    method: str = "rates",
    progress: Progress = no_progress,
) -> EvaluationResult:
    """Prune by rates, exactly as given, or by those of an allocation, and measure.

    `shape` is the model that given rates are for, where that is known. Raises UsageError for a model or a text that
    cannot be had and for rates of the wrong number, range or model.
    """
    target = prepare(spec, choice if isinstance(choice, Allocation) else None, progress)
    rates = choose_rates(target, choice, shape, progress)
    session = Session(spec, progress, sensitivity=False, target=target)
    plan = spec.plan(list(rates), target.shape)
    measured = session.evaluate(plan)
    report = None if spec.report is None else session.evaluate(plan, "report").perplexity
    dense_report = session.card.dense_report
    return EvaluationResult(
        model=spec.model,
        method=method,
        rate=removed_share(measured.parameters),
        perplexity=measured.perplexity,
        dense_perplexity=session.card.dense.perplexity,
        kl=measured.kl,
        report_perplexity=report,
        dense_report_perplexity=None if dense_report is None else dense_report.perplexity,
        parameters=measured.parameters,
        seqlen=spec.fitness.seqlen,
        tokens=measured.tokens,
        seconds=measured.seconds,
        calibration=spec.calibration.source,
        data=spec.fitness.source,
        rates=rates,
    )


def evaluate_as_it_is(
    name: str, texts: Mapping[Role, TextSpec], *, dtype: Dtype, seed: int, progress: Progress = no_progress
) -> EvaluationResult:
    """Measure a model, such as an exported one, without pruning it.

    `texts` has what to measure on; windows that a calibration text takes are left out of the others, as they are where
    a model is pruned.
    """
    progress("loading model", 0, 1)
    model = load_model(
        name, dtype, Workload(_longest(texts), writes_text=any(t.source == SELF for t in texts.values()))
    )
    progress("loading model", 1, 1)
    windows = load_roles(
        texts,
        seed,
        model.tokenizer,
        lambda n, length: self_text(model, n, length, seed, progress),
        model.window_start,
    )
    start = time.perf_counter()
    value, tokens = watched_perplexity(model.decoder, windows["fitness"], progress)
    seconds = time.perf_counter() - start
    report = watched_perplexity(model.decoder, windows["report"], progress)[0] if "report" in windows else None
    shape = model.decoder.shape
    return EvaluationResult(
        model=name,
        method=None,
        rate=0.0,
        perplexity=value,
        dense_perplexity=None,
        kl=None,
        report_perplexity=report,
        dense_report_perplexity=None,
        parameters=count_parameters(dense_plan(shape), shape),
        seqlen=texts["fitness"].seqlen,
        tokens=tokens,
        seconds=seconds,
        calibration=None,
        data=texts["fitness"].source,
        rates=(),
    )


def _longest(texts: Mapping[Role, TextSpec]) -> int:
    return max(text.seqlen for text in texts.values())


def allocate_once(spec: SearchSpec, allocation: Allocation, progress: Progress = no_progress) -> AllocationResult:
    """The rates of an allocation; nothing is pruned."""
    target = prepare(spec, allocation, progress)
    rates = allocate(target, allocation, progress)
    plan = spec.plan(list(rates), target.shape)
    return AllocationResult(
        model=spec.model,
        method=allocation.method,
        rates=rates,
        parameters=count_parameters(plan, target.shape),
        plan=plan.layers,
        shape=target.shape,
        spec=spec,
    )


def choose_rates(
    target: Target, choice: tuple[float, ...] | Allocation, shape: ModelShape | None, progress: Progress = no_progress
) -> tuple[float, ...]:
    """The rates to prune `target` by. Raises BudgetError where given ones are for another model or another budget."""
    if isinstance(choice, Allocation):
        return allocate(target, choice, progress)
    spec = target.spec
    if shape is not None and shape != target.shape:
        raise BudgetError(f"the rates are for {shape.words}; {spec.model} has {target.shape.words}")
    check_rates(choice, target.shape, spec.rate, spec.granularity)
    return choice


def removed_share(parameters: Parameters) -> float:
    """The share of the decoder's parameters that is gone."""
    return round(1 - parameters.decoder_after / parameters.decoder_before, 5)
