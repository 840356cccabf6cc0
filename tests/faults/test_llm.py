"""Faults of LLM endpoints, one after another on the same connection: nothing escapes, and the next answer is clean."""

import asyncio
import gzip
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import psutil
import pytest
from aiohttp import web
from structlog.testing import capture_logs

from agents.llm.chat import Chat
from agents.llm.policy import ChatPolicy
from protocol.errors import EndpointError
from tests.faults.marks import fault, slow_fault
from tests.support.chatting import OK, QUICK, ask, attempts, changed, fails, quick
from tests.support.scripted_llm import (
    Handler,
    Reply,
    ScriptedLlm,
    as_json,
    breaks_off,
    drips,
    hangs,
    never_ends,
    refuses,
    says,
)

MB = 1024 * 1024

# Every row of what endpoints do instead of answering
REFUSALS: dict[str, Handler] = {
    "429": refuses(429, "Rate limit reached", headers={"retry-after-ms": "5"}),
    "429 in the body": Reply(b'{"error": {"message": "slow down"}, "retry_after": 0.005}', 429),
    "502 of a proxy": Reply(b"<html>Bad Gateway</html>", 502, content_type="text/html"),
    "413": Reply(b"Payload Too Large", 413, content_type="text/plain"),
    "422": as_json({"detail": [{"loc": ["body", "n"], "msg": "extra fields not permitted"}]}, 422),
    "404 of a proxy": Reply(b"404 page not found", 404, content_type="text/plain"),
    "a redirect": Reply(b"", 307, {"location": "http://169.254.169.254/latest/meta-data"}),
    "no content": Reply(b"", 204),
    "an error of lists": as_json([{"error": ["what", 7]}], 500),
    "an error that is text": as_json("overloaded", 529),
    "an error that is no text": Reply(b"\xff\xfe\x00", 500),
}
REPLIES: dict[str, Handler] = {
    "a login page": Reply(b"<html>Please log in</html>", content_type="text/html"),
    "an empty body": Reply(b""),
    "cut JSON": Reply(b'{"choices": [{"mess'),
    "nested too deep": Reply(b"[" * 100_000),
    "a huge number": Reply(b'{"choices": ' + b"9" * 6000 + b"}"),
    "no UTF-8": Reply(b'{"choices": "\xff"}'),
    "null": as_json(None),
    "null choices": as_json({"choices": None}),
    "no choices": as_json({"choices": []}),
    "a choice that is null": as_json({"choices": [None]}),
    "a message that is null": as_json({"choices": [{"message": None}]}),
    "a choice without message": as_json({"choices": [{"finish_reason": "stop"}]}),
    "a message that is text": as_json({"choices": [{"message": "hello"}]}),
    "an error with 200": as_json({"error": {"message": "overloaded", "code": 503}}),
    "a connection reset amid the body": breaks_off,
    "a body without end": never_ends,
    "a gzip bomb": Reply(gzip.compress(b" " * 100 * MB, mtime=0), headers={"content-encoding": "gzip"}),
    "a compressed body": Reply(gzip.compress(b"{}"), headers={"content-encoding": "br"}),
}
ODD_ANSWERS: dict[str, Handler] = {
    "content null": says(None),
    "content a list": as_json({"choices": [{"message": {"content": [{"type": "text", "text": "hi"}]}}]}),
    "a refusal": says(None, refusal="I cannot help with that."),
    "filtered": says("", finish_reason="content_filter"),
    "cut off": says("[0.1, 0.", finish_reason="length"),
    "reasoning only": says(None, reasoning_content="0.3, 0.3"),
    "reasoning without end": says("<think>0.1, 0.2"),
    "prose": says("As you wish."),
    "a lone surrogate": says("\ud800"),
    "an odd finish": says("fine", finish_reason=None),  # type: ignore[arg-type]
    "odd counts": as_json(
        {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "many", "completion_tokens": -1}}
    ),
    "usage null": as_json({"choices": [{"message": {"content": "x"}}], "usage": None}),
    "a megabyte of blanks": says(" " * MB),
}


@fault("37", "an LLM endpoint answers anything else", "every kind of reply, 50 in all", "counted, next call clean")
@pytest.mark.parametrize("fault", [*REFUSALS, *REPLIES, *ODD_ANSWERS])
async def test_every_reply_is_counted_raises_no_other_error_and_leaves_the_next_answer_clean(fault: str) -> None:
    handler = (REFUSALS | REPLIES | ODD_ANSWERS)[fault]
    policy = quick(attempts=1, failures_to_open=2, max_reply_bytes=2 * 1024 * 1024)
    async with ScriptedLlm([handler, OK]) as llm, Chat([llm.endpoint], policy) as chat:
        if fault in ODD_ANSWERS:
            await ask(chat)
        else:
            with pytest.raises(EndpointError) as caught:
                await ask(chat)
            assert len(str(caught.value)) < 500
            assert chat.usage["fake"].errors == 1
        assert (await ask(chat)).text == "fine"
        assert len(llm.asked) == 2 and llm.other_paths == []


# How often


@fault("34", "an LLM endpoint limits the rate", "429 three times, then an answer", "4 requests")
async def test_three_rate_limits_and_then_an_answer_are_four_requests() -> None:
    limited = refuses(429, "slow down")
    assert await attempts([limited, limited, limited, OK], changed(ChatPolicy(), first_wait=0.001)) == (4, "fine")


@fault("34", "an LLM endpoint is broken", "a storm of 500", "requests as the policy says, then a probe each rest")
async def test_status_500_is_retried_as_often_as_the_policy_says_and_then_probed_once_per_rest() -> None:
    policy = quick(attempts=4, failures_to_open=4, rest_seconds=0.3, longest_rest=0.3)
    async with ScriptedLlm([refuses(500, "broken")]) as llm, Chat([llm.endpoint], policy) as chat:
        started = time.monotonic()
        while time.monotonic() - started < 1.4:
            await fails(chat)
            if len(llm.asked) <= 4:
                assert len(llm.asked) == 4
            await asyncio.sleep(0.005)
        assert 6 <= len(llm.asked) <= 8  # four, and a probe each 0.3 s


async def test_with_an_endpoint_down_asking_is_cheap() -> None:
    async with ScriptedLlm([refuses(401, "no")]) as llm, Chat([llm.endpoint], QUICK) as chat:
        with capture_logs() as logs:
            for _ in range(500):
                await fails(chat)
        assert len(llm.asked) == 1
        assert [line["event"] for line in logs].count("endpoint_failed") == 1
        assert len(logs) < 5


# How long, and how large


@fault("36", "an LLM endpoint does not come to an end", "drips, hangs, streams", "the deadline, for all of an answer")
@pytest.mark.parametrize("fault", [drips, hangs, never_ends])
async def test_a_question_takes_its_deadline_and_no_longer(fault: Handler) -> None:
    policy = quick(deadline_seconds=1.0, max_reply_bytes=10**12)
    async with ScriptedLlm([fault]) as llm, Chat([llm.endpoint], policy) as chat:
        started = time.monotonic()
        await fails(chat, "no whole answer within 1 s")
        assert 0.9 <= time.monotonic() - started <= 1.5  # a busy machine gets some slack


@slow_fault("36", "an LLM endpoint does not come to an end, for long", "drips, hangs", "10 s, within a tenth")
@pytest.mark.parametrize("fault", [drips, hangs])
async def test_a_deadline_of_ten_seconds_is_kept_within_a_tenth(fault: Handler) -> None:
    async with (
        ScriptedLlm([refuses(500, "hm"), fault]) as llm,
        Chat([llm.endpoint], ChatPolicy(deadline_seconds=10.0)) as chat,
    ):
        started = time.monotonic()
        await fails(chat, "no whole answer within 10 s")
        assert 9 <= time.monotonic() - started <= 11


@asynccontextmanager
async def memory_stays(most: int) -> AsyncIterator[None]:
    """The process may not grow by more than `most` bytes, at any moment of the block."""
    process = psutil.Process()
    before = peak = process.memory_info().rss

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, process.memory_info().rss)
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    yield
    watching.cancel()
    assert peak - before < most, f"grew by {(peak - before) / MB:.0f} MB"


async def huge(request: web.Request, status: int = 200) -> web.StreamResponse:
    """300 MB of JSON."""
    response = web.StreamResponse(status=status)
    response.content_type = "application/json"
    if status == 200:
        response.content_length = 300 * MB
    await response.prepare(request)
    for _ in range(300):
        await response.write(b" " * MB)
    return response


@fault("36", "an LLM endpoint sends too much", "300 MB, 300 MB of error, a gzip bomb", "less than 50 MB of memory")
@pytest.mark.parametrize(
    "fault", [huge, partial(huge, status=500), REPLIES["a gzip bomb"]], ids=["reply", "error", "bomb"]
)
async def test_a_reply_of_any_size_takes_no_memory(fault: Handler) -> None:
    async with ScriptedLlm([fault, fault, OK]) as llm, Chat([llm.endpoint], QUICK) as chat, memory_stays(50 * MB):
        assert (await ask(chat)).text == "fine"
