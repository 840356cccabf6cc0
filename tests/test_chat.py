"""Chat against a scripted endpoint: what is sent, what is tried again, and that no reply can do harm."""

import asyncio
import gzip
import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from agents.backoff import LONGEST, retry_after
from agents.chat import Chat
from agents.endpoint import Answer, ChatPolicy, Endpoint
from protocol.errors import EndpointError
from tests.scripted_llm import Handler, Reply, ScriptedLlm, as_json, breaks_off, drips, hangs, never_ends, refuses, says

QUICK = ChatPolicy(first_wait=0.001, longest_wait=0.002, deadline=30.0)
SCHEMA: dict[str, object] = {"type": "object"}
OK = says("fine")


async def ask(chat: Chat, schema: dict[str, object] | None = SCHEMA) -> Answer:
    return await chat.ask(
        [{"role": "user", "content": "Which rates?"}],
        schema=schema,
        schema_name="rates",
        seed=7,
        temperature=0.5,
        max_tokens=100,
        label="test",
    )


async def test_the_request_holds_what_was_asked_and_the_answer_what_came() -> None:
    async with ScriptedLlm([says("fine", prompt_tokens=11, completion_tokens=3)]) as llm, Chat([llm.endpoint]) as chat:
        answer = await ask(chat)
        assert llm.bodies == [
            {
                "model": "model",
                "messages": [{"role": "user", "content": "Which rates?"}],
                "seed": 7,
                "temperature": 0.5,
                "max_tokens": 100,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "rates", "strict": True, "schema": SCHEMA},
                },
            }
        ]
        assert (answer.text, answer.endpoint, answer.prompt_tokens, answer.completion_tokens) == ("fine", "fake", 11, 3)
        assert not answer.truncated


async def test_a_function_of_the_request_can_answer() -> None:
    async with ScriptedLlm(lambda body: f"seed {body['seed']}") as llm, Chat([llm.endpoint]) as chat:
        assert (await ask(chat)).text == "seed 7"


# What is tried again


async def attempts(script: Sequence[Handler], policy: ChatPolicy = QUICK) -> tuple[int, str | EndpointError]:
    """Requests that the endpoint saw, and the text or the error in the end."""
    async with ScriptedLlm(script) as llm, Chat([llm.endpoint], policy) as chat:
        result: str | EndpointError
        try:
            result = (await ask(chat)).text
        except EndpointError as error:
            result = error
        assert chat.usage["fake"].requests == len(llm.asked)
        return len(llm.asked), result


async def test_a_rate_limit_is_tried_again_and_the_sdk_adds_nothing() -> None:
    limited = refuses(429, "slow down")
    assert await attempts([limited, limited, limited, OK]) == (4, "fine")


async def test_attempts_are_bounded() -> None:
    count, error = await attempts([refuses(500, "broken")], replace(QUICK, attempts=3))
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


@pytest.mark.parametrize("message", ["the request exceeds the available context size (2048 tokens): response_format"])
async def test_a_prompt_that_is_too_long_is_a_clear_error_and_no_matter_of_dialect(message: str) -> None:
    async with ScriptedLlm([refuses(400, message), OK]) as llm, Chat([llm.endpoint], QUICK) as chat:
        with pytest.raises(EndpointError, match="context size"):
            await ask(chat)
        assert len(llm.asked) == 1
        await ask(chat)  # the endpoint does not rest for it
        assert llm.bodies[1]["response_format"]["type"] == "json_schema"


@pytest.mark.parametrize(
    "bad",
    [
        Reply(b"<html>Please log in</html>", content_type="text/html"),
        Reply(b'{"choices": [{"mess'),
        Reply(b""),
        Reply(b"[]"),
        Reply(b"[" * 100_000),
        Reply(b"\xff\xfe"),
        as_json({"choices": None}),
        as_json({"choices": []}),
        as_json({"choices": [None]}),
        as_json({"choices": [{"message": None}]}),
        as_json({"error": {"message": "overloaded"}}),
        breaks_off,
        never_ends,
        Reply(gzip.compress(b" " * 50_000_000), headers={"content-encoding": "gzip"}),
        Reply(b" " * 50_000_000, status=400),
    ],
    ids=lambda reply: reply.__name__ if callable(reply) and hasattr(reply, "__name__") else repr(reply.body[:30]),
)
async def test_a_reply_that_is_no_completion_is_tried_again(bad: Handler) -> None:
    assert await attempts([bad, bad, OK]) == (3, "fine")


async def test_an_endpoint_that_sends_only_rubbish_is_an_error_that_says_what() -> None:
    _, error = await attempts([Reply(b"<html>Please log in</html>", content_type="text/html")])
    assert "text/html" in str(error)
    _, error = await attempts([as_json({"error": {"message": "overloaded"}})])
    assert "overloaded" in str(error)
    _, error = await attempts([Reply(gzip.compress(b"{}"), headers={"content-encoding": "gzip"})])
    assert "compressed" in str(error)


async def test_the_byte_cap_counts_bytes() -> None:
    text = "x" * 5000
    count, error = await attempts([says(text)], replace(QUICK, byte_cap=4000, attempts=2))
    assert count == 2
    assert "4000 bytes" in str(error)
    assert await attempts([says(text)], replace(QUICK, byte_cap=8000)) == (1, text)


@pytest.mark.parametrize("slow", [drips, hangs])
async def test_the_deadline_is_for_all_of_an_answer(slow: Handler) -> None:
    count, error = await attempts([slow], replace(QUICK, deadline=0.2))
    assert count == 1
    assert "no whole answer within 0.2 s" in str(error)


async def test_a_wait_that_would_end_after_the_deadline_is_not_begun() -> None:
    later = refuses(503, "loading", headers={"retry-after": "200"})
    async with ScriptedLlm([later]) as llm, Chat([llm.endpoint], QUICK) as chat:
        with pytest.raises(EndpointError, match="loading"):
            await ask(chat)
        with pytest.raises(EndpointError, match="left alone"):
            await ask(chat)
        assert len(llm.asked) == 1


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


# What counts as the answer


@pytest.mark.parametrize(
    ("reply", "text", "truncated"),
    [
        (says(None), "", False),
        (says(None, reasoning_content="0.3, 0.4", refusal="no"), "", False),
        (says("<think>0.1</think>\n[0.2]"), "[0.2]", False),
        (says("0.1</think>[0.2]"), "[0.2]", False),
        (says("<think>0.1, 0.2"), "", True),
        (says("[0.1, 0.", finish_reason="length"), "[0.1, 0.", True),
    ],
)
async def test_only_the_answer_counts_not_the_reasoning(reply: Reply, text: str, truncated: bool) -> None:
    async with ScriptedLlm([reply]) as llm, Chat([llm.endpoint], QUICK) as chat:
        answer = await ask(chat)
        assert (answer.text, answer.truncated) == (text, truncated)


# The ladder of structured output


async def test_a_refused_form_of_answer_is_one_step_down_and_remembered() -> None:
    script = [
        refuses(400, "response_format json_schema is not supported"),
        refuses(400, "'response_format.type' must be 'text'"),
        OK,
    ]
    async with ScriptedLlm(script) as llm, Chat([llm.endpoint], replace(QUICK, attempts=1)) as chat:
        await ask(chat)
        await ask(chat)
        formats = [body.get("response_format", {"type": "text"})["type"] for body in llm.bodies]
        assert formats == ["json_schema", "json_object", "text", "text"]
        assert chat.usage["fake"].errors == 0


async def test_no_schema_no_form() -> None:
    async with ScriptedLlm([OK]) as llm, Chat([llm.endpoint]) as chat:
        await ask(chat, schema=None)
        assert "response_format" not in llm.bodies[0]


async def test_what_else_a_model_refuses_is_left_out() -> None:
    script = [
        refuses(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        refuses(400, "'temperature' does not support 0.5"),
        OK,
    ]
    async with ScriptedLlm(script) as llm, Chat([llm.endpoint], QUICK) as chat:
        await ask(chat)
        assert {"temperature", "max_tokens"}.isdisjoint(llm.bodies[2])
        assert llm.bodies[2]["max_completion_tokens"] == 100


# Several endpoints


async def test_the_second_endpoint_answers_when_the_first_is_down_which_then_rests() -> None:
    async with (
        ScriptedLlm([refuses(500, "broken")], name="a") as first,
        ScriptedLlm([OK], name="b") as second,
        Chat([first.endpoint, second.endpoint], replace(QUICK, attempts=2)) as chat,
    ):
        assert (await ask(chat)).endpoint == "b"
        assert (await ask(chat)).endpoint == "b"
        assert (len(first.asked), len(second.asked)) == (2, 2)
        assert not chat.degraded


async def test_after_its_rest_an_endpoint_is_asked_again() -> None:
    policy = replace(QUICK, attempts=1, rest=0.0)
    async with ScriptedLlm([refuses(500, "broken"), OK]) as llm, Chat([llm.endpoint], policy) as chat:
        with pytest.raises(EndpointError, match="broken"):
            await ask(chat)
        assert chat.degraded
        assert (await ask(chat)).text == "fine"
        assert not chat.degraded


async def test_one_question_that_takes_too_long_does_not_stop_the_others() -> None:
    policy = replace(QUICK, deadline=1.0)  # room for the good answer on a busy machine
    async with ScriptedLlm([hangs, hangs, OK, hangs]) as llm, Chat([llm.endpoint], policy) as chat:
        for _ in range(2):
            with pytest.raises(EndpointError, match="no whole answer"):
                await ask(chat)
        await ask(chat)
        for _ in range(3):
            with pytest.raises(EndpointError, match="no whole answer"):
                await ask(chat)
        with pytest.raises(EndpointError, match="left alone"):
            await ask(chat)
        assert len(llm.asked) == 6


async def test_questions_that_wait_for_a_slot_do_not_ask_an_endpoint_that_went_down() -> None:
    policy = replace(QUICK, attempts=1, concurrency=1)
    async with ScriptedLlm([refuses(500, "broken")]) as llm, Chat([llm.endpoint], policy) as chat:
        results = await asyncio.gather(*(ask(chat) for _ in range(5)), return_exceptions=True)
        assert all(isinstance(result, EndpointError) for result in results)
        assert len(llm.asked) == 1


async def test_no_endpoint_or_none_that_is_there_is_an_error() -> None:
    async with Chat([]) as chat:
        with pytest.raises(EndpointError, match="none is configured"):
            await ask(chat)
    nowhere = Endpoint("nowhere", "http://127.0.0.1:9/v1", "model")
    async with Chat([nowhere], QUICK) as chat:
        with pytest.raises(EndpointError, match="nowhere: "):
            await ask(chat)
        assert chat.usage["nowhere"].requests == QUICK.attempts


async def test_so_many_questions_at_a_time_and_no_more() -> None:
    at_once, most = 0, 0

    async def counts(request: object) -> object:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.02)
        at_once -= 1
        return await OK(request)  # type: ignore[arg-type]

    async with ScriptedLlm([counts]) as llm, Chat([llm.endpoint], replace(QUICK, concurrency=3)) as chat:  # type: ignore[list-item]
        await asyncio.gather(*(ask(chat) for _ in range(12)))
        assert len(llm.asked) == 12
        assert most == 3


# Keys and addresses


async def test_a_key_goes_to_its_endpoint_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "from-the-environment")
    records: list[dict[str, object]] = []
    echo = refuses(401, "Incorrect API key provided: key-of-a")
    with capture_logs() as logs:
        async with (
            ScriptedLlm([echo], name="a") as first,
            ScriptedLlm([OK], name="b") as second,
            Chat(
                [replace(first.endpoint, api_key=SecretStr("key-of-a")), second.endpoint], QUICK, record=records.append
            ) as chat,
        ):
            await ask(chat)
            assert first.asked[0].headers["Authorization"] == "Bearer key-of-a"
            sent = json.dumps([dict(asked.headers) for asked in second.asked])
            assert "key-of-a" not in sent
            assert "from-the-environment" not in sent + json.dumps(dict(first.asked[0].headers))
    assert "key-of-a" not in json.dumps([logs, records])
    assert "Incorrect API key provided: ***" in json.dumps(records)


async def test_the_error_names_no_key() -> None:
    async with ScriptedLlm([refuses(401, "bad key: secret-1234")]) as llm:
        endpoint = replace(llm.endpoint, api_key=SecretStr("secret-1234"))
        async with Chat([endpoint], QUICK) as chat:
            with pytest.raises(EndpointError) as caught:
                await ask(chat)
        assert "secret-1234" not in str(caught.value)
        assert "secret-1234" not in repr(endpoint)


async def test_a_redirect_is_not_followed() -> None:
    async with ScriptedLlm([OK], name="elsewhere") as elsewhere:
        moved = Reply(b"", 307, {"location": f"{elsewhere.base_url}/chat/completions"})
        async with ScriptedLlm([moved]) as llm, Chat([llm.endpoint], replace(QUICK, attempts=1)) as chat:
            with pytest.raises(EndpointError, match="307"):
                await ask(chat)
        assert elsewhere.asked == []


async def test_a_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ScriptedLlm() as proxy, ScriptedLlm([OK]) as llm:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        async with Chat([llm.endpoint], QUICK) as chat:
            assert (await ask(chat)).text == "fine"
        assert proxy.asked == [] and proxy.other_paths == []


# Pausing and ending


async def test_nothing_is_asked_while_the_gate_is_closed_and_the_deadline_waits() -> None:
    gate = asyncio.Event()

    async def wait_at_gate() -> None:
        await gate.wait()

    policy = replace(QUICK, deadline=0.5)
    async with ScriptedLlm([OK]) as llm, Chat([llm.endpoint], policy, gate=wait_at_gate) as chat:
        asking = asyncio.create_task(ask(chat))
        await asyncio.sleep(1.0)
        assert llm.asked == [] and not asking.done()
        gate.set()
        assert (await asking).text == "fine"


async def test_the_gate_stands_before_every_attempt() -> None:
    passed = 0

    async def count() -> None:
        nonlocal passed
        passed += 1

    async with ScriptedLlm([refuses(500, "hm"), refuses(400, "no json_schema"), OK]) as llm:
        async with Chat([llm.endpoint], QUICK, gate=count) as chat:
            await ask(chat)
        assert passed == len(llm.asked) == 3


async def test_what_the_gate_raises_passes_and_frees_the_slot() -> None:
    class Stopped(Exception):  # noqa: N818
        pass

    stopping = True

    async def gate() -> None:
        if stopping:
            raise Stopped

    async with ScriptedLlm([OK]) as llm, Chat([llm.endpoint], replace(QUICK, concurrency=1), gate=gate) as chat:
        with pytest.raises(Stopped):
            await ask(chat)
        stopping = False
        assert (await ask(chat)).text == "fine"


async def test_a_cancelled_question_frees_its_slot_and_is_no_failure() -> None:
    async with ScriptedLlm([hangs, OK]) as llm, Chat([llm.endpoint], replace(QUICK, concurrency=1)) as chat:
        asking = asyncio.create_task(ask(chat))
        while not llm.asked:
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert (await ask(chat)).text == "fine"
        assert chat.usage["fake"].errors == 0


# What is kept


async def test_the_transcript_holds_answers_and_failures() -> None:
    records: list[dict[str, object]] = []
    async with (
        ScriptedLlm([refuses(404, "no such model")], name="a") as first,
        ScriptedLlm([says("fine", prompt_tokens=11, completion_tokens=3)], name="b") as second,
        Chat([first.endpoint, second.endpoint], QUICK, record=records.append) as chat,
    ):
        await ask(chat)
    failed, answered = records
    assert (failed["endpoint"], failed["text"]) == ("a", None)
    assert "no such model" in str(failed["error"])
    assert (answered["endpoint"], answered["text"], answered["error"], answered["label"]) == ("b", "fine", None, "test")
    assert (answered["prompt_tokens"], answered["completion_tokens"]) == (11, 3)
    assert answered["messages"] == [{"role": "user", "content": "Which rates?"}]
    json.dumps(records, allow_nan=False)


async def test_usage_counts_requests_answers_errors_and_tokens() -> None:
    script = [refuses(500, "hm"), OK, OK, refuses(404, "gone")]
    async with ScriptedLlm(script) as llm, Chat([llm.endpoint], QUICK) as chat:
        await ask(chat)
        await ask(chat)
        with pytest.raises(EndpointError):
            await ask(chat)
        usage = chat.usage["fake"]
        assert (usage.requests, usage.answers, usage.errors) == (4, 2, 1)
        assert (usage.prompt_tokens, usage.completion_tokens) == (20, 10)


# Readiness


async def test_waiting_for_an_endpoint_is_said_once() -> None:
    loading = refuses(503, "Loading model")
    ready = Reply(b'{"object": "list", "data": []}')
    said: list[str] = []
    async with ScriptedLlm(models=[loading, loading, loading, ready]) as llm, Chat([llm.endpoint], QUICK) as chat:
        await chat.wait_ready(said.append)
        assert llm.readiness_checks == 4
        assert said == ["fake"]


async def test_a_server_that_starts_late_is_waited_for() -> None:
    async with ScriptedLlm([OK]) as llm:
        port, base_url = llm.port, llm.base_url
    late = Endpoint("late", base_url, "model")
    heard = asyncio.Event()
    async with AsyncExitStack() as stack:
        chat = await stack.enter_async_context(Chat([late], QUICK))
        waiting = asyncio.create_task(chat.wait_ready(lambda _: heard.set()))
        await heard.wait()
        assert not waiting.done()
        await stack.enter_async_context(ScriptedLlm([OK], port=port))
        await waiting


async def test_any_endpoint_that_answers_is_enough_and_a_refusal_is_an_answer() -> None:
    said: list[str] = []
    nowhere = Endpoint("nowhere", "http://127.0.0.1:9/v1", "model")
    async with ScriptedLlm(models=[refuses(404, "no list here")]) as llm, Chat([nowhere, llm.endpoint], QUICK) as chat:
        await chat.wait_ready(said.append)
    assert said == []
    async with Chat([]) as chat:
        await chat.wait_ready(said.append)
