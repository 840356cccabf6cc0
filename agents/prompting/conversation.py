"""The conversation that every agent has with the LLM: ask, parse, take what is good, answer what was wrong."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from agents.llm.endpoint import Answer, Asks, Message
from agents.population.call import Call
from agents.prompting.descriptions import about_model
from agents.prompting.prompts import Prompts
from agents.prompting.replies import Parsed
from agents.prompting.settings import AgentSettings
from protocol.errors import EndpointError, InvalidReply

TOKENS_BESIDE = 100
LONGEST_QUOTE = 8_000
"""Characters of its own reply that the LLM is shown when it is asked again."""
LONGEST_QUOTE_OF_A_CUT_REPLY = 400
"""Of one that ran into its token limit, for it is often one number over and over, and would fill the context."""
LARGE = 20_000
"""Characters of an answer that is read in a thread."""

T = TypeVar("T")

Take = Callable[[T, Answer], Awaitable[str | None]]
"""Uses one item of an answer; returns None, or why it was refused."""
Turn = Callable[[], AbstractAsyncContextManager[None]]
"""What an answer is taken within."""
log = structlog.get_logger()


@dataclass(frozen=True)
class Question(Generic[T]):
    """One question: the prompt, the form of the answer for so many missing items, and how it is read."""

    name: str
    """Of the prompt's file, which also names the schema."""
    prompt: str
    schema: Callable[[int], dict[str, object]]
    parse: Callable[[str, int], Parsed[T]]
    tokens: int
    """What one item of the answer takes, about."""


class Asker:
    """Asks questions for the agents, and asks again with what was wrong."""

    def __init__(self, chat: Asks, prompts: Prompts, settings: AgentSettings) -> None:
        self._chat = chat
        self._prompts = prompts
        self._settings = settings
        self._room = 1

    async def ask(
        self, call: Call, question: Question[T], missing: int, take: Take[T], turn: Turn = nullcontext
    ) -> int:
        """Ask until `missing` items are taken or the re-asks are used up; returns how many were taken."""
        messages: list[Message] = [
            {"role": "system", "content": self._prompts.fill("system", about=about_model(call.view, ()))},
            {"role": "user", "content": question.prompt},
        ]
        taken = 0
        for attempt in range(1 + self._settings.reasks):
            try:
                answer = await self._answer(call, question, messages, missing - taken, attempt)
            except EndpointError as error:
                log.debug("llm_unavailable", agent=call.agent, round=call.view.round, reason=str(error))
                break
            async with turn():
                good, problems = await self._take_all(question, answer, missing - taken, take)
            taken += good
            log.info(
                "llm_reply",
                agent=call.agent,
                round=call.view.round,
                endpoint=answer.endpoint,
                accepted=good,
                refused=len(problems),
                reason=problems[0] if problems else None,
            )
            if taken >= missing:
                break
            again = self._prompts.fill("reask", problems=problems[:5], missing=missing - taken)
            messages += [
                {"role": "assistant", "content": _quote(answer)},
                {"role": "user", "content": again},
            ]
        return taken

    async def _answer(
        self, call: Call, question: Question[T], messages: list[Message], missing: int, attempt: int
    ) -> Answer:
        needed = self._room * (TOKENS_BESIDE + missing * question.tokens)
        answer = await self._chat.ask(
            messages,
            schema=question.schema(missing),
            schema_name=question.name,
            seed=call.seed(attempt),
            temperature=self._settings.temperature,
            max_tokens=min(needed, self._settings.max_tokens),
            label=f"{call.agent} round {call.view.round} call {call.index} attempt {attempt}",
        )
        if answer.truncated and needed < self._settings.max_tokens:
            # For good: a model that reasons before it answers will do so every time.
            self._room *= 4
        return answer

    async def _take_all(
        self, question: Question[T], answer: Answer, missing: int, take: Take[T]
    ) -> tuple[int, list[str]]:
        """How many items of the answer were taken, and a sentence for each that was not."""
        try:
            if len(answer.text) < LARGE:
                parsed = question.parse(answer.text, missing)
            else:
                parsed = await asyncio.to_thread(question.parse, answer.text, missing)
        except InvalidReply as error:
            return 0, ["Your reply was cut off: keep it short." if answer.truncated else str(error)]
        taken, problems = 0, list(parsed.problems)
        for name, item in zip(parsed.names, parsed.good, strict=True):
            refusal = await take(item, answer)
            if refusal is None:
                taken += 1
            else:
                problems.append(f"{name}: {refusal}.")
        return taken, problems


def _quote(answer: Answer) -> str:
    """The LLM's own words as it is shown them again: not too many, and no lone surrogate, which no request can hold."""
    longest = LONGEST_QUOTE_OF_A_CUT_REPLY if answer.truncated else LONGEST_QUOTE
    return answer.text[:longest].encode(errors="replace").decode()
