"""Allocation without a search: what a method needs to know of the model is measured, then it says the rates."""

from collections.abc import Callable

from gpu_worker.evaluation.sensitivity import measure_sensitivity
from gpu_worker.evaluation.target import Target
from gpu_worker.models.loading import LoadedModel
from gpu_worker.progress import Progress, no_progress
from protocol.errors import BudgetError
from protocol.plans.allocation import Allocation, DenseMeasurements, allocation_rates, llm_pruner_rates, uniform_rates
from protocol.plans.plan import check_rates
from protocol.plans.shape import ModelShape
from protocol.plans.single_unit_pruning import single_unit_removed_share
from protocol.plans.spec import SearchSpec

Choice = tuple[float, ...] | Allocation
"""Given rates, or those of an allocation."""


def prepare(
    spec: SearchSpec,
    choice: Choice,
    progress: Progress = no_progress,
    *,
    shape: ModelShape | None = None,
    check: Callable[[LoadedModel], None] = lambda _: None,
    measured: bool = True,
) -> Target:
    """The target of `spec`, with what `choice` needs to see of the dense model.

    Given rates, for a model of this `shape` where that is known, are checked as soon as the model is loaded, and so is
    the budget of an allocation that needs no measurement; `check` sees the model too. All of that comes before anything
    that takes time. Where nothing will be `measured`, no text for that is read. Raises BudgetError for rates of another
    model, number, range or budget.
    """

    def check_first(model: LoadedModel) -> None:
        check(model)
        check_choice(spec, choice, shape, model.decoder.shape)

    threshold = choice.outlier_threshold if isinstance(choice, Allocation) and choice.method == "owl" else None
    return Target(spec, progress, outlier_threshold=threshold, check=check_first, measured=measured)


def check_choice(spec: SearchSpec, choice: Choice, known: ModelShape | None, shape: ModelShape) -> None:
    """Raise BudgetError where a model of `shape` cannot be pruned by `choice`, as far as that is known beforehand."""
    if isinstance(choice, Allocation):
        if choice.method == "llm-pruner":
            rates = llm_pruner_rates(choice.first_layers, choice.last_layers, shape, spec.rate, spec.granularity)
        else:
            rates = uniform_rates(shape, spec.rate, spec.granularity)
    else:
        if known is not None and not known.same_decoder(shape):
            raise BudgetError(f"the rates are for {known.words}; {spec.model} has {shape.words}")
        check_rates(choice, shape, spec.rate, spec.granularity)
        rates = choice
    spec.plan(list(rates), shape)


def choose_rates(target: Target, choice: Choice, progress: Progress = no_progress) -> tuple[float, ...]:
    """The rates to prune `target` by, which comes from `prepare`."""
    return allocate(target, choice, progress) if isinstance(choice, Allocation) else choice


def allocate(target: Target, allocation: Allocation, progress: Progress = no_progress) -> tuple[float, ...]:
    """The method's pruning rates, one per unit of the target's spec, with a mean of exactly its rate.

    `target` comes from `prepare`. Raises BudgetError where the method cannot reach the rate.
    """
    spec, shape = target.spec, target.shape
    findings = DenseMeasurements(outliers=target.outliers)
    if allocation.method == "sensitivity":
        rises = measure_sensitivity(target.ordered, spec, target.calibration, progress)
        removed = [single_unit_removed_share(unit, spec, shape) for unit in shape.units(spec.granularity)]
        findings = DenseMeasurements(sensitivity=rises, removed=removed)
    return allocation_rates(allocation, findings, shape, spec.rate, spec.granularity)
