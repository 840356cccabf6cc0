"""The page of a search: static files, and what they show besides the API's status and events."""

import asyncio
from importlib.resources import files

from aiohttp import web

from daemon.monitor.observer import Observer
from daemon.monitor.record import SearchRecord
from daemon.monitor.report import CHARTS, overview

FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.svg": ("page.svg", "image/svg+xml"),
}
"""Files and content types by the path that they are served under. They hold nothing of the search."""


class Page:
    """Serves the page of the search that `observer` observes."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._static = {
            path: ((files(__name__) / name).read_text(encoding="utf-8"), content_type)
            for path, (name, content_type) in FILES.items()
        }
        self._drawn: dict[str, tuple[int, str]] = {}
        self._drawing = asyncio.Lock()

    def add_routes(self, application: web.Application) -> None:
        """Add the routes of the page."""
        for path in FILES:
            application.router.add_get(path, self._file)
        application.router.add_get("/api/charts/{name}", self._chart)

    async def _file(self, request: web.Request) -> web.Response:
        text, content_type = self._static[request.path]
        return web.Response(text=text, content_type=content_type)

    async def _chart(self, request: web.Request) -> web.Response:
        """Reply with a chart as SVG, drawn anew only if there are new outcomes."""
        name = request.match_info["name"]
        if name not in CHARTS:
            raise web.HTTPNotFound(text=f"there is no chart of this name; there are {', '.join(CHARTS)}")
        async with self._drawing:  # many clients ask for the same chart
            version, svg = self._drawn.get(name, (-1, ""))
            if version != self._observer.population.outcomes:
                record = self._observer.record
                if record is None:
                    raise web.HTTPServiceUnavailable(text="there are no charts before the model has been measured")
                version = record.population.outcomes
                svg = await asyncio.to_thread(lambda: CHARTS[name](record).svg)
                self._drawn[name] = (version, svg)
        return web.Response(text=svg, content_type="image/svg+xml")


async def overview_of(record: SearchRecord | None) -> dict[str, object] | None:
    """Return the figures and tables of a search; None before the model has been measured."""
    return None if record is None else await asyncio.to_thread(overview, record)
