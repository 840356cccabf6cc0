"""What makes the next candidate of a search with rules: a rule, moves or a whole plan. Pure, seeded.

A rule has few numbers, so it can be tuned on few outcomes, and it is readable. Moves change few units of a good
candidate, any of them. A whole plan changes all units at once and relies on the surrogate most. The Selector may choose
one of them for a round. Otherwise Thompson sampling chooses for each candidate, by how often each has lately improved
on the best candidate.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from agents.operators.rules import rule_of, sample_rule_crossover, sample_rule_mutation
from agents.operators.sampling import sample_ranked_mix, sample_ranked_moves
from agents.operators.trust_region import sample_plan
from agents.population.submission import Operator
from agents.population.view import Member, Proposal, View
from protocol.plans.candidate import Step

REMEMBERED = 24
"""Number of recent candidates whose success counts."""
MUTATION: dict[Step, Operator] = {"rules": sample_rule_mutation, "moves": sample_ranked_moves, "plans": sample_plan}
CROSSOVER: dict[Step, Operator] = {"rules": sample_rule_crossover, "moves": sample_ranked_mix, "plans": sample_plan}


@dataclass(frozen=True)
class Record:
    """How many recent candidates a step has made, and how many of them were better than all recent ones before."""

    made: int = 0
    better: int = 0


def next_step(view: View, rng: random.Random) -> Step:
    """Return what to propose next: the round's step if the Selector chose one, otherwise by Thompson sampling."""
    possible = possible_steps(view)
    if view.step in possible:
        return view.step
    records = step_records(view)
    drawn = {step: _draw(records[step], rng) for step in possible}
    return max(drawn, key=lambda step: drawn[step])


def possible_steps(view: View) -> tuple[Step, ...]:
    """Return the steps that this search can take; rules need a measured rule."""
    has_rule = any(rule_of(member) for member in view.measured)
    return tuple(step for step in get_args(Step) if step != "rules" or has_rule)


def step_records(view: View) -> dict[Step, Record]:
    """Return the record of each step among the last REMEMBERED candidates."""
    best = float("inf")
    found: list[tuple[Step, bool]] = []
    for tried in view.recent:
        fitness = tried.fitness if tried.fitness is not None and not tried.stopped else float("inf")
        if (step := tried.candidate.provenance.step) and tried.candidate.provenance.round > 0:
            found.append((step, fitness < best))
        best = min(best, fitness)
    last = found[-REMEMBERED:]
    return {
        step: Record(sum(s == step for s, _ in last), sum(s == step and better for s, better in last))
        for step in get_args(Step)
    }


def _draw(record: Record, rng: random.Random) -> float:
    """Draw from the distribution of a step's success, with one success and one failure to begin with."""
    return rng.betavariate(1 + record.better, 1 + record.made - record.better)


def sample_mutation_step(rng: random.Random, view: View, parents: Sequence[Member]) -> Proposal:
    """Return a mutation of a rule, a parent after moves, or a whole plan."""
    return MUTATION[next_step(view, rng)](rng, view, parents)


def sample_crossover_step(rng: random.Random, view: View, parents: Sequence[Member]) -> Proposal:
    """Return a crossover of two rules, a mix of two parents, or a whole plan."""
    return CROSSOVER[next_step(view, rng)](rng, view, parents)
