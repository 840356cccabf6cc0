"""Submission of proposals: the candidates of one call, and proposals sampled without an LLM."""

import asyncio
import random
from collections.abc import Callable

from agents.population.call import Call
from agents.population.view import BUDGET_USED_UP, KNOWN_ALREADY, Proposal, Refused, Submit
from protocol.plans.candidate import AgentName, Provenance, Source

TRIES = 25
"""Samples for each missing proposal before sampling gives up: by then probably no new plan is left."""

Sampler = Callable[[random.Random], Proposal]
"""A classical operator: returns another proposal at each call."""


class NothingLeft(Exception):  # noqa: N818  (no error: the call is at its end)
    """The call has all its candidates, or the budget is used up: every further proposal would be refused."""


class Submitter:
    """Submits the proposals of one call. `accepted` holds the ids of its candidates, also from an earlier process."""

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
        """Return None if the proposal is accepted, else the reason; raise NothingLeft when no more can be."""
        provenance = Provenance(
            agent=self._agent,
            source=source,
            round=self.call.view.round,
            call=self.call.index,
            parents=proposal.parents,
            endpoint=endpoint,
            prompt=prompt,
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
            # An earlier process got other answers: its candidates and ours together are enough.
            raise NothingLeft
        return None

    async def sample(self, rng: random.Random, missing: int, sampler: Sampler, source: Source) -> int:
        """Submit samples until `missing` are accepted or no new plan is found; return how many were accepted."""
        taken = 0
        for _ in range(TRIES * missing):
            taken += await self.submit(sampler(rng), source) is None
            if taken == missing:
                break
            await asyncio.sleep(0)  # a refusal awaits nothing, so without this other tasks would starve
        return taken
