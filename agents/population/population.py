"""The population: measured candidates, best first. Pure; nothing here waits."""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from protocol.plans.candidate import Candidate, Measured, Outcome


@dataclass(frozen=True)
class Evaluation:
    """A candidate with its outcome. `order` is its place in the sequence of outcomes."""

    candidate: Candidate
    outcome: Outcome
    order: int


class Population:
    """All outcomes of a search, and among the measured ones an order by fitness (lower is better).

    Baselines are kept (they are measured like any other) but are not members: they are what the search is compared
    with. A failed candidate is remembered and never a member.
    """

    def __init__(self) -> None:
        self._evaluations: dict[str, Evaluation] = {}
        # Equals by round and id, so that the rank does not depend on which worker was faster.
        self._ranked: list[tuple[float, int, str]] = []

    def __len__(self) -> int:
        return len(self._ranked)

    @property
    def outcomes(self) -> int:
        """How many outcomes there are: members, baselines, and candidates that failed or were stopped."""
        return len(self._evaluations)

    def __contains__(self, candidate_id: str) -> bool:
        return candidate_id in self._evaluations

    def __iter__(self) -> Iterator[Evaluation]:
        """Every evaluation, in the order of its outcome."""
        return iter(self._evaluations.values())

    def newest(self, count: int) -> list[Evaluation]:
        """The last `count` evaluations in the order of their outcomes; costs as much as these alone."""
        return list(islice(reversed(self._evaluations.values()), count))[::-1]

    def insert(self, candidate: Candidate, outcome: Outcome) -> bool:
        """Remember an outcome; True when its candidate is the new best. A second outcome for an id is ignored."""
        if candidate.id in self._evaluations:
            return False
        evaluation = Evaluation(candidate, outcome, len(self._evaluations))
        self._evaluations[candidate.id] = evaluation
        if not isinstance(outcome, Measured) or not candidate.is_proposal:
            return False
        insort(self._ranked, (outcome.fitness, candidate.provenance.round, candidate.id))
        return self._ranked[0][2] == candidate.id

    def get(self, candidate_id: str) -> Evaluation | None:
        """The evaluation of a candidate, if there is one."""
        return self._evaluations.get(candidate_id)

    def top(self, count: int | None, *, before: int | None = None) -> list[Evaluation]:
        """The best `count` members (all for None), best first; of rounds earlier than `before` where it is given."""
        ranked = (id_ for _, round_, id_ in self._ranked if before is None or round_ < before)
        return [self._evaluations[id_] for id_ in islice(ranked, count)]

    def best(self) -> Evaluation | None:
        """The best member, or None while nothing is measured."""
        return self.top(1)[0] if self._ranked else None
