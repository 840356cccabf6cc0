"""Where a candidate comes from: its ancestors, and what it changed against each parent."""

from collections import deque
from typing import Any

from agents.population.population import Population
from protocol.plans.candidate import SOURCE_NAMES, Candidate, Measured
from protocol.plans.shape import Unit

GENERATIONS = 6
"""Generations of ancestors that are shown."""
CHANGES_SHOWN = 12
"""Units shown whose rate differs from a parent's, the largest difference first."""
LEAST_CHANGE = 0.0005
"""Smallest difference of two rates that is shown: rates are shown with three decimals."""


def family_of(
    id_: str, units: tuple[Unit, ...], ledger: dict[str, Candidate], population: Population
) -> dict[str, Any]:
    """Return the candidate's fitness, agent and parents, the same of each parent, and so on, as JSON values.

    `changes` of the candidate itself list, for each parent, the units whose rates differ, with both rates. An ancestor
    on several lines has its own parents only where it is nearest to the candidate, so that the tree stays small.
    """
    candidate = ledger[id_]
    parents = [ledger[parent] for parent in candidate.provenance.parents if parent in ledger]
    root = _member(id_, ledger, population)
    followed, waiting = {id_}, deque([(root, 0)])
    while waiting:  # the nearest ancestors first
        member, generation = waiting.popleft()
        known = ledger.get(member["id"])
        for parent in known.provenance.parents if known else ():
            child = _member(parent, ledger, population)
            member["parents"].append(child)
            if parent not in followed and generation + 1 < GENERATIONS:
                followed.add(parent)
                waiting.append((child, generation + 1))
    return root | {"changes": [_changes(parent, candidate, units) for parent in parents]}


def _member(id_: str, ledger: dict[str, Candidate], population: Population) -> dict[str, Any]:
    candidate, evaluation = ledger.get(id_), population.get(id_)
    outcome = evaluation.outcome if evaluation else None
    return {
        "id": id_,
        "agent": candidate.provenance.agent if candidate else None,
        "made": SOURCE_NAMES[candidate.provenance.source] if candidate else None,
        "endpoint": candidate.provenance.endpoint if candidate else None,
        "round": candidate.provenance.round if candidate else None,
        "fitness": outcome.fitness if isinstance(outcome, Measured) else None,
        "parents": [],
    }


def _changes(parent: Candidate, child: Candidate, units: tuple[Unit, ...]) -> dict[str, Any]:
    pairs = zip(units, parent.rates, child.rates, strict=True)
    differing = [pair for pair in pairs if abs(pair[2] - pair[1]) >= LEAST_CHANGE]
    differing.sort(key=lambda pair: -abs(pair[2] - pair[1]))
    shown = [{"unit": unit.name, "parent": before, "child": after} for unit, before, after in differing[:CHANGES_SHOWN]]
    return {"parent": parent.id, "units": shown, "more": len(differing) - len(shown)}
