"""A surrogate: what a plan will measure, guessed from what was measured, and how sure that is. Pure.

The rise of log-perplexity over the dense model (the divergence itself, where the search minimises that) is a Gaussian
process over the shares that the units lose. What is believed beforehand is the sum of what each unit costs alone: the
model profile's sensitivity, below the pruning rate in proportion, above it with the square. Pruned together, units cost
more than alone, and some much more; so what is believed may be off

- by a factor, one for all units and one for each, and by a slope for each;
- in each unit's own way from one share to the next: which channels go makes some difference;
- and in a way that depends on all units together, so that plans near a measured one measure as much as it did.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.population.view import Member, View
from protocol.plans.plan import Plan, removed_shares
from protocol.plans.single_unit import removed_alone
from protocol.plans.spec import Measure

Array = NDArray[np.floating[Any]]

COMMON, FACTOR, LEVEL = 1.0, 0.3, 1.2
"""How far the factors, of all units and of each, are believed to be from 1, and what all plans may differ by from what
is believed, as a share of the usual rise: standard deviations."""


@dataclass(frozen=True)
class Roughness:
    """How rough what is minimised is over the plans: standard deviations as shares of the usual rise, and lengths.

    As they make the recorded outcomes of SmolLM2's searches likeliest (docs/lab-notes/surrogate.md).
    """

    slope: float
    """Of a unit, for each decoder layer's worth of parameters."""
    own: float
    """What is a unit's own."""
    joint: float
    """What depends on all units."""
    noise: float
    """What no share of anything tells."""
    own_length: float
    """How far apart two shares of a unit have little to do with one another, in a layer's worth of parameters."""
    joint_length: float
    """How far apart two plans have, in the same unit."""


ROUGHNESS: dict[Measure, Roughness] = {
    "perplexity": Roughness(slope=0.16, own=0.012, joint=0.06, noise=0.012, own_length=0.04, joint_length=0.4),
    "kl": Roughness(slope=0.043, own=0.015, joint=0.019, noise=0.0033, own_length=0.1, joint_length=0.52),
}
"""The divergence, to which every token's whole distribution speaks, is far smoother than perplexity on a short text."""

DISTANCE = 0.1
"""The noise of an outcome grows by this share of its distance from the best: a guess has to be right where the search
is."""
STOPPED = 0.05
"""How far off the fitness of a candidate may be that was stopped in its race, beside: some windows are easier."""
MOST = 500
"""Outcomes that are looked at, the best ones: in a search of thousands a guess shall not take seconds."""


class Surrogate:
    """Guesses the fitness of plans of one search, from its model profile and the outcomes of earlier rounds."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._alone = _alone(view)
        shape = view.profile.shape
        layer = shape.decoder_parameters / len(shape.layers)
        self._sizes: Array = np.array([unit.parameters / layer for unit in view.units])
        self._is_kl = view.spec.measure == "kl"
        self._rough = ROUGHNESS[view.spec.measure]
        self._dense = 0.0 if self._is_kl else math.log(view.profile.dense.perplexity)
        measured = view.measured[:MOST]
        stopped = [Member(tried.candidate, tried.fitness) for tried in view.recent if tried.stopped and tried.fitness]
        every = (*measured, *stopped)
        shares = np.array([self._shares(member.candidate.plan) for member in every])
        rises = np.array([self.rise(member) for member in every])
        self._points = self._at(shares.reshape(len(every), len(self._sizes)))
        self._usual = float(np.median(rises)) if every else float(sum(rise for _, rise in self._alone))
        self._usual = max(self._usual, 1e-6)
        self._weights: Array = np.zeros(0)
        self._inverse: Array = np.zeros((0, 0))
        if every:
            noise = (self._rough.noise * self._usual) ** 2 + (DISTANCE * (rises - rises.min())) ** 2
            noise[len(measured) :] += (STOPPED * self._usual) ** 2
            covariance = self._covariance(self._points, self._points) + np.diag(noise)
            self._inverse = np.linalg.inv(covariance)
            self._weights = self._inverse @ (rises - self._points.believed)

    def guess(self, plan: Plan) -> float:
        """The rise over the dense model, in nats: of log-perplexity, or of the divergence."""
        return float(self._guess(np.array([self._shares(plan)]))[0])

    def changes(self, rates: Sequence[float], moves: Sequence[Mapping[int, float]]) -> tuple[Array, Array]:
        """How the rise changes from `rates` if some units, by their numbers, get other rates; how far that may be off.

        Both have one entry for each of the `moves`, in nats; the second is a standard deviation.
        """
        shares = np.repeat(np.array([rates]), len(moves), axis=0)
        for row, move in zip(shares, moves, strict=True):
            row[list(move)] = list(move.values())
        from_, to = self._at(np.array([rates])), self._at(shares)
        rows = self._change_of_covariance(from_, to)
        means = to.believed - from_.believed + rows @ self._weights
        variances = self._variance_between(to, from_) - (rows @ self._inverse * rows).sum(axis=1)
        return means, np.sqrt(np.maximum(variances, 0.0))

    def fitness_of_rates(self, rates: Sequence[float]) -> float:
        """The fitness, a perplexity or a divergence, of rates that are about on budget."""
        guess = float(self._guess(np.array([rates]))[0])
        return max(guess, 0.0) if self._is_kl else math.exp(min(guess + self._dense, 50.0))

    def rise(self, member: Member) -> float:
        """What a member's measured fitness is in the guess's unit."""
        return member.fitness if self._is_kl else math.log(member.fitness) - self._dense

    def _shares(self, plan: Plan) -> tuple[float, ...]:
        return removed_shares(plan, self._view.profile.shape, self._view.spec.granularity)

    def _at(self, shares: Array) -> "_Points":
        return _Points(shares, self._alone, self._sizes)

    def _guess(self, shares: Array) -> Array:
        points = self._at(shares)
        return points.believed + self._covariance(points, self._points) @ self._weights

    def _covariance(self, first: "_Points", second: "_Points") -> Array:
        """[points of the first, points of the second]."""
        usual, rough = self._usual, self._rough
        found = (LEVEL * usual) ** 2 + COMMON**2 * np.outer(first.believed, second.believed)
        found += (
            FACTOR**2 * first.damages @ second.damages.T + (rough.slope * usual) ** 2 * first.places @ second.places.T
        )
        apart = np.zeros_like(found)
        for mine, theirs in zip(first.places.T, second.places.T, strict=True):
            square = np.subtract.outer(mine, theirs) ** 2
            apart += square
            found += (rough.own * usual) ** 2 * np.exp(square / (-2 * rough.own_length**2))
        found += (rough.joint * usual) ** 2 * np.exp(apart / (-2 * rough.joint_length**2))
        return found

    def _change_of_covariance(self, from_: "_Points", to: "_Points") -> Array:
        """Of what was measured with `to` instead of the one point `from_`: [points of `to`, outcomes].

        Most units have not changed, and theirs need not be computed.
        """
        usual, rough, known = self._usual, self._rough, self._points
        found = COMMON**2 * np.outer(to.believed - from_.believed, known.believed)
        found += FACTOR**2 * (to.damages - from_.damages) @ known.damages.T
        found += (rough.slope * usual) ** 2 * (to.places - from_.places) @ known.places.T
        before = (from_.places - known.places) ** 2
        apart = np.repeat(before.sum(axis=1)[None], len(to.places), axis=0)
        joint = np.exp(apart[0] / (-2 * rough.joint_length**2)) if len(apart) else 0.0
        for unit, old in enumerate(from_.places[0]):
            changed = np.flatnonzero(to.places[:, unit] != old)
            square = np.subtract.outer(to.places[changed, unit], known.places[:, unit]) ** 2
            apart[changed] += square - before[:, unit]
            own = np.exp(square / (-2 * rough.own_length**2)) - np.exp(before[:, unit] / (-2 * rough.own_length**2))
            found[changed] += (rough.own * usual) ** 2 * own
        found += (rough.joint * usual) ** 2 * (np.exp(apart / (-2 * rough.joint_length**2)) - joint)
        return found

    def _variance_between(self, points: "_Points", other: "_Points") -> Array:
        """Of the difference of each of `points` to the one `other`, before anything is measured."""
        usual, rough = self._usual, self._rough
        square = (points.places - other.places) ** 2
        found: Array = COMMON**2 * (points.believed - other.believed) ** 2
        found += FACTOR**2 * ((points.damages - other.damages) ** 2).sum(axis=1)
        found += (rough.slope * usual) ** 2 * square.sum(axis=1)
        found += 2 * (rough.own * usual) ** 2 * (1 - np.exp(square / (-2 * rough.own_length**2))).sum(axis=1)
        found += 2 * (rough.joint * usual) ** 2 * (1 - np.exp(square.sum(axis=1) / (-2 * rough.joint_length**2)))
        return found


@functools.lru_cache(maxsize=2)
def surrogate_of(view: View) -> Surrogate:
    """Return the surrogate of a view, made once for all that ask in a round."""
    return Surrogate(view)


class _Points:
    """Shares that plans take from each unit [points, units], and what is made of them."""

    def __init__(self, shares: Array, alone: Sequence[tuple[float, float]], sizes: Array) -> None:
        self.places: Array = shares * sizes
        """In a decoder layer's worth of parameters."""
        measured, rises = np.array(alone).T
        ratios = np.divide(shares, measured, out=np.zeros_like(shares), where=measured > 0)
        self.damages: Array = rises * np.where(ratios <= 1, ratios, ratios**2)
        """What each unit costs: in proportion up to where it was measured, then with the square."""
        self.believed: Array = self.damages.sum(axis=1)


def _alone(view: View) -> list[tuple[float, float]]:
    """For each unit that is pruned alone, the share that it loses and the rise; without sensitivity one for all.

    Noise that would reward pruning is left out: nothing is free.
    """
    profile = view.profile
    shares = [removed_alone(unit, view.spec, profile.shape) for unit in view.units]
    rises = profile.sensitivity or [unit.parameters / profile.shape.decoder_parameters for unit in view.units]
    return [(share, max(rise, 1e-4 * share)) for share, rise in zip(shares, rises, strict=True)]
