"""How an agent gets its candidates: several calls to the LLM at a time, and the stand-in for what they leave out."""

import asyncio
import hashlib
import random
from collections.abc import Callable

import structlog
from structlog.contextvars import bound_contextvars

from agents.asking import Asker, Asks, Call, Question
from agents.endpoint import Answer
from agents.prompt import Prompts
from agents.settings import AgentSettings
from agents.turns import Turns
from agents.view import BUDGET_USED_UP, KNOWN_ALREADY, Proposal, Refused, Submit, View
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
        """Get `count` candidates accepted; returns how many are, which is fewer only where no new plan was found.

        Calls that a process before this one has begun are repeated, and those it has finished are not: the questions
        are the same, so with the same answers the candidates are.
        """
        calls = [Call(self._agent, view, i, size) for i, size in enumerate(self._settings.split(count))]
        offers = [_Offers(self._agent, call, submit) for call in calls]
        begun = [offer for offer in offers if not offer.is_complete]
        turns = Turns(offer.call.index for offer in begun)
        async with asyncio.TaskGroup() as group:
            for offer in begun:
                group.create_task(self._fill(offer, turns, question(offer.call), stand_in))
        return sum(len(offer.made) for offer in offers)

    async def _fill(
        self,
        offers: "_Offers",
        turns: Turns,
        question: Question[Proposal],
        stand_in: Callable[[random.Random], Proposal],
    ) -> None:
        call = offers.call
        prompt = f"{question.name}:{hashlib.sha256(question.prompt.encode()).hexdigest()[:8]}"

        async def take(proposal: Proposal, answer: Answer) -> str | None:
            return await offers.make(proposal, "llm", endpoint=answer.endpoint, prompt=prompt)

        with bound_contextvars(agent=self._agent, round=call.view.round):
            try:
                async with turns.part(call.index):
                    taken = await self._asker.ask(call, question, call.count, take, lambda: turns.turn(call.index))
                    if taken < call.count:
                        async with turns.turn(call.index):
                            await self._stand_in(call, call.count - taken, offers, stand_in)
            except _NothingLeft:
                log.debug("nothing_left_to_propose", agent=self._agent, round=call.view.round, call=call.index)

    async def _stand_in(
        self, call: Call, missing: int, offers: "_Offers", stand_in: Callable[[random.Random], Proposal]
    ) -> None:
        rng, taken = call.rng, 0
        for _ in range(STAND_IN_TRIES * missing):
            taken += await offers.make(stand_in(rng), "stand-in") is None
            if taken == missing:
                break
        log.info("stand_in", agent=self._agent, round=call.view.round, accepted=taken, missing=missing - taken)


class _NothingLeft(Exception):  # noqa: N818  (no error: the call is at its end)
    """The call has all its candidates, or the budget is used up: whatever is proposed now is refused."""


class _Offers:
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
        """None when the proposal is accepted, else why not; raises _NothingLeft when no more will be."""
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
            raise _NothingLeft
        if isinstance(result, Refused):
            return result.reason
        if result.id in self._taken:
            return KNOWN_ALREADY.reason
        self._taken.add(result.id)
        self.made.add(result.id)
        if self.is_complete and len(self._taken) < self.call.count:
            # An earlier process was answered otherwise: its candidates and ours together are enough.
            raise _NothingLeft
        return None
