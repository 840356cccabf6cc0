"""Counts of the agents' proposals, kept as they come, so that reading them is cheap in a long search."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from protocol.plans.candidate import AgentName, Candidate

Calls = dict[tuple[AgentName, int], frozenset[str]]
"""The ids of the candidates made by each call of each agent."""


class Proposals:
    """Counts of the candidates in a ledger, without baselines."""

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
        """Return the ids that each call of a round has made."""
        return {call: frozenset(ids) for call, ids in self._rounds.get(round_, {}).items()}
