"""The state of a search: the ledger, the population, and the parents selected in each round."""

from dataclasses import dataclass, field
from typing import Self

from agents.population.population import Population
from daemon.search.proposals import Proposals
from daemon.state.history import History
from protocol.plans.candidate import Candidate
from protocol.plans.profile import ModelProfile
from protocol.plans.spec import SearchSpec


@dataclass
class SearchState:
    """The state of one search. The PopulationKeeper alone writes the population; Admission writes the rest."""

    spec: SearchSpec
    profile: ModelProfile
    ledger: dict[str, Candidate] = field(default_factory=dict)
    """Every candidate that was issued, by its id, in the order of issue."""
    population: Population = field(default_factory=Population)
    selections: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """The ids of the parents that the Selector chose, by round."""
    proposals: Proposals = field(init=False)
    """Counts of the candidates in the ledger."""

    def __post_init__(self) -> None:
        self.proposals = Proposals(self.ledger.values())

    @classmethod
    def of(cls, spec: SearchSpec, profile: ModelProfile, history: History) -> Self:
        """Return the state that earlier processes have left."""
        population = Population()
        for id_, outcome in history.outcomes.items():
            population.insert(history.ledger[id_], outcome)
        return cls(spec, profile, dict(history.ledger), population, dict(history.selections))
