"""The live display of `selfpruner run` on a terminal. Without a terminal, the log has the same information."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from daemon.monitor.follower import REFRESH_SECONDS
from daemon.search.control import ControlWatcher
from daemon.search.figures import figures_of
from daemon.search.search import Search
from daemon.state.store import SearchStore


class Display:
    """Shows a search and its workers: one line for the search and one per worker."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
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
        found = figures_of(state.spec, state.profile, state.population).in_words()
        doing = "paused" if control_watcher.command == "pause" else f"round {search.round}"
        self._progress.update(
            self._line,
            description=f"search: {doing}; {found}",
            completed=len(state.population),
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
            busy = status.stage not in ("idle", "evaluating") and status.total > 0
            if busy != (consumer in self._busy):
                # Replace Rich's task, because its total cannot be removed, and its clock stops when it is complete.
                self._progress.remove_task(self._workers[consumer])
                self._workers[consumer] = self._progress.add_task("", total=None)
                self._busy ^= {consumer}
            self._progress.update(
                self._workers[consumer],
                description=f"worker: {status.stage}",
                completed=status.done if busy else status.measured,
                total=status.total if busy else None,
            )
