"""Feedback from the search for prompts, in addition to the configurations; each part is optional. Pure."""

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from agents.operators.surrogate import surrogate_of
from agents.population.view import Member, View
from agents.prompting.settings import FeedbackPart
from protocol.plans.plan import unit_bounds

SHOWN_CHANGES = 4
MIN_POINTS = 1
"""Changes of at most this many percentage points are left out, because projection changes every unit a little."""
SHOWN_EFFECTS = 6
SHOWN_UNITS = 3
STEP = 0.05
"""Change of a unit's rate for which the gain or loss is predicted."""
MIN_MEMBERS = 8
"""Minimum number of configurations for a comparison of good and bad configurations."""


@dataclass(frozen=True)
class Feedback:
    """The parts as prompts state them; a part that is unknown or switched off is empty."""

    weakest: tuple[str, ...] = ()
    """Units of the best configuration that would gain most from less pruning."""
    strongest: tuple[str, ...] = ()
    """Units of the best configuration that would lose least from more pruning."""
    contrast: str = ""
    """How the best configurations differ from the worst, in percentage points."""
    effects: tuple[str, ...] = ()
    """The effects of earlier changes."""


def feedback_on(view: View, parts: Collection[FeedbackPart]) -> Feedback:
    """Return the feedback of these parts, as far as it is known."""
    weakest, strongest = _weakest_and_strongest(view) if "weakest" in parts and view.population else ((), ())
    return Feedback(
        weakest=weakest,
        strongest=strongest,
        contrast=_contrast(view) if "contrast" in parts else "",
        effects=tuple(effects_of_changes(view, SHOWN_EFFECTS)) if "effects" in parts else (),
    )


def effects_of_changes(view: View, count: int) -> list[str]:
    """Return `count` sentences on mutations: latest round first, and within a round the clearest effects first.

    Each sentence states which rates were changed, and the change of the fitness in percent.
    """
    by_id = {member.candidate.id: member.fitness for member in view.measured}
    by_id |= {tried.candidate.id: tried.fitness for tried in view.recent if tried.fitness is not None}
    rates = {member.candidate.id: member.candidate.rates for member in view.measured}
    rates |= {tried.candidate.id: tried.candidate.rates for tried in view.recent}
    found = []
    for child in view.recent:
        provenance = child.candidate.provenance
        known = [parent for parent in provenance.parents if parent in by_id]
        if child.fitness is None or provenance.agent != "mutator" or not known:
            continue
        # A candidate from a `lists` reply has all shown members as parents, so it is compared with the nearest one.
        parent = min(known, key=lambda id_: math.dist(rates[id_], child.candidate.rates))
        found.append((provenance.round, _gain(by_id[parent], child.fitness), child, parent))
    sentences: list[str] = []
    in_order = sorted(found, key=lambda effect: (-effect[0], -abs(effect[1]), effect[2].candidate.id))
    for _, gain, child, parent in in_order:
        if words := changes(view, rates[parent], child.candidate.rates):
            sentences.append(f"{words}: {_verdict(gain)}{', and was stopped early' if child.stopped else ''}")
        if len(sentences) == count:
            break
    return sentences


def changes(view: View, before: Sequence[float], after: Sequence[float]) -> str:
    """Return the units whose rates changed most, in percentage points: `mlp 3 +8, attention 5 -25`, or nothing."""
    points = [round(100 * (new - old)) for old, new in zip(before, after, strict=True)]
    ranked = sorted(range(len(points)), key=lambda i: -abs(points[i]))[:SHOWN_CHANGES]
    return ", ".join(f"{view.units[i].name} {points[i]:+d}" for i in ranked if abs(points[i]) > MIN_POINTS)


def _gain(parent: float, child: float) -> float:
    """Return how much lower the child's fitness is, as the logarithm of the ratio."""
    return math.log(parent / child) if min(parent, child) > 0 else 0.0


def _verdict(gain: float) -> str:
    percent = 100 * (math.exp(-gain) - 1)
    if abs(percent) < 0.1:
        return "no difference"
    return f"{'helped' if percent < 0 else 'hurt'}, {percent:+.1f} %"


def _weakest_and_strongest(view: View) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return units of the best configuration: those that gain most from less pruning, those that lose least from more.

    The gain and the loss are predictions, per parameter.
    """
    surrogate, rates = surrogate_of(view), view.population[0].candidate.rates
    spec = view.spec
    bounds = unit_bounds(view.profile.shape, spec.granularity, spec.lowest_rate, spec.highest_rate)
    able = [
        {sign: sign * STEP for sign in (-1, 1) if low <= rate + sign * STEP <= high}
        for rate, (low, high) in zip(rates, bounds, strict=True)
    ]
    ends = []
    for sign in (-1, 1):
        units = [i for i, steps in enumerate(able) if sign in steps]
        means, _ = surrogate.predict_changes(rates, [{i: rates[i] + sign * STEP} for i in units])
        ranked = sorted((mean / view.units[i].parameters, i) for mean, i in zip(means.tolist(), units, strict=True))
        ends.append(tuple(view.units[i].name for _, i in ranked[:SHOWN_UNITS]))
    return ends[0], ends[1]


def _contrast(view: View) -> str:
    """Return the units whose mean rates differ most between the best and the worst quarter of the known members."""
    recent = [Member(t.candidate, t.fitness) for t in view.recent if t.fitness is not None]
    by_id = {member.candidate.id: member for member in (*view.measured, *recent)}
    members = tuple(sorted(by_id.values(), key=lambda member: member.fitness))
    if len(members) < MIN_MEMBERS:
        return ""
    quarter = len(members) // 4
    return changes(view, _means(members[-quarter:]), _means(members[:quarter]))


def _means(members: tuple[Member, ...]) -> tuple[float, ...]:
    return tuple(statistics.fmean(rates) for rates in zip(*(m.candidate.rates for m in members), strict=True))
