"""What follows a search in its own process: the display of a terminal, or another program's callback."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import structlog

from daemon.search.control import ControlWatcher
from daemon.search.figures import Figures, figures_of
from daemon.search.search import Search
from daemon.state.store import SearchStore

REFRESH_SECONDS = 0.5

log = structlog.get_logger()


class Follower(Protocol):
    """Shows a search while it runs."""

    def follow(self, search: Search, control_watcher: ControlWatcher) -> None:
        """Show this search from now on."""
        ...

    def following(self, store: SearchStore) -> AbstractAsyncContextManager[None]:
        """Show what happens while the block runs."""
        ...


@dataclass(frozen=True)
class Progress:
    """How far a search has come."""

    stage: str
    """What a worker does, such as `calibrating`; `searching` once candidates are measured."""
    done: int
    """Steps of the stage, or candidates with an outcome."""
    total: int | None
    """All of them, if that is known."""
    figures: Figures | None = None
    """The best figures so far, once there are any."""


def _ignore(_: Progress) -> None:
    """Report nothing."""


class Reporter:
    """Calls a function with each change of a search's progress; after an error of that function, no more."""

    def __init__(self, report: Callable[[Progress], None]) -> None:
        self._report = report
        self._search: Search | None = None
        self._last: Progress | None = None

    def follow(self, search: Search, _: ControlWatcher) -> None:
        """Report on this search from now on."""
        self._search = search

    @asynccontextmanager
    async def following(self, store: SearchStore) -> AsyncIterator[None]:
        """Report while the block runs, and once at its end."""
        task = asyncio.create_task(self._follow(store))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await self._take(self._of_search())

    async def _follow(self, store: SearchStore) -> None:
        while True:
            progress = self._of_search()
            await self._take(await self._of_workers(store) if progress is None or not progress.done else progress)
            await asyncio.sleep(REFRESH_SECONDS)

    async def _take(self, progress: Progress | None) -> None:
        if progress is not None and progress != self._last:
            self._last = progress
            try:
                await asyncio.to_thread(self._report, progress)  # it may take its time
            except Exception as error:  # noqa: BLE001  (the caller's code must not end a search of hours)
                log.warning("progress_not_reported", error=repr(error))
                self._report = _ignore

    def _of_search(self) -> Progress | None:
        if (search := self._search) is None:
            return None
        state = search.state
        figures = figures_of(state.spec, state.profile, state.population)
        total = search.budget.proposed + search.budget.remaining
        return Progress("searching", len(state.population), total, figures)

    async def _of_workers(self, store: SearchStore) -> Progress | None:
        statuses = await store.workers()
        busy = [status for status in statuses if status.total]
        return Progress(busy[0].stage, busy[0].done, busy[0].total) if busy else None
