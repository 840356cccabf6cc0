"""Chat against a scripted endpoint: requests, answers, pausing, and the transcript."""

import asyncio
import json
from dataclasses import replace

import pytest

from agents.llm.chat import Chat
from tests.support.chatting import OK, QUICK, SCHEMA, ask, fails, quick, two_endpoints
from tests.support.scripted_llm import Reply, ScriptedLlm, hangs, refuses, says


async def test_the_request_has_the_question_and_the_answer_has_the_reply() -> None:
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


async def test_a_refused_response_format_takes_one_step_down_and_is_remembered() -> None:
    refused = ("response_format json_schema is not supported", "'response_format.type' must be 'text'")
    async with (
        ScriptedLlm([*(refuses(400, message) for message in refused), OK]) as llm,
        Chat([llm.endpoint], quick(attempts=1)) as chat,
    ):
        await ask(chat)
        await ask(chat)
        formats = [body.get("response_format", {"type": "text"})["type"] for body in llm.bodies]
        assert formats == ["json_schema", "json_object", "text", "text"]
        assert chat.usage["fake"].errors == 0


async def test_a_refused_grammar_takes_one_step_down_too() -> None:
    schema: dict[str, object] = {"enum": [1, 2]}
    script = [refuses(400, "Unknown parameter: 'grammar'."), refuses(400, "json_schema is not supported"), OK]
    async with ScriptedLlm(script) as llm:
        async with Chat([replace(llm.endpoint, grammar=True)], quick(attempts=1)) as chat:
            await ask(chat, schema)
            await ask(chat, schema)
        assert llm.bodies[0]["grammar"].startswith("root ::=")
        assert "response_format" not in llm.bodies[0]
        formats = [body["response_format"]["type"] for body in llm.bodies[1:]]
        assert formats == ["json_schema", "json_object", "json_object"]
        assert not any("grammar" in body for body in llm.bodies[1:])


async def test_a_grammar_that_leads_to_empty_answers_is_given_up() -> None:
    """If the chat template opens the reasoning, everything that the grammar allows is reasoning."""
    schema: dict[str, object] = {"enum": [1, 2]}
    silent = says("", reasoning_content="1", prompt_tokens=10, completion_tokens=5)
    async with ScriptedLlm([silent, OK]) as llm, Chat([replace(llm.endpoint, grammar=True)], QUICK) as chat:
        assert (await ask(chat, schema)).text == (await ask(chat, schema)).text == "fine"
        assert ["grammar" in body for body in llm.bodies] == [True, False, False]
        usage = chat.usage["fake"]
        assert (usage.requests, usage.answers, usage.prompt_tokens, usage.completion_tokens) == (3, 2, 30, 15)


async def test_an_answer_without_text_is_an_answer_where_no_grammar_was_sent() -> None:
    async with ScriptedLlm([says("")]) as llm, Chat([replace(llm.endpoint, grammar=True)], QUICK) as chat:
        assert (await ask(chat, None)).text == ""
        assert len(llm.bodies) == 1


async def test_a_schema_without_a_grammar_is_sent_as_it_is_and_its_refusal_counts_for_all() -> None:
    async with ScriptedLlm([refuses(400, "json_schema is not supported"), OK]) as llm:
        async with Chat([replace(llm.endpoint, grammar=True)], QUICK) as chat:
            await ask(chat, {"type": "string"})
            await ask(chat, {"enum": [1, 2]})
        formats = [body["response_format"]["type"] for body in llm.bodies]
        assert formats == ["json_schema", "json_object", "json_object"]


async def test_without_a_schema_no_response_format_is_sent() -> None:
    async with ScriptedLlm([OK]) as llm, Chat([llm.endpoint]) as chat:
        await ask(chat, schema=None)
        assert "response_format" not in llm.bodies[0]


async def test_other_parameters_that_a_model_refuses_are_left_out() -> None:
    script = [
        refuses(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        refuses(400, "'temperature' does not support 0.5"),
        OK,
    ]
    async with ScriptedLlm(script) as llm, Chat([llm.endpoint], QUICK) as chat:
        await ask(chat)
        assert {"temperature", "max_tokens"}.isdisjoint(llm.bodies[2])
        assert llm.bodies[2]["max_completion_tokens"] == 100


# Pausing and ending


async def test_nothing_is_asked_while_the_gate_is_closed_and_the_deadline_waits() -> None:
    gate = asyncio.Event()

    async def wait_at_gate() -> None:
        await gate.wait()

    policy = quick(deadline_seconds=0.5)
    async with ScriptedLlm([OK]) as llm, Chat([llm.endpoint], policy, gate=wait_at_gate) as chat:
        asking = asyncio.create_task(ask(chat))
        await asyncio.sleep(1.0)
        assert llm.asked == [] and not asking.done()
        gate.set()
        assert (await asking).text == "fine"


async def test_every_attempt_passes_the_gate() -> None:
    passed = 0

    async def count() -> None:
        nonlocal passed
        passed += 1

    async with ScriptedLlm([refuses(500, "hm"), refuses(400, "no json_schema"), OK]) as llm:
        async with Chat([llm.endpoint], QUICK, gate=count) as chat:
            await ask(chat)
        assert passed == 1 + len(llm.asked) == 4  # once for admission, and before each request


async def test_an_error_raised_by_the_gate_frees_the_slot() -> None:
    class Stopped(Exception):  # noqa: N818
        pass

    stopping = True

    async def gate() -> None:
        if stopping:
            raise Stopped

    async with ScriptedLlm([OK]) as llm, Chat([llm.endpoint], quick(concurrency=1), gate=gate) as chat:
        with pytest.raises(Stopped):
            await ask(chat)
        stopping = False
        assert (await ask(chat)).text == "fine"


async def test_a_cancelled_question_frees_its_slot_and_is_no_failure() -> None:
    async with ScriptedLlm([hangs, OK]) as llm, Chat([llm.endpoint], quick(concurrency=1)) as chat:
        asking = asyncio.create_task(ask(chat))
        while not llm.asked:
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert (await ask(chat)).text == "fine"
        assert chat.usage["fake"].errors == 0


async def test_a_bug_in_our_reader_is_not_blamed_on_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("agents.llm.client.read_completion", broken)
    async with ScriptedLlm([OK]) as llm, Chat([llm.endpoint], QUICK) as chat:
        with pytest.raises(ZeroDivisionError):
            await ask(chat)


# What is kept


async def test_the_transcript_holds_answers_and_failures() -> None:
    records: list[dict[str, object]] = []
    async with two_endpoints(
        [refuses(404, "no such model")], [says("fine", prompt_tokens=11, completion_tokens=3)], record=records.append
    ) as (chat, _, _):
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
        await fails(chat)
        usage = chat.usage["fake"]
        assert (usage.requests, usage.answers, usage.errors) == (4, 2, 1)
        assert (usage.prompt_tokens, usage.completion_tokens) == (20, 10)
