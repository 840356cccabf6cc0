"""The surrogate: a Gaussian process that predicts the fitness of a plan from measured candidates. Pure.

Candidates of searches at other rates count too. They differ only in how much their units lose.

It predicts the rise: the log-perplexity minus the log-perplexity of the dense model, or the divergence itself if the
search minimises divergence. Its inputs are the shares of parameters that each unit loses.

The prior mean is the sum of the rises that the units cause when each is pruned alone. The model profile's sensitivity
is such a rise, measured at one share. Up to that share, a unit's rise is proportional to the share that it loses. Above
it, the rise grows with the square of the share.

Units that are pruned together cost more than the sum of their rises, and some much more. So the kernel adds

- one factor on the prior mean of all units, one factor for each unit, and a slope for each unit;
- a smooth function of the share of each unit, because the channels that are removed differ in importance;
- a smooth function of all shares together, so that plans near a measured plan get a similar prediction.
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
from protocol.plans.single_unit_pruning import single_unit_removed_share
from protocol.plans.spec import Measure

Array = NDArray[np.floating[Any]]

COMMON_FACTOR_STD, UNIT_FACTOR_STD = 1.0, 0.3
"""Standard deviations of the factors on the prior mean: of the factor for all units, and of the factor for each."""
OFFSET_STD = 1.2
"""Standard deviation of a constant that is added to the rise of all plans, in units of the scale (see Kernel)."""


@dataclass(frozen=True)
class Kernel:
    """Hyperparameters of the kernel.

    Standard deviations are in units of the scale, which is the median rise of the measured candidates. Length scales
    are numbers of removed parameters, divided by the parameters of one decoder layer. The values come
    from the likelihood of outcomes on SmolLM2: those for perplexity as docs/lab-notes/surrogate.md says, those for
    divergence as docs/lab-notes/whole-plans.md says, on one seed.
    """

    slope_std: float
    """Standard deviation of a unit's slope, which is an additional rise in proportion to the removed parameters."""
    unit_std: float
    """Standard deviation of the smooth function of one unit's share."""
    joint_std: float
    """Standard deviation of the smooth function of all shares together."""
    noise_std: float
    """Standard deviation of the noise of a measurement."""
    unit_length_scale: float
    joint_length_scale: float


KERNELS: dict[Measure, Kernel] = {
    "perplexity": Kernel(
        slope_std=0.16, unit_std=0.012, joint_std=0.06, noise_std=0.012, unit_length_scale=0.04, joint_length_scale=0.4
    ),
    "kl": Kernel(
        slope_std=0.01,
        unit_std=0.005,
        joint_std=0.013,
        noise_std=0.002,
        unit_length_scale=0.07,
        joint_length_scale=1.5,
    ),
}
"""The kernel of each measure. Divergence compares whole distributions at every token, so it is far smoother than
perplexity on a short text."""

NOISE_PER_RISE = 0.1
"""Standard deviation of additional noise, as a share of the difference between an outcome's rise and the lowest rise
at its rate.
Worse candidates are thus noisier and count less, because predictions must be accurate near the best candidate."""
STOPPED_STD = 0.05
"""Standard deviation of additional noise for a candidate that was stopped in its race, in units of the scale. Its
fitness is estimated from a part of the windows, and some windows are easier than others."""
MAX_OUTCOMES = 500
"""Maximum number of measured candidates that are used, best first. With thousands, a prediction would take seconds."""


class Surrogate:
    """Predicts the fitness of plans of one search, from its model profile and the outcomes of earlier rounds."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._pruned_alone = _pruned_alone(view)
        shape = view.profile.shape
        layer = shape.decoder_parameters / len(shape.layers)
        self._sizes: Array = np.array([unit.parameters / layer for unit in view.units])
        self._is_kl = view.spec.measure == "kl"
        self._kernel = KERNELS[view.spec.measure]
        self._dense = 0.0 if self._is_kl else math.log(view.profile.dense.perplexity)
        measured = view.measured[:MAX_OUTCOMES]
        stopped = [Member(tried.candidate, tried.fitness) for tried in view.recent if tried.stopped and tried.fitness]
        members = (*measured, *stopped, *(member for group in view.at_other_rates for member in group))
        shares = np.array([self._shares(member.candidate.plan) for member in members])
        rises = np.array([self.rise(member) for member in members])
        self._observed = self._inputs(shares.reshape(len(members), len(self._sizes)))
        scale = float(np.median(rises)) if members else float(sum(rise for _, rise in self._pruned_alone))
        self._scale = max(scale, 1e-6)
        self._weights: Array = np.zeros(0)
        self._inverse: Array = np.zeros((0, 0))
        if members:
            counts = [len(measured) + len(stopped), *map(len, view.at_other_rates)]
            lowest = np.concatenate([np.full(len(part), part.min(initial=np.inf)) for part in _split(rises, counts)])
            noise = (self._kernel.noise_std * self._scale) ** 2 + (NOISE_PER_RISE * (rises - lowest)) ** 2
            noise[len(measured) : counts[0]] += (STOPPED_STD * self._scale) ** 2
            covariance = self._covariance(self._observed, self._observed) + np.diag(noise)
            self._inverse = np.linalg.inv(covariance)
            self._weights = self._inverse @ (rises - self._observed.prior)

    def predict(self, plan: Plan) -> float:
        """Return the mean of the predicted rise, in nats."""
        return float(self._mean(np.array([self._shares(plan)]))[0])

    def predict_shares(self, shares: Array) -> tuple[Array, Array]:
        """Return mean and standard deviation of the rise, in nats, of plans that remove `shares` [plans, units]."""
        inputs = self._inputs(shares)
        covariance = self._covariance(inputs, self._observed)
        mean = inputs.prior + covariance @ self._weights
        variance = self._prior_variance(inputs) - (covariance @ self._inverse * covariance).sum(axis=1)
        return mean, np.sqrt(np.maximum(variance, 0.0))

    def predict_changes(self, rates: Sequence[float], changes: Sequence[Mapping[int, float]]) -> tuple[Array, Array]:
        """Predict how the rise changes from `rates` when some units get other rates.

        Each of the `changes` maps indices of units to their new rates. Return the mean and the standard deviation of
        the rise's change for each of them, in nats.
        """
        shares = np.repeat(np.array([rates]), len(changes), axis=0)
        for row, change in zip(shares, changes, strict=True):
            row[list(change)] = list(change.values())
        base, changed = self._inputs(np.array([rates])), self._inputs(shares)
        covariance = self._covariance_of_change(base, changed)
        mean = changed.prior - base.prior + covariance @ self._weights
        variance = self._prior_variance_of_change(changed, base) - (covariance @ self._inverse * covariance).sum(axis=1)
        return mean, np.sqrt(np.maximum(variance, 0.0))

    def predict_fitness(self, rates: Sequence[float]) -> float:
        """Return the predicted fitness (a perplexity or a divergence) of rates whose mean is about the target rate."""
        return self.fitness_at(float(self._mean(np.array([rates]))[0]))

    def fitness_at(self, rise: float) -> float:
        """Return the fitness (a perplexity or a divergence) of a plan with this rise."""
        return max(rise, 0.0) if self._is_kl else math.exp(min(rise + self._dense, 50.0))

    def rise(self, member: Member) -> float:
        """Return the measured rise of a member, in nats."""
        return member.fitness if self._is_kl else math.log(member.fitness) - self._dense

    def _shares(self, plan: Plan) -> tuple[float, ...]:
        return removed_shares(plan, self._view.profile.shape, self._view.spec.granularity)

    def _inputs(self, shares: Array) -> "_Inputs":
        return _Inputs(shares, self._pruned_alone, self._sizes)

    def _mean(self, shares: Array) -> Array:
        inputs = self._inputs(shares)
        return inputs.prior + self._covariance(inputs, self._observed) @ self._weights

    def _covariance(self, first: "_Inputs", second: "_Inputs") -> Array:
        """Return the prior covariance [points of `first`, points of `second`]."""
        scale, kernel = self._scale, self._kernel
        covariance = (OFFSET_STD * scale) ** 2 + COMMON_FACTOR_STD**2 * np.outer(first.prior, second.prior)
        covariance += (
            UNIT_FACTOR_STD**2 * first.unit_priors @ second.unit_priors.T
            + (kernel.slope_std * scale) ** 2 * first.removed @ second.removed.T
        )
        distance = np.zeros_like(covariance)  # squared
        for mine, theirs in zip(first.removed.T, second.removed.T, strict=True):
            square = np.subtract.outer(mine, theirs) ** 2
            distance += square
            covariance += (kernel.unit_std * scale) ** 2 * np.exp(square / (-2 * kernel.unit_length_scale**2))
        covariance += (kernel.joint_std * scale) ** 2 * np.exp(distance / (-2 * kernel.joint_length_scale**2))
        return covariance

    def _prior_variance(self, inputs: "_Inputs") -> Array:
        """Return the prior variance of the rise of each point."""
        scale, kernel = self._scale, self._kernel
        units = inputs.removed.shape[1]
        variance: Array = (OFFSET_STD * scale) ** 2 + COMMON_FACTOR_STD**2 * inputs.prior**2
        variance += UNIT_FACTOR_STD**2 * (inputs.unit_priors**2).sum(axis=1)
        variance += (kernel.slope_std * scale) ** 2 * (inputs.removed**2).sum(axis=1)
        variance += (units * kernel.unit_std**2 + kernel.joint_std**2) * scale**2
        return variance

    def _covariance_of_change(self, base: "_Inputs", changed: "_Inputs") -> Array:
        """Return the prior covariance of the rise's changes, from `base` to points of `changed`, with each outcome.

        The shape is [points of `changed`, outcomes]. Terms of units that do not change are zero and are not computed.
        """
        scale, kernel, observed = self._scale, self._kernel, self._observed
        covariance = COMMON_FACTOR_STD**2 * np.outer(changed.prior - base.prior, observed.prior)
        covariance += UNIT_FACTOR_STD**2 * (changed.unit_priors - base.unit_priors) @ observed.unit_priors.T
        covariance += (kernel.slope_std * scale) ** 2 * (changed.removed - base.removed) @ observed.removed.T
        before = (base.removed - observed.removed) ** 2
        distance = np.repeat(before.sum(axis=1)[None], len(changed.removed), axis=0)  # squared
        joint = np.exp(distance[0] / (-2 * kernel.joint_length_scale**2)) if len(distance) else 0.0
        width = -2 * kernel.unit_length_scale**2
        for unit, old in enumerate(base.removed[0]):
            rows = np.flatnonzero(changed.removed[:, unit] != old)
            square = np.subtract.outer(changed.removed[rows, unit], observed.removed[:, unit]) ** 2
            distance[rows] += square - before[:, unit]
            covariance[rows] += (kernel.unit_std * scale) ** 2 * (
                np.exp(square / width) - np.exp(before[:, unit] / width)
            )
        covariance += (kernel.joint_std * scale) ** 2 * (np.exp(distance / (-2 * kernel.joint_length_scale**2)) - joint)
        return covariance

    def _prior_variance_of_change(self, changed: "_Inputs", base: "_Inputs") -> Array:
        """Return the prior variance of the change from `base` (one point) to each point of `changed`."""
        scale, kernel = self._scale, self._kernel
        square = (changed.removed - base.removed) ** 2
        variance: Array = COMMON_FACTOR_STD**2 * (changed.prior - base.prior) ** 2
        variance += UNIT_FACTOR_STD**2 * ((changed.unit_priors - base.unit_priors) ** 2).sum(axis=1)
        variance += (kernel.slope_std * scale) ** 2 * square.sum(axis=1)
        unit = 1 - np.exp(square / (-2 * kernel.unit_length_scale**2))
        variance += 2 * (kernel.unit_std * scale) ** 2 * unit.sum(axis=1)
        joint = 1 - np.exp(square.sum(axis=1) / (-2 * kernel.joint_length_scale**2))
        variance += 2 * (kernel.joint_std * scale) ** 2 * joint
        return variance


@functools.lru_cache(maxsize=2)
def surrogate_of(view: View) -> Surrogate:
    """Return the surrogate of a view, which is fitted once for all calls of a round."""
    return Surrogate(view)


def _split(values: Array, counts: Sequence[int]) -> list[Array]:
    """Return consecutive parts of `values` with these numbers of values."""
    return np.split(values, np.cumsum(counts[:-1]))


class _Inputs:
    """Shares removed from each unit [points, units], and values computed from them."""

    def __init__(self, shares: Array, pruned_alone: Sequence[tuple[float, float]], sizes: Array) -> None:
        self.removed: Array = shares * sizes
        """Removed parameters of each unit, divided by the parameters of one decoder layer [points, units]."""
        measured, rises = np.array(pruned_alone).T
        ratios = np.divide(shares, measured, out=np.zeros_like(shares), where=measured > 0)
        self.unit_priors: Array = rises * np.where(ratios <= 1, ratios, ratios**2)
        """Prior mean of the rise that each unit causes [points, units]. It is proportional to the share up to the
        measured share, and above that it grows with the square of the share."""
        self.prior: Array = self.unit_priors.sum(axis=1)
        """Prior mean of the rise [points]."""


def _pruned_alone(view: View) -> list[tuple[float, float]]:
    """Return for each unit the share that it loses when it is pruned alone, and the rise that this causes.

    If sensitivity was not measured, the unit's share of the decoder's parameters stands for the rise. A rise below zero
    is noise and would reward pruning, so it is replaced by a value a little above zero.
    """
    profile = view.profile
    shares = [single_unit_removed_share(unit, view.spec, profile.shape) for unit in view.units]
    rises = profile.sensitivity or [unit.parameters / profile.shape.decoder_parameters for unit in view.units]
    return [(share, max(rise, 1e-4 * share)) for share, rise in zip(shares, rises, strict=True)]
