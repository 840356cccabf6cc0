"""A surrogate: what a plan will measure, guessed from what was measured. Additive over units. Pure.

The rise of log-perplexity over the dense model (the divergence itself, where the search minimises that) is taken as a
sum over units of what each loses. Before anything is measured that is the model card's sensitivity, the divergence from
the dense model at the search's rate: below it in proportion, above it with the square. Pruned together, units cost more
than alone, and some much more, so each outcome moves that: one factor for all, one for each unit, and a slope for each
unit, by ridge regression with the sensitivity as what is believed beforehand.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agents.view import Member, View
from protocol.alone import removed_alone
from protocol.plan import Plan, removed_shares

Vector = NDArray[np.float64]

COMMON, FACTOR, SLOPE = 0.01, 1.0, 100.0
"""How strongly the common factor, a unit's own factor, and its slope are held to what is believed beforehand: the
precision of that belief, as of a normal distribution."""
SHARPNESS = 10.0
"""An outcome's errors are scaled by exp(−SHARPNESS × distance from the best, in nats): the guess has to be right where
the search is. Of one that is 0.2 nats behind an error counts a seventh."""
MOST = 500
"""Outcomes that are looked at, the best ones: in a search of thousands a guess shall not take seconds."""
NOISE = 0.02
"""Of an outcome in log-perplexity: differences below it teach little."""


class Surrogate:
    """Guesses the fitness of plans of one search, from its model card and all that was measured before this round."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._damages = _damages(view)
        self._is_kl = view.spec.measure == "kl"
        self._dense = 0.0 if self._is_kl else math.log(view.card.dense.perplexity)
        self._centre = np.zeros(1 + 2 * len(self._damages))
        """Of the features: a slope says what is unusual in a unit; what all share is the common factor's."""
        self.errors: Vector = np.zeros(0)
        """How far the guess of each outcome, best first, would have been off had it not been seen."""
        self.heard: Vector = np.zeros(0)
        """How much each of them counted, against the best one's 1."""
        self._weights = self._fit(view.measured[:MOST])
        common, *weights = self._weights.tolist()
        own, slopes = weights[: len(self._damages)], weights[len(self._damages) :]
        centres = self._centre[1 + len(self._damages) :].tolist()
        self._by_unit: list[tuple[float, float, float]] = [
            (common + o, s, c) for o, s, c in zip(own, slopes, centres, strict=True)
        ]

    def guess(self, plan: Plan) -> float:
        """The rise over the dense model, in nats: of log-perplexity, or of the divergence."""
        return float((self._features(plan) - self._centre) @ self._weights)

    def of_unit(self, unit: int, share: float) -> float:
        """What the guess has from one unit, by its number, that loses `share` of its parameters."""
        factor, slope, centre = self._by_unit[unit]
        return factor * _damage(self._damages[unit], share) + slope * (share - centre)

    def fitness_of_rates(self, rates: Sequence[float]) -> float:
        """The fitness, a perplexity or a divergence, of rates that are about on budget."""
        guess = sum(self.of_unit(unit, rate) for unit, rate in enumerate(rates))
        return max(guess, 0.0) if self._is_kl else math.exp(min(guess + self._dense, 50.0))

    def rise(self, member: Member) -> float:
        """What a member's measured fitness is in the guess's unit."""
        return member.fitness if self._is_kl else math.log(member.fitness) - self._dense

    def _features(self, plan: Plan) -> Vector:
        """The sum of all damages, each unit's damage, and each unit's share."""
        shares = removed_shares(plan, self._view.card.shape, self._view.spec.granularity)
        damages = [_damage(alone, share) for alone, share in zip(self._damages, shares, strict=True)]
        return np.array([sum(damages), *damages, *shares])

    def _fit(self, measured: Sequence[Member]) -> Vector:
        units = len(self._damages)
        believed = np.zeros(1 + 2 * units)
        believed[0] = 1.0
        if not measured:
            return believed
        features = np.array([self._features(member.candidate.plan) for member in measured])
        rises = np.array([self.rise(member) for member in measured])
        self._centre[1 + units :] = features[:, 1 + units :].mean(axis=0)
        features = features - self._centre
        self.heard = np.exp(-SHARPNESS * (rises - rises.min()))
        precision = self.heard / NOISE
        held = np.sqrt([COMMON] + [FACTOR] * units + [SLOPE] * units)
        rows = np.vstack([features * precision[:, None], np.diag(held)])
        wanted = np.concatenate([(rises - features @ believed) * precision, np.zeros(1 + 2 * units)])
        moved: Vector = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        # What each outcome's guess would have been off without it (leave-one-out, exact for least squares).
        weighted = rows[: len(rises)]
        leverage = np.einsum("ij,jk,ik->i", weighted, np.linalg.pinv(rows.T @ rows), weighted)
        self.errors = (rises - features @ (believed + moved)) / np.maximum(1 - leverage, 1e-6)
        return believed + moved


def _damages(view: View) -> list[tuple[float, float]]:
    """For each unit that is pruned alone, the share that it loses and the rise; without sensitivity one for all.

    Noise that would reward pruning is left out: nothing is free.
    """
    card = view.card
    shares = [removed_alone(unit, view.spec, card.shape) for unit in view.units]
    rises = card.sensitivity or [unit.parameters / card.shape.decoder_parameters for unit in view.units]
    return [(share, max(rise, 1e-4 * share)) for share, rise in zip(shares, rises, strict=True)]


def _damage(alone: tuple[float, float], share: float) -> float:
    """What a unit costs that loses `share`: in proportion up to where it was measured, then with the square."""
    measured, rise = alone
    if not measured:
        return 0.0
    ratio = share / measured
    return rise * (ratio if ratio <= 1 else ratio**2)
