"""What goes over the wire to an endpoint and what may come back: hooks for the HTTP client."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import cast

import httpx2

from protocol.errors import EndpointError

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
    """A hook that ends every body, an error's too, in EndpointError once it is longer than `byte_cap`.

    A compressed body is refused: it was not asked for, answers are small, and a few kilobytes can grow to gigabytes.
    """

    async def hook(response: httpx2.Response) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise EndpointError("the endpoint's reply is compressed, which was not asked for", retryable=True)
        response.stream = _CappedStream(cast(httpx2.AsyncByteStream, response.stream), byte_cap)

    return hook


class _CappedStream(httpx2.AsyncByteStream):
    """A reply's body that ends in EndpointError after so many bytes."""

    def __init__(self, stream: httpx2.AsyncByteStream, cap: int) -> None:
        self._stream = stream
        self._cap = cap

    async def __aiter__(self) -> AsyncIterator[bytes]:
        seen = 0
        async for chunk in self._stream:
            seen += len(chunk)
            if seen > self._cap:
                raise EndpointError(f"the endpoint's reply is larger than {self._cap} bytes", retryable=True)
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
