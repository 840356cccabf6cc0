"""Child processes of the daemon: restarted when they die, ended in order, none left behind.

Each child has its own session, so that Ctrl-C reaches only the daemon, which saves its state and then ends the
children. A child also ends when the daemon is killed (daemon/local/end_with_parent.py).
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from protocol.errors import UsageError
from protocol.runtime.environment import child_environment
from protocol.runtime.files import open_log

LONGEST_WAIT_SECONDS = 30.0
"""Longest wait before a child that keeps dying is restarted."""

log = structlog.get_logger()


class Child:
    """A child process that is restarted when it dies, unless it exits with the code `final`.

    It inherits the environment without secrets, plus `environment`. If it `loads_models`, it also gets the hub's token.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        quiet: Path | None = None,
        final: int | None = None,
        loads_models: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._command = command
        self._quiet = quiet
        self._final = final
        self._environment = {**child_environment(loads_models=loads_models), **(environment or {})}
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process, and restart it whenever it dies, until `end` or an exit with the code `final`.

        Raises UsageError if it cannot be started.
        """
        try:
            await self._spawn()
        except OSError as error:
            raise UsageError(
                f"{self.name} cannot be started, with its log in {self._quiet}: {error.strerror}"
            ) from error
        self._watch = asyncio.create_task(self._restart_forever())

    async def first_exit(self) -> int:
        """Wait until the process that runs now has exited; return its code."""
        assert self._process is not None, "start() comes first"
        return await self._process.wait()

    @property
    def running(self) -> bool:
        """Whether the process is running."""
        return self._process is not None and self._process.returncode is None

    @property
    def has_given_up(self) -> bool:
        """Whether it exited with the code `final`."""
        return self._process is not None and self._final is not None and self._process.returncode == self._final

    async def end(self, grace_seconds: float = 5.0) -> None:
        """Send SIGTERM to the process. When it has ended, or after the grace time, send SIGKILL to its session."""
        if self._watch:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if self._process is None:
            return
        await self._end_process(self._process, grace_seconds)

    async def restart(self, grace_seconds: float = 5.0) -> None:
        """End the running process. It is then restarted like a process that has died."""
        if self._process is not None and self.running:
            await self._end_process(self._process, grace_seconds)

    async def _end_process(self, process: asyncio.subprocess.Process, grace_seconds: float) -> None:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), grace_seconds)
            except TimeoutError:
                log.warning("child_killed", child=self.name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # processes that it may have left in its session
        await process.wait()

    async def _spawn(self) -> None:
        output = open_log(self._quiet) if self._quiet else None
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "daemon.local.end_with_parent",
                str(os.getpid()),
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output or sys.stderr.fileno(),
                stderr=output,
                start_new_session=True,
                env=self._environment,
            )
        finally:
            if output:
                output.close()

    async def _restart_forever(self) -> None:
        wait = 0.5
        while True:
            assert self._process is not None
            started = asyncio.get_running_loop().time()
            code = await self._process.wait()
            if code == self._final:
                return
            if asyncio.get_running_loop().time() - started > 60:
                wait = 0.5
            log.warning("child_restarted", child=self.name, status=code, after_seconds=wait)
            await asyncio.sleep(wait)
            wait = min(wait * 2, LONGEST_WAIT_SECONDS)
            await self._spawn_at_last()

    async def _spawn_at_last(self) -> None:
        """Try until the process starts, because memory, or the folder of its log, may be missing for a while."""
        wait, fails = 0.5, False
        while True:
            try:
                await self._spawn()
                break
            except (OSError, subprocess.SubprocessError) as error:
                if not fails:
                    log.error("child_not_started", child=self.name, error=str(error))
                fails = True
            await asyncio.sleep(wait)
            wait = min(wait * 2, LONGEST_WAIT_SECONDS)
        if fails:
            log.info("child_started", child=self.name)


async def log_if_it_dies(event: str, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`. If it raises an exception, log `event` with the traceback, and do not raise it again."""
    try:
        await work
    except Exception:
        log.exception(event)
