"""How an agent gets its candidates: several calls to the LLM at a time, and the stand-in for what they leave out."""

import asyncio
import hashlib
from collections.abc import Callable

import structlog
from structlog.contextvars import bound_contextvars

from agents.llm.endpoint import Answer
from agents.population.submission import Draw, NothingLeft, Offers
from agents.population.view import Proposal, Submit, View
from agents.prompting.conversation import Asker, Asks, Call, Question
from agents.prompting.prompts import Prompts
from agents.prompting.settings import AgentSettings
from agents.turns import Turns
from protocol.plans.candidate import AgentName

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
        stand_in: Draw,
    ) -> int:
        """Get `count` candidates accepted; returns how many are, which is fewer only where no new plan was found.

        Calls that a process before this one has begun are repeated, and those it has finished are not: the questions
        are the same, so with the same answers the candidates are.
        """
        calls = [Call(self._agent, view, i, size) for i, size in enumerate(self._settings.split(count))]
        offers = [Offers(self._agent, call, submit) for call in calls]
        begun = [offer for offer in offers if not offer.is_complete]
        turns = Turns(offer.call.index for offer in begun)
        async with asyncio.TaskGroup() as group:
            for offer in begun:
                group.create_task(self._fill(offer, turns, question(offer.call), stand_in))
        return sum(len(offer.made) for offer in offers)

    async def _fill(
        self,
        offers: Offers,
        turns: Turns,
        question: Question[Proposal],
        stand_in: Draw,
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
                        # The last turn, so that these proposals do not depend on how often the LLM failed, or how.
                        async with turns.last_turn(call.index):
                            await self._stand_in(call, call.count - taken, offers, stand_in)
            except NothingLeft:
                log.debug("nothing_left_to_propose", agent=self._agent, round=call.view.round, call=call.index)

    async def _stand_in(self, call: Call, missing: int, offers: Offers, stand_in: Draw) -> None:
        taken = await offers.draw(call.rng, missing, stand_in, "stand-in")
        log.info("stand_in", agent=self._agent, round=call.view.round, accepted=taken, missing=missing - taken)
