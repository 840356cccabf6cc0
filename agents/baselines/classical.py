"""Agents that ask no LLM: baselines of an LLM search, and replacements of single LLM agents.

Each class has the interface of the agent that it replaces, so its candidates are processed in the same way: they are
made feasible, planned, compared with the known plans, queued and measured. The samples depend only on the search's
seed, the round and the outcomes of earlier rounds, so a search that was killed makes the same samples again.
"""

from collections.abc import Sequence
from contextlib import suppress

from agents.operators.genetic import tournament
from agents.population.submission import Call, NothingLeft, Operator, Submitter
from agents.population.view import Member, Selection, Submit, View
from protocol.plans.candidate import AgentName


class OperatorAgent:
    """Proposes candidates that an operator makes from the parents; proposes none for fewer than `min_parents`."""

    def __init__(self, agent: AgentName, operator: Operator, min_parents: int) -> None:
        self._agent: AgentName = agent
        self._operator = operator
        self._min_parents = min_parents

    async def propose(self, view: View, parents: Sequence[Member], count: int, submit: Submit) -> int:
        """Submit candidates until `count` are accepted; return the number accepted.

        It is smaller than `count` if no new plan was found, and 0 for fewer than `min_parents` parents.
        """
        if len(parents) < self._min_parents:
            return 0
        call = Call(self._agent, view, 0, count)
        submitter = Submitter(self._agent, call, submit)
        if not submitter.is_complete:
            with suppress(NothingLeft):
                await submitter.sample(count, self._operator, parents, "classical")
        return len(submitter.accepted)


class RandomInitializer:
    """Proposes samples of an operator that needs no parents."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    async def propose(self, view: View, count: int, submit: Submit) -> int:
        """Submit candidates until `count` are accepted; return the number accepted."""
        return await OperatorAgent("initializer", self._operator, 0).propose(view, (), count, submit)


class TournamentSelector:
    """Selects each parent as the best of three random members."""

    async def select(self, view: View, count: int) -> Selection:
        """Return up to `count` parents, best first: at most half of the population, but at least two members."""
        wanted = min(count, max(2, len(view.population) // 2), len(view.population))
        return Selection(tournament(Call("selector", view, 0, wanted).rng, view.population, wanted), "classical")
