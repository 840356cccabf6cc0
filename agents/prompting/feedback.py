"""What the LLM is told of a search beside the configurations themselves; each part is a switch. Pure."""

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from agents.operators.surrogate import surrogate_of
from agents.population.view import Member, View
from agents.prompting.settings import Told
from protocol.plans.plan import unit_bounds

SHOWN_CHANGES = 4


LEAST_POINTS = 1
"""Changes of fewer percent points are left out: projection moves every unit a little."""


def lessons(view: View, most: int) -> list[str]:
    """The `most` clearest mutations of the last rounds: what changed, and what came of it; the latest first.

    Told as the change of the fitness in percent.
    """
    by_id = {member.candidate.id: member.fitness for member in view.measured}
    by_id |= {tried.candidate.id: tried.fitness for tried in view.recent if tried.fitness is not None}
    rates = {member.candidate.id: member.candidate.rates for member in view.measured}
    rates |= {tried.candidate.id: tried.candidate.rates for tried in view.recent}
    found = []
    for child in view.recent:
        who = child.candidate.provenance
        known = [parent for parent in who.parents if parent in by_id]
        if child.fitness is None or who.agent != "mutator" or not known:
            continue
        # Of lists, which are made from all that the LLM is shown, the one that was changed least.
        parent = min(known, key=lambda id_: math.dist(rates[id_], child.candidate.rates))
        found.append((who.round, _gain(by_id[parent], child.fitness), child, parent))
    told = []
    in_order = sorted(found, key=lambda lesson: (-lesson[0], -abs(lesson[1]), lesson[2].candidate.id))
    for _, gain, child, parent in in_order:
        if words := changes(view, rates[parent], child.candidate.rates):
            told.append(f"{words}: {_verdict(gain)}{', and was stopped early' if child.stopped else ''}")
        if len(told) == most:
            break
    return told


def changes(view: View, before: Sequence[float], after: Sequence[float]) -> str:
    """The units whose rates changed most, in percent points: `mlp 3 +8, attention 5 -25`; empty where none did."""
    points = [round(100 * (new - old)) for old, new in zip(before, after, strict=True)]
    ranked = sorted(range(len(points)), key=lambda i: -abs(points[i]))[:SHOWN_CHANGES]
    return ", ".join(f"{view.units[i].name} {points[i]:+d}" for i in ranked if abs(points[i]) > LEAST_POINTS)


def _gain(parent: float, child: float) -> float:
    """How much lower the child's fitness is, as a logarithm of the ratio."""
    return math.log(parent / child) if min(parent, child) > 0 else 0.0


def _verdict(gain: float) -> str:
    percent = 100 * (math.exp(-gain) - 1)
    if abs(percent) < 0.1:
        return "no difference"
    return f"{'helped' if percent < 0 else 'hurt'}, {percent:+.1f} %"


SHOWN_LESSONS = 6
SHOWN_UNITS = 3
STEP = 0.05
"""How far a unit's rate is moved to see what it would gain or lose."""
LEAST_MEMBERS = 8
"""Fewer configurations have no best and worst that say anything."""


@dataclass(frozen=True)
class Telling:
    """The parts, as prompts say them; what is not told is empty."""

    weakest: tuple[str, ...] = ()
    """Units of the best configuration that would gain most if they were pruned less."""
    strongest: tuple[str, ...] = ()
    """Units of it that would lose least if they were pruned more."""
    contrast: str = ""
    """How the best configurations differ from the worst, in percent points."""
    lessons: tuple[str, ...] = ()
    """What earlier changes did."""


def telling(view: View, told: Collection[Told]) -> Telling:
    """What `told` says, as far as it is known by now."""
    weakest, strongest = _ends(view) if "weakest" in told and view.population else ((), ())
    return Telling(
        weakest=weakest,
        strongest=strongest,
        contrast=_contrast(view) if "contrast" in told else "",
        lessons=tuple(lessons(view, SHOWN_LESSONS)) if "lessons" in told else (),
    )


def _ends(view: View) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The weakest and the strongest units of the best configuration, by what a surrogate expects for each parameter."""
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
        changes_, _ = surrogate.changes(rates, [{i: rates[i] + sign * STEP} for i in units])
        ranked = sorted(
            (change / view.units[i].parameters, i) for change, i in zip(changes_.tolist(), units, strict=True)
        )
        ends.append(tuple(view.units[i].name for _, i in ranked[:SHOWN_UNITS]))
    return ends[0], ends[1]


def _contrast(view: View) -> str:
    """The units whose mean rates differ most between the best quarter of what is shown and the worst."""
    recent = [Member(t.candidate, t.fitness) for t in view.recent if t.fitness is not None]
    by_id = {member.candidate.id: member for member in (*view.measured, *recent)}
    members = tuple(sorted(by_id.values(), key=lambda member: member.fitness))
    if len(members) < LEAST_MEMBERS:
        return ""
    quarter = len(members) // 4
    return changes(view, _means(members[-quarter:]), _means(members[:quarter]))


def _means(members: tuple[Member, ...]) -> tuple[float, ...]:
    return tuple(statistics.fmean(rates) for rates in zip(*(m.candidate.rates for m in members), strict=True))
