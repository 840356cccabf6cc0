"""The live display of `selfpruner run` on a terminal. Without a terminal, the log has the same information."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from daemon.monitor.follower import REFRESH_SECONDS
from daemon.monitor.glance import Glance
from daemon.monitor.status import Tally
from daemon.monitor.watch_screen import plain
from daemon.search.control import ControlWatcher
from daemon.search.figures import figures_of
from daemon.search.search import Search
from daemon.state.store import SearchStore


class _Lines(Progress):
    """The lines of progress, above what the search has found so far."""

    found: tuple[RenderableType, ...] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield what is shown."""
        yield from super().get_renderables()
        yield from self.found


class Display:
    """Shows one line for the search and one per worker, and under them a glance at the search."""

    def __init__(self, console: Console) -> None:
        self._progress = _Lines(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._line = self._progress.add_task("search: waiting for the model", total=None)
        self._workers: dict[str, TaskID] = {}
        self._busy: set[str] = set()
        """Workers whose progress bar counts the steps of a stage instead of candidates."""
        self._search: tuple[Search, ControlWatcher] | None = None
        self._tally = Tally()

    def follow(self, search: Search, control_watcher: ControlWatcher) -> None:
        """Show this search from now on."""
        self._search = search, control_watcher

    @asynccontextmanager
    async def following(self, store: SearchStore) -> AsyncIterator[None]:
        """Show the display while the block runs."""
        with self._progress:
            task = asyncio.create_task(self._follow(store))
            try:
                yield
            finally:
                task.cancel()

    async def _follow(self, store: SearchStore) -> None:
        while True:
            await self._show_workers(store)
            if self._search is not None:
                self._show_search(*self._search)
            await asyncio.sleep(REFRESH_SECONDS)

    def _show_search(self, search: Search, control_watcher: ControlWatcher) -> None:
        state = search.state
        spec, profile, population = state.spec, state.profile, state.population
        self._tally.take(state.ledger, population)
        glance = Glance.of(spec, profile, population, self._tally.evaluations, self._tally.improvements)
        words = Text(figures_of(spec, profile, population).in_words(), no_wrap=True, overflow="ellipsis")
        self._progress.found = (words, glance) if glance else (words,)
        doing = "paused" if control_watcher.command == "pause" else f"round {search.round}"
        self._progress.update(
            self._line,
            description=f"search: {doing}",
            completed=len(population),
            total=search.budget.proposed + search.budget.remaining,
        )

    async def _show_workers(self, store: SearchStore) -> None:
        statuses = {status.consumer: status for status in await store.workers()}
        self._busy &= statuses.keys()
        for consumer in self._workers.keys() - statuses.keys():
            self._progress.remove_task(self._workers.pop(consumer))
        for consumer, status in statuses.items():
            if consumer not in self._workers:
                self._workers[consumer] = self._progress.add_task("", total=None)
            busy = status.total > 0 and not status.is_ready
            if busy != (consumer in self._busy):
                # Replace Rich's task, because its total cannot be removed, and its clock stops when it is complete.
                self._progress.remove_task(self._workers[consumer])
                self._workers[consumer] = self._progress.add_task("", total=None)
                self._busy ^= {consumer}
            self._progress.update(
                self._workers[consumer],
                description=plain(f"worker: {status.stage}").plain,
                completed=status.done if busy else status.measured,
                total=status.total if busy else None,
            )
