"""Pruning rates without a search: what every search is compared with. Pure.

Each method gives one raw rate per unit; `feasible` then moves them to five decimals with a mean of exactly β.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat

from protocol.errors import BudgetError
from protocol.plans.any_heads import Heads
from protocol.plans.plan import unit_bounds
from protocol.plans.rates import feasible
from protocol.plans.shape import Granularity, ModelShape, Unit
from protocol.plans.spec import Reconstruction

Method = Literal["uniform", "first-layer", "owl", "llm-pruner", "sensitivity"]

OUTLIER_THRESHOLD = 5.0
"""OWL's M, as its authors set it."""
SENSITIVITY_FLOOR = 1.0
"""Times the median that is added to every sensitivity. Most units matter about as little, and what tells them apart is
noise: without it the luckiest unit would be pruned away. A unit that matters ten times as much is still spared."""


def uniform_label(reconstruction: Reconstruction, heads: Heads = "rectangular") -> str:
    """Return the name of uniform pruning in tables, which shows how strong a baseline it is."""
    fitted = reconstruction == "least-squares"
    if heads == "any":
        return "uniform, any heads, fitted" if fitted else "uniform, any heads"
    return "uniform, fitted" if fitted else "uniform, rectangular"


class Allocation(BaseModel):
    """A method and its settings; those of other methods are not read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method
    outlier_threshold: PositiveFloat = OUTLIER_THRESHOLD
    """OWL's M: an entry of |W|·‖x‖ is an outlier when it exceeds M times the layer's mean."""
    outlier_range: float = Field(default=0.08, gt=0, lt=1)
    """OWL's λ: rates lie within β ± λ, more or less."""
    first_layers: NonNegativeInt | None = None
    """LLM-Pruner: how many layers at the bottom are kept whole; an eighth of them if None, as 4 of 32."""
    last_layers: NonNegativeInt | None = None
    """LLM-Pruner: how many at the top; a sixteenth of them if None, as 2 of 32."""


@dataclass(frozen=True)
class Findings:
    """What was measured of the dense model, for the methods that need it."""

    outliers: Sequence[float] = ()
    """OWL: each layer's share of outliers, in percent."""
    sensitivity: Sequence[float] = ()
    """Each unit's divergence from the dense model when it alone loses the share `removed`."""
    removed: Sequence[float] = ()


def allocated(
    allocation: Allocation, findings: Findings, shape: ModelShape, rate: float, granularity: Granularity
) -> tuple[float, ...]:
    """The method's pruning rates, one per unit, with a mean of exactly `rate`.

    Raises BudgetError where the method cannot reach it.
    """
    if allocation.method == "uniform":
        return uniform_rates(shape, rate, granularity)
    if allocation.method == "first-layer":
        return llm_pruner_rates(1, 0, shape, rate, granularity)
    if allocation.method == "owl":
        return owl_rates(findings.outliers, allocation.outlier_range, shape, rate, granularity)
    if allocation.method == "llm-pruner":
        return llm_pruner_rates(allocation.first_layers, allocation.last_layers, shape, rate, granularity)
    return sensitivity_rates(findings.sensitivity, findings.removed, shape, rate, granularity)


def uniform_rates(shape: ModelShape, rate: float, granularity: Granularity) -> tuple[float, ...]:
    """The same rate for every unit."""
    return _on_budget([rate] * len(shape.units(granularity)), shape, rate, granularity)


def owl_rates(
    outliers: Sequence[float], spread: float, shape: ModelShape, rate: float, granularity: Granularity
) -> tuple[float, ...]:
    """OWL (Yin et al., 2024): layers with more outliers lose less.

    `outliers` is each layer's share of outliers, in percent. Scaled to [0, 2λ] and shifted so that their mean is 1 − β,
    they are what a layer keeps; `spread` is λ. A layer's rate goes to each of its units.
    """
    least, most = min(outliers), max(outliers)
    scaled = [2 * spread * (d - least) / (most - least) if most > least else 0.0 for d in outliers]
    mean = statistics.fmean(scaled)
    rates = [rate + mean - each for each in scaled]
    return _on_budget([rates[unit.layer] for unit in shape.units(granularity)], shape, rate, granularity)


def llm_pruner_rates(
    first: int | None, last: int | None, shape: ModelShape, rate: float, granularity: Granularity
) -> tuple[float, ...]:
    """LLM-Pruner (Ma et al., 2023): the same rate in a middle range of layers, the first and the last kept whole.

    Raises BudgetError where the middle cannot give that much.
    """
    count = len(shape.layers)
    whole = (round(count / 8) if first is None else first, round(count / 16) if last is None else last)
    if sum(whole) >= count:
        raise BudgetError(f"{whole[0]} first and {whole[1]} last layers are all that the model has: nothing is pruned")
    spared = [not whole[0] <= unit.layer < count - whole[1] for unit in shape.units(granularity)]
    units = shape.units(granularity)
    middle = (
        rate
        * sum(u.parameters for u in units)
        / sum(u.parameters for u, keep in zip(units, spared, strict=True) if not keep)
    )
    try:
        return _on_budget([0.0 if keep else middle for keep in spared], shape, rate, granularity, spared=spared)
    except BudgetError as error:
        raise BudgetError(f"{error}, for {whole[0]} first and {whole[1]} last layers stay whole") from error


def sensitivity_rates(
    sensitivity: Sequence[float], removed: Sequence[float], shape: ModelShape, rate: float, granularity: Granularity
) -> tuple[float, ...]:
    """The rates with the least damage, if each unit's damage grows with the square of its rate.

    `sensitivity` is each unit's divergence from the dense model when it alone loses the share `removed`. Minimises
    Σ s_i · (p_i / removed_i)² for the given budget: p_i ∝ w_i · removed_i² / s_i, w being parameters, up to the bounds.
    To each s_i `SENSITIVITY_FLOOR` medians are added; what measured below nought counts as nought.
    """
    units = shape.units(granularity)
    floor = SENSITIVITY_FLOOR * max(statistics.median(sensitivity), 1e-6)
    pull = [
        unit.parameters * share**2 / (max(s, 0.0) + floor)
        for unit, share, s in zip(units, removed, sensitivity, strict=True)
    ]
    return _on_budget(_fill(pull, units, shape, rate, granularity), shape, rate, granularity)


def _fill(
    pull: Sequence[float], units: Sequence[Unit], shape: ModelShape, rate: float, granularity: Granularity
) -> list[float]:
    """Rates proportional to `pull`, cut at the units' bounds, that use up the budget."""
    bounds = unit_bounds(shape, granularity)
    budget = rate * sum(unit.parameters for unit in units)

    def at(level: float) -> list[float]:
        return [min(level * p, high) for p, (_, high) in zip(pull, bounds, strict=True)]

    # What cannot lose anything pulls at nothing, and stays whole.
    low, high = 0.0, 1 / min((p for p in pull if p > 0), default=1.0)
    for _ in range(200):
        middle = (low + high) / 2
        spent = sum(r * unit.parameters for r, unit in zip(at(middle), units, strict=True))
        low, high = (middle, high) if spent < budget else (low, middle)
    return at(high)


def _on_budget(
    rates: Sequence[float],
    shape: ModelShape,
    rate: float,
    granularity: Granularity,
    *,
    spared: Sequence[bool] = (),
) -> tuple[float, ...]:
    """The nearest feasible rates; `spared` units keep a rate of nought."""
    bounds = list(unit_bounds(shape, granularity))
    for i, keep in enumerate(spared):
        if keep:
            bounds[i] = (0.0, 0.0)
    return feasible(rates, [unit.parameters for unit in shape.units(granularity)], rate, bounds)
