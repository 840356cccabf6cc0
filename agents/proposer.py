"""How an agent gets its candidates: by concurrent calls to the LLM, and from the fallback if the LLM gives too few."""

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import structlog
from structlog.contextvars import bound_contextvars

from agents.llm.endpoint import Answer, ChatClient
from agents.population.submission import Call, NothingLeft, Operator, Submitter
from agents.population.view import Member, Proposal, Submit, View
from agents.prompting.conversation import Asker
from agents.prompting.prompts import Prompt
from agents.prompting.replies import Parsed, parse_lists
from agents.prompting.schemas import lists_schema
from agents.prompting.settings import AgentSettings
from protocol.plans.candidate import AgentName


class RoundRobin:
    """Lets concurrent calls submit their proposals one call at a time, in a fixed order.

    The members are the numbers of the calls. In each of its turns, a call submits the proposals of one answer. All
    members have their first turn, in the order of their numbers, then all have their second turn, and so on.

    The candidates that a round gets depend on the order in which proposals are compared with the known plans. With
    turns, that order depends only on the answers and not on the time that each answer took, so a search can be replayed
    or resumed in the middle of a round.
    """

    def __init__(self, members: Iterable[int]) -> None:
        self._steps: dict[int, float] = dict.fromkeys(members, 0)
        self._calls = {member: asyncio.Event() for member in self._steps}

    @asynccontextmanager
    async def membership(self, member: int) -> AsyncIterator[None]:
        """Hold this context during all turns of a member. When it ends, the others no longer wait for this member."""
        try:
            yield
        finally:
            del self._steps[member]
            self._call_next()

    @asynccontextmanager
    async def turn(self, member: int) -> AsyncIterator[None]:
        """Wait for this member's turn; the next member's turn begins when the context ends."""
        while self._next() != member:
            await self._calls[member].wait()
            self._calls[member].clear()
        yield
        self._steps[member] += 1
        self._call_next()

    @asynccontextmanager
    async def last_turn(self, member: int) -> AsyncIterator[None]:
        """Wait for this member's last turn. Last turns begin when no member has another kind of turn left.

        The order of the last turns does not depend on how many turns a member had before.
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
    """Makes an agent's proposals in several concurrent calls. The fallback makes those that the LLM does not make."""

    def __init__(self, agent: AgentName, chat: ChatClient, settings: AgentSettings) -> None:
        self._agent = agent
        self._asker = Asker(chat, settings)
        self._settings = settings

    async def propose(
        self,
        view: View,
        parents: Sequence[Member],
        count: int,
        submit: Submit,
        make_prompt: Callable[[Call], Prompt[Proposal] | Operator],
        operator: Operator,
        partner: Operator | None = None,
    ) -> int:
        """Submit proposals until `count` are accepted, plans run out or a budget ends. Return the number accepted.

        `operator` is the fallback. `partner` makes the candidates that the LLM is not asked for (llm.share); without
        it, the LLM is asked for all. `make_prompt` may return an operator in place of a prompt, and the LLM is not
        asked then either. A call that an earlier process began but did not finish is repeated. Its questions are the
        same, so the same answers lead to the same candidates.
        """
        calls = [Call(self._agent, view, i, size) for i, size in enumerate(self._settings.split(count, view.together))]
        submitters = [Submitter(self._agent, call, submit) for call in calls]
        unfinished = [submitter for submitter in submitters if not submitter.is_complete]
        turns = RoundRobin(submitter.call.index for submitter in unfinished)
        async with asyncio.TaskGroup() as group:
            for submitter in unfinished:
                call = submitter.call
                without = None if self._settings.asks(call.generator("share")) else partner
                prompt = without or make_prompt(call)
                group.create_task(self._fill(submitter, turns, prompt, operator, parents))
        return sum(len(submitter.accepted) for submitter in submitters)

    async def _fill(
        self,
        submitter: Submitter,
        turns: RoundRobin,
        prompt: Prompt[Proposal] | Operator,
        operator: Operator,
        parents: Sequence[Member],
    ) -> None:
        call = submitter.call
        where = {"agent": self._agent, "round": call.view.round}
        with bound_contextvars(**where):
            try:
                async with turns.membership(call.index):
                    if not isinstance(prompt, Prompt):
                        async with turns.turn(call.index):
                            await submitter.sample(call.count, prompt, parents, "classical")
                        return
                    taken = await self._ask(submitter, turns, prompt)
                    if missing := call.count - taken:
                        # In a last turn, so that fallbacks keep an order, whenever their calls failed.
                        async with turns.last_turn(call.index):
                            made = await submitter.sample(missing, operator, parents, "fallback")
                        log.info("fallback", **where, accepted=made, missing=missing - made)
            except NothingLeft:
                log.debug("nothing_left_to_propose", **where, call=call.index)

    async def _ask(self, submitter: Submitter, turns: RoundRobin, prompt: Prompt[Proposal]) -> int:
        """Submit what the LLM answers; return how many candidates were accepted."""
        call = submitter.call
        prompt_id = f"{prompt.name}:{hashlib.sha256(prompt.text.encode()).hexdigest()[:8]}"

        async def take(proposal: Proposal, answer: Answer) -> str | None:
            return await submitter.submit(proposal, "llm", endpoint=answer.endpoint, prompt=prompt_id)

        return await self._asker.ask(call, prompt, call.count, take, lambda: turns.turn(call.index))


TOKENS_PER_RATE = 9


def lists_prompt(name: str, text: str, view: View, shown: Sequence[Member]) -> Prompt[Proposal]:
    """Return a prompt that asks for lists of rates. The parents of each list are all members in `shown`."""
    units = view.units
    parents = tuple(member.candidate.id for member in shown)

    def parse(text: str, count: int) -> Parsed[Proposal]:
        parsed = parse_lists(text, units, view.spec.rate, count)
        return Parsed(tuple(Proposal(rates, parents) for rates in parsed.good), parsed.names, parsed.problems)

    return Prompt(name, text, lambda count: lists_schema(len(units), count), parse, TOKENS_PER_RATE * len(units))
