"""CMA-ES over the pruning rates, with the package `cmaes`. Each round is a generation.

This is the separable variant (Ros & Hansen, 2008), which learns one variance per unit. A few hundred evaluations are
too few to learn the covariances of sixty units.
"""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.baselines.classical import OperatorAgent
from agents.population.submission import NothingLeft
from agents.population.view import Member, Proposal, Submit, View
from protocol.plans.plan import unit_bounds

if TYPE_CHECKING:
    from cmaes import SepCMA

SIGMA = 0.1
"""Standard deviation of the rates in the first generation."""
MIN_SIZE = 2
"""Minimum number of samples in a generation that the method needs."""


class CmaEsMutator:
    """Samples each round from the distribution learned from earlier rounds; `size` is the number of samples.

    No state is stored. A process that starts in the middle of a search samples the earlier rounds again, from the seed,
    and learns from their outcomes.
    """

    def __init__(self, size: int) -> None:
        self._size = max(MIN_SIZE, size)
        self._optimizer: SepCMA | None = None
        self._samples: list[Any] = []
        self._round = 0
        """The round of `_samples`."""

    async def propose(self, view: View, _parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Submit up to `count` samples. Return the number accepted: fewer if some samples are known plans."""
        # Planning a sample takes milliseconds, so a generation is processed in a thread.
        await asyncio.to_thread(self._advance, view)
        generation = iter(self._samples)

        def next_of_generation(*_: object) -> Proposal:
            rates = next(generation, None)
            if rates is None:
                raise NothingLeft
            return Proposal(tuple(rates.tolist()))

        return await OperatorAgent("mutator", next_of_generation, 0).propose(view, (), count, submit)

    def _advance(self, view: View) -> None:
        """Learn from the earlier rounds and sample this one."""
        if self._optimizer is None or self._round > view.round:
            self._optimizer, self._round = self._first(view), 0
        while self._round < view.round:
            if self._round:
                self._learn(view)
            self._samples = [self._optimizer.ask() for _ in range(self._size)]
            self._round += 1

    def _first(self, view: View) -> "SepCMA":
        from cmaes import SepCMA  # not at the start: it loads SciPy, which takes a second

        spec = view.spec
        bounds = np.array(unit_bounds(view.profile.shape, spec.granularity, spec.lowest_rate, spec.highest_rate))
        return SepCMA(
            mean=np.clip(_start(view), bounds[:, 0], bounds[:, 1]),  # rounding may have moved a rate out of bounds
            sigma=SIGMA,
            bounds=bounds,
            seed=spec.seed % 2**32,
            population_size=self._size,
        )

    def _learn(self, view: View) -> None:
        assert self._optimizer is not None
        ids = [view.candidate_id(x.tolist()) for x in self._samples]
        fitness = [None if id_ is None else view.fitness_of(id_) for id_ in ids]
        # Samples without fitness (they failed, have no plan, or the budget was used up) count as the worst.
        worst = max((each for each in fitness if each is not None), default=0.0)
        filled = [worst if each is None else each for each in fitness]
        self._optimizer.tell(list(zip(self._samples, filled, strict=True)))


def _start(view: View) -> tuple[float, ...]:
    """Return the rates where the search begins: the best of the first population, or uniform rates without them."""
    return view.start or view.spec.uniform_rates(view.profile.shape)
