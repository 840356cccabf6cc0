"""CMA-ES over the pruning rates, by the package `cmaes`: a round is a generation.

The separable variant (Ros & Hansen, 2008), which learns one variance a unit: a few hundred evaluations are too few to
learn how sixty units depend on each other.
"""

import random
from collections.abc import Iterator, Sequence

import numpy as np
from cmaes import SepCMA

from agents.classical import draw_all
from agents.offers import NothingLeft
from agents.view import Member, Proposal, Submit, View
from protocol.plan import unit_bounds

SIGMA = 0.1
"""The standard deviation of the first generation, in rates."""
LEAST = 2
"""Members of a generation that the method needs."""


class CmaEsMutator:
    """Draws each round from the distribution that the earlier rounds have taught; `size` is a generation's.

    Nothing is kept beside the history: what was drawn in the earlier rounds is drawn again, from the seed, and told
    with what it measured.
    """

    def __init__(self, size: int) -> None:
        self._size = max(LEAST, size)

    async def propose(self, view: View, _parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Get `count` candidates accepted; returns how many were, fewer where what is drawn is known already."""
        generation = self._generation(view)

        def draw(_: random.Random) -> Proposal:
            rates = next(generation, None)
            if rates is None:
                raise NothingLeft
            return Proposal(rates)

        return await draw_all("mutator", view, count, submit, draw)

    def _generation(self, view: View) -> Iterator[tuple[float, ...]]:
        """The raw rates of this round."""
        optimizer = SepCMA(
            mean=np.array(_start(view)),
            sigma=SIGMA,
            bounds=np.array(unit_bounds(view.card.shape, view.spec.granularity)),
            seed=view.spec.seed % 2**32,
            population_size=self._size,
        )
        fitness = {member.candidate.id: member.fitness for member in view.measured}
        worst = max(fitness.values(), default=0.0)
        for _ in range(1, view.round):
            drawn = [optimizer.ask() for _ in range(self._size)]
            # What was not measured (it failed, or the budget was used up) was no good.
            optimizer.tell([(x, fitness.get(view.candidate_id(x.tolist()), worst)) for x in drawn])
        for _ in range(self._size):
            yield tuple(optimizer.ask().tolist())


def _start(view: View) -> tuple[float, ...]:
    """The best of the first population: where the search begins."""
    first = [member for member in view.measured if member.candidate.provenance.round == 0]
    return first[0].candidate.rates if first else view.spec.uniform_rates(view.card.shape)
