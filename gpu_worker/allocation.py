"""Pruning rates without a search: the baselines that a search is compared with."""

from collections.abc import Callable
from dataclasses import dataclass

from protocol.plan import Plan
from protocol.shape import ModelShape
from protocol.spec import SearchSpec


@dataclass(frozen=True)
class Allocation:
    """Pruning rates, one per decoder layer, and the plan they become."""

    rates: tuple[float, ...]
    plan: Plan


def uniform(spec: SearchSpec, shape: ModelShape) -> Allocation:
    """The same rate for every layer, and for heads and MLP alike, as FLAP's Wanda-sp does."""
    return Allocation((spec.rate,) * len(shape.layers), spec.uniform_plan(shape))


ALLOCATIONS: dict[str, Callable[[SearchSpec, ModelShape], Allocation]] = {"uniform": uniform}
"""Methods by the name they have on the command line."""
