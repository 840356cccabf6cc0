"""How an agent gets its candidates: several calls to the LLM at a time, and the stand-in for what they leave out."""

import asyncio
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from agents.asking import Asker, Asks, Call, Question
from agents.endpoint import Answer
from agents.prompt import Prompts
from agents.settings import AgentSettings
from agents.view import BUDGET_USED_UP, Proposal, Refused, Submit, View
from protocol.candidate import AgentName, Provenance, Source

STAND_IN_TRIES = 25
"""Proposals that the stand-in may make for one that is still missing, before it is believed that there is none."""

log = structlog.get_logger()


class Proposer:
    """Makes an agent's proposals: several calls at a time, and the stand-in for what the LLM leaves out."""

    def __init__(self, agent: AgentName, chat: Asks, prompts: Prompts, settings: AgentSettings) -> None:
        self._agent = agent
        self._asker = Asker(chat, prompts, settings)
        self._settings = settings

    async def propose(
        self,
        view: View,
        count: int,
        submit: Submit,
        question: Callable[[Call], Question[Proposal]],
        stand_in: Callable[[random.Random], Proposal],
    ) -> int:
        """Get `count` candidates accepted; returns how many were, which is fewer only where no new plan was found.

        Calls that an earlier process completed (`view.made`) are left out. One that it did not is asked again as it
        was: an LLM that answers the same then makes the same candidates.
        """
        calls = [Call(self._agent, view, i, size) for i, size in enumerate(self._settings.split(count))]
        open_calls = [call for call in calls if _made(call) < call.count]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._fill(call, submit, question(call), stand_in)) for call in open_calls]
        return sum(task.result() for task in tasks)

    async def _fill(
        self,
        call: Call,
        submit: Submit,
        question: Question[Proposal],
        stand_in: Callable[[random.Random], Proposal],
    ) -> int:
        prompt = f"{question.name}:{hashlib.sha256(question.prompt.encode()).hexdigest()[:8]}"
        offers = _Offers(call, self._agent, submit)

        async def take(proposal: Proposal, answer: Answer) -> str | None:
            return await offers.make(proposal, "llm", endpoint=answer.endpoint, prompt=prompt)

        try:
            await self._asker.ask(call, question, call.count, take)
            if offers.accepted < call.count:
                await self._stand_in(call, call.count - offers.accepted, offers, stand_in)
        except _NothingLeft:
            log.debug("nothing_left_to_ask", agent=self._agent, round=call.view.round)
        return offers.accepted

    async def _stand_in(
        self, call: Call, missing: int, offers: "_Offers", stand_in: Callable[[random.Random], Proposal]
    ) -> None:
        rng, taken = call.rng, 0
        for _ in range(STAND_IN_TRIES * missing):
            taken += await offers.make(stand_in(rng), "stand-in") is None
            if taken == missing:
                break
        log.info("stand_in", agent=self._agent, round=call.view.round, accepted=taken, missing=missing - taken)


class _NothingLeft(Exception):  # noqa: N818  (no error: the search is at its end)
    """The budget is used up, or an interrupted call has all it lacked; whatever is proposed now is refused."""


def _made(call: Call) -> int:
    """How many candidates of this call an earlier process got accepted."""
    return sum(made for (agent, i), made in call.view.made.items() if (agent, i) == (call.agent, call.index))


@dataclass
class _Offers:
    """Hands in the proposals of one call, and counts those accepted, and among them the new ones."""

    call: Call
    agent: AgentName
    submit: Submit
    accepted: int = 0
    new: int = 0

    async def make(
        self, proposal: Proposal, source: Source, *, endpoint: str | None = None, prompt: str | None = None
    ) -> str | None:
        """None when the proposal is accepted, else why not; raises _NothingLeft when no more are wanted."""
        provenance = Provenance(
            agent=self.agent,
            source=source,
            round=self.call.view.round,
            call=self.call.index,
            parents=proposal.parents,
            endpoint=endpoint,
            prompt=prompt,
        )
        result = await self.submit(proposal.rates, provenance)
        if result == BUDGET_USED_UP:
            raise _NothingLeft
        if isinstance(result, Refused):
            return result.reason
        self.accepted += 1
        self.new += not result.again
        made = _made(self.call)
        if made and made + self.new == self.call.count:
            raise _NothingLeft
        return None
