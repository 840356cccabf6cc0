"""Measures the statistics that an allocation method needs; protocol/plans/allocation.py computes the rates."""

from collections.abc import Callable

from gpu_worker.evaluation.integer_program import mip_rates
from gpu_worker.evaluation.target import Target, is_fitted
from gpu_worker.models.loading import LoadedModel
from gpu_worker.progress import Progress, no_progress
from protocol.errors import BudgetError, RuleError
from protocol.plans.allocation import (
    Allocation,
    Choice,
    DenseMeasurements,
    PruningRequest,
    allocation_rates,
    llm_pruner_rates,
    uniform_rates,
)
from protocol.plans.features import MEASURED, RawFeatures, raw_features
from protocol.plans.plan import check_rates
from protocol.plans.shape import ModelShape
from protocol.plans.single_unit_pruning import single_unit_removed_share


def prepare(
    request: PruningRequest,
    progress: Progress = no_progress,
    *,
    check: Callable[[LoadedModel], None] = lambda _: None,
    measured: bool = True,
) -> Target:
    """Prepare the target to prune, with the statistics of the dense model that an allocation needs.

    `check` is called as soon as the model is loaded, before the slow stages. Given rates, or an allocation's budget,
    are checked then too. With `measured=False`, evaluation texts are not read. Raises BudgetError for rates of another
    model, and for rates of the wrong number, range or budget.
    """

    def check_first(model: LoadedModel) -> None:
        check(model)
        _check_choice(request, model.decoder.shape)

    choice = request.choice
    threshold = choice.outlier_threshold if isinstance(choice, Allocation) and _needs_outliers(choice) else None
    return Target(request.spec, progress, outlier_threshold=threshold, check=check_first, measured=measured)


def _needs_outliers(choice: Allocation) -> bool:
    return choice.method == "owl" or (choice.method == "rule" and "outliers" in choice.rule.features)


def _check_choice(request: PruningRequest, shape: ModelShape) -> None:
    """Raise BudgetError or RuleError if a model of `shape` cannot be pruned so, as far as is known before measuring."""
    spec, choice, known = request.spec, request.choice, request.shape
    if isinstance(choice, Allocation):
        if choice.method == "rule" and "fit_error" in choice.rule.features and not is_fitted(spec):
            raise RuleError("the rule needs the feature fit_error: give --reconstruction least-squares, dense scoring")
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


def choose_rates(target: Target, choice: Choice) -> tuple[float, ...]:
    """Return the rates to prune by. `target` comes from `prepare`."""
    return allocate(target, choice) if isinstance(choice, Allocation) else choice


def allocate(target: Target, allocation: Allocation) -> tuple[float, ...]:
    """Return the method's pruning rates, one per unit, whose mean is exactly the spec's rate.

    `target` comes from `prepare`. Raises BudgetError if the method cannot reach the rate, RuleError if a rule needs a
    feature that this spec does not have.
    """
    spec, shape = target.spec, target.shape
    if allocation.method == "mip":
        return mip_rates(target.levels(), spec, shape)
    units = shape.units(spec.granularity)
    needed = allocation.rule.features if allocation.method == "rule" else {allocation.method}
    rises: tuple[float, ...] = ()
    if needed & {"sensitivity", "least_damage"}:
        rises = target.sensitivity()
    others: RawFeatures = {}
    if needed & (MEASURED.keys() - {"sensitivity", "outliers"}):
        others = target.features()
    removed = [single_unit_removed_share(unit, spec, shape) for unit in units]
    findings = DenseMeasurements(
        outliers=target.outliers,
        sensitivity=rises,
        removed=removed,
        features=raw_features(units, sensitivity=rises, removed=removed, outliers=target.outliers, others=others),
    )
    return allocation_rates(allocation, findings, shape, spec.rate, spec.granularity)
