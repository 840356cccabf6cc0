"""Listens for the HTTP API: a bounded number of connections, none of which may stay silent, and a prompt end."""

import asyncio
import errno

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from daemon.http_guard import Handler
from protocol.errors import UsageError

MAX_CONNECTIONS = 256
"""Far below the usual 1024 open files of a process: the search needs the others."""
SILENT_SECONDS = 15.0
"""A connection that has not sent a whole request head by then is closed."""
SHUTDOWN_SECONDS = 0.3


class _Refusal(asyncio.Protocol):
    """One connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class HttpServer:
    """Serves `application` from `start` to `stop`."""

    def __init__(self, application: web.Application) -> None:
        application.middlewares.insert(0, self._hear)
        self._runner = web.AppRunner(
            application,
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=SHUTDOWN_SECONDS,
            keepalive_timeout=30,
            lingering_time=1,
        )
        self._silent: set[RequestHandler] = set()
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises UsageError, naming the port, where that cannot be."""
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
        handler = server()
        self._silent.add(handler)
        asyncio.get_running_loop().call_later(SILENT_SECONDS, self._close_if_silent, handler)
        return handler

    def _close_if_silent(self, handler: RequestHandler) -> None:
        if handler in self._silent and handler.transport is not None:
            handler.transport.close()
        self._silent.discard(handler)


class CannotListen(UsageError):  # noqa: N818
    """The address cannot be listened on."""

    def __init__(self, host: str, port: int, error: OSError) -> None:
        self.taken = error.errno == errno.EADDRINUSE
        why = "another program listens there" if self.taken else str(error.strerror or error).lower()
        super().__init__(
            f"the HTTP API cannot listen on port {port} of {host} ({why}): "
            "set http.port to a free one, or http.enabled to false"
        )
