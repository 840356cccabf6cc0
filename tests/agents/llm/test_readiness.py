"""Waiting for endpoints, and refusing those that will never answer."""

import asyncio
from dataclasses import replace

import pytest

from agents.llm.chat import Chat
from agents.llm.endpoint import Endpoint
from protocol.errors import SettingsError
from tests.support.chatting import OK, QUICK, ask, quick
from tests.support.scripted_llm import Reply, ScriptedLlm, as_json, lists_models, refuses


async def test_waiting_for_an_endpoint_is_announced_once() -> None:
    loading = refuses(503, "Loading model")
    ready = lists_models("model")
    said: list[tuple[str, str]] = []
    async with ScriptedLlm(models=[loading, loading, loading, ready]) as llm, Chat([llm.endpoint], QUICK) as chat:
        await chat.wait_ready(lambda name, why: said.append((name, why)))
        assert llm.readiness_checks == 4
        ((name, why),) = said
        assert name == "fake" and "Loading model" in why


async def test_a_server_that_starts_late_is_waited_for() -> None:
    async with ScriptedLlm([OK]) as llm:
        port, base_url = llm.port, llm.base_url
    late = Endpoint("late", base_url, "model")
    heard = asyncio.Event()
    async with Chat([late], QUICK) as chat:
        waiting = asyncio.create_task(chat.wait_ready(lambda *_: heard.set()))
        await heard.wait()
        assert not waiting.done()
        async with ScriptedLlm([OK], port=port):
            await waiting


async def test_questions_wait_for_an_endpoint_that_is_waited_for() -> None:
    async with ScriptedLlm([OK]) as llm:
        port, base_url = llm.port, llm.base_url
    async with Chat([Endpoint("late", base_url, "model")], QUICK) as chat:
        heard = asyncio.Event()
        waiting = asyncio.create_task(chat.wait_ready(lambda *_: heard.set(), at_most=60))
        await heard.wait()
        question = asyncio.create_task(ask(chat))
        awaited = chat.state.awaited
        assert awaited is not None and awaited.reason.startswith("late: ") and awaited.until is not None
        await asyncio.sleep(0.1)
        assert not question.done()
        async with ScriptedLlm([OK], port=port):
            await question
        await waiting
        assert chat.state.awaited is None


async def test_any_endpoint_that_answers_is_enough_and_a_refusal_is_an_answer() -> None:
    said: list[str] = []
    nowhere = Endpoint("nowhere", "http://127.0.0.1:9/v1", "model")
    async with ScriptedLlm(models=[refuses(404, "no list here")]) as llm, Chat([nowhere, llm.endpoint], QUICK) as chat:
        await chat.wait_ready(lambda name, _: said.append(name))
    assert said == []
    async with Chat([]) as chat:
        await chat.wait_ready(lambda name, _: said.append(name))


async def test_the_start_waits_at_most_so_long() -> None:
    nowhere = Endpoint("nowhere", "http://127.0.0.1:9/v1", "model")
    async with Chat([nowhere], QUICK) as chat, asyncio.timeout(20):
        await chat.wait_ready(at_most=0.3)


# A model that the endpoint does not know


async def test_a_model_that_is_listed_is_not_asked_for_a_try() -> None:
    async with ScriptedLlm([OK], models=[lists_models("other", "model")]) as llm, Chat([llm.endpoint], QUICK) as chat:
        await chat.wait_ready()
        assert llm.asked == []


async def test_a_model_that_the_endpoint_does_not_know_is_refused_with_those_it_knows() -> None:
    unknown = refuses(404, "The model `model` does not exist.", code="model_not_found")
    models = [lists_models("gpt-4o", "gpt-4o-mini")]
    async with ScriptedLlm([unknown], models=models) as llm, Chat([llm.endpoint], QUICK) as chat:
        with pytest.raises(
            SettingsError, match=r"'fake' does not know the model 'model'.*it knows gpt-4o, gpt-4o-mini"
        ):
            await chat.wait_ready()
        assert llm.bodies[0]["max_tokens"] == 1


@pytest.mark.parametrize(
    ("listed", "given", "context"),
    [
        ({"id": "model", "max_model_len": 4096}, None, 4096),
        ({"id": "model", "meta": {"n_ctx_train": 32768, "n_ctx": 2048}}, None, 2048),
        ({"id": "model", "meta": {"n_ctx_train": 32768, "n_ctx": 131072}}, None, 131072),
        ({"id": "model", "meta": {"n_ctx_train": 32768}}, None, 32768),
        ({"id": "model", "context_length": 8192}, 16384, 16384),
        ({"id": "/models/model.gguf", "max_model_len": 4096}, None, 4096),
        ({"id": "model", "max_model_len": "much", "context_length": True, "meta": 3}, None, None),
        ({"id": "model"}, None, None),
    ],
    ids=[
        "vllm",
        "llama.cpp",
        "stretched",
        "only trained",
        "what was given counts",
        "another name",
        "no number",
        "silent",
    ],
)
async def test_the_context_is_what_was_given_or_else_what_the_endpoint_says(
    listed: dict[str, object], given: int | None, context: int | None
) -> None:
    models = [as_json({"object": "list", "data": [listed]})]
    async with ScriptedLlm([OK], models=models) as llm, Chat([replace(llm.endpoint, context=given)], QUICK) as chat:
        assert chat.contexts == {"fake": given}
        await chat.wait_ready()
        assert chat.contexts == {"fake": context}


async def test_of_several_models_only_ours_gives_the_context() -> None:
    entries = [{"id": "a", "max_model_len": 10}, {"id": "b", "max_model_len": 20}]
    models = [as_json({"object": "list", "data": entries})]
    async with ScriptedLlm([OK], models=models) as llm:
        for model, context in (("b", 20), ("c", None)):
            async with Chat([replace(llm.endpoint, model=model)], QUICK) as chat:
                await chat.wait_ready()
                assert chat.contexts == {"fake": context}


@pytest.mark.parametrize("models", [lists_models("/models/qwen3.gguf"), lists_models(), refuses(404, "no list here")])
async def test_a_server_that_lists_its_model_under_another_name_or_none_is_accepted_if_it_answers(
    models: Reply,
) -> None:
    async with ScriptedLlm([OK], models=[models]) as llm, Chat([llm.endpoint], QUICK) as chat:
        await chat.wait_ready()
        assert len(llm.asked) == 1 and chat.usage["fake"].requests == 1


async def test_no_question_is_tried_while_the_gate_is_closed() -> None:
    gate = asyncio.Event()

    async def wait_at_gate() -> None:
        await gate.wait()

    async with (
        ScriptedLlm([OK], models=[lists_models()]) as llm,
        Chat([llm.endpoint], QUICK, gate=wait_at_gate) as chat,
    ):
        waiting = asyncio.create_task(chat.wait_ready())
        await asyncio.sleep(0.3)
        assert llm.readiness_checks == 1 and llm.asked == []
        gate.set()
        await waiting
        assert len(llm.asked) == 1


async def test_a_key_that_is_refused_and_a_wrong_address_are_refused_at_the_start() -> None:
    for models, script in (([refuses(401, "no")], OK), ([refuses(404, "no list")], refuses(403, "no"))):
        async with ScriptedLlm([script], models=models) as llm, Chat([llm.endpoint], QUICK) as chat:
            with pytest.raises(SettingsError, match="refuses the key"):
                await chat.wait_ready()
    nothing = refuses(404, "Not Found")
    async with ScriptedLlm([nothing], models=[nothing]) as llm, Chat([llm.endpoint], QUICK) as chat:
        with pytest.raises(SettingsError, match="must end in /v1"):
            await chat.wait_ready()


async def test_a_search_that_has_begun_continues_with_the_remaining_endpoints() -> None:
    refusing = [refuses(401, "no")]
    async with (
        ScriptedLlm([OK], name="a", models=refusing) as first,
        ScriptedLlm([OK], name="b") as second,
        Chat([first.endpoint, second.endpoint], QUICK) as chat,
    ):
        await chat.wait_ready(refuse=False)
        assert [endpoint.state for endpoint in chat.state.endpoints] == ["open", "closed"]
        assert (await ask(chat)).endpoint == "b" and first.asked == []


async def test_a_search_that_has_begun_continues_if_all_endpoints_refuse() -> None:
    """They may refuse by mistake, so they rest and are probed later."""
    policy = quick(rest_seconds=0.0, longest_rest=0.0)
    async with ScriptedLlm([OK], models=[refuses(401, "no")]) as llm, Chat([llm.endpoint], policy) as chat:
        await chat.wait_ready(refuse=False)
        (state,) = chat.state.endpoints
        assert state.state == "open" and "refuses the key" in str(state.reason)
        assert (await ask(chat)).endpoint == "fake"
