"""The control key of a search: run, pause or stop, set by the command line or by
`SET selfpruner:<search>:control pause`."""

import contextlib
import json
from time import monotonic
from typing import Any, Literal

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from protocol.queue.connection import RedisRetry
from protocol.queue.keys import Keys
from protocol.queue.streams import load_scripts

Command = Literal["run", "pause", "stop"]
COMMANDS: tuple[Command, ...] = ("run", "pause", "stop")

SETTLED_SECONDS = 60.0
"""An epoch that is lower for this many seconds belongs to a new daemon. A running daemon restores its epoch sooner."""

log = structlog.get_logger()


async def has_ended(redis: Redis, keys: Keys) -> bool:
    """Return whether the daemon has said that the search ended; False if it has said nothing that can be read."""
    text: Any = await redis.get(keys.condition)
    try:
        return bool(json.loads(text or "{}")["finished"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


class Control:
    """Reads and writes the control key. An absent key means run; an invalid value changes nothing.

    The last valid command is stored in a second key, so that a paused search stays paused if its control key is
    misspelt and its processes restart. While the server's data is lost, the command does not change either, until the
    daemon restores it with the other data. An absent or lower epoch shows such a loss. A lower epoch that stays shows
    no loss: it belongs to a new daemon that started on a server whose clock is behind.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._key, self._last_command_key = keys.control, keys.last_command
        self._keys = [keys.control, keys.last_command, keys.epoch]
        self._read = load_scripts(redis)["read_control"]
        self._retry = RedisRetry(redis, self._key)
        self._command: Command | None = None
        self._epoch = 0
        self._observed_epoch, self._epoch_since = 0, monotonic()
        self._reported: str | None = None

    async def read(self) -> Command:
        """Return the current command, read from the server."""
        value, last_command, epoch = await self._retry(lambda: self._read(self._keys))
        if self._command is not None and self._has_lost_data(int(epoch)):
            return self._command
        self._epoch = int(epoch)
        command = _parse_command("run" if value is None else value)
        if command is not None:
            if command != self._command:
                # The command is obeyed even if it cannot be stored because the server is full, or down again.
                with contextlib.suppress(RedisError, OSError):
                    await self._redis.set(self._last_command_key, command)
            self._command, self._reported = command, None
            return command
        # Use the stored command, because another process may have read a later one than this process.
        stays = self._command = _parse_command(last_command or "run") or "run"
        if value != self._reported:
            self._reported = value
            log.warning("control_not_understood", value=value.strip(), expected="run, pause or stop", stays=stays)
        return stays

    def _has_lost_data(self, epoch: int) -> bool:
        """Whether this epoch shows that the server has lost data and no daemon has restored it yet."""
        if epoch != self._observed_epoch:
            self._observed_epoch, self._epoch_since = epoch, monotonic()
        has_settled = epoch > 0 and monotonic() - self._epoch_since >= SETTLED_SECONDS
        return epoch < self._epoch and not has_settled

    async def write(self, command: Command) -> None:
        """Set the command. Evaluations in progress are completed in any case."""
        await self._retry(lambda: self._redis.set(self._key, command))


def _parse_command(value: str) -> Command | None:
    """Return the command that `value` spells, or None."""
    word = value.strip().lower()
    return next((command for command in COMMANDS if command == word), None)
