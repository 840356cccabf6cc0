"""Any reply of an endpoint leads to an answer or EndpointError, soon, in little memory, without showing our key."""

import asyncio
import gc
import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import quote

import psutil
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from agents.llm.chat import Chat
from agents.llm.endpoint import Endpoint
from agents.llm.policy import ChatPolicy
from protocol.errors import EndpointError, SettingsError
from tests.faults.marks import fault, slow_fault
from tests.support.chatting import ask, changed, fails
from tests.support.hostile_replies import BY_NAME, KINDS, Hostile, completion, http
from tests.support.hostile_server import HostileServer

KEY = "sk-very/secret+1234"
POLICY = changed(ChatPolicy(attempts=1, failures_to_open=10_000, deadline_seconds=0.5), connect_timeout=0.5)
WELL = http(completion("fine"))
MB = 1024 * 1024


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> Iterator[None]:
    """Make the SDK's first client, which takes a second, and let no collection of earlier tests' garbage be timed."""
    Chat([Endpoint("first", "http://127.0.0.1:9/v1", "model")])
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@asynccontextmanager
async def loop_stays_free(seconds: float) -> AsyncIterator[None]:
    """Fail if the event loop is busy for longer than `seconds` at a time; time of other processes is not counted."""
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.01)
            longest = max(longest, time.thread_time() - before)

    watching = asyncio.create_task(watch())
    yield
    watching.cancel()
    assert longest < seconds


@asynccontextmanager
async def asking(*kinds: Hostile, policy: ChatPolicy = POLICY, **endpoint: object) -> AsyncIterator[Chat]:
    """Return a Chat whose endpoint answers one request with each of the kinds, and later ones with valid answers."""
    left = list(kinds)
    async with HostileServer(lambda _: left.pop(0) if left else WELL) as server:
        one = Endpoint("hostile", server.base_url, "model", **endpoint)  # type: ignore[arg-type]
        async with Chat([one], policy) as chat:
            yield chat


@fault("45", "an LLM endpoint sends anything", "every kind, one at a time", "an answer or a failure")
@pytest.mark.parametrize("kind", KINDS, ids=str)
async def test_every_kind_of_reply_is_an_answer_or_a_failure(kind: Hostile) -> None:
    """Send each kind in reply to a question and to the list of models; our key must not be stored or shown."""
    kept: list[object] = []
    async with HostileServer(lambda _: kind) as server, loop_stays_free(0.5):
        endpoint = Endpoint("hostile", server.base_url, "model", api_key=SecretStr(KEY))
        with capture_logs() as logs:
            async with Chat([endpoint], POLICY, record=kept.append) as chat:
                for attempt in (ask(chat), chat.wait_ready(at_most=0)):
                    try:
                        kept.append(await attempt)
                    except (EndpointError, SettingsError) as error:
                        assert len(str(error)) < 1500 and str(error).isprintable()
                        kept.append(str(error))
                kept.append(chat.state)
                usage = chat.usage["hostile"]
        assert server.served[kind.name] >= 1
    assert usage.prompt_tokens <= usage.requests * 2_100
    assert usage.completion_tokens <= usage.requests * POLICY.max_reply_bytes
    told = json.dumps([kept, logs], default=str)
    assert KEY not in told and quote(KEY, safe="") not in told


@slow_fault("45", "an LLM endpoint sends anything", "every kind, then a good answer", "the good answer counts")
async def test_after_every_kind_the_next_answer_is_clean() -> None:
    """On the same connection pool, without kinds that ask for a wait or reject all questions."""
    policy = changed(POLICY, deadline_seconds=0.3)
    for kind in KINDS:
        if not kind.refuses and "retry" not in kind.name:
            async with asking(kind, policy=policy) as chat:
                came = ""
                async with asyncio.timeout(60):  # a busy machine may miss the short deadline more than once
                    while came != "fine":
                        with suppress(EndpointError):
                            came = (await ask(chat, schema=None)).text


@slow_fault("46", "an LLM endpoint breaks off", "closed and reset at every byte of a reply", "a failure each time")
async def test_a_reply_may_break_off_at_every_byte() -> None:
    for how in ("close", "reset"):
        cut = [Hostile(f"{i} bytes", lambda _r, _q, i=i: WELL[:i], how) for i in range(len(WELL))]  # type: ignore[misc]
        async with asking(*cut, policy=changed(POLICY, deadline_seconds=20)) as chat:
            for _ in cut:
                await fails(chat)
            assert (await ask(chat)).text == "fine"


@fault("46", "an LLM endpoint garbles a reply", "each byte of it, one at a time", "an answer or a failure")
async def test_one_wrong_byte_anywhere_is_an_answer_or_a_failure() -> None:
    rng = random.Random(0)
    garbled = [
        Hostile(f"byte {i}", lambda _r, _q, i=i: WELL[:i] + bytes([rng.randrange(256)]) + WELL[i + 1 :])  # type: ignore[misc]
        for i in range(len(WELL))
    ]
    async with asking(*garbled, policy=changed(POLICY, deadline_seconds=0.2)) as chat:
        for _ in garbled:
            with suppress(EndpointError):
                await ask(chat)


async def test_an_https_address_of_a_plain_server_is_a_failure() -> None:
    async with HostileServer(lambda _: WELL) as server:
        endpoint = Endpoint("plain", server.base_url.replace("http", "https", 1), "model")
        async with Chat([endpoint], changed(POLICY, deadline_seconds=5)) as chat:
            await fails(chat, "plain: ")


GROWING = """a header that goes on for ever; header lines without end; 100 Continue for ever; a body without end;
 an error without end; chunks of a byte without end; random bytes without end; 100 cookies;
 an error with charset zlib; 300,000 empty lists; 200,000 choices; list: 100,000 models"""


@slow_fault("36", "an LLM endpoint sends too much, again and again", "endless and huge replies", "memory stays")
@pytest.mark.parametrize("name", [name.strip() for name in GROWING.split(";")])
async def test_no_kind_takes_much_memory(name: str) -> None:
    """Repeat each kind many times, so that leaked memory would show."""
    process = psutil.Process()
    async with asking(*[BY_NAME[name]] * 10, policy=changed(POLICY, deadline_seconds=0.3)) as chat:
        sizes = []
        for _ in range(10):
            with suppress(EndpointError):
                await ask(chat)
            sizes.append(process.memory_info().rss)
    assert max(sizes) - sizes[2] < 50 * MB


@pytest.mark.parametrize("key", ["0", "1", "none", "0.3"])
async def test_a_placeholder_for_a_key_is_not_blanked_out_of_an_answer(key: str) -> None:
    kind = Hostile("numbers", lambda _r, _q: http(completion("[0.31, 0.1]")))
    async with asking(kind, api_key=SecretStr(key)) as chat:
        assert (await ask(chat)).text == "[0.31, 0.1]"


@pytest.mark.parametrize("count", ["4,299 digits", "10^30", "a million"])
async def test_a_count_of_tokens_is_believed_up_to_a_bound(count: str) -> None:
    kind = BY_NAME[f"usage of {count}"]
    sent = len(kind.make(random.Random(0), b""))
    async with asking(kind) as chat:
        answer = await ask(chat)
        assert answer.prompt_tokens == 2 * len("Which rates?") + 2000
        assert 100 <= answer.completion_tokens < sent
        assert chat.usage["hostile"].completion_tokens == answer.completion_tokens


@pytest.mark.parametrize("count", ["below zero", "true", "1e999", "text"])
async def test_a_count_of_tokens_that_cannot_be_is_estimated(count: str) -> None:
    async with asking(BY_NAME[f"usage of {count}"]) as chat:
        answer = await ask(chat)
        assert (answer.prompt_tokens, answer.completion_tokens) == (len("Which rates?") // 4, len("x") // 4)
        assert chat.usage["hostile"].prompt_tokens == answer.prompt_tokens


async def test_a_count_of_hidden_reasoning_is_believed_up_to_the_limit_that_was_sent() -> None:
    usage = {"prompt_tokens": 40, "completion_tokens": 100}
    kind = Hostile("reasons", lambda _r, _q: http(completion("x", usage)))
    async with asking(kind) as chat:
        answer = await ask(chat)
        assert (answer.prompt_tokens, answer.completion_tokens) == (40, 100)
