"""The state of a search: the ledger, the population, the parents selected in each round, and counts of proposals."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

from agents.population.population import Population
from agents.population.view import Member
from daemon.state.history import History
from protocol.plans.candidate import AgentName, Candidate, KeptSelection
from protocol.plans.profile import ModelProfile
from protocol.plans.spec import SearchSpec

Calls = dict[tuple[AgentName, int], frozenset[str]]
"""The ids of the candidates made by each call of each agent."""


class Proposals:
    """Counts of the agents' candidates in a ledger, updated with each candidate, so that reading them is cheap."""

    def __init__(self, ledger: Iterable[Candidate]) -> None:
        self.by_agent: Counter[str] = Counter()
        self.by_source: Counter[str] = Counter()
        self._rounds: defaultdict[int, dict[tuple[AgentName, int], set[str]]] = defaultdict(dict)
        self._made: Counter[tuple[AgentName, int]] = Counter()
        for candidate in ledger:
            self.add(candidate)

    def __len__(self) -> int:
        return self.by_agent.total()

    def add(self, candidate: Candidate) -> None:
        """Count a new candidate of the ledger."""
        who = candidate.provenance
        if not candidate.is_proposal:
            return
        self.by_agent[who.agent] += 1
        self.by_source[who.source] += 1
        self._made[who.agent, who.round] += 1
        self._rounds[who.round].setdefault((who.agent, who.call), set()).add(candidate.id)

    def made(self, agent: AgentName, round_: int) -> int:
        """Return the number of candidates that an agent has made in a round."""
        return self._made[agent, round_]

    def in_round(self, round_: int) -> int:
        """Return the number of candidates made in a round."""
        return sum(count for (_, made_in), count in self._made.items() if made_in == round_)

    def before(self, round_: int) -> int:
        """Return the number of candidates made in earlier rounds."""
        return sum(count for (_, made_in), count in self._made.items() if made_in < round_)

    def calls(self, round_: int) -> Calls:
        """Return the ids of the candidates that each call has made in a round."""
        return {call: frozenset(ids) for call, ids in self._rounds.get(round_, {}).items()}


@dataclass
class SearchState:
    """The state of one search.

    Only the PopulationKeeper writes the population, only Admission the ledger and the proposals, and only Search the
    selections.
    """

    spec: SearchSpec
    profile: ModelProfile
    ledger: dict[str, Candidate] = field(default_factory=dict)
    """Every candidate that was issued, by its id, in the order of issue."""
    population: Population = field(default_factory=Population)
    selections: dict[int, KeptSelection] = field(default_factory=dict)
    """What the Selector chose, by round."""
    lessons: str = ""
    """What the LLM is told of earlier searches."""
    at_other_rates: tuple[tuple[Member, ...], ...] = ()
    """The best members of searches at other rates (search.learn_from)."""
    proposals: Proposals = field(init=False)
    """Counts of the candidates in the ledger."""

    def __post_init__(self) -> None:
        self.proposals = Proposals(self.ledger.values())

    @classmethod
    def of(
        cls,
        spec: SearchSpec,
        profile: ModelProfile,
        history: History,
        lessons: str = "",
        at_other_rates: tuple[tuple[Member, ...], ...] = (),
    ) -> Self:
        """Return the state of the search that earlier processes have recorded in `history`."""
        kept = history.ledger, history.population, history.selections
        return cls(spec, profile, *kept, lessons, at_other_rates)
