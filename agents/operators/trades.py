"""Trades: one unit is pruned more, another less, by the same number of parameters. Ranked by a surrogate. Pure.

What an LLM is good at is to choose and to combine; what it is bad at is to reckon with sixty numbers. So the surrogate
lists the trades that promise most, and the LLM decides which of them to make together.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from agents.operators.surrogate import surrogate_of
from agents.population.view import Member, Proposal, View
from protocol.plans.plan import parameters_to_next_level, unit_bounds
from protocol.plans.rates import ROUNDING

SIZES = (0.04, 0.08, 0.16)
"""Parameters that change sides, as shares of a decoder layer's."""
WIDE = 12
"""Units that are looked at on each side of a trade: those that promise most there."""
MOST_USES = 2
"""Trades of a menu that one unit may take part in: a menu of one unit is no choice."""
OFFERED = 0.5
"""Share of the units that a menu is made of (`WIDE` at least), drawn anew for each: offspring of one round that all try
the same unit teach one thing many times over, and if it hurts, it hurts all of them."""
EAGERNESS = 1.0
"""Standard deviations of what a trade promises that speak for it: of what nobody has tried more is to be learned."""


@dataclass(frozen=True)
class Trade:
    """The unit `more` is pruned more, the unit `less` is pruned less, by their numbers; and the rates that both get."""

    more: int
    less: int
    more_rate: float
    less_rate: float
    promise: float
    """The change that the surrogate expects, in nats of log-perplexity, or of divergence; negative is better."""
    doubt: float
    """How far that may be off: a standard deviation."""


def menu(view: View, parent: Member, rng: random.Random, count: int) -> tuple[Trade, ...]:
    """The `count` trades from `parent` that promise most or are least known, by promise; fewer where there are none."""
    ranked = _Market(view, parent.candidate.rates, rng).ranked()
    chosen: list[Trade] = []
    uses: Counter[int] = Counter()
    for trade in ranked:
        if max(uses[trade.more], uses[trade.less]) < MOST_USES and len(chosen) < count:
            chosen.append(trade)
            uses.update((trade.more, trade.less))
    return tuple(sorted(chosen, key=lambda trade: trade.promise))


def traded(parent: Member, trades: Sequence[Trade]) -> Proposal:
    """The parent after these trades; a unit that takes part in several moves by each."""
    before = parent.candidate.rates
    rates = list(before)
    for trade in trades:
        for unit, rate in ((trade.more, trade.more_rate), (trade.less, trade.less_rate)):
            rates[unit] = min(max(rates[unit] + rate - before[unit], 0.0), 1.0)
    return Proposal(tuple(rates), (parent.candidate.id,))


class _Market:
    """All trades from one parent's rates."""

    def __init__(self, view: View, rates: Sequence[float], rng: random.Random) -> None:
        self._view, self._surrogate, self._rates = view, surrogate_of(view), rates
        spec = view.spec
        self._bounds = unit_bounds(view.profile.shape, spec.granularity, spec.lowest_rate, spec.highest_rate)
        self._offered = sorted(rng.sample(range(len(rates)), max(min(WIDE, len(rates)), round(OFFERED * len(rates)))))

    def ranked(self) -> list[Trade]:
        """Best first."""
        layer = self._view.profile.shape.layer_parameters(0)
        # Where attention takes part its level is the size, every time.
        moves = dict.fromkeys(pair for size in SIZES for pair in self._pairs(round(size * layer)))
        if not moves:
            return []
        promises, doubts = self._surrogate.changes(self._rates, [{a: x, b: y} for a, x, b, y in moves])
        trades = [
            (promise - EAGERNESS * doubt, Trade(more, less, more_rate, less_rate, promise, doubt))
            for (more, more_rate, less, less_rate), promise, doubt in zip(
                moves, promises.tolist(), doubts.tolist(), strict=True
            )
        ]
        return [trade for _, trade in sorted(trades, key=lambda each: each[0])]

    def _pairs(self, parameters: int) -> Iterator[tuple[int, float, int, float]]:
        """Two units and their rates after a trade of `parameters`, or of attention's next level where it takes part."""
        takers, givers = (self._sides(sign, parameters) for sign in (1, -1))
        for more, amount in takers:
            for less, other in givers:
                if more != less and (moved := self._moved_by_both(more, amount, less, other, parameters)):
                    yield more, self._after(more, moved), less, self._after(less, -moved)

    def _sides(self, sign: int, parameters: int) -> list[tuple[int, int]]:
        """The units that promise most when pruned more (`sign` 1) or less (−1), and by how many parameters they are."""
        amounts = {
            i: self._to_next_level(i, sign) if self._view.units[i].kind == "attention" else parameters
            for i in self._offered
        }
        able = [(i, amount) for i, amount in amounts.items() if self._is_able(i, sign * amount)]
        if not able:
            return []
        promises, doubts = self._surrogate.changes(self._rates, [{i: self._after(i, sign * a)} for i, a in able])
        worth = (promises - EAGERNESS * doubts) / np.array([amount for _, amount in able])
        return [able[k] for k in np.argsort(worth, kind="stable")[:WIDE]]

    def _moved_by_both(self, more: int, amount: int, less: int, other: int, parameters: int) -> int:
        """Parameters of a trade: the side that can choose takes as many as the other has to; 0 where none can be."""
        fixed = [a for i, a in ((more, amount), (less, other)) if self._view.units[i].kind == "attention"]
        if len(fixed) == 2 and fixed[0] != fixed[1]:
            return 0
        moved = fixed[0] if fixed else parameters
        return moved if self._is_able(more, moved) and self._is_able(less, -moved) else 0

    def _is_able(self, unit: int, parameters: int) -> bool:
        low, high = self._bounds[unit]
        return parameters != 0 and low - ROUNDING <= self._after(unit, parameters) <= high + ROUNDING

    def _after(self, unit: int, parameters: int) -> float:
        """The rate of a unit that loses so many parameters more."""
        return self._rates[unit] + parameters / self._view.units[unit].parameters

    def _to_next_level(self, unit: int, sign: int) -> int:
        return parameters_to_next_level(self._view.profile.shape, self._view.units[unit], self._rates[unit], sign)
