"""Retries: which failures, how often; and no reply does harm."""

import gzip

import pytest

from agents.llm.chat import Chat
from tests.faults.test_llm import REPLIES
from tests.support.chatting import OK, QUICK, ask, attempts, fails, quick
from tests.support.scripted_llm import (
    Reply,
    ScriptedLlm,
    as_json,
    refuses,
    says,
)


async def test_attempts_are_bounded() -> None:
    count, error = await attempts([refuses(500, "broken")], quick(attempts=3))
    assert count == 3
    assert "broken" in str(error)


@pytest.mark.parametrize("status", [408, 409, 500, 502, 503])
async def test_a_passing_failure_is_tried_again(status: int) -> None:
    assert await attempts([refuses(status, "hm"), OK]) == (2, "fine")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_a_refusal_is_not_tried_again(status: int) -> None:
    count, error = await attempts([refuses(status, "no such thing"), OK])
    assert count == 1
    assert "no such thing" in str(error)


async def test_a_quota_that_is_used_up_is_not_tried_again() -> None:
    count, error = await attempts([refuses(429, "quota used up", code="insufficient_quota"), OK])
    assert count == 1
    assert "quota" in str(error)


async def test_a_prompt_that_is_too_long_is_a_clear_error_and_does_not_change_the_dialect() -> None:
    message = "the request exceeds the available context size (2048 tokens): response_format"
    async with ScriptedLlm([refuses(400, message), OK]) as llm, Chat([llm.endpoint], QUICK) as chat:
        await fails(chat, "context size")
        assert len(llm.asked) == 1
        await ask(chat)  # the endpoint does not rest for it
        assert llm.bodies[1]["response_format"]["type"] == "json_schema"


@pytest.mark.parametrize("kind", REPLIES)
async def test_a_reply_that_is_no_completion_is_tried_again(kind: str) -> None:
    assert await attempts([REPLIES[kind], REPLIES[kind], OK]) == (3, "fine")


async def test_an_endpoint_that_sends_only_rubbish_is_an_error_that_describes_it() -> None:
    _, error = await attempts([Reply(b"<html>Please log in</html>", content_type="text/html")])
    assert "text/html" in str(error)
    _, error = await attempts([as_json({"error": {"message": "overloaded"}})])
    assert "overloaded" in str(error)
    _, error = await attempts([Reply(gzip.compress(b"{}"), headers={"content-encoding": "gzip"})])
    assert "compressed" in str(error)


async def test_the_byte_cap_counts_bytes() -> None:
    text = "x" * 5000
    count, error = await attempts([says(text)], quick(max_reply_bytes=4000, attempts=2))
    assert count == 2
    assert "4000 bytes" in str(error)
    assert await attempts([says(text)], quick(max_reply_bytes=8000)) == (1, text)
