"""CMA-ES over the pruning rates, by the package `cmaes`: a round is a generation.

The separable variant (Ros & Hansen, 2008), which learns one variance a unit: a few hundred evaluations are too few to
learn how sixty units depend on each other.
"""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from cmaes import SepCMA

from agents.baselines.classical import draw_all
from agents.population.submission import NothingLeft
from agents.population.view import Member, Proposal, Submit, View
from protocol.plans.plan import unit_bounds

SIGMA = 0.1
"""The standard deviation of the first generation, in rates."""
LEAST = 2
"""Members of a generation that the method needs."""


class CmaEsMutator:
    """Draws each round from the distribution that the earlier rounds have taught; `size` is a generation's.

    Nothing is kept beside the history. A process that begins amid a search draws the earlier rounds again, from the
    seed, and tells them with what they measured.
    """

    def __init__(self, size: int) -> None:
        self._size = max(LEAST, size)
        self._optimizer: SepCMA | None = None
        self._drawn: list[Any] = []
        self._round = 0
        """Whose draws `_drawn` are."""

    async def propose(self, view: View, _parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Get `count` candidates accepted; returns how many were, fewer where what is drawn is known already."""
        # Each proposal that is compared with the history takes milliseconds: others go on meanwhile.
        await asyncio.to_thread(self._go_to, view)
        generation = iter(self._drawn)

        def draw(_: random.Random) -> Proposal:
            rates = next(generation, None)
            if rates is None:
                raise NothingLeft
            return Proposal(tuple(rates.tolist()))

        return await draw_all("mutator", view, count, submit, draw)

    def _go_to(self, view: View) -> None:
        """Draw this round, after telling the earlier ones."""
        if self._optimizer is None or self._round > view.round:
            self._optimizer, self._round = self._first(view), 0
        while self._round < view.round:
            if self._round:
                self._tell(view)
            self._drawn = [self._optimizer.ask() for _ in range(self._size)]
            self._round += 1

    def _first(self, view: View) -> SepCMA:
        spec = view.spec
        bounds = np.array(unit_bounds(view.profile.shape, spec.granularity, spec.lowest_rate, spec.highest_rate))
        return SepCMA(
            mean=np.clip(_start(view), bounds[:, 0], bounds[:, 1]),  # of which rounding may have made a little more
            sigma=SIGMA,
            bounds=bounds,
            seed=spec.seed % 2**32,
            population_size=self._size,
        )

    def _tell(self, view: View) -> None:
        assert self._optimizer is not None
        ids = [view.candidate_id(x.tolist()) for x in self._drawn]
        fitness = [None if id_ is None else view.fitness_of(id_) for id_ in ids]
        # What was not measured (it failed, it has no plan, or the budget was used up) was no good.
        worst = max((each for each in fitness if each is not None), default=0.0)
        told = [worst if each is None else each for each in fitness]
        self._optimizer.tell(list(zip(self._drawn, told, strict=True)))


def _start(view: View) -> tuple[float, ...]:
    """The best of the first population: where the search begins."""
    return view.start or view.spec.uniform_rates(view.profile.shape)
