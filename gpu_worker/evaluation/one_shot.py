"""Evaluates one-shot pruning, by given rates or an allocation and without a search, and models that are not pruned."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpu_worker.evaluation.allocation import allocate, choose_rates, prepare
from gpu_worker.evaluation.session import Session
from gpu_worker.evaluation.target import Target
from gpu_worker.evaluation.texts import check_length, count_windows, read_texts
from gpu_worker.measuring.corpora import SELF, windows_digest
from gpu_worker.measuring.perplexity import checked_perplexity
from gpu_worker.measuring.self_text import load_saved_text
from gpu_worker.models.errors import NotFiniteError
from gpu_worker.models.loading import LoadedModel, load_model
from gpu_worker.models.memory import Workload
from gpu_worker.progress import Progress, no_progress
from gpu_worker.pruning.importance import any_heads_plan
from protocol.plans.allocation import Allocation, Choice, PruningRequest
from protocol.plans.any_heads import AnyHeadsPlan, Heads
from protocol.plans.candidate import Measured
from protocol.plans.plan import Parameters, Plan, count_parameters, dense_plan
from protocol.plans.spec import Dtype, Role, SearchSpec, TextSpec
from protocol.results.commands import AllocationResult, EvaluationResult


@dataclass(frozen=True)
class Pruned:
    """A pruned target with its measurements."""

    session: Session
    rates: tuple[float, ...]
    plan: Plan
    fitness: Measured
    report: Measured | None


def evaluate_once(
    request: PruningRequest, heads: Heads = "rectangular", progress: Progress = no_progress
) -> EvaluationResult:
    """Prune by given rates or by an allocation's rates, and measure.

    `heads="any"` needs layer granularity, equal split and dense scoring. Raises UsageError for a model or text that is
    not available, and for rates of the wrong number, range or model.
    """
    spec = request.spec
    target = prepare(request, progress)
    rates = choose_rates(target, request.choice)
    plan: Plan | AnyHeadsPlan = spec.plan(list(rates), target.shape)
    if heads == "any":
        plan = any_heads_plan(rates, target.importance, target.shape, multiple_of=spec.multiple_of)
    session, measured, report = _measured(target, plan, progress)
    profile = session.profile
    return EvaluationResult(
        model=spec.model,
        method=request.method,
        heads=heads,
        reconstruction=spec.reconstruction,
        rate=removed_share(measured.parameters),
        perplexity=measured.perplexity,
        dense_perplexity=profile.dense.perplexity,
        kl=measured.kl,
        report_perplexity=report and report.perplexity,
        dense_report_perplexity=profile.dense_report and profile.dense_report.perplexity,
        parameters=measured.parameters,
        seqlen=spec.fitness.seqlen,
        tokens=measured.tokens,
        seconds=measured.seconds,
        calibration=spec.calibration.source,
        data=spec.fitness.source,
        fitness_digest=windows_digest(target.texts.fitness),
        rates=rates,
    )


def prune_and_measure(target: Target, choice: Choice, progress: Progress = no_progress) -> Pruned:
    """Prune `target`, which comes from `prepare`, and measure it on all its texts. The target stays pruned.

    Raises NotFiniteError if the pruned model's loss is not finite.
    """
    rates = choose_rates(target, choice)
    plan = target.spec.plan(list(rates), target.shape)
    session, fitness, report = _measured(target, plan, progress)
    return Pruned(session, rates, plan, fitness, report)


def _measured(
    target: Target, plan: Plan | AnyHeadsPlan, progress: Progress
) -> tuple[Session, Measured, Measured | None]:
    """Measure the dense and then the pruned target on the fitness and report texts. The target stays pruned."""
    session = Session(target.spec, progress, sensitivity=False, target=target)
    try:
        fitness = session.evaluate(plan, progress=progress)
        report = None if target.spec.report is None else session.evaluate(plan, "report", progress)
    except NotFiniteError as error:
        raise NotFiniteError(f"pruned so, {target.spec.model} does not compute: {error}") from error
    return session, fitness, report


def evaluate_model(
    name: str,
    texts: Mapping[Role, TextSpec],
    *,
    dtype: Dtype,
    seed: int,
    saved_text: Path | None = None,
    progress: Progress = no_progress,
) -> EvaluationResult:
    """Measure a model, such as an exported model, without pruning it.

    Measures on the fitness and report texts of `texts`. Windows of a calibration text are excluded from the other
    texts, as when a model is pruned. `saved_text` is the file with the tokens that an export was measured on, if the
    export has such a file.
    """
    longest = max(text.seqlen for text in texts.values())
    progress("loading model", 0, 1)
    generates_text = saved_text is None and any(text.source == SELF for text in texts.values())
    measured = texts.keys() - {"calibration"}
    read = {role: text for role, text in texts.items() if saved_text is None or role != "fitness"}

    def check(bare: LoadedModel) -> None:
        check_length(bare, longest)
        count_windows(bare, read, seed, measured)

    model = load_model(name, dtype, Workload(longest, generates_text=generates_text), check)
    progress("loading model", 1, 1)
    windows = read_texts(model, read, seed, progress, only=measured)
    if saved_text is not None:
        windows["fitness"] = load_saved_text(saved_text, texts["fitness"], model.decoder.head.out_features)
    start = time.perf_counter()
    value, tokens = checked_perplexity(model.decoder, windows["fitness"], progress, "measuring")
    seconds = time.perf_counter() - start
    report = None
    if "report" in texts:
        report, _ = checked_perplexity(model.decoder, windows["report"], progress, "measuring on the report text")
    shape = model.decoder.shape
    return EvaluationResult(
        model=name,
        perplexity=value,
        report_perplexity=report,
        parameters=count_parameters(dense_plan(shape), shape),
        seqlen=texts["fitness"].seqlen,
        tokens=tokens,
        seconds=seconds,
        data=texts["fitness"].source,
        fitness_digest=windows_digest(windows["fitness"]),
        report_digest=windows_digest(windows["report"]) if "report" in windows else None,
    )


def allocate_once(spec: SearchSpec, allocation: Allocation, progress: Progress = no_progress) -> AllocationResult:
    """Compute the rates of an allocation without pruning."""
    target = prepare(PruningRequest(spec, allocation), progress, measured=False)
    rates = allocate(target, allocation)
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


def removed_share(parameters: Parameters) -> float:
    """Return the share of the decoder's parameters that was removed."""
    return round(1 - parameters.decoder_after / parameters.decoder_before, 5)
