"""The conversation of an agent with the LLM: ask, parse, take the valid items, and ask again with the problems."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TypeVar

import structlog

from agents.llm.endpoint import Answer, ChatClient, Message, Question
from agents.population.submission import Call
from agents.prompting.descriptions import about_model
from agents.prompting.prompts import Prompt, fill
from agents.prompting.settings import AgentSettings
from protocol.errors import EndpointError, InvalidReply

TOKENS_BESIDE = 100
"""Tokens that a reply may have in addition to its items."""
LONGEST_QUOTE = 8_000
"""An invalid reply is shown to the LLM again, cut to this number of characters."""
LONGEST_QUOTE_OF_A_CUT_REPLY = 400
"""The same limit for a reply that was cut off. Such a reply often repeats one number and would fill the context."""
DRAFTS = -2
"""Number of the attempt that asks for drafts, which gives it a seed of its own."""
LARGE = 20_000
"""Answers of at least this many characters are parsed in a thread."""

T = TypeVar("T")

Take = Callable[[T, Answer], Awaitable[str | None]]
"""Uses one item of an answer. Returns None, or the reason why the item was refused."""
Turn = Callable[[], AbstractAsyncContextManager[None]]
"""Returns a context manager that waits for the call's turn. The items of one answer are taken inside it, so that
concurrent calls submit their items in a fixed order."""
log = structlog.get_logger()


class Asker:
    """Asks the LLM for the items of an agent. If some are invalid, asks again and says what was wrong."""

    def __init__(self, chat: ChatClient, settings: AgentSettings) -> None:
        self._chat = chat
        self._settings = settings
        self._token_factor = 1
        """Factor on the token limit, which grows when a reply is cut off."""

    async def ask(self, call: Call, prompt: Prompt[T], missing: int, take: Take[T], turn: Turn = nullcontext) -> int:
        """Ask until `missing` items are taken or the re-asks are used up; return how many were taken."""
        messages: list[Message] = [
            {"role": "system", "content": fill("system", about=about_model(call.view, ()))},
            {"role": "user", "content": prompt.text},
        ]
        taken = 0
        if prompt.preview and self._settings.what_if:
            messages += await self._drafts(call, prompt, prompt.preview, messages, missing)
        for attempt in range(1 + self._settings.reasks):
            try:
                answer = await self._answer(call, prompt, messages, missing - taken, attempt)
            except EndpointError as error:
                log.debug("llm_unavailable", agent=call.agent, round=call.view.round, reason=str(error))
                break
            async with turn():
                good, problems = await self._take_all(prompt, answer, missing - taken, take)
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
            again = fill("reask", problems=problems[:5], missing=missing - taken)
            messages += [
                {"role": "assistant", "content": _quote(answer)},
                {"role": "user", "content": again},
            ]
        return taken

    async def _drafts(
        self, call: Call, prompt: Prompt[T], preview: Callable[[T], str], messages: list[Message], missing: int
    ) -> list[Message]:
        """Ask for drafts. Return the messages that tell what is predicted of them; none if no draft could be read."""
        count = self._settings.what_if
        asked: Message = {"role": "user", "content": f"{prompt.text}\n\n{fill('what_if', count=count)}"}

        def predicted_of(reply: str) -> list[str]:
            parsed = prompt.parse(reply, count)
            refined = map(prompt.refine, parsed.good) if prompt.refine else parsed.good
            return [f"{name}: {preview(each)}" for name, each in zip(parsed.names, refined, strict=True)]

        try:
            answer = await self._answer(call, prompt, [*messages[:-1], asked], count, DRAFTS)
            found = await asyncio.to_thread(predicted_of, answer.text)
        except EndpointError as error:
            log.debug("llm_unavailable", agent=call.agent, round=call.view.round, reason=str(error))
            return []
        except InvalidReply as error:
            log.info("llm_drafts", agent=call.agent, round=call.view.round, read=0, reason=str(error))
            return []
        log.info("llm_drafts", agent=call.agent, round=call.view.round, read=len(found))
        predicted = fill("what_if_answer", predicted=found, count=missing)
        return [{"role": "assistant", "content": _quote(answer)}, {"role": "user", "content": predicted}]

    async def _answer(
        self, call: Call, prompt: Prompt[T], messages: list[Message], missing: int, attempt: int
    ) -> Answer:
        needed = self._token_factor * (TOKENS_BESIDE + missing * prompt.tokens_per_item)
        question = Question(
            messages=tuple(messages),
            schema=prompt.schema(missing),
            schema_name=prompt.name,
            seed=call.seed(attempt),
            temperature=self._settings.temperature,
            max_tokens=min(needed, self._settings.max_tokens),
            label=f"{call.agent} round {call.view.round} call {call.index} attempt {attempt}",
        )
        answer = await self._chat.ask(question)
        if answer.truncated and needed < self._settings.max_tokens:
            # Later questions get the higher limit too: a model that reasons before it answers does so every time.
            self._token_factor *= 4
        return answer

    async def _take_all(self, prompt: Prompt[T], answer: Answer, missing: int, take: Take[T]) -> tuple[int, list[str]]:
        """Take the items of the answer. Return how many were taken, and a sentence for each item that was not."""
        try:
            if len(answer.text) < LARGE:
                parsed = prompt.parse(answer.text, missing)
            else:
                parsed = await asyncio.to_thread(prompt.parse, answer.text, missing)
        except InvalidReply as error:
            return 0, ["Your reply was cut off: keep it short." if answer.truncated else str(error)]
        taken, problems = 0, list(parsed.problems)
        for name, item in zip(parsed.names, parsed.good, strict=True):
            refined = await asyncio.to_thread(prompt.refine, item) if prompt.refine else item
            refusal = await take(refined, answer)
            if refusal is None:
                taken += 1
            else:
                problems.append(f"{name}: {refusal}.")
        return taken, problems


def _quote(answer: Answer) -> str:
    """Return the LLM's reply, cut to a limit and without lone surrogates, which no request can encode."""
    longest = LONGEST_QUOTE_OF_A_CUT_REPLY if answer.truncated else LONGEST_QUOTE
    return answer.text[:longest].encode(errors="replace").decode()
