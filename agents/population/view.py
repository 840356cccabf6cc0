"""The view that agents get of a search, and the interface by which they submit proposals."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from protocol.errors import BudgetError
from protocol.plans.candidate import AgentName, Candidate, Provenance, Source, Step, candidate_id
from protocol.plans.features import RawFeatures, raw_features, unit_features
from protocol.plans.profile import ModelProfile
from protocol.plans.shape import Unit
from protocol.plans.single_unit_pruning import single_unit_removed_share
from protocol.plans.spec import SearchSpec


@dataclass(frozen=True)
class Member:
    """A measured candidate of the population."""

    candidate: Candidate
    fitness: float
    """Perplexity or KL divergence, depending on the spec's measure; lower is better."""


@dataclass(frozen=True)
class Tried:
    """A candidate with its fitness, which is None if the candidate failed."""

    candidate: Candidate
    fitness: float | None
    stopped: bool = False
    """Whether it lost its race. Its fitness is then estimated from its first windows and its rival's losses."""


def _unknown(_: str) -> None:
    """Return None, the fitness of every candidate before anything is measured."""


@dataclass(frozen=True, eq=False)
class View:
    """A search as agents see it at the beginning of a round; `population` is best first."""

    spec: SearchSpec
    profile: ModelProfile
    round: int
    population: tuple[Member, ...]
    made: Mapping[tuple[AgentName, int], frozenset[str]] = field(default_factory=dict)
    """Ids of this round's candidates by agent and call, if an earlier process began the round and was killed."""
    measured: tuple[Member, ...] = ()
    """The best members of all earlier rounds, best first. `population` is the first part of this list."""
    recent: tuple[Tried, ...] = ()
    """The last candidates of the earlier rounds, with any outcome, in the order in which they were issued."""
    start: tuple[float, ...] | None = None
    """The rates of the best member of the first population."""
    fitness_of: Callable[[str], float | None] = _unknown
    """Returns the fitness of a candidate of an earlier round by its id; None if the candidate has no fitness."""
    at_other_rates: tuple[tuple[Member, ...], ...] = ()
    """The best members of each search that this search learns from (search.learn_from), best first. Their plans have
    another pruning rate."""
    lessons: str = ""
    """What earlier searches found (llm.lessons)."""
    together: int = 1
    """Number of candidates that one question asks for, if llm.proposals_per_call does not say it."""
    step: Step | None = None
    """What should make this round's offspring; None if each candidate decides for itself."""

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The units, in the order of the rates."""
        return self.profile.shape.units(self.spec.granularity)

    @cached_property
    def raw_features(self) -> RawFeatures:
        """What was measured of each unit before pruning."""
        profile = self.profile
        return raw_features(
            self.units,
            sensitivity=profile.sensitivity,
            removed=[single_unit_removed_share(unit, self.spec, profile.shape) for unit in self.units],
            outliers=profile.outliers,
            others=profile.features,
        )

    @cached_property
    def features(self) -> Mapping[str, tuple[float, ...]]:
        """The features of the units that rules compute with, one value per unit."""
        return unit_features(self.profile.shape, self.spec.rate, self.spec.granularity, self.raw_features)

    def candidate_id(self, rates: Sequence[float]) -> str | None:
        """Return the id of the candidate that these raw rates become; None if no plan fits them."""
        shape = self.profile.shape
        try:
            plan = self.spec.plan(self.spec.feasible(tuple(rates), shape), shape)
        except BudgetError:
            return None
        return candidate_id(plan, self.spec.fingerprint)

    @property
    def by_fragility(self) -> tuple[Unit, ...]:
        """The units, most sensitive first; empty if sensitivity was not measured."""
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
    """The proposal will not be measured; `reason` completes "configuration 2: …" for the LLM."""

    reason: str


BUDGET_USED_UP = Refused("the budget of evaluations is used up")
"""Refuses every proposal once the budget is used up: the agents then stop without an error."""
KNOWN_ALREADY = Refused("it prunes the model exactly as an earlier configuration does")
"""Refuses a proposal whose plan was proposed before, by this call or another call."""

Submit = Callable[[Sequence[float], Provenance], Awaitable[Accepted | Refused]]
"""Takes raw rates, one per unit. They are made feasible, planned, compared with the known plans, and enqueued.

A plan that the same call proposed before is accepted again, because a call is repeated if its process was killed.
"""


@dataclass(frozen=True)
class Proposal:
    """Raw rates, one per unit, the ids of the parents, what made it, and the rule that gave the rates, if one did."""

    rates: tuple[float, ...]
    parents: tuple[str, ...] = ()
    rule: str | None = None
    step: Step | None = None


@dataclass(frozen=True)
class Selection:
    """Parents for the next offspring, best first, the source of the choice, and what should make the offspring."""

    parents: tuple[Member, ...]
    source: Source
    step: Step | None = None
