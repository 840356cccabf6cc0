"""Allocations (uniform, OWL, LLM-Pruner, sensitivity, a rule): pruning rates without a search. Pure.

`mip`, an integer program, is solved where its sizes are measured (gpu_worker/evaluation/integer_program.py).

Each method computes one raw rate per unit. `feasible` then returns the nearest rates with five decimals and a mean of
exactly β.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat

from protocol.errors import BudgetError
from protocol.plans.any_heads import Heads
from protocol.plans.budget import on_budget, sensitivity_rates
from protocol.plans.features import RawFeatures, unit_features
from protocol.plans.rule import DEFAULT_RULE, Rule
from protocol.plans.shape import Granularity, ModelShape
from protocol.plans.spec import Reconstruction, SearchSpec
from protocol.plans.value import Value

Method = Literal["uniform", "first-layer", "owl", "llm-pruner", "sensitivity", "mip", "rule"]

OUTLIER_THRESHOLD = 5.0
"""OWL's M, the authors' default."""


def uniform_label(reconstruction: Reconstruction, heads: Heads = "rectangular") -> str:
    """Return the name of this uniform baseline in tables."""
    fitted = reconstruction == "least-squares"
    if heads == "any":
        return "uniform, any heads, fitted" if fitted else "uniform, any heads"
    return "uniform, fitted" if fitted else "uniform, rectangular"


class Allocation(Value):
    """An allocation method and its settings. Settings of other methods are ignored."""

    method: Method
    outlier_threshold: PositiveFloat = OUTLIER_THRESHOLD
    """OWL's M: an entry of |W|·‖x‖ is an outlier if it exceeds M times the layer's mean."""
    outlier_range: float = Field(default=0.08, gt=0, lt=1)
    """OWL's λ: rates lie within about β ± λ."""
    first_layers: NonNegativeInt | None = None
    """LLM-Pruner: number of first layers that are not pruned; None means an eighth (4 of 32)."""
    last_layers: NonNegativeInt | None = None
    """LLM-Pruner: number of last layers that are not pruned; None means a sixteenth (2 of 32)."""
    rule: Rule = DEFAULT_RULE


Choice = tuple[float, ...] | Allocation
"""Given rates, or an allocation that computes them."""


@dataclass(frozen=True)
class PruningRequest:
    """A model to prune without a search, and its rates."""

    spec: SearchSpec
    choice: Choice
    shape: ModelShape | None = None
    """The model shape that given rates are for, if known."""
    method: str = "rates"
    """The allocation method or the source of the rates, as shown to users."""


@dataclass(frozen=True)
class DenseMeasurements:
    """Measurements of the dense model, for the methods that need them."""

    outliers: Sequence[float] = ()
    """OWL: share of outliers per layer, in percent."""
    sensitivity: Sequence[float] = ()
    """Per unit: KL divergence from the dense model when only this unit is pruned."""
    removed: Sequence[float] = ()
    """Per unit: the share of its parameters that was removed to measure `sensitivity`."""
    features: RawFeatures = field(default_factory=dict)
    """What a rule computes with."""


def allocation_rates(
    allocation: Allocation, findings: DenseMeasurements, shape: ModelShape, rate: float, granularity: Granularity
) -> tuple[float, ...]:
    """Return the method's pruning rates, one per unit, with a mean of exactly `rate`.

    Raises BudgetError if the method cannot reach that mean, RuleError if a rule needs a feature that is missing.
    """
    if allocation.method == "uniform":
        return uniform_rates(shape, rate, granularity)
    if allocation.method == "first-layer":
        return llm_pruner_rates(1, 0, shape, rate, granularity)
    if allocation.method == "owl":
        return owl_rates(findings.outliers, allocation.outlier_range, shape, rate, granularity)
    if allocation.method == "llm-pruner":
        return llm_pruner_rates(allocation.first_layers, allocation.last_layers, shape, rate, granularity)
    if allocation.method == "rule":
        values = allocation.rule.rates(unit_features(shape, rate, granularity, findings.features))
        return on_budget(values, shape, rate, granularity)
    return sensitivity_rates(findings.sensitivity, findings.removed, shape, rate, granularity)


def uniform_rates(shape: ModelShape, rate: float, granularity: Granularity) -> tuple[float, ...]:
    """Return the same rate for every unit."""
    return on_budget([rate] * len(shape.units(granularity)), shape, rate, granularity)


def owl_rates(
    outliers: Sequence[float], spread: float, shape: ModelShape, rate: float, granularity: Granularity
) -> tuple[float, ...]:
    """Return OWL's rates (Yin et al., 2024): layers with more outliers are pruned less.

    `outliers` is the share of outliers per layer, in percent, and `spread` is λ. Scaled to [0, 2λ] and shifted to a
    mean of 1 − β, the outlier shares become the share that each layer keeps. All units of a layer get its rate.
    """
    least, most = min(outliers), max(outliers)
    scaled = [2 * spread * (d - least) / (most - least) if most > least else 0.0 for d in outliers]
    mean = statistics.fmean(scaled)
    rates = [rate + mean - each for each in scaled]
    return on_budget([rates[unit.layer] for unit in shape.units(granularity)], shape, rate, granularity)


def llm_pruner_rates(
    first: int | None, last: int | None, shape: ModelShape, rate: float, granularity: Granularity
) -> tuple[float, ...]:
    """Return LLM-Pruner's rates (Ma et al., 2023): equal in the middle layers, zero in the first and last ones.

    Raises BudgetError if the middle layers are too small for the budget.
    """
    count = len(shape.layers)
    whole = (round(count / 8) if first is None else first, round(count / 16) if last is None else last)
    if sum(whole) >= count:
        raise BudgetError(
            f"{whole[0]} first and {whole[1]} last layers are all of the model: no layer is left to prune"
        )
    spared = [not whole[0] <= unit.layer < count - whole[1] for unit in shape.units(granularity)]
    units = shape.units(granularity)
    middle = (
        rate
        * sum(u.parameters for u in units)
        / sum(u.parameters for u, keep in zip(units, spared, strict=True) if not keep)
    )
    try:
        return on_budget([0.0 if keep else middle for keep in spared], shape, rate, granularity, spared=spared)
    except BudgetError as error:
        raise BudgetError(f"{error}, because {whole[0]} first and {whole[1]} last layers are not pruned") from error
