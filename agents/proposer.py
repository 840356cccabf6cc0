"""How an agent gets its candidates: several calls to the LLM at a time, and the fallback for what they leave out."""

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import structlog
from structlog.contextvars import bound_contextvars

from agents.llm.endpoint import Answer, Asks
from agents.population.call import Call
from agents.population.submission import Draw, NothingLeft, Offers
from agents.population.view import Member, Proposal, Submit, View
from agents.prompting.conversation import Asker, Question
from agents.prompting.prompts import Prompts
from agents.prompting.replies import Parsed, parse_lists
from agents.prompting.settings import AgentSettings
from protocol.plans.candidate import AgentName


class Turns:
    """Members take turns by step, then by number: everybody's first turn, in order, then everybody's second.

    Which candidates a round gets depends on the order in which proposals are compared with what is known. With turns it
    depends on the answers alone and not on how long each took, so a search can be replayed, and resumed amid a round.
    """

    def __init__(self, members: Iterable[int]) -> None:
        self._steps: dict[int, float] = dict.fromkeys(members, 0)
        self._calls = {member: asyncio.Event() for member in self._steps}

    @asynccontextmanager
    async def part(self, member: int) -> AsyncIterator[None]:
        """All of what a member does; nobody waits for it afterwards."""
        try:
            yield
        finally:
            del self._steps[member]
            self._call_next()

    @asynccontextmanager
    async def turn(self, member: int) -> AsyncIterator[None]:
        """Waits until it is this member's turn; the next one's begins at the end."""
        while self._next() != member:
            await self._calls[member].wait()
            self._calls[member].clear()
        yield
        self._steps[member] += 1
        self._call_next()

    @asynccontextmanager
    async def last_turn(self, member: int) -> AsyncIterator[None]:
        """Wait until every other member is done, or waits for its own last turn and has a higher number.

        How many turns a member had before its last one makes no difference to the order of the last turns.
        """
        self._steps[member] = math.inf
        self._call_next()
        async with self.turn(member):
            yield

    def _next(self) -> int:
        return min(self._steps, key=lambda member: (self._steps[member], member))

    def _call_next(self) -> None:
        if self._steps:
            self._calls[self._next()].set()


log = structlog.get_logger()


class Proposer:
    """Makes an agent's proposals: several calls at a time, and the fallback for what the LLM leaves out."""

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
        fallback: Draw,
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
                group.create_task(self._fill(offer, turns, question(offer.call), fallback))
        return sum(len(offer.made) for offer in offers)

    async def _fill(
        self,
        offers: Offers,
        turns: Turns,
        question: Question[Proposal],
        fallback: Draw,
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
                            await self._fallback(call, call.count - taken, offers, fallback)
            except NothingLeft:
                log.debug("nothing_left_to_propose", agent=self._agent, round=call.view.round, call=call.index)

    async def _fallback(self, call: Call, missing: int, offers: Offers, fallback: Draw) -> None:
        taken = await offers.draw(call.rng, missing, fallback, "fallback")
        log.info("fallback", agent=self._agent, round=call.view.round, accepted=taken, missing=missing - taken)


TOKENS_PER_RATE = 9


def lists_question(name: str, prompt: str, view: View, shown: Sequence[Member]) -> Question[Proposal]:
    """A question whose answer is lists of rates, made from all the members `shown`."""
    units = view.units
    parents = tuple(member.candidate.id for member in shown)

    def parse(text: str, count: int) -> Parsed[Proposal]:
        parsed = parse_lists(text, units, view.spec.rate, count)
        return Parsed(tuple(Proposal(rates, parents) for rates in parsed.good), parsed.names, parsed.problems)

    return Question(name, prompt, lambda count: lists_schema(len(units), count), parse, TOKENS_PER_RATE * len(units))


def lists_schema(units: int, count: int) -> dict[str, object]:
    """For `count` configurations of so many units' rates."""
    rate = {"type": "number", "minimum": 0, "maximum": 1}
    rates = {"type": "array", "items": rate, "minItems": units, "maxItems": units}
    lists = {"type": "array", "items": rates, "minItems": count, "maxItems": count}
    return {
        "type": "object",
        "properties": {"configurations": lists},
        "required": ["configurations"],
        "additionalProperties": False,
    }
