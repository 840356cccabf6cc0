"""Follows the control key of a search: closes a gate while it is paused, and raises an error when it is stopped."""

import asyncio

import structlog

from protocol.errors import SelfPrunerError
from protocol.queue.control import Command, Control

POLL_SECONDS = 0.5
"""Interval between reads of the control key. A pause must take effect within two seconds, even with a slow server."""

log = structlog.get_logger()


class StopRequested(SelfPrunerError):  # noqa: N818
    """The command `stop` was given."""


class ControlWatcher:
    """Follows the control key of a search."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._open = asyncio.Event()
        self.command: Command = "run"

    async def begin(self) -> None:
        """Read the first command. Starting a search overrides an earlier stop, but not a pause."""
        if await self._control.read() == "stop":
            await self._control.write("run")
        self._obey(await self._control.read())

    async def watch(self) -> None:
        """Follow the key until cancelled. Raises StopRequested after the command `stop`."""
        while True:
            self._obey(await self._control.read())
            if self.command == "stop":
                raise StopRequested("the search was stopped by command")
            await asyncio.sleep(POLL_SECONDS)

    async def gate(self) -> None:
        """Wait while the search is paused."""
        await self._open.wait()

    def _obey(self, command: Command) -> None:
        if command != self.command or (command == "pause" and self._open.is_set()):
            log.info("control_changed", command=command)
        self.command = command
        if command == "run":
            self._open.set()
        else:
            self._open.clear()
