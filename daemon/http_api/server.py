"""The HTTP server of the API: bounded connections, timeouts for silent clients, and a quick stop."""

import asyncio
import errno
import json
import time
from contextlib import suppress
from typing import Any

import structlog
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from daemon.http_api.guard import Handler, add_headers
from protocol.errors import UsageError

MAX_CONNECTIONS = 256
"""Maximum number of connections. The usual limit is 1024 open files, and the search needs files too."""
SILENT_SECONDS = 15.0
"""A connection that has not sent a complete request head within this time is closed."""
UNREAD_SECONDS = 30.0
"""A client that reads nothing of its reply for this long is disconnected. Data in kernel buffers counts as read."""
REFUSED_SECONDS = 1.0
"""A refused client may send for this long. If we closed at once, a reset would destroy our answer."""
SHUTDOWN_SECONDS = 0.3
LOG_SECONDS = 20.0
"""The log gets at most one line about malformed requests in this time."""

log = structlog.get_logger()


class _Malformed:
    """Counts requests that are not valid HTTP, and logs the count at most every LOG_SECONDS.

    A log line contains nothing that the client sent, because that may be long, and may contain the token.
    """

    def __init__(self) -> None:
        self._unlogged = 0
        self._logged_at: float | None = None

    def count(self, address: str | None, error: BaseException) -> None:
        """Count one request from `address`, which failed with `error`."""
        self._unlogged += 1
        now = time.monotonic()
        if self._logged_at is None or now - self._logged_at >= LOG_SECONDS:
            log.warning("http_request_malformed", address=address, reason=type(error).__name__, requests=self._unlogged)
            self._unlogged, self._logged_at = 0, now


class _Refused(web.Response):
    """An answer to a client that may still be sending: it is read and ignored until it closes the connection."""

    _transport: asyncio.Transport | None = None

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Keep the connection, which the base class hides."""
        self._transport = request.transport
        return await super().prepare(request)

    async def write_eof(self, data: bytes = b"") -> None:
        """Send the answer and its end, then wait for the client's end for at most REFUSED_SECONDS."""
        await super().write_eof(data)
        if self._transport is not None and not self._transport.is_closing():
            with suppress(OSError):  # the client is gone already
                self._transport.write_eof()
                await asyncio.sleep(REFUSED_SECONDS)  # cancelled when the connection is lost


class _Connection(RequestHandler):
    """A connection whose client may send anything and read nothing."""

    def __init__(self, server: web.Server, malformed: _Malformed) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(server, loop=loop, access_log=None, keepalive_timeout=30, lingering_time=1)  # type: ignore[arg-type]
        self._malformed = malformed
        self._unread: asyncio.TimerHandle | None = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a request that the parser refuses with a JSON error, like the guard. aiohttp would log a traceback."""
        if not isinstance(exc, HttpProcessingError):
            return super().handle_error(request, status, exc, message)
        self._malformed.count(request.remote, exc)
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer is sent already")
        text = json.dumps({"error": "this is not a valid HTTP request"})
        response = _Refused(text=text, status=400, content_type="application/json")
        add_headers(response)
        self.close()  # all further bytes are ignored
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Log our own errors with a traceback. A body that cannot be decoded is the client's error, and is counted."""
        error = kw.get("exc_info")
        if isinstance(error, web.RequestPayloadError | HttpProcessingError):
            self._malformed.count(None, error)
        else:
            super().log_exception(*args, **kw)

    def pause_writing(self) -> None:
        """Start checking whether the client reads its reply, because unread data stays in memory."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """Stop checking, because the client has read most of its reply."""
        super().resume_writing()
        self._forget_unread()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop checking a client that has disconnected."""
        self._forget_unread()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if isinstance(self.transport, asyncio.WriteTransport):
            unread = self.transport.get_write_buffer_size()
            self._unread = asyncio.get_running_loop().call_later(UNREAD_SECONDS, self._check_unread, unread)

    def _check_unread(self, before: int) -> None:
        """Disconnect a client that has read nothing since `before` bytes were unread. Check a slow client again."""
        assert isinstance(self.transport, asyncio.WriteTransport), "connection_lost cancels this call"
        if self.transport.get_write_buffer_size() < before:
            self._watch()
        else:
            self.transport.abort()

    def _forget_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class _Refusal(asyncio.Protocol):
    """Closes a connection over the limit at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class HttpServer:
    """Serves `application` from `start` to `stop`."""

    def __init__(self, application: web.Application) -> None:
        application.middlewares.insert(0, self._hear)
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=SHUTDOWN_SECONDS)
        self._malformed = _Malformed()
        self._silent: set[RequestHandler] = set()
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen on a port and return it. Raises CannotListen, a UsageError that names the port, if that fails."""
        await self._runner.setup()
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self._connection, host, port, backlog=MAX_CONNECTIONS
            )
        except OSError as error:
            await self._runner.cleanup()
            raise CannotListen(host, port, error) from error
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Close every connection; takes no longer than half a second."""
        if self._server:
            self._server.close()
        await self._runner.cleanup()

    @web.middleware
    async def _hear(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._silent.discard(request.protocol)
        return await handler(request)

    def _connection(self) -> asyncio.Protocol:
        server = self._runner.server
        assert server is not None, "start() comes first"
        if len(server.connections) >= MAX_CONNECTIONS:
            return _Refusal()
        handler = _Connection(server, self._malformed)
        self._silent.add(handler)
        asyncio.get_running_loop().call_later(SILENT_SECONDS, self._close_if_silent, handler)
        return handler

    def _close_if_silent(self, handler: RequestHandler) -> None:
        if handler in self._silent and handler.transport is not None:
            handler.transport.close()
        self._silent.discard(handler)


class CannotListen(UsageError):  # noqa: N818
    """The server cannot listen on the address."""

    def __init__(self, host: str, port: int, error: OSError) -> None:
        self.taken = error.errno == errno.EADDRINUSE
        why = "it is in use" if self.taken else str(error.strerror or error).lower()
        super().__init__(
            f"the HTTP API cannot listen on port {port} of {host} ({why}): "
            "set http.port to a free one, or http.enabled to false"
        )
