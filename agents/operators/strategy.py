"""Whether the next candidate of a search with rules is made by a rule or by moves. Pure, seeded.

A rule has few numbers, so it can be tuned on few outcomes. Moves can change any unit. Thompson sampling chooses between
them, by how often each has lately improved on the best candidate.
"""

import random
from collections.abc import Sequence
from typing import Literal

from agents.operators.rules import rule_of, sample_rule_crossover, sample_rule_mutation
from agents.operators.sampling import sample_ranked_mix, sample_ranked_moves
from agents.population.view import Member, Proposal, Tried, View

Step = Literal["rule", "moves"]
REMEMBERED = 24
"""Number of recent candidates whose success counts."""


def next_step(view: View, rng: random.Random) -> Step:
    """Return what to propose next. Without a measured rule, it is moves."""
    if not any(rule_of(member) for member in view.measured):
        return "moves"
    odds = {"rule": [1, 1], "moves": [1, 1]}  # successes and failures, with one of each to begin with
    for step, succeeded in _record(view)[-REMEMBERED:]:
        odds[step][0 if succeeded else 1] += 1
    drawn: dict[Step, float] = {"rule": rng.betavariate(*odds["rule"]), "moves": rng.betavariate(*odds["moves"])}
    return max(drawn, key=lambda step: drawn[step])


def _record(view: View) -> list[tuple[Step, bool]]:
    """Return for each recent offspring what made it, and whether it was better than all recent candidates before it."""
    best = float("inf")
    record: list[tuple[Step, bool]] = []
    for tried in view.recent:
        fitness = tried.fitness if tried.fitness is not None and not tried.stopped else float("inf")
        if tried.candidate.provenance.round > 0:
            record.append((_step_of(tried), fitness < best))
        best = min(best, fitness)
    return record


def _step_of(tried: Tried) -> Step:
    return "moves" if tried.candidate.provenance.rule is None else "rule"


def sample_mutation_step(rng: random.Random, view: View, parents: Sequence[Member]) -> Proposal:
    """Return a mutation of a rule, or a parent after moves."""
    operator = sample_rule_mutation if next_step(view, rng) == "rule" else sample_ranked_moves
    return operator(rng, view, parents)


def sample_crossover_step(rng: random.Random, view: View, parents: Sequence[Member]) -> Proposal:
    """Return a crossover of two rules, or a mix of two parents."""
    operator = sample_rule_crossover if next_step(view, rng) == "rule" else sample_ranked_mix
    return operator(rng, view, parents)
