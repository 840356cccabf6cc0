"""Handing in what is proposed: the candidates of one call, and proposals drawn without an LLM."""

import asyncio
import random
from collections.abc import Callable

from agents.population.call import Call
from agents.population.view import BUDGET_USED_UP, KNOWN_ALREADY, Proposal, Refused, Submit
from protocol.plans.candidate import AgentName, Provenance, Source

TRIES = 25
"""Proposals that may be drawn for one that is still missing, before it is believed that there is none."""

Draw = Callable[[random.Random], Proposal]
"""A classical operator: makes one proposal after another."""


class NothingLeft(Exception):  # noqa: N818  (no error: the call is at its end)
    """The call has all its candidates, or the budget is used up: whatever is proposed now is refused."""


class Offers:
    """Hands in the proposals of one call. `made` are its candidates, those of an earlier process included."""

    def __init__(self, agent: AgentName, call: Call, submit: Submit) -> None:
        self._agent: AgentName = agent
        self.call = call
        self.made = set(call.view.made.get((agent, call.index), ()))
        self._submit = submit
        self._taken: set[str] = set()

    @property
    def is_complete(self) -> bool:
        """Whether the call has all the candidates that it is to make."""
        return len(self.made) >= self.call.count

    async def make(
        self, proposal: Proposal, source: Source, *, endpoint: str | None = None, prompt: str | None = None
    ) -> str | None:
        """None when the proposal is accepted, else why not; raises NothingLeft when no more will be."""
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
        if result.id in self._taken:
            return KNOWN_ALREADY.reason
        self._taken.add(result.id)
        self.made.add(result.id)
        if self.is_complete and len(self._taken) < self.call.count:
            # An earlier process was answered otherwise: its candidates and ours together are enough.
            raise NothingLeft
        return None

    async def draw(self, rng: random.Random, missing: int, draw: Draw, source: Source) -> int:
        """Hand in what `draw` makes until `missing` are accepted, or no new plan is found; returns how many were."""
        taken = 0
        for _ in range(TRIES * missing):
            taken += await self.make(draw(rng), source) is None
            if taken == missing:
                break
            await asyncio.sleep(0)  # what is refused waits for nobody, and others have to get on
        return taken
