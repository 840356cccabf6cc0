"""HTTP requests to one endpoint through the OpenAI SDK, and the classification of failures. The only file with openai.

Every request ends in bytes or in RequestFailed, whatever the endpoint sends. `Client._edge` is the one place that turns
every exception of the HTTP stack into RequestFailed. It catches them all, because there are too many kinds to list:
aiohttp's own exceptions, UnicodeError, RecursionError and others.

The SDK's own retries are off, so the endpoint sees exactly the attempts of our policy. The SDK's `timeout` applies to
each read and not to the whole request, so the caller sets the deadline. The SDK reads bodies of any size, so the
transport limits the size of all bodies, including those of errors.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, Self, TypeVar, cast
from urllib.parse import urlsplit

import httpx2
import openai

from agents.llm.breaker import retry_after
from agents.llm.endpoint import LOOPBACK, Endpoint, Message
from agents.llm.masking import Masking
from agents.llm.policy import ChatPolicy
from agents.llm.responses import Completion, check_content_type, read_completion, read_models
from agents.llm.transport import capped_at, only_own_headers, without_cookies
from protocol.errors import EndpointError

Kind = Literal["unreachable", "limited", "question", "refused"]
"""The cause of a failure.

`unreachable`: the connection or the server failed, or the reply is no completion. The circuit breaker counts such
failures, and most of them are retried. `limited`: the endpoint asks for a wait. `question`: the endpoint cannot answer
this question. `refused`: the endpoint answers none of our questions at present (a wrong key, an unknown model, an
exhausted quota).
"""

_NO_KEY = "none"
"""Placeholder sent to endpoints that need no key. Without it, the SDK would send OPENAI_API_KEY to any address."""
_LARGE = 20_000
"""Bodies of at least this many bytes are parsed in a thread."""
_LONGEST_LOOK = 1_000
"""Maximum number of characters of an error's body that are searched for its cause."""
_LONGEST_CODE = 100
"""Maximum number of characters of an error's code that are used."""
_QUOTA_CODES = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_CANNOT_CONNECT = re.compile(r"Cannot connect to host (\S+) ssl:\S+ \[(.*)\]", re.DOTALL)
_UNKNOWN_MODEL = re.compile(
    r"model_not_found|(unknown|invalid|no such) model\b|not a valid model"
    r"|\bmodel\b[^{}]{0,150}?(\bnot found\b|\bnot be found\b|does not exist|doesn't exist)",
    re.IGNORECASE,
)

T = TypeVar("T")


class RequestFailed(EndpointError):  # noqa: N818  (an EndpointError of its own kind)
    """One HTTP request failed. `wait` is the wait in seconds that the endpoint asks for; None if it asks for none."""

    def __init__(
        self, reason: str, kind: Kind, *, retryable: bool = False, status: int | None = None, wait: float | None = None
    ) -> None:
        super().__init__(reason, retryable=retryable)
        self.kind = kind
        self.status = status
        self.wait = wait
        self.unknown_model = False


class Client:
    """Sends requests to one endpoint; an async context manager."""

    def __init__(self, endpoint: Endpoint, policy: ChatPolicy) -> None:
        self._model = endpoint.model
        key = endpoint.api_key.get_secret_value() if endpoint.api_key else ""
        self.masking = Masking([key] if key else [])
        self._sdk = _make_sdk(endpoint.base_url, key or _NO_KEY, policy)

    async def __aenter__(self) -> Self:
        await self._sdk.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._sdk.close()

    async def complete(self, messages: Sequence[Message], body: dict[str, object], max_tokens: int) -> Completion:
        """Return the completion of one HTTP request, whose `body` sets the limit `max_tokens`; raise RequestFailed."""
        asked = sum(len(message["content"]) for message in messages)
        read = partial(read_completion, asked=asked, max_tokens=max_tokens)
        completion = await self._read(read, await self._edge(self._post(messages, body)))
        if isinstance(completion, RequestFailed):
            raise completion
        return completion

    async def models(self) -> dict[str, int | None]:
        """Return the models that the endpoint lists, with their context sizes if given.

        Raise RequestFailed, for example if the server has no list.
        """
        models = await self._read(read_models, await self._edge(self._get_models()))
        if isinstance(models, RequestFailed):
            raise models
        return models

    async def _post(self, messages: Sequence[Message], body: dict[str, object]) -> bytes:
        create = self._sdk.chat.completions.with_streaming_response.create
        async with create(model=self._model, messages=cast(Any, messages), extra_body=body) as response:
            check_content_type(response.headers.get("content-type", ""))
            return await response.read()

    async def _get_models(self) -> bytes:
        response = await self._sdk.models.with_raw_response.list()
        return response.content

    async def _edge(self, request: Awaitable[bytes]) -> bytes | RequestFailed:
        """Return the bytes of a reply; after any exception, return RequestFailed.

        RequestFailed is returned instead of raised, because an error that is raised while another error is handled
        keeps the other error alive until the next garbage collection, with its frames and the megabytes in them.
        """
        try:
            return await request
        except Exception as error:  # noqa: BLE001  (the edge: no reply of an endpoint may end a search)
            return self._failure(error)

    async def _read(self, read: Callable[[bytes], T], body: bytes | RequestFailed) -> T | RequestFailed:
        """Return `read(body)`, called in a thread for a large body; return RequestFailed if it raises EndpointError."""
        if isinstance(body, RequestFailed):
            return body
        try:
            return read(body) if len(body) < _LARGE else await asyncio.to_thread(read, body)
        except EndpointError as error:
            return self._failure(error)

    def _failure(self, error: Exception) -> RequestFailed:
        if isinstance(error, openai.APIStatusError):
            return self._refusal(error)
        cause = error.__cause__
        if isinstance(error, EndpointError | httpx2.TransportError):
            reason = str(error) or type(error).__name__
        elif isinstance(error, openai.APIConnectionError) and cause:
            reason = str(cause) if isinstance(cause, EndpointError) else _no_connection(error, cause)
        else:
            reason = f"the request to the endpoint failed ({type(error).__name__}: {error})"
        return RequestFailed(self.masking.shown(reason), "unreachable", retryable=True)

    def _refusal(self, error: openai.APIStatusError) -> RequestFailed:
        status = error.status_code
        text, body = _body_of(error.response)
        code = str(error.code)[:_LONGEST_CODE]
        unknown = status in (400, 404, 422) and _UNKNOWN_MODEL.search(f"{code} {text[:_LONGEST_LOOK]}") is not None
        quota = status == 402 or (status == 429 and code in _QUOTA_CODES)
        kind: Kind = "unreachable"
        if unknown or quota or status in (401, 403):
            kind = "refused"
        elif status == 429:
            kind = "limited"
        elif status in (400, 413, 422):
            kind = "question"
        # A proxy answers 404 or 307 while its server starts. This question is not retried, but later ones may succeed.
        retryable = kind == "limited" or (kind == "unreachable" and (status >= 500 or status in (408, 409)))
        wait = retry_after(error.response.headers, datetime.now(UTC), body)
        reason = error.message if " - " in error.message else f"{error.message}: {text}".rstrip(": ")
        failed = RequestFailed(self.masking.shown(reason), kind, retryable=retryable, status=status, wait=wait)
        failed.unknown_model = unknown
        return failed


def _no_connection(error: Exception, cause: BaseException) -> str:
    """Return why there is no connection to the endpoint; aiohttp's own words are hard to read."""
    said = _CANNOT_CONNECT.search(str(cause))
    if said is None:
        return f"{error} ({cause or type(cause).__name__})"
    return f"nothing listens on {said[1]}" if "Connect call failed" in said[2] else f"{said[1]}: {said[2]}"


def _body_of(response: httpx2.Response) -> tuple[str, object]:
    """Return an error's body as text, and as a value if it is JSON."""
    text, body = "", None
    with suppress(httpx2.ResponseNotRead, httpx2.StreamError, ValueError, RecursionError):
        text = response.text
        body = json.loads(text)
    return text, body


class _HttpClient(openai.DefaultAioHttpClient):
    """The SDK's client over aiohttp, whose sessions keep no cookie."""

    def _init_transport(self, *given: Any, **options: Any) -> Any:
        return without_cookies(super()._init_transport(*given, **options))

    def _init_proxy_transport(self, *given: Any, **options: Any) -> Any:
        return without_cookies(super()._init_proxy_transport(*given, **options))


def _make_sdk(base_url: str, key: str, policy: ChatPolicy) -> openai.AsyncOpenAI:
    """Return the SDK over aiohttp: no redirects, no proxy for loopback, no headers for other endpoints."""
    http = _HttpClient(
        trust_env=urlsplit(base_url).hostname not in LOOPBACK,
        follow_redirects=False,
        timeout=httpx2.Timeout(policy.deadline_seconds, connect=policy.connect_timeout, pool=None),
        event_hooks={"request": [only_own_headers(key)], "response": [capped_at(policy.max_reply_bytes)]},
    )
    return openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, http_client=http)
