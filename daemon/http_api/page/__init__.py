"""The page of a search: static files, and what they show besides the API's status and events."""

import asyncio
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

from aiohttp import web

from daemon.monitor.event_log import strict_json
from daemon.monitor.family import family_of
from daemon.monitor.observer import Observer
from daemon.monitor.record import SearchRecord
from daemon.monitor.report import CHARTS, overview
from daemon.state.journal import TRANSCRIPT
from daemon.state.transcript import questions_of
from protocol.plans.candidate import Candidate, Measured

MOST_QUESTIONS = 5
"""Questions shown of a candidate: a question is asked again if its answer cannot be used."""
LEAST_SECONDS = 1.0
SHARE = 0.05
"""Largest share of the time that each chart and the tables take to make."""
RECENT = 20
"""Evaluations by which the time that is left is estimated."""
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.svg": ("page.svg", "image/svg+xml"),
}
"""Files and content types by the path that they are served under. They hold nothing of the search."""


@dataclass(frozen=True)
class _Made:
    """A chart or a table, and until when it is shown as it is."""

    text: str
    outcomes: int
    good_until: float


class Page:
    """Serves the page of the search that `observer` observes."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._static = {
            path: ((files(__name__) / name).read_text(encoding="utf-8"), content_type)
            for path, (name, content_type) in FILES.items()
        }
        self._made: dict[str, _Made] = {}
        self._making = asyncio.Lock()

    def add_routes(self, application: web.Application) -> None:
        """Add the routes of the page."""
        for path in FILES:
            application.router.add_get(path, self._file)
        application.router.add_get("/api/charts/{name}", self._chart)
        application.router.add_get("/api/overview", self._overview)
        application.router.add_get("/api/candidates/{id}/family", self._family)
        application.router.add_get("/api/candidates/{id}/questions", self._questions)

    async def _file(self, request: web.Request) -> web.Response:
        text, content_type = self._static[request.path]
        return web.Response(text=text, content_type=content_type)

    async def _chart(self, request: web.Request) -> web.Response:
        """Reply with a chart as SVG. The header `Outcomes` says how many outcomes it shows."""
        name = request.match_info["name"]
        if name not in CHARTS:
            raise web.HTTPNotFound(text=f"there is no chart of this name; there are {', '.join(CHARTS)}")
        made = await self._latest(name, lambda record: CHARTS[name](record).svg)
        if made is None:
            raise web.HTTPServiceUnavailable(text="there are no charts before the model has been measured")
        return web.Response(text=made.text, content_type="image/svg+xml", headers={"Outcomes": str(made.outcomes)})

    async def _overview(self, _request: web.Request) -> web.Response:
        """Reply with the figures and tables of the report, and with what is left; null before the model is measured."""

        def tables(record: SearchRecord) -> str:
            left = {"planned": planned, "seconds_left": seconds_left(record, planned)}
            return json.dumps(overview(record) | left, ensure_ascii=False)

        planned = self._observer.search.settings.planned if self._observer.search else 0
        made = await self._latest("overview", tables)
        return web.Response(text="null" if made is None else made.text, content_type="application/json")

    async def _latest(self, name: str, make: Callable[[SearchRecord], str]) -> "_Made | None":
        """Return what `make` returned for the search as it is now, or a moment ago; None before it can be made.

        It is made once for all clients, in a thread, at most once a second, and during at most a twentieth of the time,
        because a long search has 100,000 candidates.
        """
        async with self._making:
            made, now = self._made.get(name), time.monotonic()
            if made is not None and now < made.good_until:
                return made
            record = self._observer.record
            if record is None:
                return None
            text = await asyncio.to_thread(make, record)
            took = time.monotonic() - now
            made = _Made(text, record.population.outcomes, now + max(LEAST_SECONDS, took / SHARE))
            self._made[name] = made
            return made

    async def _family(self, request: web.Request) -> web.Response:
        """Reply with a candidate's ancestors, and with what it changed against its parents."""
        candidate, search = self._candidate(request), self._observer.search
        if search is None:
            raise web.HTTPServiceUnavailable(text="the model has not been measured yet")
        units = search.state.profile.shape.units(search.state.spec.granularity)
        family = family_of(candidate.id, units, self._observer.ledger, self._observer.population)
        return web.Response(text=strict_json(family), content_type="application/json")

    async def _questions(self, request: web.Request) -> web.Response:
        """Reply with the questions to the LLM, and its answers, that led to a candidate, the last ones at the end."""
        who = self._candidate(request).provenance
        if who.source != "llm":
            return web.json_response([])
        label = f"{who.agent} round {who.round} call {who.call} "
        path = self._observer.folder / TRANSCRIPT
        return web.json_response(await asyncio.to_thread(questions_of, path, label, MOST_QUESTIONS))

    def _candidate(self, request: web.Request) -> Candidate:
        candidate = self._observer.ledger.get(request.match_info["id"])
        if candidate is None:
            raise web.HTTPNotFound(text="this search has no candidate with this id")
        return candidate


def seconds_left(record: SearchRecord, planned: int) -> float | None:
    """Return how long the evaluations that are left take, by the last ones and by how busy the workers have been.

    None if that is not known.
    """
    recent = [e.outcome.seconds for e in record.population.newest(RECENT) if isinstance(e.outcome, Measured)]
    workers = [each for each in (record.status.workers if record.status else ()) if each.is_ready]
    if not recent or not workers:
        return None
    left = max(0, planned - len(record.proposals))
    ready = sum(each.ready_seconds for each in workers)
    busy = sum(each.busy_seconds for each in workers) / ready if ready else 0.0
    return left * statistics.median(recent) / len(workers) / (busy or 1.0)
