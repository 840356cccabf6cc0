"""Asks the LLM: endpoints in order, one retry policy, one total deadline, a byte cap. The only file with openai.

The SDK's own retries are off, so that the attempts of the policy are the attempts that the endpoint sees. The SDK's
`timeout` is per read, so the deadline is asyncio's; its reading is unbounded, so the cap sits in the transport, where
it also covers the bodies of errors.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self, cast
from urllib.parse import urlsplit

import httpx2
import openai
import structlog
import tenacity

from agents.backoff import retry_after
from agents.completion import Completion, check_content_type, read_completion
from agents.dialect import Dialect
from agents.endpoint import Answer, ChatPolicy, Endpoint, Message, Question, Usage
from agents.transport import capped_at, only_own_headers
from protocol.errors import EndpointError, SettingsError

__all__ = ["Answer", "Chat", "ChatPolicy", "Endpoint", "Usage"]

Gate = Callable[[], Awaitable[None]]
Record = Callable[[dict[str, object]], None]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NO_KEY = "none"
"""What an endpoint without a key of its own is sent: the SDK would otherwise take OPENAI_API_KEY to any address."""

_LEFT_ALONE = "left alone after a failure"

log = structlog.get_logger()


async def _open_gate() -> None:
    return


def _no_record(_: dict[str, object]) -> None:
    return


class Chat:
    """Asks endpoints in order; an async context manager.

    `gate` is awaited before every HTTP attempt, so that a pause holds; `record` gets every question with its answer.
    `degraded` is true from the moment no endpoint answered until one does.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        policy: ChatPolicy | None = None,
        *,
        gate: Gate = _open_gate,
        record: Record = _no_record,
    ) -> None:
        self._policy = policy or ChatPolicy()
        self._connections = [_Connection(endpoint, self._policy, gate) for endpoint in endpoints]
        self._record = record
        self._stack = AsyncExitStack()
        self.degraded = False

    async def __aenter__(self) -> Self:
        for connection in self._connections:
            await self._stack.enter_async_context(connection.client)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def usage(self) -> dict[str, Usage]:
        """Totals by endpoint name."""
        return {connection.endpoint.name: connection.usage for connection in self._connections}

    @property
    def resting(self) -> frozenset[str]:
        """The names of endpoints that are left alone for now."""
        return frozenset(connection.endpoint.name for connection in self._connections if connection.resting)

    async def ask(
        self,
        messages: Sequence[Message],
        *,
        schema: dict[str, object] | None,
        schema_name: str,
        seed: int,
        temperature: float,
        max_tokens: int,
        label: str = "",
    ) -> Answer:
        """The first endpoint's answer that comes; raises EndpointError when none does."""
        question = Question(messages, schema, schema_name, seed, temperature, max_tokens)
        failures = []
        for connection in self._connections:
            if connection.resting:
                failures.append(f"{connection.endpoint.name}: {_LEFT_ALONE}")
                continue
            try:
                answer = await connection.answer(question)
            except EndpointError as error:
                self._keep(question, label, connection.endpoint.name, error=str(error))
                failures.append(f"{connection.endpoint.name}: {error}")
                continue
            self._keep(question, label, answer.endpoint, answer=answer)
            self.degraded = False
            return answer
        self.degraded = True
        raise EndpointError(
            "no LLM endpoint answered: " + ("; ".join(failures) or "none is configured"), retryable=True
        )

    async def wait_ready(self, waiting: Callable[[str], None] = lambda _: None) -> None:
        """Return when any endpoint answers; `waiting` gets their names, once, if none does at first."""
        pause, told = self._policy.first_wait, False
        while self._connections and not any(await asyncio.gather(*(c.ready() for c in self._connections))):
            if not told:
                waiting(", ".join(c.endpoint.name for c in self._connections))
                told = True
            await asyncio.sleep(pause)
            pause = min(2 * pause, self._policy.longest_wait)

    def _keep(
        self, question: Question, label: str, endpoint: str, *, answer: Answer | None = None, error: str | None = None
    ) -> None:
        self._record(
            {
                "time": datetime.now(UTC).isoformat(),
                "label": label,
                "endpoint": endpoint,
                "messages": [dict(message) for message in question.messages],
                "schema_name": question.schema_name,
                "seed": question.seed,
                "temperature": question.temperature,
                "text": answer.text if answer else None,
                "error": error,
                "finish_reason": answer.finish_reason if answer else None,
                "prompt_tokens": answer.prompt_tokens if answer else 0,
                "completion_tokens": answer.completion_tokens if answer else 0,
                "seconds": answer.seconds if answer else None,
            }
        )


@dataclass
class _Connection:
    """One endpoint: its SDK client, what it accepts, and whether it is being left alone."""

    endpoint: Endpoint
    policy: ChatPolicy
    gate: Gate
    usage: Usage = field(default_factory=Usage)
    dialect: Dialect = field(default_factory=Dialect)

    def __post_init__(self) -> None:
        self.client = _make_client(self.endpoint, self.policy)
        self._slots = asyncio.Semaphore(self.policy.concurrency)
        self._not_before = 0.0
        self._rests_until = 0.0
        self._failures_in_a_row = 0

    @property
    def resting(self) -> bool:
        return time.monotonic() < self._rests_until

    async def answer(self, question: Question) -> Answer:
        """One answer, after as many attempts as the policy allows; raises EndpointError."""
        async with self._slots:
            if self.resting:  # since this question began to wait for a slot
                raise EndpointError(_LEFT_ALONE, retryable=True)
            started = time.monotonic()
            try:
                async with asyncio.timeout(self.policy.deadline) as clock:
                    completion: Completion = await self._retrying(clock)(self._attempt, question, clock)
            except TimeoutError:
                raise self._failed(f"no whole answer within {self.policy.deadline:g} s", down=False) from None
            except (openai.OpenAIError, httpx2.TransportError, ValueError, EndpointError) as error:
                raise self._failed(self._describe(error), down=_is_down(error)) from None
        self._failures_in_a_row = 0
        self.usage.answers += 1
        self.usage.prompt_tokens += completion.prompt_tokens
        self.usage.completion_tokens += completion.completion_tokens
        return Answer(
            completion.text,
            self.endpoint.name,
            completion.prompt_tokens,
            completion.completion_tokens,
            time.monotonic() - started,
            completion.finish_reason,
        )

    async def ready(self) -> bool:
        """Whether the endpoint answers. Not every server lists its models: any status but 'still loading' counts."""
        try:
            async with asyncio.timeout(self.policy.connect_timeout):
                await self.client.models.with_raw_response.list()
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise SettingsError(
                    f"the LLM endpoint {self.endpoint.name!r} refuses the key ({error.status_code}): "
                    "set api_key_file or api_key in llm.endpoints"
                ) from None
            return error.status_code not in (502, 503, 504)
        except (openai.OpenAIError, TimeoutError, EndpointError):
            return False
        return True

    def _retrying(self, clock: asyncio.Timeout) -> tenacity.AsyncRetrying:
        """The one retry policy; its last wait is not begun where it would end after the deadline."""
        backoff = tenacity.wait_random_exponential(multiplier=self.policy.first_wait, max=self.policy.longest_wait)

        def wait(state: tenacity.RetryCallState) -> float:
            told = _told_to_wait(state.outcome.exception() if state.outcome else None)
            if told is None:
                return backoff(state)
            self._not_before = max(self._not_before, time.monotonic() + told)
            return told

        def too_late(state: tenacity.RetryCallState) -> bool:
            end = clock.when()
            return end is not None and asyncio.get_running_loop().time() + state.upcoming_sleep >= end

        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_worth_another_try),
            wait=wait,
            stop=lambda state: state.attempt_number >= self.policy.attempts or too_late(state),
            reraise=True,
        )

    async def _attempt(self, question: Question, clock: asyncio.Timeout) -> Completion:
        """One attempt; a refused parameter is left out and asked again at once, which is no failure."""
        while True:
            await self._wait_turn(clock)
            body = self.dialect.body(
                question.schema, question.schema_name, question.seed, question.temperature, question.max_tokens
            )
            self.usage.requests += 1
            try:
                return await self._post(question.messages, body)
            except openai.APIStatusError as error:
                if not self.dialect.learn(error.status_code, str(error), body):
                    raise
                log.info("endpoint_dialect", endpoint=self.endpoint.name, rung=self.dialect.rung)

    async def _wait_turn(self, clock: asyncio.Timeout) -> None:
        """Wait as long as the endpoint asked for, then at the gate, so that nothing stands between it and the request.

        A wait beyond the deadline is not begun.
        """
        while (wait := self._not_before - time.monotonic()) > 0:
            end = clock.when()
            if end is not None and asyncio.get_running_loop().time() + wait >= end:
                raise EndpointError(f"the endpoint asks to be left alone for {wait:.0f} s", retryable=False)
            await asyncio.sleep(wait)
        await self._pass_gate(clock)

    async def _pass_gate(self, clock: asyncio.Timeout) -> None:
        """Wait at the gate with the deadline's clock stopped."""
        loop = asyncio.get_running_loop()
        left = (clock.when() or loop.time()) - loop.time()
        clock.reschedule(None)
        await self.gate()
        clock.reschedule(loop.time() + left)

    async def _post(self, messages: Sequence[Message], body: dict[str, object]) -> Completion:
        create = self.client.chat.completions.with_streaming_response.create
        async with create(model=self.endpoint.model, messages=cast(Any, messages), extra_body=body) as response:
            check_content_type(response.headers.get("content-type", ""))
            return read_completion(await response.read())

    def _failed(self, why: str, *, down: bool) -> EndpointError:
        """Count the failure. An endpoint that is down rests at once; one that failed a question, after some in a row.

        A local model that is too slow for one long question, or a prompt that it cannot take, must not stop the others.
        """
        self.usage.errors += 1
        self._failures_in_a_row += 1
        now = time.monotonic()
        if down or self._failures_in_a_row >= self.policy.failures_to_rest:
            self._rests_until = max(now + self.policy.rest, self._not_before)
        rests = max(0.0, self._rests_until - now)
        log.warning("endpoint_failed", endpoint=self.endpoint.name, reason=why, rests_s=round(rests, 1))
        return EndpointError(why, retryable=True)

    def _describe(self, error: Exception) -> str:
        cause = error.__cause__
        text = f"{error} ({cause})" if isinstance(error, openai.APIConnectionError) and cause else str(error)
        if self.endpoint.api_key and (secret := self.endpoint.api_key.get_secret_value()):
            text = text.replace(secret, "***")
        return text[:300]


def _worth_another_try(error: BaseException) -> bool:
    match error:
        case EndpointError():
            return error.retryable
        case openai.RateLimitError():
            return error.code != "insufficient_quota"
        case openai.APIStatusError():
            return error.status_code >= 500 or error.status_code in (408, 409)
        case _:
            return isinstance(error, openai.APIConnectionError | httpx2.TransportError | ValueError)


def _is_down(error: Exception) -> bool:
    """Whether another question would fare no better: unreachable, overloaded, or it does not know us."""
    match error:
        case openai.APIConnectionError():
            return not isinstance(error.__cause__, EndpointError)  # what our own hooks refuse is about one reply
        case openai.APIStatusError():
            return error.status_code not in (400, 413, 422)
        case _:
            return False


def _told_to_wait(error: BaseException | None) -> float | None:
    if not isinstance(error, openai.APIStatusError):
        return None
    return retry_after(error.response.headers, datetime.now(UTC))


def _make_client(endpoint: Endpoint, policy: ChatPolicy) -> openai.AsyncOpenAI:
    """The SDK over aiohttp: no redirects, no proxy for loopback, no header beside the endpoint's own."""
    key = endpoint.api_key.get_secret_value() if endpoint.api_key else _NO_KEY

    http = openai.DefaultAioHttpClient(
        trust_env=urlsplit(endpoint.base_url).hostname not in _LOOPBACK,
        follow_redirects=False,
        timeout=httpx2.Timeout(policy.deadline, connect=policy.connect_timeout, pool=None),
        event_hooks={"request": [only_own_headers(key)], "response": [capped_at(policy.byte_cap)]},
    )
    return openai.AsyncOpenAI(base_url=endpoint.base_url, api_key=key, max_retries=0, http_client=http)
