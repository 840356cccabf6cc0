"""Allocation without a search: what a method needs to know of the model is measured, then it says the rates."""

from collections.abc import Callable

from gpu_worker.models import LoadedModel
from gpu_worker.progress import Progress, no_progress
from gpu_worker.sensitivity import measure_sensitivity, removed_alone
from gpu_worker.target import Target
from protocol.allocation import Allocation, llm_pruner_rates, owl_rates, sensitivity_rates, uniform_rates
from protocol.spec import SearchSpec


def prepare(
    spec: SearchSpec,
    allocation: Allocation | None,
    progress: Progress = no_progress,
    *,
    check: Callable[[LoadedModel], None] | None = None,
) -> Target:
    """The target of `spec`, with what `allocation` needs to see of the dense model.

    `check` sees the loaded model before anything that takes time is done with it.
    """
    threshold = allocation.outlier_threshold if allocation is not None and allocation.method == "owl" else None
    return Target(spec, progress, outlier_threshold=threshold, check=check)


def allocate(target: Target, allocation: Allocation, progress: Progress = no_progress) -> tuple[float, ...]:
    """The method's pruning rates, one per unit of the target's spec, with a mean of exactly its rate.

    `target` comes from `prepare`. Raises BudgetError where the method cannot reach the rate.
    """
    spec, shape = target.spec, target.shape
    if allocation.method == "uniform":
        return uniform_rates(shape, spec.rate, spec.granularity)
    if allocation.method == "owl":
        return owl_rates(target.outliers, allocation.outlier_range, shape, spec.rate, spec.granularity)
    if allocation.method == "llm-pruner":
        return llm_pruner_rates(allocation.first_layers, allocation.last_layers, shape, spec.rate, spec.granularity)
    rises = measure_sensitivity(target.ordered, spec, target.texts.calibration, progress)
    removed = [removed_alone(unit, spec, shape) for unit in shape.units(spec.granularity)]
    return sensitivity_rates(rises, removed, shape, spec.rate, spec.granularity)
