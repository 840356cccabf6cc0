"""Trades: one unit is pruned more, another less, by the same number of parameters. Ranked by a surrogate. Pure.

What an LLM is good at is to choose and to combine; what it is bad at is to reckon with sixty numbers. So the surrogate
lists the trades that promise most, and the LLM decides which of them to make together.
"""

import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from agents.view import Member, Proposal, View
from protocol.plan import attention_levels, unit_bounds

SIZES = (0.03, 0.06, 0.12)
"""Parameters that change sides, as shares of a decoder layer's."""
WIDE = 12
"""Units that are looked at on each side of a trade: those that promise most there."""
MOST_USES = 2
"""Trades of a menu that one unit may take part in: a menu of one unit is no choice."""
OFFERED = 0.5
"""Share of the units that a menu is made of (`WIDE` at least), drawn anew for each: offspring of one round that all try
the same unit teach one thing many times over, and if it hurts, it hurts all of them."""
DOUBT = 0.25
"""Noise on what a unit promises, as a share of what promises differ by: calls see different menus, and units that the
surrogate is wrong about get their chance."""


@dataclass(frozen=True)
class Trade:
    """The unit `more` is pruned more, the unit `less` is pruned less, by their numbers; and the rates that both get."""

    more: int
    less: int
    more_rate: float
    less_rate: float
    promise: float
    """The change that the surrogate expects, in nats of log-perplexity, or of divergence; negative is better."""


def menu(view: View, parent: Member, rng: random.Random, count: int) -> tuple[Trade, ...]:
    """The `count` trades from `parent` that promise most, best first; fewer where there are not so many."""
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
        self._view, self._surrogate, self._rates = view, view.surrogate, rates
        spec = view.spec
        self._bounds = unit_bounds(view.card.shape, spec.granularity, spec.lowest_rate, spec.highest_rate)
        self._doubts = [rng.gauss(0, DOUBT) for _ in rates]
        self._offered = set(rng.sample(range(len(rates)), max(min(WIDE, len(rates)), round(OFFERED * len(rates)))))

    def ranked(self) -> list[Trade]:
        """Best first, with some noise in the order."""
        layer = self._view.card.shape.layer_parameters(0)
        of_all_sizes = [trade for size in SIZES for trade in self._of_size(round(size * layer))]
        if not of_all_sizes:
            return []
        # Where attention takes part its level is the size, every time.
        found = list({(t.more, t.less, round(t.more_rate, 5)): t for t in of_all_sizes}.values())
        promises = [trade.promise for trade in found]
        spread = statistics.median(promises) - min(promises)
        return sorted(
            found, key=lambda trade: trade.promise + spread * (self._doubts[trade.more] + self._doubts[trade.less])
        )

    def _of_size(self, parameters: int) -> list[Trade]:
        """Trades of `parameters`, or of an attention block's next level where one takes part."""
        sides = {sign: self._sides(sign, parameters) for sign in (1, -1)}
        trades = []
        for more, amount in sides[1]:
            for less, other in sides[-1]:
                if more == less or not (trade := self._trade(more, less, amount, other, parameters)):
                    continue
                trades.append(trade)
        return trades

    def _sides(self, sign: int, parameters: int) -> list[tuple[int, int]]:
        """The units that promise most when pruned more (`sign` 1) or less (−1), and by how many parameters they are."""
        sides = []
        for i, unit in enumerate(self._view.units):
            if i not in self._offered:
                continue
            amount = self._next_level(i, sign) if unit.kind == "attention" else parameters
            promise = self._promise(i, sign * amount)
            if promise is not None:
                sides.append((promise / amount, i, amount))
        return [(i, amount) for _, i, amount in sorted(sides)[:WIDE]]

    def _trade(self, more: int, less: int, amount: int, other: int, parameters: int) -> Trade | None:
        """One trade; the side that can choose takes as many parameters as the other has to."""
        fixed = [a for i, a in ((more, amount), (less, other)) if self._view.units[i].kind == "attention"]
        if len(fixed) == 2 and fixed[0] != fixed[1]:
            return None
        moved = fixed[0] if fixed else parameters
        ours, theirs = self._promise(more, moved), self._promise(less, -moved)
        if ours is None or theirs is None:
            return None
        return Trade(more, less, self._moved(more, moved), self._moved(less, -moved), ours + theirs)

    def _promise(self, unit: int, parameters: int) -> float | None:
        """What the surrogate expects of a unit that loses so many more; None where it cannot."""
        rate = self._moved(unit, parameters)
        low, high = self._bounds[unit]
        if parameters == 0 or not low - 1e-9 <= rate <= high + 1e-9:
            return None
        return self._surrogate.of_unit(unit, rate) - self._surrogate.of_unit(unit, self._rates[unit])

    def _moved(self, unit: int, parameters: int) -> float:
        return self._rates[unit] + parameters / self._view.units[unit].parameters

    def _next_level(self, unit: int, sign: int) -> int:
        """Parameters from where an attention block is to its next level; 0 where there is none."""
        block = self._view.units[unit]
        shares = [share for share, _ in attention_levels(self._view.card.shape, block.layer)]
        now = min(range(len(shares)), key=lambda k: abs(shares[k] - self._rates[unit]))
        if not 0 <= now + sign < len(shares):
            return 0
        return round(abs(shares[now + sign] - self._rates[unit]) * block.parameters)
