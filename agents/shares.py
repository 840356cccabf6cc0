"""Whom to ask: each endpoint's share follows what its proposals have improved. Pure, seeded."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from agents.view import Member, View


@dataclass(frozen=True)
class Record:
    """What an endpoint's proposals came to."""

    measured: int
    improved: int
    """Of these: better than the best of their parents; without parents, better than the median of their round."""


def records(members: Iterable[Member]) -> dict[str, Record]:
    """By the name of the endpoint; `members` are all that was measured."""
    everybody = list(members)
    fitness = {member.candidate.id: member.fitness for member in everybody}
    medians = _medians(everybody)
    measured: Counter[str] = Counter()
    improved: Counter[str] = Counter()
    for member in everybody:
        who = member.candidate.provenance
        if who.endpoint is not None:
            known = [fitness[parent] for parent in who.parents if parent in fitness]
            measured[who.endpoint] += 1
            improved[who.endpoint] += member.fitness < (min(known) if known else medians[who.round])
    return {name: Record(count, improved[name]) for name, count in measured.items()}


def ranked_endpoints(view: View, names: Sequence[str], seed: int) -> tuple[str, ...]:
    """The endpoints in the order in which a question asks them, by Thompson sampling.

    The share of an endpoint's proposals that improve is believed to be Beta(1 + improved, 1 + others); one draw from
    each decides. The same view and seed give the same order.
    """
    known: Mapping[str, Record] = records(view.measured)
    rng = random.Random(seed)
    draws = {}
    for name in names:
        record = known.get(name, Record(0, 0))
        draws[name] = rng.betavariate(1 + record.improved, 1 + record.measured - record.improved)
    return tuple(sorted(names, key=lambda name: -draws[name]))


def _medians(members: Iterable[Member]) -> dict[int, float]:
    rounds: dict[int, list[float]] = {}
    for member in members:
        rounds.setdefault(member.candidate.provenance.round, []).append(member.fitness)
    return {round_: sorted(values)[len(values) // 2] for round_, values in rounds.items()}
