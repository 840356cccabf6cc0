"""What the LLM is told of a search beside the configurations themselves; each part is a switch. Pure."""

import statistics
from collections.abc import Collection
from dataclasses import dataclass

from agents.population.view import Member, View
from agents.prompting.lessons import changes, lessons
from agents.prompting.settings import Told
from protocol.plans.plan import unit_bounds

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
    surrogate, rates = view.surrogate, view.population[0].candidate.rates
    spec = view.spec
    bounds = unit_bounds(view.card.shape, spec.granularity, spec.lowest_rate, spec.highest_rate)
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
