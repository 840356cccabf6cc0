"""Hooks for the HTTP client: headers that are sent, and limits on the replies."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import aiohttp
import httpx2

from protocol.errors import EndpointError

LONGEST_ERROR = 65_536
"""Maximum number of bytes of an error's body that are read. The rest is not needed to classify the error."""
# The SDK reads the last header from the reply's request. The header marks that the caller wants the bytes.
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
    """Return a hook that sends this endpoint's key, and nothing that the SDK found in the environment."""

    async def hook(request: httpx2.Request) -> None:
        for name in [name for name in request.headers if name not in _SENT_HEADERS]:
            del request.headers[name]
        request.headers["authorization"] = f"Bearer {key}"
        request.headers["accept-encoding"] = "identity"

    return hook


def capped_at(byte_cap: int) -> Callable[[httpx2.Response], Awaitable[None]]:
    """Return a hook that raises EndpointError for a body longer than `byte_cap`, and truncates an error's body.

    A compressed body is refused: we did not ask for compression, and a few kilobytes can unpack to gigabytes.
    """

    async def hook(response: httpx2.Response) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise EndpointError("the endpoint's reply is compressed, which was not asked for", retryable=True)
        # A response may name any codec of Python as its charset, even one that decompresses or takes quadratic time.
        response.encoding = "utf-8"
        stream = cast(httpx2.AsyncByteStream, response.stream)
        response.stream = _CappedStream(stream, byte_cap) if response.is_success else _CutStream(stream, LONGEST_ERROR)

    return hook


def without_cookies(transport: Any) -> Any:
    """Return the SDK's `transport` with aiohttp sessions that store no cookies.

    An endpoint that sets new cookies in each reply would fill the memory, and each request would send all of them.
    """
    make = transport.get_client

    def get_client() -> aiohttp.ClientSession:
        session: aiohttp.ClientSession = make()
        session._cookie_jar = aiohttp.DummyCookieJar()  # the SDK has no parameter for it
        return session

    transport.get_client = get_client
    return transport


class _Stream(httpx2.AsyncByteStream):
    """A reply's body with a limit on the bytes that are read."""

    def __init__(self, stream: httpx2.AsyncByteStream, limit: int) -> None:
        self._stream = stream
        self._limit = limit

    async def aclose(self) -> None:
        await self._stream.aclose()


class _CappedStream(_Stream):
    """Raises EndpointError beyond the limit."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        seen = 0
        async for chunk in self._stream:
            seen += len(chunk)
            if seen > self._limit:
                raise EndpointError(f"the endpoint's reply is larger than {self._limit} bytes", retryable=True)
            yield chunk


class _CutStream(_Stream):
    """Ends at the limit."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = self._limit
        async for chunk in self._stream:
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                break
