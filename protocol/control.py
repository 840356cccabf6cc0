"""Run, pause or stop: one key, set by hand (`SET selfpruner:<search>:control pause`) or by the command line."""

from typing import Any, Literal

import structlog
from redis.asyncio import Redis

from protocol.connection import Patience
from protocol.keys import Keys

Command = Literal["run", "pause", "stop"]
COMMANDS: tuple[Command, ...] = ("run", "pause", "stop")

log = structlog.get_logger()


class Control:
    """Reads and writes the control key. An absent key means run; a value that is none of the three changes nothing."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._key = keys.control
        self._patiently = Patience(redis, self._key)
        self._last: Command = "run"
        self._complained = ""

    async def read(self) -> Command:
        """What is commanded now; asks the server each time."""
        value = await self._patiently(lambda: self._redis.get(self._key))
        word = "run" if value is None else value.strip().lower()
        if word in COMMANDS:
            self._last, self._complained = word, ""
        elif word != self._complained:
            self._complained = word
            log.warning("control_not_understood", value=word[:40], expected="run, pause or stop", stays=self._last)
        return self._last

    async def write(self, command: Command) -> None:
        """Command it; what is being evaluated is finished in any case."""
        await self._patiently(lambda: self._redis.set(self._key, command))
