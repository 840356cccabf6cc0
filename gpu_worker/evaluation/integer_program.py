"""Allocation by integer programming: for each unit one of several sizes, so that the summed damage is least.

This is how Puzzletron (Bercovich et al., 2024) puts a model together from blocks. It measures how much the model loses
if only one block has a size, and assumes that losses add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gpu_worker.evaluation.sensitivity import measure_harm
from gpu_worker.progress import Progress
from gpu_worker.pruning.ordered_model import OrderedModel
from protocol.errors import BudgetError
from protocol.plans.budget import on_budget
from protocol.plans.plan import LayerPlan, attention_levels, dense_plan
from protocol.plans.shape import ModelShape, Unit
from protocol.plans.single_unit_pruning import single_unit_plan
from protocol.plans.spec import SearchSpec

SHARES = (0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9)
"""The shares that an MLP, or a layer, may lose. An attention block may lose each number of heads that it can."""


@dataclass(frozen=True)
class Level:
    """A size that a unit may have."""

    rate: float
    plan: LayerPlan


def levels_of(unit: Unit, spec: SearchSpec, shape: ModelShape) -> tuple[Level, ...]:
    """Return the sizes of a unit below its whole size, largest first."""
    if unit.kind == "attention":
        whole = dense_plan(shape).layers[unit.layer]
        sizes = [(rate, kept) for rate, kept in attention_levels(shape, unit.layer) if 0 < rate <= unit.highest_rate]
        return tuple(
            Level(rate, whole.model_copy(update={"kv_heads": kv, "queries_per_kv": each})) for rate, (kv, each) in sizes
        )
    rates = [*(rate for rate in SHARES if rate < unit.highest_rate), unit.highest_rate]
    return tuple(Level(rate, single_unit_plan(unit, spec.model_copy(update={"rate": rate}), shape)) for rate in rates)


def measure_levels(
    ordered: OrderedModel, spec: SearchSpec, text: Tensor, progress: Progress
) -> dict[str, tuple[float, ...]]:
    """Return KL(dense ‖ pruned) in nats per token for each size of each unit, pruned alone, by the unit's name.

    Measured as sensitivity is. Raises NotFiniteError if the dense model is broken.
    """
    shape = ordered.decoder.shape
    units = shape.units(spec.granularity)
    sizes = [(unit, level.plan) for unit in units for level in levels_of(unit, spec, shape)]
    found = iter(measure_harm(ordered, sizes, text, progress, "measuring sizes"))
    return {unit.name: tuple(next(found) for _ in levels_of(unit, spec, shape)) for unit in units}


def mip_rates(harm: dict[str, tuple[float, ...]], spec: SearchSpec, shape: ModelShape) -> tuple[float, ...]:
    """Return the rates with the least summed harm that remove at least the spec's share, moved onto the budget.

    `harm` comes from `measure_levels`. Raises BudgetError if no sizes remove so much.
    """
    units = shape.units(spec.granularity)
    rates = [(0.0, *(level.rate for level in levels_of(unit, spec, shape))) for unit in units]
    costs = [(0.0, *(max(each, 0.0) for each in harm[unit.name])) for unit in units]
    removed = [[rate * unit.parameters for rate in each] for unit, each in zip(units, rates, strict=True)]
    chosen = _least_cost(costs, removed, spec.rate * sum(unit.parameters for unit in units))
    return on_budget([each[i] for each, i in zip(rates, chosen, strict=True)], shape, spec.rate, spec.granularity)


def _least_cost(costs: Sequence[Sequence[float]], gains: Sequence[Sequence[float]], least: float) -> list[int]:
    """Return the index of one option for each unit, with the least summed cost, whose gains sum to `least` or more."""
    from scipy.optimize import LinearConstraint, milp  # takes half a second

    flat_costs, flat_gains = (np.array([value for each in values for value in each]) for values in (costs, gains))
    owner = np.repeat(np.arange(len(costs)), [len(each) for each in costs])
    one_each = (owner == np.arange(len(costs))[:, None]).astype(float)
    found = milp(
        flat_costs,
        integrality=np.ones_like(flat_costs),
        bounds=(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(flat_gains / least, 1, np.inf)],
        options={"mip_rel_gap": 1e-4, "time_limit": 60},
    )
    if found.x is None:
        raise BudgetError("no choice of sizes removes so many parameters: lower the rate")
    return [int(found.x[owner == unit].argmax()) for unit in range(len(costs))]
