"""Moves: one unit is pruned more, another less, by the same number of parameters. The surrogate ranks them. Pure.

An LLM is good at choosing and combining, and bad at arithmetic with sixty numbers. So the surrogate lists the most
promising moves, and the LLM decides which of them to combine.
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
"""Numbers of parameters that a move shifts, as shares of the parameters of a decoder layer."""
UNITS_PER_SIDE = 12
"""Number of units considered for each side of a move: the units with the best acquisition."""
MAX_USES = 2
"""Maximum number of moves of a menu in which one unit takes part. Without it, one unit could fill the menu."""
OFFERED = 0.5
"""Share of the units that a menu is made of (at least `UNITS_PER_SIDE` units), sampled anew for each menu. If all
offspring of a round changed the same unit, the search would learn little, and a bad change would harm all of them."""
KAPPA = 1.0
"""Exploration weight of the acquisition, `mean - KAPPA * std` (a lower confidence bound; lower is better)."""


@dataclass(frozen=True)
class Move:
    """One unit is pruned more and another less. `more` and `less` are unit numbers, with the rates after the move."""

    more: int
    less: int
    more_rate: float
    less_rate: float
    mean: float
    """Predicted change of the rise (see surrogate.py), in nats of log-perplexity or divergence; negative is better."""
    std: float
    """Standard deviation of the prediction."""


def move_menu(view: View, parent: Member, rng: random.Random, count: int) -> tuple[Move, ...]:
    """Return the `count` moves from `parent` with the best acquisition, sorted by mean; fewer if fewer are possible."""
    ranked = _Moves(view, parent.candidate.rates, rng).ranked()
    chosen: list[Move] = []
    uses: Counter[int] = Counter()
    for move in ranked:
        if max(uses[move.more], uses[move.less]) < MAX_USES and len(chosen) < count:
            chosen.append(move)
            uses.update((move.more, move.less))
    return tuple(sorted(chosen, key=lambda move: move.mean))


def apply_moves(parent: Member, moves: Sequence[Move]) -> Proposal:
    """Return the parent after these moves. A unit that takes part in several moves changes by their sum."""
    before = parent.candidate.rates
    rates = list(before)
    for move in moves:
        for unit, rate in ((move.more, move.more_rate), (move.less, move.less_rate)):
            rates[unit] = min(max(rates[unit] + rate - before[unit], 0.0), 1.0)
    return Proposal(tuple(rates), (parent.candidate.id,), step="moves")


class _Moves:
    """The moves that are possible from one parent's rates."""

    def __init__(self, view: View, rates: Sequence[float], rng: random.Random) -> None:
        self._view, self._surrogate, self._rates = view, surrogate_of(view), rates
        spec = view.spec
        self._bounds = unit_bounds(view.profile.shape, spec.granularity, spec.lowest_rate, spec.highest_rate)
        units = len(rates)
        self._offered = sorted(rng.sample(range(units), max(min(UNITS_PER_SIDE, units), round(OFFERED * units))))

    def ranked(self) -> list[Move]:
        """Return all moves, sorted by acquisition, best first."""
        layer = self._view.profile.shape.layer_parameters(0)
        # With attention, the next level decides the size, so all SIZES give the same move.
        pairs = dict.fromkeys(pair for size in SIZES for pair in self._pairs(round(size * layer)))
        if not pairs:
            return []
        means, stds = self._surrogate.predict_changes(self._rates, [{a: x, b: y} for a, x, b, y in pairs])
        moves = [
            (mean - KAPPA * std, Move(more, less, more_rate, less_rate, mean, std))
            for (more, more_rate, less, less_rate), mean, std in zip(pairs, means.tolist(), stds.tolist(), strict=True)
        ]
        return [move for _, move in sorted(moves, key=lambda each: each[0])]

    def _pairs(self, parameters: int) -> Iterator[tuple[int, float, int, float]]:
        """Yield two units and their rates after a move of `parameters`, or of attention to its next level."""
        takers, givers = (self._sides(sign, parameters) for sign in (1, -1))
        for more, amount in takers:
            for less, other in givers:
                if more != less and (shifted := self._shifted_by_both(more, amount, less, other, parameters)):
                    yield more, self._after(more, shifted), less, self._after(less, -shifted)

    def _sides(self, sign: int, parameters: int) -> list[tuple[int, int]]:
        """Return the best units to prune more (`sign` 1) or less (−1), each with the number of parameters to shift."""
        amounts = {
            i: self._to_next_level(i, sign) if self._view.units[i].kind == "attention" else parameters
            for i in self._offered
        }
        able = [(i, amount) for i, amount in amounts.items() if self._is_able(i, sign * amount)]
        if not able:
            return []
        means, stds = self._surrogate.predict_changes(self._rates, [{i: self._after(i, sign * a)} for i, a in able])
        acquisition = (means - KAPPA * stds) / np.array([amount for _, amount in able])
        return [able[k] for k in np.argsort(acquisition, kind="stable")[:UNITS_PER_SIDE]]

    def _shifted_by_both(self, more: int, amount: int, less: int, other: int, parameters: int) -> int:
        """Return the number of parameters that both units can shift; 0 if the move is impossible.

        An attention block changes by whole levels; the other unit takes the same number of parameters.
        """
        fixed = [a for i, a in ((more, amount), (less, other)) if self._view.units[i].kind == "attention"]
        if len(fixed) == 2 and fixed[0] != fixed[1]:
            return 0
        shifted = fixed[0] if fixed else parameters
        return shifted if self._is_able(more, shifted) and self._is_able(less, -shifted) else 0

    def _is_able(self, unit: int, parameters: int) -> bool:
        low, high = self._bounds[unit]
        return parameters != 0 and low - ROUNDING <= self._after(unit, parameters) <= high + ROUNDING

    def _after(self, unit: int, parameters: int) -> float:
        """Return the rate of a unit after it loses `parameters` more."""
        return self._rates[unit] + parameters / self._view.units[unit].parameters

    def _to_next_level(self, unit: int, sign: int) -> int:
        return parameters_to_next_level(self._view.profile.shape, self._view.units[unit], self._rates[unit], sign)
