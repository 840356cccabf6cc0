"""Waits that endpoints ask for; all questions share them."""

import asyncio
import random
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from structlog.testing import capture_logs

from agents.llm.breaker import LONGEST, SPREAD, Cooldown, retry_after
from agents.llm.chat import Chat
from protocol.errors import EndpointError
from tests.support.chatting import OK, QUICK, ask, quick
from tests.support.scripted_llm import Reply, ScriptedLlm, refuses


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
    bodies: tuple[object, ...] = (
        None,
        [],
        "7",
        {"retry_after": True},
        {"retry_after": -1},
        {"error": 7},
        {"retry_after": "1e999"},
    )
    for nonsense in bodies:
        assert retry_after({}, now, nonsense) is None


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
    async with (
        ScriptedLlm([limited], name="a") as first,
        ScriptedLlm([OK], name="b") as second,
        Chat([first.endpoint, second.endpoint], QUICK) as chat,
    ):
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
    limited = asyncio.Event()

    async def limit(_request: object) -> Reply:
        limited.set()
        return refuses(429, "slow down", headers=headers)

    async def limiting(request: object) -> object:
        return await (await limit(request))(request)  # type: ignore[arg-type]

    async with ScriptedLlm([limiting, OK]) as llm, Chat([llm.endpoint], QUICK) as chat:  # type: ignore[list-item]
        first = asyncio.create_task(ask(chat))
        await limited.wait()
        await asyncio.sleep(0.1)  # the 429 has arrived, and its wait has begun
        await ask(chat)
        await first
        assert len(llm.asked) == 3
        assert all(asked.moment - llm.asked[0].moment >= 0.3 for asked in llm.asked[1:])


async def test_a_wait_that_would_end_after_the_deadline_is_not_begun() -> None:
    later = refuses(503, "loading", headers={"retry-after": "200"})
    async with ScriptedLlm([later]) as llm, Chat([llm.endpoint], QUICK) as chat:
        with pytest.raises(EndpointError, match="loading"):
            await ask(chat)
        with pytest.raises(EndpointError, match="not asked"):
            await ask(chat)
        assert len(llm.asked) == 1
