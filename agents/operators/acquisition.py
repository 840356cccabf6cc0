"""CMA-ES on the surrogate: the sample with the lowest `mean - kappa * std`. Pure."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from agents.operators.plan_space import Array, plan_space_of
from agents.operators.surrogate import surrogate_of
from agents.population.view import View

if TYPE_CHECKING:
    from cmaes import CMA, SepCMA

OUTSIDE = 1e6
"""Acquisition of a sample outside of the trust region, to which its distance is added."""


def lowest_acquisition(
    view: View,
    optimizer: "CMA | SepCMA",
    generations: int,
    kappa: float,
    values_of: Callable[[Array], Array],
    first: Array | None = None,
    region: tuple[Array, float] | None = None,
) -> Array:
    """Return the best of the samples that `optimizer` draws in its generations, and of the sample `first`.

    `values_of` turns samples [samples, numbers] into raw rates [samples, units]. No plan is measured.

    `region` is a trust region: the rates of some plans [plans, units], and how much each rate may differ from those of
    the nearest of them. A sample outside is worse than every sample inside, and the worse the farther outside it is.
    """
    surrogate, space = surrogate_of(view), plan_space_of(view)
    lowest, found = np.inf, np.zeros(0)
    for _ in range(generations):
        samples = np.array([optimizer.ask() for _ in range(optimizer.population_size)])
        if first is not None:
            samples[0], first = first, None
        values = values_of(samples)
        mean, std = surrogate.predict_shares(space.shares(values))
        acquisition = mean - kappa * std
        if region is not None:
            centers, length = region
            distance = np.abs(space.rates(values)[:, None] - centers).max(axis=2).min(axis=1)
            acquisition = np.where(distance > length, OUTSIDE + distance, acquisition)
        if acquisition.min() < lowest:
            lowest, found = acquisition.min(), samples[acquisition.argmin()]
        optimizer.tell(list(zip(samples, acquisition.tolist(), strict=True)))
    return found
