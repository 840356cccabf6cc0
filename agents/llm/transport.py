"""What goes over the wire to an endpoint and what may come back: hooks for the HTTP client."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import aiohttp
import httpx2

from protocol.errors import EndpointError

LONGEST_ERROR = 65_536
"""Bytes that are read of the body of an error; what follows cannot change what it means."""
# The last is how the SDK tells itself, from the reply's request, that the caller wants the bytes.
_SENT_HEADERS = {
    "host",
    "accept",
    "content-type",
    "content-length",
    "user-agent",
    "connection",
    "x-stainless-raw-response",
}


def only_own_headers(key: str) -> Callable[[httpx2.Request], Awaitable[None]]:
    """A hook that sends this endpoint's key, and nothing that the SDK found in the environment."""

    async def hook(request: httpx2.Request) -> None:
        for name in [name for name in request.headers if name not in _SENT_HEADERS]:
            del request.headers[name]
        request.headers["authorization"] = f"Bearer {key}"
        request.headers["accept-encoding"] = "identity"

    return hook


def capped_at(byte_cap: int) -> Callable[[httpx2.Response], Awaitable[None]]:
    """A hook that ends a body in EndpointError once it is longer than `byte_cap`, and cuts an error's body short.

    A compressed body is refused: it was not asked for, answers are small, and a few kilobytes can grow to gigabytes.
    """

    async def hook(response: httpx2.Response) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise EndpointError("the endpoint's reply is compressed, which was not asked for", retryable=True)
        # A response names any codec of Python as its charset, also those that unpack, or take quadratic time.
        response.encoding = "utf-8"
        stream = cast(httpx2.AsyncByteStream, response.stream)
        response.stream = _CappedStream(stream, byte_cap) if response.is_success else _CutStream(stream, LONGEST_ERROR)

    return hook


def without_cookies(transport: Any) -> Any:
    """Return the SDK's `transport` with sessions of aiohttp that keep no cookie.

    An endpoint that sets new cookies with each reply would fill the memory, and each request would carry all of them.
    """
    make = transport.get_client

    def get_client() -> aiohttp.ClientSession:
        session: aiohttp.ClientSession = make()
        session._cookie_jar = aiohttp.DummyCookieJar()  # the SDK has no parameter for it
        return session

    transport.get_client = get_client
    return transport


class _Stream(httpx2.AsyncByteStream):
    """A reply's body of which no more than so many bytes are read."""

    def __init__(self, stream: httpx2.AsyncByteStream, most: int) -> None:
        self._stream = stream
        self._most = most

    async def aclose(self) -> None:
        await self._stream.aclose()


class _CappedStream(_Stream):
    """Ends in EndpointError after so many bytes."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        seen = 0
        async for chunk in self._stream:
            seen += len(chunk)
            if seen > self._most:
                raise EndpointError(f"the endpoint's reply is larger than {self._most} bytes", retryable=True)
            yield chunk


class _CutStream(_Stream):
    """Just ends after so many bytes."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = self._most
        async for chunk in self._stream:
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                break
