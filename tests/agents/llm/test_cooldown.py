"""Waits that endpoints ask for; all questions share them."""

import asyncio
import random
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from structlog.testing import capture_logs

from agents.llm.breaker import LONGEST, SPREAD, Cooldown, retry_after
from agents.llm.chat import Chat
from tests.support.chatting import OK, QUICK, ask, fails, quick, two_endpoints
from tests.support.scripted_llm import ScriptedLlm, refuses
from tests.support.servers import eventually


def test_retry_after_is_seconds_milliseconds_or_a_date() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    in_a_minute = format_datetime(now + timedelta(seconds=60), usegmt=True)
    assert retry_after({"retry-after": "7"}, now) == 7
    assert retry_after({"retry-after-ms": "250", "retry-after": "7"}, now) == 0.25
    assert retry_after({"retry-after": in_a_minute}, now) == 60
    assert retry_after({"retry-after": format_datetime(now - timedelta(days=1), usegmt=True)}, now) == 0
    assert retry_after({"retry-after": "1e12"}, now) == LONGEST
    for nonsense in ("", "soon", "-1", "nan", "inf"):
        assert retry_after({"retry-after": nonsense}, now) is None
    assert retry_after({}, now) is None


def test_retry_after_may_be_in_the_body_and_headers_take_precedence() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert retry_after({}, now, {"retry_after": 7}) == 7
    assert retry_after({}, now, {"error": {"message": "slow down", "retry_after": "2.5"}}) == 2.5
    assert retry_after({"retry-after": "1"}, now, {"retry_after": 7}) == 1
    told: tuple[object, ...] = (True, -1, "1e999")
    bodies: list[object] = [None, [], "7", {"error": 7}, *({"retry_after": each} for each in told)]
    assert {retry_after({}, now, body) for body in bodies} == {None}


def test_a_cooldown_is_shared_and_each_question_waits_a_little_longer_than_it() -> None:
    now = 0.0
    cooldown = Cooldown(lambda: now, random.Random(0))
    assert cooldown.wait() == 0 and not cooldown.left
    assert cooldown.extend(8)
    assert not cooldown.extend(2)  # a shorter one changes nothing
    waits = [cooldown.wait() for _ in range(50)]
    assert all(8 <= wait <= 8 * (1 + SPREAD) for wait in waits)
    assert len(set(waits)) == 50
    now = 8.0
    assert cooldown.wait() == 0


async def test_after_a_cooldown_not_all_questions_go_at_once() -> None:
    limited = refuses(429, "slow down", headers={"retry-after": "0.4"})
    policy = quick(concurrency=8)
    async with ScriptedLlm([limited] * 8 + [OK]) as llm, Chat([llm.endpoint], policy) as chat:
        await asyncio.gather(*(ask(chat) for _ in range(8)))
        moments = sorted(asked.moment for asked in llm.asked[8:])
        assert len(moments) == 8
        assert moments[0] - llm.asked[0].moment >= 0.4
        assert moments[-1] - moments[0] > 0.02


async def test_a_free_endpoint_is_asked_instead_of_a_long_wait() -> None:
    limited = refuses(429, "slow down", headers={"retry-after": "20"})
    async with two_endpoints([limited]) as (chat, first, _):
        async with asyncio.timeout(10):
            assert [(await ask(chat)).endpoint for _ in range(3)] == ["b"] * 3
        assert len(first.asked) == 1
        assert chat.state.endpoints[0].state == "closed"  # it is up: it only asks for a wait


async def test_a_cooldown_is_logged_once() -> None:
    limited = refuses(429, "slow down", headers={"retry-after-ms": "200"})
    async with ScriptedLlm([limited] * 4 + [OK]) as llm, Chat([llm.endpoint], QUICK) as chat:
        with capture_logs() as logs:
            await asyncio.gather(*(ask(chat) for _ in range(4)))
        assert [line["event"] for line in logs].count("endpoint_cools_down") == 1


@pytest.mark.parametrize("headers", [{"retry-after": "0.3"}, {"retry-after-ms": "300", "retry-after": "100"}])
async def test_the_endpoint_says_how_long_to_wait_and_all_questions_wait(headers: dict[str, str]) -> None:
    limited = refuses(429, "slow down", headers=headers)
    async with ScriptedLlm([limited, OK]) as llm, Chat([llm.endpoint], QUICK) as chat:
        first = asyncio.create_task(ask(chat))
        await eventually(lambda: llm.asked)
        await asyncio.sleep(0.1)  # the 429 has arrived, and its wait has begun
        await ask(chat)
        await first
        assert len(llm.asked) == 3
        assert all(asked.moment - llm.asked[0].moment >= 0.3 for asked in llm.asked[1:])


async def test_a_wait_that_would_end_after_the_deadline_is_not_begun() -> None:
    later = refuses(503, "loading", headers={"retry-after": "200"})
    async with ScriptedLlm([later]) as llm, Chat([llm.endpoint], QUICK) as chat:
        await fails(chat, "loading")
        await fails(chat, "no question sent")
        assert len(llm.asked) == 1
