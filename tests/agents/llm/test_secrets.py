"""Keys go to their endpoint and nowhere else, and no redirect or proxy leads questions astray."""

import json
from dataclasses import replace

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from agents.llm.chat import Chat
from agents.llm.endpoint import Endpoint
from agents.llm.responses import LONGEST_REPLY
from protocol.errors import EndpointError, SettingsError
from tests.support.chatting import OK, QUICK, ask, fails, quick
from tests.support.scripted_llm import Reply, ScriptedLlm, as_json, lists_models, refuses, says


def with_key(llm: ScriptedLlm, key: str) -> Endpoint:
    return replace(llm.endpoint, api_key=SecretStr(key))


async def test_a_key_goes_to_its_endpoint_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "from-the-environment")
    records: list[dict[str, object]] = []
    echo = refuses(401, "Incorrect API key provided: key-of-a")
    with capture_logs() as logs:
        async with (
            ScriptedLlm([echo], name="a") as first,
            ScriptedLlm([OK], name="b") as second,
            Chat([with_key(first, "key-of-a"), second.endpoint], QUICK, record=records.append) as chat,
        ):
            await ask(chat)
            assert first.asked[0].headers["Authorization"] == "Bearer key-of-a"
            sent = json.dumps([dict(asked.headers) for asked in second.asked])
            assert "key-of-a" not in sent
            assert "from-the-environment" not in sent + json.dumps(dict(first.asked[0].headers))
    assert "key-of-a" not in json.dumps([logs, records])
    assert "Incorrect API key provided: ***" in json.dumps(records)


@pytest.mark.parametrize("before", [0, 4, 11, 12])
async def test_a_key_at_the_end_of_what_is_kept_of_an_answer_is_not_cut_in_two(before: int) -> None:
    key = "secret-1234x"
    text = "a" * (LONGEST_REPLY + 1 - before) + key
    records: list[dict[str, object]] = []
    async with ScriptedLlm([says(text)]) as llm, Chat([with_key(llm, key)], QUICK, record=records.append) as chat:
        answer = await ask(chat)
    assert len(answer.text) <= LONGEST_REPLY + 1
    assert key[:4] not in answer.text + json.dumps(records)


async def test_no_cookie_is_sent_back() -> None:
    sets = replace(OK, headers={"set-cookie": "session=1; path=/"})
    async with ScriptedLlm([sets]) as llm:
        # A name: a client may refuse the cookies of an address anyway.
        endpoint = replace(llm.endpoint, base_url=llm.base_url.replace("127.0.0.1", "localhost"))
        async with Chat([endpoint], QUICK) as chat:
            for _ in range(3):
                await ask(chat)
        assert len(llm.asked) == 3 and not [asked for asked in llm.asked if "Cookie" in asked.headers]


async def test_a_redirect_is_not_followed() -> None:
    async with ScriptedLlm([OK], name="elsewhere") as elsewhere:
        moved = Reply(b"", 307, {"location": f"{elsewhere.base_url}/chat/completions"})
        async with ScriptedLlm([moved]) as llm, Chat([llm.endpoint], quick(attempts=1)) as chat:
            await fails(chat, "307")
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


SECRET = "sk-very-secret-1234"
ECHOES = {
    "a refused key": refuses(401, f"Incorrect API key provided: {SECRET}"),
    "an unknown model": refuses(404, f"The model does not exist for {SECRET}", code="model_not_found"),
    "a quota": refuses(429, f"{SECRET} has no money left", code="insufficient_quota"),
    "a rate limit": refuses(429, f"slow down, {SECRET}", headers={"retry-after": "500"}),
    "a broken server": refuses(500, f"Traceback: authorization=Bearer {SECRET}"),
    "an error without words": Reply(f'{{"detail": "{SECRET}"}}'.encode(), 418),
    "an error with 200": as_json({"error": f"no {SECRET}"}),
    "an answer": says(f"Your key is {SECRET}."),
}


@pytest.mark.parametrize("echo", ECHOES)
async def test_a_key_that_an_endpoint_echoes_is_in_no_log_transcript_error_or_state(echo: str) -> None:
    records: list[dict[str, object]] = []
    told: list[object] = []
    policy = quick(attempts=2, failures_to_open=2)
    async with ScriptedLlm([ECHOES[echo]], models=[lists_models(SECRET)]) as llm:
        endpoint = with_key(llm, SECRET)
        async with Chat([endpoint], policy, record=records.append) as chat:
            with capture_logs() as logs:
                for asking in (ask(chat), ask(chat), chat.wait_ready()):
                    try:
                        told.append(await asking)
                    except (EndpointError, SettingsError) as error:
                        told.append(str(error))
            told.append(chat.state)
        assert llm.asked[0].headers["Authorization"] == f"Bearer {SECRET}"
    assert records and SECRET not in f"{logs} {records} {told} {endpoint}"
