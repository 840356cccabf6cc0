"""Whatever an endpoint sends, the outcome is an answer or EndpointError, soon, and without our key."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from urllib.parse import quote

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from agents.chat import Chat
from agents.endpoint import ChatPolicy, Endpoint
from protocol.errors import EndpointError, SettingsError
from tests.chatting import ask
from tests.hostile_replies import KINDS, Hostile, completion, http
from tests.hostile_server import HostileServer

KEY = "sk-very/secret+1234"
POLICY = ChatPolicy(attempts=1, failures_to_open=100, deadline=1.0, connect_timeout=1.0)


@contextlib.asynccontextmanager
async def loop_stays_free(seconds: float) -> AsyncIterator[None]:
    """Fail where the block keeps the event loop for longer than `seconds` at a time."""
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    yield
    watching.cancel()
    assert longest < seconds


@pytest.mark.parametrize("kind", KINDS, ids=str)
async def test_every_kind_of_reply_is_an_answer_or_a_failure_and_the_next_answer_is_clean(kind: Hostile) -> None:
    """To a question, and to the list of models; and nothing that is kept or told holds our key."""
    hostile = True
    kept: list[object] = []

    def choose(_: bytes) -> Hostile | bytes:
        return kind if hostile else http(completion("fine"))

    async with HostileServer(choose) as server, loop_stays_free(1.0):
        endpoint = Endpoint("hostile", server.base_url, "model", api_key=SecretStr(KEY))
        with capture_logs() as logs:
            async with Chat([endpoint], POLICY, record=kept.append) as chat:
                for asking in (ask(chat), chat.wait_ready(at_most=0)):
                    try:
                        kept.append(await asking)
                    except (EndpointError, SettingsError) as error:
                        kept.append(str(error))
                        assert len(str(error)) < 1500
                assert server.served[kind.name] >= 1
                kept.append(chat.state)
                usage = chat.usage["hostile"]
                assert usage.prompt_tokens + usage.completion_tokens < 2_000_000
                hostile = False
                await asyncio.sleep(1)
                if not kind.refuses and not chat._connections[0]._cooldown.left:
                    assert (await ask(chat)).text == "fine"
    told = json.dumps([kept, logs], default=str)
    assert KEY not in told and quote(KEY, safe="") not in told
    assert "\\u001b" not in told.replace(json.dumps("\x1b[2J\x1b]0;owned\x07" * 100)[1:-1], "")
