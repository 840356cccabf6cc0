"""Whom to ask: each endpoint's share follows what its offspring have improved. Pure, seeded."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from agents.population import Population
from agents.view import Tried, View
from protocol.candidate import Measured


@dataclass(frozen=True)
class Record:
    """What an endpoint's offspring came to."""

    tried: int
    improved: int
    """Of these: better than the best of their parents. What failed, or was stopped in a race, is not."""


def records(candidates: Iterable[Tried], fitness: Mapping[str, float]) -> dict[str, Record]:
    """By the name of the endpoint; `fitness` is parents' by id. Without parents there is nothing to improve on."""
    tried: Counter[str] = Counter()
    improved: Counter[str] = Counter()
    for one in candidates:
        who = one.candidate.provenance
        known = [fitness[parent] for parent in who.parents if parent in fitness]
        if who.endpoint is not None and known:
            tried[who.endpoint] += 1
            improved[who.endpoint] += one.fitness is not None and not one.stopped and one.fitness < min(known)
    return {name: Record(count, improved[name]) for name, count in tried.items()}


def records_of(population: Population) -> dict[str, Record]:
    """Of all offspring there have been, by the name of the endpoint."""
    counted = Offspring()
    counted.take(population)
    return counted.records


class Offspring:
    """Counts the offspring of a population that grows: what is looked at again costs what is new alone."""

    def __init__(self) -> None:
        self._fitness: dict[str, float] = {}
        self._taken = 0
        self._tried: Counter[str] = Counter()
        self._improved: Counter[str] = Counter()

    @property
    def records(self) -> dict[str, Record]:
        """By the name of the endpoint."""
        return {name: Record(count, self._improved[name]) for name, count in self._tried.items()}

    def take(self, population: Population) -> None:
        """Count those whose outcomes are new; parents' came before them."""
        new = population.newest(max(0, population.outcomes - self._taken))
        self._taken = population.outcomes
        fitness = {e.candidate.id: e.outcome.fitness for e in new if isinstance(e.outcome, Measured)}
        self._fitness |= fitness
        tried = (Tried(e.candidate, fitness.get(e.candidate.id)) for e in new)
        for name, record in records(tried, self._fitness).items():
            self._tried[name] += record.tried
            self._improved[name] += record.improved


def ranked_endpoints(view: View, names: Sequence[str], seed: int) -> tuple[str, ...]:
    """The endpoints in the order in which a question asks them, by Thompson sampling.

    The share of an endpoint's offspring that improve is believed to be Beta(1 + improved, 1 + others), by the last
    candidates; one draw from each decides. The same view and seed give the same order.
    """
    if len(names) < 2:
        return tuple(names)
    fitness = {member.candidate.id: member.fitness for member in view.measured}
    fitness |= {tried.candidate.id: tried.fitness for tried in view.recent if tried.fitness is not None}
    known = records(view.recent, fitness)
    rng = random.Random(seed)
    draws = {}
    for name in names:
        record = known.get(name, Record(0, 0))
        draws[name] = rng.betavariate(1 + record.improved, 1 + record.tried - record.improved)
    return tuple(sorted(names, key=lambda name: -draws[name]))
