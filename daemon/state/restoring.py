"""Restores search data that the server has lost while the daemon runs, in steps of a few milliseconds each.

Everything is written to temporary keys, and the last step renames all of them to the real keys at once. If the daemon
is killed before that, the real keys are unchanged, and the next daemon starts over.

The first step deletes the daemon's own epoch, which may still exist. From then until the last step, no queue of this or
an earlier daemon can write. The memory of the daemon after the first step is therefore complete. If the epoch reappears
in the meantime (a restarted server may have lost the deletion), the last step refuses, and restoring starts over.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import structlog
from pydantic import BaseModel
from redis.asyncio import Redis

from daemon.state.history import Memory
from protocol.queue.connection import RedisRetry
from protocol.queue.keys import Keys
from protocol.queue.streams import PART, TAKEN_OVER, TakenOver, load_scripts

INCOMPLETE = -3
"""Reply of the last step if parts are missing, or if the queue may have written in the meantime."""

log = structlog.get_logger()


class Restorer:
    """Restores the search with these keys for its daemon."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._retry = RedisRetry(redis, keys.state)
        self._scripts = load_scripts(redis)

    async def clear(self) -> None:
        """Delete the temporary keys of a daemon that was killed while restoring."""
        await self._retry(lambda: self._redis.unlink(*self._written))

    async def restore(self, epoch: int, spec: str, remembered: Callable[[], Memory]) -> tuple[int, int, int]:
        """Replace the server's history by the `remembered` history; `spec` is the search's spec as JSON.

        Returns the number of candidates and outcomes that were restored, and then the numbers of candidates and of
        outcomes that the server now has. Raises TakenOver if another daemon is in charge.
        """
        while True:
            await self._begin(epoch)
            there = await self._count()
            memory = remembered()
            history = memory.history
            ledger = list(history.ledger.items())  # a copy, because the search adds candidates meanwhile
            outcomes = [(evaluation.candidate.id, evaluation.outcome) for evaluation in history.population]
            selections = [(str(round_), selection) for round_, selection in history.selections.items()]
            await self._write(epoch, self._keys.candidates, self._keys.issued, _texts(ledger))
            await self._write(epoch, self._keys.outcomes, self._keys.applied, _texts(outcomes))
            await self._write(epoch, self._keys.selections, "", _texts(selections))
            counts = len(ledger), len(outcomes), len(selections)
            if await self._move(epoch, spec, memory, counts) != INCOMPLETE:
                return max(0, len(ledger) + len(outcomes) - there), len(ledger), len(outcomes)

    @property
    def _history_keys(self) -> list[str]:
        keys = self._keys
        return [keys.candidates, keys.issued, keys.outcomes, keys.applied, keys.selections]

    @property
    def _written(self) -> list[str]:
        return [self._keys.restoring(key) for key in self._history_keys]

    async def _begin(self, epoch: int) -> None:
        keys = [self._keys.epoch, *self._written]
        await self._fenced(lambda: self._scripts["begin_restoring"](keys, [epoch]))

    async def _count(self) -> int:
        issued = await self._retry(lambda: self._redis.llen(self._keys.issued))
        return int(issued) + int(await self._retry(lambda: self._redis.llen(self._keys.applied)))

    async def _write(self, epoch: int, hash_: str, order: str, pairs: Iterable[tuple[str, str]]) -> None:
        """Write pairs to the hash's temporary key. If `order` names a list, write their ids to its temporary key."""
        keys = [self._keys.epoch, *(self._keys.restoring(key) for key in (hash_, order) if key)]
        for part in _parts(pairs):
            args = [epoch, *(text for pair in part for text in pair)]
            await self._fenced(partial(self._scripts["restore_part"], keys, args))

    async def _move(self, epoch: int, spec: str, memory: Memory, counts: tuple[int, int, int]) -> int:
        keys = [self._keys.epoch, self._keys.spec, self._keys.profile, self._keys.control, self._keys.last_command]
        keys += [name for key in self._history_keys for name in (self._keys.restoring(key), key)]
        profile = memory.profile.model_dump_json() if memory.profile else ""
        ledger, outcomes, selections = counts
        args = [epoch, spec, profile, memory.command or ""]
        args += [ledger, ledger, outcomes, outcomes, selections]
        return int(await self._fenced(lambda: self._scripts["restore"](keys, args)))

    async def _fenced(self, script: Callable[[], Awaitable[Any]]) -> Any:
        answer = await self._retry(script)
        if answer == TAKEN_OVER:
            raise TakenOver(f"another daemon has taken over the search {self._keys.search!r}")
        return answer


def _texts(values: Iterable[tuple[str, BaseModel]]) -> Iterator[tuple[str, str]]:
    return ((id_, value.model_dump_json()) for id_, value in values)


def _parts(pairs: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    left = iter(pairs)
    while part := list(islice(left, PART)):
        yield part
