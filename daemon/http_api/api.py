"""The HTTP API: status, population, events, control and metrics of the search of this process.

It shows the Observer's last observation, so that requests cost the search no Redis traffic. An error in the API does
not affect the search.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from daemon.http_api.guard import Guard
from daemon.http_api.metrics import CONTENT_TYPE, Metrics
from daemon.http_api.page import Page
from daemon.http_api.server import CannotListen, HttpServer
from daemon.http_api.token import Access
from daemon.monitor.event_log import Reader, strict_json
from daemon.monitor.events import Event
from daemon.monitor.observer import Observer
from daemon.monitor.status import Status
from daemon.settings.service import HttpSettings
from daemon.state.journal import candidate_record, evaluation_record
from protocol.queue.control import Command, Control

DEFAULT_PORT = 8090
MAX_MEMBERS = 500
"""Maximum number of population members in one reply."""
MAX_EVENT_STREAMS = 224
"""Fewer than connections (server.py), so that there is always one for other requests."""
CONTROL_SECONDS = 3.0
PING_SECONDS = 15.0

log = structlog.get_logger()


class ControlRequest(BaseModel):
    """The body of POST /api/control."""

    model_config = ConfigDict(extra="forbid", strict=True)

    command: Command


class HttpApi:
    """Serves one search. With `free_port`, it uses any free port if no port is set and the default port is in use."""

    def __init__(self, settings: HttpSettings, access: Access, observer: Observer, *, free_port: bool) -> None:
        self._settings = settings
        self._free_port = free_port and settings.port is None
        self._observer = observer
        self._control = Control(observer.redis, observer.keys)
        self._page = Page(observer)
        self.metrics = Metrics(observer)
        guard = Guard(access, settings.host, settings.allowed_hosts)
        self._server = HttpServer(self._application(guard))

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Serve while the block runs; yields the URL. Raises UsageError if it cannot listen on the port.

        At the end every event stream gets `search_ended` and is closed. Requests run in the search's event loop, but
        daemon/http_api/guard.py catches their errors, so that they never reach the search.
        """
        host = self._settings.host
        bound = await self._listen(host)
        try:
            url = f"http://[{host}]:{bound}" if ":" in host else f"http://{host}:{bound}"
            log.info("http_api_listening", url=url)
            yield url
        finally:
            self._observer.events.add([Event("search_ended", {"finished": self._observer.finished})])
            self._observer.events.close()
            await self._server.stop()

    async def _listen(self, host: str) -> int:
        port = self._settings.port
        try:
            return await self._server.start(host, DEFAULT_PORT if port is None else port)
        except CannotListen as error:
            if not (error.taken and self._free_port):
                raise
            return await self._server.start(host, 0)

    def _application(self, guard: Guard) -> web.Application:
        application = guard.application()
        application.router.add_get("/livez", self._livez)
        application.router.add_get("/readyz", self._readyz)
        application.router.add_get("/metrics", self._metrics)
        application.router.add_get("/api/status", self._status)
        application.router.add_get("/api/population", self._population)
        application.router.add_get("/api/candidates/{id}", self._candidate)
        application.router.add_get("/api/events", self._events, allow_head=False)
        application.router.add_get("/api/control", self._read_control)
        application.router.add_post("/api/control", self._write_control)
        self._page.add_routes(application)
        return application

    async def _livez(self, _request: web.Request) -> web.Response:
        return _json({"alive": True})

    async def _readyz(self, _request: web.Request) -> web.Response:
        """Reply whether Redis answers and a worker is usable. A search without an LLM (`degraded`) is ready too."""
        status = self._observer.status
        redis = status is not None and status.redis == "answers"
        workers = sum(worker.stage != "unusable" for worker in status.workers) if status and redis else 0
        body = {
            "ready": redis and workers > 0,
            "redis": redis,
            "workers": workers,
            "degraded": status.degraded if status else None,
            "endpoints": {name: endpoint.state for name, endpoint in status.endpoints.items()} if status else {},
        }
        return _json(body, status=200 if body["ready"] else 503)

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self.metrics.page(), headers={"Content-Type": CONTENT_TYPE})

    async def _status(self, _request: web.Request) -> web.Response:
        return _json(self._known_status().model_dump(mode="json"))

    async def _population(self, request: web.Request) -> web.Response:
        limit = _number(request, "limit", default=50, least=1, most=MAX_MEMBERS)
        offset = _number(request, "offset", default=0, least=0, most=10**9)
        population = self._observer.population
        members = population.top(offset + limit)[offset:]
        records = [{"rank": offset + i, **evaluation_record(member)} for i, member in enumerate(members, start=1)]
        return _json({"total": len(population), "limit": limit, "offset": offset, "members": records})

    async def _candidate(self, request: web.Request) -> web.Response:
        id_ = request.match_info["id"]
        candidate = self._observer.ledger.get(id_)
        if candidate is None:
            raise web.HTTPNotFound(text="this search has no candidate with this id")
        evaluation = self._observer.population.get(id_)
        if evaluation is None:
            return _json({"order": None, **candidate_record(candidate), "outcome": None})
        return _json(evaluation_record(evaluation))

    async def _read_control(self, _request: web.Request) -> web.Response:
        return _json({"search": self._observer.keys.search, "control": self._known_status().control})

    async def _write_control(self, request: web.Request) -> web.Response:
        try:
            command = ControlRequest.model_validate_json(await request.read()).command
        except ValidationError:
            raise web.HTTPBadRequest(
                text='the body must be one JSON object such as {"command": "pause"}, with run, pause or stop'
            ) from None
        try:
            async with asyncio.timeout(CONTROL_SECONDS):
                await self._control.write(command)
        except TimeoutError:
            raise web.HTTPServiceUnavailable(text="Redis does not answer, so commands cannot be sent now") from None
        log.info("http_control", command=command, address=request.remote)
        await self._observer.look()
        return _json({"search": self._observer.keys.search, "control": command})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self.metrics.event_streams >= MAX_EVENT_STREAMS:
            raise web.HTTPServiceUnavailable(
                text=f"there are already {MAX_EVENT_STREAMS} clients of /api/events", headers={"Retry-After": "30"}
            )
        self.metrics.event_streams += 1
        try:
            return await self._stream(request)
        finally:
            self.metrics.event_streams -= 1

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        """Send server-sent events: the status, then changes; `Last-Event-ID` resumes a client's stream."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        reader = self._observer.events.reader(request.headers.get("Last-Event-ID"))
        try:
            if status := self._observer.status:
                await _send(response, f"event: status\ndata: {strict_json(status.model_dump(mode='json'))}\n\n")
            while (text := await _next(reader)) is not None:
                await _send(response, text)
        except ConnectionResetError:
            log.debug("event_stream_lost", address=request.remote)  # the client has disconnected, or reads nothing
        return response

    def _known_status(self) -> Status:
        status = self._observer.status
        if status is None:
            raise web.HTTPServiceUnavailable(text="the search's status is not known yet: Redis has not answered")
        return status


async def _next(reader: Reader) -> str | None:
    """Return the next events as text, or a keep-alive comment after PING_SECONDS; None at the end of the log."""
    try:
        async with asyncio.timeout(PING_SECONDS):
            events = await reader.next()
    except TimeoutError:
        return ": nothing new\n\n"
    return None if events is None else "".join(event.text for event in events)


async def _send(response: web.StreamResponse, text: str) -> None:
    await response.write(text.encode())


def _number(request: web.Request, name: str, *, default: int, least: int, most: int) -> int:
    """Return the whole number `name` of the query. Raises HTTPBadRequest for any other text."""
    text = request.query.get(name)
    if text is None:
        return default
    number = int(text) if re.fullmatch(r"[0-9]{1,12}", text) else None
    if number is None or not least <= number <= most:
        raise web.HTTPBadRequest(text=f"{name} must be a whole number from {least} to {most}")
    return number


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(text=strict_json(value), status=status, content_type="application/json")
