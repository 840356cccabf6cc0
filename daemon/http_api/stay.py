"""`--stay`: keep the process alive after its search has ended or failed, so that a supervisor does not restart it.

Otherwise a search that has ended would be restarted again and again, and a wrong key would be retried every minute.
"""

import asyncio
import contextlib
from pathlib import Path

import structlog
from aiohttp import web

from daemon.http_api.api import DEFAULT_PORT
from daemon.http_api.guard import Guard
from daemon.http_api.server import HttpServer
from daemon.http_api.token import Access
from daemon.monitor.remote import saved_status
from daemon.settings.settings import Settings
from protocol.errors import SelfPrunerError
from protocol.runtime.signals import run_until_signal, until_cancelled

log = structlog.get_logger()


def stay_after_end(settings: Settings, access: Access | None) -> None:
    """Serve the health check and the last status until a signal."""
    run_until_signal(_answer(settings, access))


def stay_after_error(error: SelfPrunerError, *, at_most: float | None = None) -> None:
    """Do nothing until a signal, or for `at_most` seconds if the cause may pass by itself.

    Nothing is served, so the health check fails and shows the problem.
    """
    run_until_signal(_wait(str(error), at_most))


async def _wait(reason: str, at_most: float | None) -> None:
    log.error("invalid_input", reason=reason, waits_s=at_most)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(at_most):
            await until_cancelled()


async def _answer(settings: Settings, access: Access | None) -> None:
    log.info("stays", search_ended=True)
    if access is None:
        await until_cancelled()
        return
    http = settings.http
    server = HttpServer(_application(Guard(access, http.host, http.allowed_hosts), settings.folder))
    await server.start(http.host, DEFAULT_PORT if http.port is None else http.port)
    try:
        await until_cancelled()
    finally:
        await server.stop()


def _application(guard: Guard, folder: Path) -> web.Application:
    application = guard.application()

    async def livez(_request: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def status(_request: web.Request) -> web.Response:
        found = saved_status(folder)
        if found is None:
            raise web.HTTPServiceUnavailable(text="the search has ended, and its status was not kept")
        return web.json_response(text=found.model_dump_json())

    async def ended(_request: web.Request) -> web.Response:
        raise web.HTTPServiceUnavailable(text="the search has ended: see /api/status; restart the daemon to resume it")

    application.router.add_get("/livez", livez)
    application.router.add_get("/api/status", status)
    application.router.add_route("*", "/{path:.*}", ended)
    return application
