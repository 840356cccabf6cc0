"""What the agents see of a search, and how they hand in what they propose."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from protocol.errors import BudgetError
from protocol.plans.candidate import AgentName, Candidate, Provenance, Source, candidate_id
from protocol.plans.profile import ModelProfile
from protocol.plans.shape import Unit
from protocol.plans.spec import SearchSpec


@dataclass(frozen=True)
class Member:
    """A measured candidate of the population."""

    candidate: Candidate
    fitness: float
    """Perplexity or KL divergence, as the spec's measure says; lower is better."""


@dataclass(frozen=True)
class Tried:
    """A candidate with what came of it: None where it failed."""

    candidate: Candidate
    fitness: float | None
    stopped: bool = False
    """In its race: the fitness is guessed from that of its rival and the windows that were measured."""


def _unknown(_: str) -> None:
    """The fitness of a candidate of a search that has none."""


@dataclass(frozen=True, eq=False)
class View:
    """A search as an agent sees it at the beginning of a round: the population is best first."""

    spec: SearchSpec
    profile: ModelProfile
    round: int
    population: tuple[Member, ...]
    made: Mapping[tuple[AgentName, int], frozenset[str]] = field(default_factory=dict)
    """Ids of this round's candidates by agent and call, where a process that was killed had begun it."""
    measured: tuple[Member, ...] = ()
    """The best of all that was measured in the rounds before, best first; `population` is the beginning of it."""
    recent: tuple[Tried, ...] = ()
    """The last candidates of the rounds before, whatever came of them, in the order in which they were issued."""
    start: tuple[float, ...] | None = None
    """The rates of the best of the first population."""
    fitness_of: Callable[[str], float | None] = _unknown
    """By a candidate's id, of any round before, however long ago; None where it has none."""

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """What the pruning rates apply to, in their order."""
        return self.profile.shape.units(self.spec.granularity)

    def candidate_id(self, rates: Sequence[float]) -> str | None:
        """The id of the candidate that these raw rates become; None where there is no plan for them."""
        shape = self.profile.shape
        try:
            plan = self.spec.plan(self.spec.feasible(tuple(rates), shape), shape)
        except BudgetError:
            return None
        return candidate_id(plan, self.spec.fingerprint)

    @property
    def by_fragility(self) -> tuple[Unit, ...]:
        """The units, those first whose pruning alone changes most; none where that was not measured."""
        if not self.profile.sensitivity:
            return ()
        ranked = sorted(zip(self.profile.sensitivity, self.units, strict=True), key=lambda pair: -pair[0])
        return tuple(unit for _, unit in ranked)


@dataclass(frozen=True)
class Accepted:
    """The proposal became the candidate `id` and will be measured."""

    id: str


@dataclass(frozen=True)
class Refused:
    """The proposal is not worth measuring; `reason` completes "configuration 2: …" for the LLM."""

    reason: str


BUDGET_USED_UP = Refused("the budget of evaluations is used up")
"""What every proposal is refused with from then on: the agents stop quietly."""
KNOWN_ALREADY = Refused("it prunes the model exactly as an earlier configuration does")
"""What a proposal is refused with whose plan another call, or this one before, has proposed."""

Submit = Callable[[Sequence[float], Provenance], Awaitable[Accepted | Refused]]
"""Takes raw rates, one per unit. They are made feasible, planned, compared with what is known, and enqueued.

What the same call has proposed before is accepted again: that call is repeated because its process was killed.
"""


@dataclass(frozen=True)
class Proposal:
    """Raw rates, one per unit, and the ids of the candidates that they were made from."""

    rates: tuple[float, ...]
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """Parents for the next offspring, best first, and who chose them."""

    parents: tuple[Member, ...]
    source: Source
