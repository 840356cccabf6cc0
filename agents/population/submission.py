"""The calls of an agent, with their random seeds, and the submission of their proposals."""

import asyncio
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agents.population.view import BUDGET_USED_UP, KNOWN_ALREADY, Member, Proposal, Refused, Submit, View
from protocol.plans.candidate import AgentName, Provenance, Source

TRIES = 25
"""Maximum number of samples for each missing proposal. If all are refused, probably no new plan is left."""

Operator = Callable[[random.Random, View, Sequence[Member]], Proposal]
"""Makes a proposal from some parents without an LLM. Each call makes another proposal."""


class NothingLeft(Exception):  # noqa: N818  (no error: the call is at its end)
    """The call has all its candidates, or the budget is used up, so every further proposal would be refused."""


@dataclass(frozen=True)
class Call:
    """One call of an agent in a round, with its number `index` and the `count` of proposals that it should make."""

    agent: str
    view: View
    index: int
    count: int

    def seed(self, attempt: int) -> int:
        """Return a seed of 31 bits, different for every question of a search."""
        key = f"{self.view.spec.seed}|{self.view.round}|{self.agent}|{self.index}|{self.count}|{attempt}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1

    def sample_members(self, members: Sequence[Member], count: int) -> tuple[Member, ...]:
        """Return at most `count` of `members`, in their order. Each call of a round sees different members."""
        first = [members[self.index % len(members)]]
        others = [member for member in members if member is not first[0]]
        sampled = first + self.rng.sample(others, min(count - 1, len(others)))
        return tuple(member for member in members if member in sampled)

    def generator(self, purpose: str) -> random.Random:
        """Return a random generator that is independent of `rng` and of those for other purposes."""
        return random.Random(f"{self.seed(-1)}|{purpose}")

    @property
    def rng(self) -> random.Random:
        """A new random generator for the fallback and the menus, with the same seed every time."""
        return random.Random(self.seed(-1))


class Submitter:
    """Submits the proposals of one call. `accepted` has its candidates' ids, including those of an earlier process."""

    def __init__(self, agent: AgentName, call: Call, submit: Submit) -> None:
        self._agent: AgentName = agent
        self.call = call
        self.accepted = set(call.view.made.get((agent, call.index), ()))
        self._submit = submit
        self._own: set[str] = set()
        """Ids accepted in this process."""

    @property
    def is_complete(self) -> bool:
        """Whether the call has as many candidates as it should make."""
        return len(self.accepted) >= self.call.count

    async def submit(
        self, proposal: Proposal, source: Source, *, endpoint: str | None = None, prompt: str | None = None
    ) -> str | None:
        """Return None if the proposal is accepted, else the reason; raise NothingLeft if no other would be accepted."""
        provenance = Provenance(
            agent=self._agent,
            source=source,
            round=self.call.view.round,
            call=self.call.index,
            parents=proposal.parents,
            endpoint=endpoint,
            prompt=prompt,
            rule=proposal.rule,
            step=proposal.step,
        )
        result = await self._submit(proposal.rates, provenance)
        if result == BUDGET_USED_UP:
            raise NothingLeft
        if isinstance(result, Refused):
            return result.reason
        if result.id in self._own:
            return KNOWN_ALREADY.reason
        self._own.add(result.id)
        self.accepted.add(result.id)
        if self.is_complete and len(self._own) < self.call.count:
            # An earlier process got other answers. Its candidates and ours together are enough.
            raise NothingLeft
        return None

    async def sample(self, missing: int, operator: Operator, parents: Sequence[Member], source: Source) -> int:
        """Submit samples until `missing` are accepted or no new plan is found; return how many were accepted."""
        rng, taken = self.call.rng, 0
        for _ in range(TRIES * missing):
            # In a thread, because some operators take a second.
            proposal = await asyncio.to_thread(operator, rng, self.call.view, parents)
            taken += await self.submit(proposal, source) is None
            if taken == missing:
                break
        return taken
