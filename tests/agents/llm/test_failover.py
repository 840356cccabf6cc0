"""Several endpoints: which one is asked, which ones rest, and their state."""

import asyncio

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from agents.llm.chat import Chat
from agents.llm.endpoint import Endpoint, EndpointState, LlmState
from protocol.errors import EndpointError
from tests.support.chatting import OK, QUICK, ask, fails, quick, two_endpoints
from tests.support.scripted_llm import Handler, Reply, ScriptedLlm, hangs, refuses
from tests.support.servers import eventually


async def test_the_second_endpoint_answers_when_the_first_is_down_which_then_rests() -> None:
    policy = quick(attempts=2, failures_to_open=2)
    async with two_endpoints([refuses(500, "broken")], policy=policy) as (chat, first, second):
        assert (await ask(chat)).endpoint == "b"
        assert (await ask(chat)).endpoint == "b"
        assert (len(first.asked), len(second.asked)) == (2, 2)
        assert chat.state.degraded is None


async def test_after_its_rest_an_endpoint_is_asked_again() -> None:
    policy = quick(attempts=1, failures_to_open=1, rest_seconds=0.0)
    async with ScriptedLlm([refuses(500, "broken"), OK]) as llm, Chat([llm.endpoint], policy) as chat:
        await fails(chat, "broken")
        assert chat.state.degraded == "endpoints"
        assert "broken" in str(chat.state.endpoints[0].reason)
        assert (await ask(chat)).text == "fine"
        assert chat.state == LlmState(endpoints=(EndpointState(name="fake", state="closed"),))


async def test_one_question_that_takes_too_long_does_not_stop_the_others() -> None:
    policy = quick(deadline_seconds=0.6, failures_to_open=3)  # room for the good answer on a busy machine
    async with ScriptedLlm([hangs, hangs, OK, hangs]) as llm, Chat([llm.endpoint], policy) as chat:
        for _ in range(2):
            await fails(chat, "no whole answer")
        await ask(chat)
        for _ in range(3):
            await fails(chat, "no whole answer")
        await fails(chat, "no question sent")
        assert len(llm.asked) == 6


async def test_questions_that_wait_for_a_slot_do_not_ask_an_endpoint_that_went_down() -> None:
    policy = quick(attempts=1, failures_to_open=1, concurrency=1)
    async with ScriptedLlm([refuses(500, "broken")]) as llm, Chat([llm.endpoint], policy) as chat:
        results = await asyncio.gather(*(ask(chat) for _ in range(5)), return_exceptions=True)
        assert all(isinstance(result, EndpointError) for result in results)
        assert len(llm.asked) == 1


async def test_no_endpoint_or_none_that_is_there_is_an_error() -> None:
    async with Chat([]) as chat:
        await fails(chat, "none is configured")
    nowhere = Endpoint("nowhere", "http://127.0.0.1:9/v1", "model")
    async with Chat([nowhere], QUICK) as chat:
        await fails(chat, "nowhere: ")
        assert chat.usage["nowhere"].requests == QUICK.attempts


async def test_concurrent_questions_are_limited() -> None:
    at_once, most = 0, 0

    async def counts(request: web.Request) -> web.StreamResponse:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.02)
        at_once -= 1
        return await OK(request)

    async with ScriptedLlm([counts]) as llm, Chat([llm.endpoint], quick(concurrency=3)) as chat:
        await asyncio.gather(*(ask(chat) for _ in range(12)))
        assert len(llm.asked) == 12
        assert most == 3


# The circuit breaker


class Door:
    """A handler that answers when released."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Handler] = asyncio.get_running_loop().create_future()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        return await (await self.answer)(request)


async def test_questions_that_fail_at_the_same_time_open_the_breaker_together() -> None:
    policy = quick(attempts=5, failures_to_open=4, concurrency=8)
    async with ScriptedLlm([refuses(500, "broken")]) as llm, Chat([llm.endpoint], policy) as chat:
        await asyncio.gather(*(ask(chat) for _ in range(8)), return_exceptions=True)
        assert len(llm.asked) < 8 + policy.failures_to_open  # those in progress when it opened, not 8 x 5
        assert chat.state.endpoints[0].state == "open"


async def test_after_the_rest_one_question_probes_and_the_others_wait_for_its_verdict() -> None:
    policy = quick(attempts=3, failures_to_open=3, rest_seconds=0.0, longest_wait=20.0, concurrency=8)
    async with ScriptedLlm([]) as llm:
        door = Door()
        llm.script = [refuses(500, "broken")] * 3 + [door, OK]
        async with Chat([llm.endpoint], policy) as chat:
            await fails(chat)
            asking = [asyncio.create_task(ask(chat)) for _ in range(6)]
            await asyncio.sleep(0.2)
            assert len(llm.asked) == 4
            assert chat.state.endpoints[0].state == "half-open"
            door.answer.set_result(OK)
            assert [answer.text for answer in await asyncio.gather(*asking)] == ["fine"] * 6
            assert chat.state == LlmState(endpoints=(EndpointState(name="fake", state="closed"),))


async def test_a_probe_that_fails_is_one_request_and_the_rest_is_longer() -> None:
    policy = quick(attempts=3, failures_to_open=3, rest_seconds=0.0001, longest_rest=60.0)
    async with ScriptedLlm([refuses(500, "broken")]) as llm, Chat([llm.endpoint], policy) as chat:
        requests = []
        for _ in range(4):
            await fails(chat)
            await asyncio.sleep(0.01)
            requests.append(len(llm.asked))
        assert requests == [3, 4, 5, 6]


async def test_a_probe_that_is_cancelled_leaves_the_next_question_to_probe() -> None:
    policy = quick(attempts=1, failures_to_open=1, rest_seconds=0.0)
    async with ScriptedLlm([refuses(500, "broken"), hangs, OK]) as llm, Chat([llm.endpoint], policy) as chat:
        await fails(chat)
        probing = asyncio.create_task(ask(chat))
        await eventually(lambda: len(llm.asked) == 2)
        probing.cancel()
        await asyncio.wait({probing})
        assert (await ask(chat)).text == "fine"


async def test_a_refused_question_shows_that_the_endpoint_lives() -> None:
    policy = quick(attempts=1, failures_to_open=2)
    script = [refuses(500, "hm"), refuses(413, "too large"), refuses(500, "hm"), OK]
    async with ScriptedLlm(script) as llm, Chat([llm.endpoint], policy) as chat:
        for _ in range(3):
            await fails(chat)
        assert (await ask(chat)).text == "fine"


# Refused


@pytest.mark.parametrize(
    "refusal",
    [
        refuses(401, "Incorrect API key provided"),
        refuses(403, "forbidden"),
        refuses(402, "Insufficient Balance"),
        refuses(429, "You exceeded your current quota", code="insufficient_quota"),
        refuses(404, "The model `model` does not exist or you do not have access to it.", code="model_not_found"),
        refuses(404, "The model `org/model-1.5` does not exist."),
        Reply(b'{"error": "model \'model\' not found"}', 404),
        refuses(400, "Invalid model: model"),
    ],
    ids=lambda reply: f"{reply.status} {reply.body[:40]!r}",
)
async def test_an_endpoint_that_refuses_rests_at_once_with_one_line_and_is_tried_again(refusal: Reply) -> None:
    policy = quick(rest_seconds=0.3, longest_rest=0.3)
    async with two_endpoints([OK, refusal, OK], policy=policy) as (chat, first, _):
        with capture_logs() as logs:
            assert [(await ask(chat)).endpoint for _ in range(4)] == ["a", "b", "b", "b"]
            assert len(first.asked) == 2
            assert chat.state.endpoints[0].state == "open" and chat.state.degraded is None
            await asyncio.sleep(0.31)
            assert (await ask(chat)).endpoint == "a"
        told = [line for line in logs if line["event"] in ("endpoint_down", "endpoint_off", "endpoint_up")]
        assert [line["event"] for line in told] == ["endpoint_down", "endpoint_up"]
        assert str(refusal.status) in told[0]["reason"]


@pytest.mark.parametrize(
    "answer", [Reply(b"404 page not found", 404, content_type="text/plain"), refuses(404, "Not Found")]
)
async def test_a_404_that_is_not_about_the_model_may_pass(answer: Reply) -> None:
    async with ScriptedLlm([answer, OK]) as llm, Chat([llm.endpoint], QUICK) as chat:
        await fails(chat, "404")
        assert (await ask(chat)).text == "fine"


async def test_with_every_endpoint_at_rest_nothing_is_asked_and_the_state_says_so() -> None:
    async with ScriptedLlm([refuses(401, "no")]) as llm, Chat([llm.endpoint], QUICK) as chat:
        results = await asyncio.gather(*(ask(chat) for _ in range(20)), return_exceptions=True)
        assert all(isinstance(result, EndpointError) for result in results)
        assert len(llm.asked) <= QUICK.concurrency
        assert chat.state.degraded == "endpoints"


async def test_each_change_of_state_is_one_line() -> None:
    policy = quick(attempts=2, failures_to_open=2, rest_seconds=0.0001, longest_rest=0.0001)
    script = [refuses(500, "broken")] * 6 + [OK]
    async with ScriptedLlm(script) as llm, Chat([llm.endpoint], policy) as chat:
        with capture_logs() as logs:
            for _ in range(8):
                await asyncio.gather(ask(chat), return_exceptions=True)
                await asyncio.sleep(0.005)
        events = [line["event"] for line in logs if line["log_level"] != "debug"]
        for event in ("endpoint_down", "endpoint_up", "llm_degraded", "llm_recovered"):
            assert events.count(event) == 1, event


@pytest.mark.parametrize("let_through", [(), (1, 3, 4)])
async def test_a_pause_while_an_endpoint_is_probed_turns_no_question_away(let_through: tuple[int, ...]) -> None:
    """The gate closes before three questions come, or (the second to pass is the probe) when all have been let in."""
    policy = quick(attempts=1, failures_to_open=1, rest_seconds=0.0, longest_wait=0.5)
    paused = False
    resumed = asyncio.Event()
    passed = 0

    async def gate() -> None:
        nonlocal passed
        passed += 1
        if paused and passed not in let_through:
            await resumed.wait()

    async with ScriptedLlm([refuses(500, "broken"), OK]) as llm, Chat([llm.endpoint], policy, gate=gate) as chat:
        await fails(chat, "broken")
        paused, passed = True, 0
        asking = [asyncio.create_task(ask(chat)) for _ in range(3)]
        await asyncio.sleep(2 * policy.longest_wait)
        assert len(llm.asked) == 1 and not any(task.done() for task in asking)
        resumed.set()
        assert [(await task).text for task in asking] == ["fine"] * 3
