"""The budget of the LLM: no question exceeds it, over all restarts, and the state gives the reason."""

import asyncio
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from agents.llm.chat import Chat
from agents.llm.policy import BudgetUsedUp, ChatPolicy, Spent
from protocol.errors import EndpointError
from tests.support.chatting import OK, QUICK, ask, quick
from tests.support.scripted_llm import ScriptedLlm, as_json, refuses, says


def test_a_budget_is_used_up_by_whichever_limit_is_reached_first() -> None:
    policy = ChatPolicy(budget_requests=10, budget_tokens=1000, budget_cost=2.0)
    assert policy.used_up(Spent(9, 500, 499, 1.99)) is None
    assert "10 of 10 requests" in str(policy.used_up(Spent(10, 0, 0, 0.0)))
    assert "1000 of 1000 tokens" in str(policy.used_up(Spent(1, 600, 400, 0.0)))
    assert "llm.budget_cost" in str(policy.used_up(Spent(1, 1, 1, 2.0)))
    assert ChatPolicy().used_up(Spent(10**9, 10**12, 10**12, 1e9)) is None


async def test_a_budget_of_requests_counts_retries_and_is_never_exceeded() -> None:
    async with (
        ScriptedLlm([refuses(500, "hm"), OK, refuses(500, "hm")]) as llm,
        Chat([llm.endpoint], quick(concurrency=8, budget_requests=5)) as chat,
    ):
        await ask(chat)
        results = await asyncio.gather(*(ask(chat) for _ in range(8)), return_exceptions=True)
        assert all(isinstance(result, EndpointError) for result in results)
        assert len(llm.asked) == 5
        assert chat.state.degraded == "budget" and "5 of 5 requests" in str(chat.state.reason)


async def test_spending_of_earlier_processes_counts() -> None:
    async with (
        ScriptedLlm([says("fine", prompt_tokens=60, completion_tokens=30)]) as llm,
        Chat([llm.endpoint], quick(budget_tokens=200), spent=Spent(7, 80, 40)) as chat,
    ):
        await ask(chat)
        assert chat.spent == Spent(8, 140, 70)
        with pytest.raises(BudgetUsedUp, match="210 of 200 tokens"):
            await ask(chat)
        assert len(llm.asked) == 1


async def test_each_endpoint_has_its_own_price() -> None:
    reply = says("fine", prompt_tokens=1000, completion_tokens=100)
    async with (
        ScriptedLlm([reply, refuses(401, "no")], name="a") as first,
        ScriptedLlm([reply], name="b") as second,
        Chat(
            [replace(first.endpoint, price_in=1.0, price_out=10.0), replace(second.endpoint, price_out=20.0)],
            quick(budget_cost=0.004),
        ) as chat,
    ):
        await ask(chat)
        assert chat.spent.cost == pytest.approx(0.002)
        await ask(chat)
        assert chat.spent.cost == pytest.approx(0.004)
        with pytest.raises(BudgetUsedUp):
            await ask(chat)


async def test_blanks_around_a_reply_count_as_no_tokens() -> None:
    reply = says("fine", completion_tokens=999_999_999)
    padded = replace(reply, body=reply.body + b" " * 900_000)
    async with ScriptedLlm([padded]) as llm, Chat([llm.endpoint], QUICK) as chat:
        assert (await ask(chat)).completion_tokens < 3_000


async def test_an_endpoint_that_counts_no_tokens_does_not_blind_the_budget() -> None:
    choice = {"message": {"role": "assistant", "content": "x" * 400}, "finish_reason": "stop"}
    async with (
        ScriptedLlm([as_json({"choices": [choice]})]) as llm,
        Chat([llm.endpoint], quick(budget_tokens=100)) as chat,
    ):
        answer = await ask(chat)
        assert answer.completion_tokens == 100 and answer.prompt_tokens > 0
        with pytest.raises(BudgetUsedUp):
            await ask(chat)


async def test_a_budget_that_is_used_up_is_logged_once_and_no_endpoint_is_asked_for_readiness() -> None:
    async with (
        ScriptedLlm([OK], models=[refuses(503, "loading")]) as llm,
        Chat([llm.endpoint], quick(budget_requests=1), spent=Spent(1)) as chat,
    ):
        with capture_logs() as logs:
            await chat.wait_ready()
            for _ in range(5):
                with pytest.raises(BudgetUsedUp):
                    await ask(chat)
        assert llm.asked == [] and llm.readiness_checks == 0
        assert [line["event"] for line in logs] == ["llm_degraded"]
