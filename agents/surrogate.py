"""A surrogate: what a plan will measure, guessed from what was measured. Additive over units. Pure.

The rise of log-perplexity over the dense model (the divergence itself, where the search minimises that) is taken as a
sum over units of what each loses. Before anything is measured that is each unit's damage curve, from the model card;
pruned together, units cost more than alone, and some much more, so each outcome moves the curves: one factor for all,
one for each unit, and a slope for each unit, by ridge regression with these curves as what is believed beforehand.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from agents.view import Member, View
from protocol.alone import removed_alone
from protocol.card import Curve
from protocol.plan import Plan, removed_shares

Vector = NDArray[np.float64]

COMMON, FACTOR, SLOPE = 0.01, 1.0, 3.0
"""How strongly the common factor, a unit's own factor, and its slope are held to what is believed beforehand: the
precision of that belief, as of a normal distribution."""
SHARPNESS = 1.0
"""An outcome's errors are scaled by exp(−SHARPNESS × distance from the best): the guess has to be right where the
search is."""
MOST = 500
"""Outcomes that are looked at, the best ones: in a search of thousands a guess shall not take seconds."""
NOISE = 0.02
"""Of an outcome in log-perplexity: differences below it teach little."""


class Surrogate:
    """Guesses the fitness of plans of one search, from its model card and all that was measured before this round."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._curves = [_rising(curve) for curve in curves(view)]
        self._is_kl = view.spec.measure == "kl"
        self._dense = 0.0 if self._is_kl else math.log(view.card.dense.perplexity)
        self._centre = np.zeros(1 + 2 * len(self._curves))
        """Of the features: a slope says what is unusual in a unit; what all share is the common factor's."""
        self.errors: Vector = np.zeros(0)
        """How far the guess of each outcome, best first, would have been off had it not been seen."""
        self._weights = self._fit(view.measured[:MOST])
        common, *weights = self._weights.tolist()
        own, slopes = weights[: len(self._curves)], weights[len(self._curves) :]
        centres = self._centre[1 + len(self._curves) :].tolist()
        self._by_unit: list[tuple[float, float, float]] = [
            (common + o, s, c) for o, s, c in zip(own, slopes, centres, strict=True)
        ]

    def guess(self, plan: Plan) -> float:
        """The rise over the dense model, in nats: of log-perplexity, or of the divergence."""
        return float((self._features(plan) - self._centre) @ self._weights)

    def of_unit(self, unit: int, share: float) -> float:
        """What the guess has from one unit, by its number, that loses `share` of its parameters."""
        factor, slope, centre = self._by_unit[unit]
        return factor * _damage(self._curves[unit], share) + slope * (share - centre)

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
        damages = [_damage(curve, share) for curve, share in zip(self._curves, shares, strict=True)]
        return np.array([sum(damages), *damages, *shares])

    def _fit(self, measured: Sequence[Member]) -> Vector:
        units = len(self._curves)
        believed = np.zeros(1 + 2 * units)
        believed[0] = 1.0
        if not measured:
            return believed
        features = np.array([self._features(member.candidate.plan) for member in measured])
        rises = np.array([self.rise(member) for member in measured])
        self._centre[1 + units :] = features[:, 1 + units :].mean(axis=0)
        features = features - self._centre
        precision = np.exp(-SHARPNESS * (rises - rises.min())) / NOISE
        held = np.sqrt([COMMON] + [FACTOR] * units + [SLOPE] * units)
        rows = np.vstack([features * precision[:, None], np.diag(held)])
        wanted = np.concatenate([(rises - features @ believed) * precision, np.zeros(1 + 2 * units)])
        moved: Vector = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        # What each outcome's guess would have been off without it (leave-one-out, exact for least squares).
        weighted = rows[: len(rises)]
        leverage = np.einsum("ij,jk,ik->i", weighted, np.linalg.pinv(rows.T @ rows), weighted)
        self.errors = (rises - features @ (believed + moved)) / np.maximum(1 - leverage, 1e-6)
        return believed + moved


def curves(view: View) -> list[Curve]:
    """Each unit's damage curve; where only its sensitivity is known, that one point; where nothing is, one for all."""
    card = view.card
    if card.curves:
        return list(card.curves)
    shares = [removed_alone(unit, view.spec, card.shape) for unit in view.units]
    rises = card.sensitivity or [unit.parameters / card.shape.decoder_parameters for unit in view.units]
    return [((share, rise),) for share, rise in zip(shares, rises, strict=True)]


def _rising(curve: Curve) -> Curve:
    """The curve without noise that would reward pruning: never below nought, never falling."""
    points: list[tuple[float, float]] = [(0.0, 0.0)]
    for share, rise in sorted(curve):
        if share > points[-1][0]:
            points.append((share, max(rise, points[-1][1], 1e-4 * share)))
    return tuple(points)


def _damage(curve: Curve, share: float) -> float:
    """The curve at `share`: straight between its points, and beyond the last one with the square of the share."""
    last, rise = curve[-1]
    if share >= last:
        return rise * (share / last) ** 2 if last else 0.0
    for (left, low), (right, high) in pairwise(curve):
        if share <= right:
            return low + (high - low) * (share - left) / (right - left)
    raise AssertionError("the share is below the last point")
