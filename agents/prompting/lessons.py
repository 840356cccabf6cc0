"""Lessons: what earlier mutations changed, and whether it helped, in words. Pure."""

import math
from collections.abc import Sequence

from agents.population.view import View

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
