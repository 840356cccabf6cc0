"""Lessons: what earlier mutations changed, and whether it helped, in words. Pure."""

import math
from collections.abc import Sequence

from agents.view import Member, View

SHOWN_UNITS = 4
LEAST_POINTS = 1
"""Changes of fewer percent points are left out: projection moves every unit a little."""


def lessons(view: View, most: int) -> list[str]:
    """The `most` clearest mutations of the last rounds: what changed, and what came of it; the latest first.

    Told as the change of the fitness in percent.
    """
    by_id = {member.candidate.id: member for member in view.measured}
    found = []
    for child in view.measured:
        who = child.candidate.provenance
        parent = by_id.get(who.parents[0]) if len(who.parents) == 1 else None
        if parent and (words := changes(view, parent.candidate.rates, child.candidate.rates)):
            found.append((who.round, _gain(parent, child), child.candidate.id, words))
    latest = sorted(found, key=lambda lesson: (-lesson[0], -abs(lesson[1]), lesson[2]))[:most]
    return [f"{words}: {_verdict(gain)}" for _, gain, _, words in latest]


def changes(view: View, before: Sequence[float], after: Sequence[float]) -> str:
    """The units whose rates changed most, in percent points: `mlp 3 +8, attention 5 -25`; empty where none did."""
    points = [round(100 * (new - old)) for old, new in zip(before, after, strict=True)]
    ranked = sorted(range(len(points)), key=lambda i: -abs(points[i]))[:SHOWN_UNITS]
    return ", ".join(f"{view.units[i].name} {points[i]:+d}" for i in ranked if abs(points[i]) > LEAST_POINTS)


def _gain(parent: Member, child: Member) -> float:
    """How much lower the child's fitness is, as a logarithm of the ratio."""
    return math.log(parent.fitness / child.fitness) if min(parent.fitness, child.fitness) > 0 else 0.0


def _verdict(gain: float) -> str:
    percent = 100 * (math.exp(-gain) - 1)
    if abs(percent) < 0.1:
        return "no difference"
    return f"{'helped' if percent < 0 else 'hurt'}, {percent:+.1f} %"
