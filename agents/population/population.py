"""The population: measured candidates, best first. Pure."""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from protocol.plans.candidate import Candidate, Measured, Outcome


@dataclass(frozen=True)
class Evaluation:
    """A candidate with its outcome. `order` is the position in the sequence of outcomes."""

    candidate: Candidate
    outcome: Outcome
    order: int


class Population:
    """All outcomes of a search, and its members ranked by fitness (lower is better).

    Members are the measured proposals. Other outcomes are kept but are not members: those of baselines, with which the
    search is compared, and those of candidates that failed or were stopped.
    """

    def __init__(self) -> None:
        self._evaluations: dict[str, Evaluation] = {}
        # Ties are broken by round and id, so that the rank does not depend on which worker was faster.
        self._ranked: list[tuple[float, int, str]] = []

    def __len__(self) -> int:
        return len(self._ranked)

    @property
    def outcomes(self) -> int:
        """The number of outcomes: members, baselines, and candidates that failed or were stopped."""
        return len(self._evaluations)

    def __contains__(self, candidate_id: str) -> bool:
        return candidate_id in self._evaluations

    def __iter__(self) -> Iterator[Evaluation]:
        """Every evaluation, in the order of its outcome."""
        return iter(self._evaluations.values())

    def copy(self) -> "Population":
        """Return a population that keeps what this one has now."""
        copied = Population()
        copied._evaluations, copied._ranked = dict(self._evaluations), list(self._ranked)
        return copied

    def newest(self, count: int) -> list[Evaluation]:
        """Return the last `count` evaluations in the order of their outcomes, in O(count)."""
        return list(islice(reversed(self._evaluations.values()), count))[::-1]

    def insert(self, candidate: Candidate, outcome: Outcome) -> bool:
        """Add an outcome; return True if its candidate is the new best. A second outcome for an id is ignored."""
        if candidate.id in self._evaluations:
            return False
        evaluation = Evaluation(candidate, outcome, len(self._evaluations))
        self._evaluations[candidate.id] = evaluation
        if not isinstance(outcome, Measured) or not candidate.is_proposal:
            return False
        insort(self._ranked, (outcome.fitness, candidate.provenance.round, candidate.id))
        return self._ranked[0][2] == candidate.id

    def get(self, candidate_id: str) -> Evaluation | None:
        """Return the evaluation of a candidate, or None."""
        return self._evaluations.get(candidate_id)

    def top(self, count: int | None, *, before: int | None = None) -> list[Evaluation]:
        """Return the best `count` members (None: all), best first; with `before` only those of earlier rounds."""
        ranked = (id_ for _, round_, id_ in self._ranked if before is None or round_ < before)
        return [self._evaluations[id_] for id_ in islice(ranked, count)]

    def best(self) -> Evaluation | None:
        """Return the best member, or None while nothing is measured."""
        return self.top(1)[0] if self._ranked else None
