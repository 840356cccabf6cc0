"""Run, pause or stop: one key, set by hand (`SET selfpruner:<search>:control pause`) or by the command line."""

import contextlib
from time import monotonic
from typing import Any, Literal

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from protocol.queue.connection import Patience
from protocol.queue.keys import Keys
from protocol.queue.streams import load_scripts

Command = Literal["run", "pause", "stop"]
COMMANDS: tuple[Command, ...] = ("run", "pause", "stop")

SETTLED_SECONDS = 60.0
"""A lower epoch that stays this long is that of a new daemon: a running one restores its epoch with its data sooner."""

log = structlog.get_logger()


class Control:
    """Reads and writes the control key. An absent key means run; a value that is none of the three changes nothing.

    The last command that was understood is kept beside it, so that a search that is paused stays so where its key is
    misspelt and its processes are started again. While the server's data is lost, nothing changes either: the daemon
    brings the command back with the rest. The epoch shows such a loss: it is absent, or lower than before. A lower one
    that stays is no loss, though, but that of a new daemon, drawn on a server whose clock is behind.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._key, self._understood = keys.control, keys.understood
        self._keys = [keys.control, keys.understood, keys.epoch]
        self._read = load_scripts(redis)["read_control"]
        self._patiently = Patience(redis, self._key)
        self._last: Command | None = None
        self._epoch = 0
        self._seen, self._seen_since = 0, monotonic()
        self._complained: str | None = None

    async def read(self) -> Command:
        """What is commanded now; asks the server each time."""
        value, understood, epoch = await self._patiently(lambda: self._read(self._keys))
        if self._last is not None and self._is_of_lost_data(int(epoch)):
            return self._last
        self._epoch = int(epoch)
        command = _command("run" if value is None else value)
        if command is not None:
            if command != self._last:
                # A server that is full, or away again, must not keep anybody from hearing the command.
                with contextlib.suppress(RedisError, OSError):
                    await self._redis.set(self._understood, command)
            self._last, self._complained = command, None
            return command
        # Another process may have understood a later one.
        stays = self._last = _command(understood or "run") or "run"
        if value != self._complained:
            self._complained = value
            log.warning("control_not_understood", value=value.strip(), expected="run, pause or stop", stays=stays)
        return stays

    def _is_of_lost_data(self, epoch: int) -> bool:
        """Whether a daemon is yet to restore the data of a server with this epoch."""
        if epoch != self._seen:
            self._seen, self._seen_since = epoch, monotonic()
        has_settled = epoch > 0 and monotonic() - self._seen_since >= SETTLED_SECONDS
        return epoch < self._epoch and not has_settled

    async def write(self, command: Command) -> None:
        """Command it; what is being evaluated is finished in any case."""
        await self._patiently(lambda: self._redis.set(self._key, command))


def _command(value: str) -> Command | None:
    """The command that a value means; None where it means nothing."""
    word = value.strip().lower()
    return next((command for command in COMMANDS if command == word), None)
