"""Sends a search to its experiment trackers. Nothing that goes wrong there ends, delays or slows the search."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import structlog

from daemon.local.children import log_if_it_dies
from daemon.monitor.report import REPORT
from daemon.search.state import SearchState
from daemon.settings.service import TrackerName
from daemon.settings.settings import Settings
from daemon.trackers.kinds import environment
from daemon.trackers.points import Curves
from daemon.trackers.process import End, Start
from protocol.runtime.files import open_log

SEND_SECONDS = 1.0
END_SECONDS = 10.0
"""Seconds that trackers have at the end of a search. Those that take longer are killed."""

KILL_SECONDS = 2.0

log = structlog.get_logger()


class Trackers:
    """The trackers of one search. `state` returns None until the search begins; `counters` has the LLM's tokens."""

    def __init__(
        self, settings: Settings, state: Callable[[], SearchState | None], counters: Callable[[], Mapping[str, float]]
    ) -> None:
        self._folder = settings.folder.absolute()
        names = dict.fromkeys(settings.run.trackers)
        start = Start(search=settings.search.name, settings=settings.shown() if names else {})
        self._feeds = [Feed(name, self._folder, start, state, counters) for name in names]

    async def run(self) -> None:
        """Start the processes, and send every second what is new, until cancelled."""
        await asyncio.gather(*(log_if_it_dies("tracker_died", feed.run()) for feed in self._feeds))

    async def end(self, *, finished: bool) -> None:
        """Send the rest with the report, and end the processes within END_SECONDS."""
        report = self._folder / REPORT
        end = End(finished=finished, report=report if report.is_file() else None)
        await asyncio.gather(*(log_if_it_dies("tracker_died", feed.end(end)) for feed in self._feeds))


class Feed:
    """Sends a search to the process of one tracker, as fast as that reads. After an error, it sends nothing more.

    The history of the search is the queue: points that the process has not read are only in the pipe.
    """

    def __init__(
        self,
        name: TrackerName,
        folder: Path,
        start: Start,
        state: Callable[[], SearchState | None],
        counters: Callable[[], Mapping[str, float]],
    ) -> None:
        self._name, self._folder, self._start = name, folder, start
        self._state, self._counters = state, counters
        self._curves: Curves | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        """Start the process, and send what is new until cancelled, or until an error."""
        async with self._logging_errors():
            self._process = await self._spawn()
            while True:
                await self._send(self._process)
                await asyncio.sleep(SEND_SECONDS)

    async def end(self, end: End) -> None:
        """Send the rest and wait for the end of the process; kill it after END_SECONDS."""
        process = self._process
        if process is None:
            return
        try:
            if self._state() is not None:
                async with self._logging_errors(), asyncio.timeout(END_SECONDS):
                    await self._send(process)
                    assert process.stdin is not None, "it is a pipe"
                    process.stdin.write(f"{end.model_dump_json()}\n".encode())
                    process.stdin.close()
                    if await process.wait():
                        raise await _error(process)
        finally:
            await _kill(process)

    async def _spawn(self) -> asyncio.subprocess.Process:
        folder = self._folder / self._name
        command = [sys.executable, "-m", "daemon.trackers.process", self._name, str(folder)]
        with await asyncio.to_thread(open_log, folder.with_suffix(".log")) as output:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "daemon.local.end_with_parent",
                str(os.getpid()),
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                start_new_session=True,
                env=environment(self._name, folder),
            )

    async def _send(self, process: asyncio.subprocess.Process) -> None:
        """Send the points that are new. Raises TrackerError if the process has ended."""
        state, stdin = self._state(), process.stdin
        assert stdin is not None, "it is a pipe"
        if process.returncode is not None:
            raise await _error(process)
        if state is None:
            return
        if self._curves is None:
            self._curves = Curves(state.spec, state.profile)
            stdin.write(f"{self._start.model_dump_json()}\n".encode())
        try:
            for point in self._curves.take(state.population, self._counters()):
                stdin.write(f"{json.dumps([point.step, point.values])}\n".encode())
                await stdin.drain()
                await asyncio.sleep(0)  # a long history must not block the event loop
        except ConnectionError:
            raise await _error(process) from None

    @contextlib.asynccontextmanager
    async def _logging_errors(self) -> AsyncIterator[None]:
        """Log an error of the tracker, and send nothing more to it."""
        try:
            yield
        except (TrackerError, OSError) as error:  # a TimeoutError is an OSError
            says = str(error) or f"it has not ended within {END_SECONDS:g} seconds"
            log.warning("tracker_failed", tracker=self._name, error=says)
            process, self._process = self._process, None
            if process:
                await _kill(process)


class TrackerError(Exception):
    """A tracker's process has failed."""


async def _error(process: asyncio.subprocess.Process) -> TrackerError:
    """Wait for the end of a process, and return the error that it printed, else its exit status."""
    assert process.stdout is not None, "it is a pipe"
    says = (await process.stdout.read()).decode(errors="replace").strip()
    return TrackerError(says or f"its process has ended with status {await process.wait()}")


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill a process and its process group, unless it has ended.

    Wait for its end only for a moment: while its stdout is open in another process, it seems to go on.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILL_SECONDS):
                await process.wait()
