"""Helpers for the tests of Chat."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from agents.llm.chat import Chat
from agents.llm.endpoint import Answer, Question
from agents.llm.policy import ChatPolicy
from protocol.errors import EndpointError
from tests.support.scripted_llm import Handler, ScriptedLlm, says

SCHEMA: dict[str, object] = {"type": "object"}
OK = says("fine")


def changed(policy: ChatPolicy, **changes: float) -> ChatPolicy:
    """Return the policy with other values, also of its constants and beyond the limits of the settings."""
    assert all(hasattr(policy, name) for name in changes), changes
    return policy.model_copy(update=changes)


QUICK = changed(ChatPolicy(attempts=5, failures_to_open=5, deadline_seconds=30.0), first_wait=0.001, longest_wait=0.002)
quick = partial(changed, QUICK)


async def ask(chat: Chat, schema: dict[str, object] | None = SCHEMA, label: str = "test") -> Answer:
    return await chat.ask(
        Question(
            [{"role": "user", "content": "Which rates?"}],
            schema,
            schema_name="rates",
            seed=7,
            temperature=0.5,
            max_tokens=100,
            label=label,
        )
    )


async def fails(chat: Chat, match: str = ".") -> None:
    """Ask a question that no endpoint answers; the error matches `match`."""
    with pytest.raises(EndpointError, match=match):
        await ask(chat)


@asynccontextmanager
async def two_endpoints(
    first: Sequence[Handler], second: Sequence[Handler] = (OK,), policy: ChatPolicy = QUICK, **options: Any
) -> AsyncIterator[tuple[Chat, ScriptedLlm, ScriptedLlm]]:
    """A chat with two scripted endpoints, `a` and `b`."""
    async with (
        ScriptedLlm(first, name="a") as a,
        ScriptedLlm(second, name="b") as b,
        Chat([a.endpoint, b.endpoint], policy, **options) as chat,
    ):
        yield chat, a, b


async def attempts(script: Sequence[Handler], policy: ChatPolicy = QUICK) -> tuple[int, str | EndpointError]:
    """Return the number of requests that the endpoint received, and the final text or error."""
    async with ScriptedLlm(script) as llm, Chat([llm.endpoint], policy) as chat:
        result: str | EndpointError
        try:
            result = (await ask(chat)).text
        except EndpointError as error:
            result = error
        assert chat.usage["fake"].requests == len(llm.asked)
        return len(llm.asked), result
