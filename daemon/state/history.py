"""The history of a search in Redis: every candidate issued and every outcome applied, read in small parts.

A long search has 100,000 candidates. Reading them at once would block the server for seconds, and parsing them would
block the event loop. A daemon that sends no heartbeat for that long is considered dead.
"""

import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import structlog
from redis.asyncio import Redis

from agents.population.population import Population
from protocol.plans.candidate import OUTCOME, Candidate, KeptSelection
from protocol.plans.profile import ModelProfile
from protocol.queue.control import Command
from protocol.queue.keys import Keys, parse_unless_damaged
from protocol.queue.streams import PART, read_selection

T = TypeVar("T")
log = structlog.get_logger()


class Ask(Protocol):
    """A function that sends a request to the server: a RedisRetry, or `at_once`."""

    async def __call__(self, operation: Callable[[], Awaitable[T]], /) -> T:
        """Return the server's answer to `operation`."""
        ...


@dataclass
class History:
    """The candidates issued and the outcomes applied to the population, both in order."""

    ledger: dict[str, Candidate] = field(default_factory=dict)
    population: Population = field(default_factory=Population)
    counters: dict[str, float] = field(default_factory=dict)
    selections: dict[int, KeptSelection] = field(default_factory=dict)
    """What the Selector chose, by round."""
    damaged: int = 0
    """Number of entries that are missing or damaged, and were left out."""


@dataclass(frozen=True)
class Memory:
    """What a running daemon knows. Together with the spec, it is enough to restore a server that has lost its data."""

    history: History
    profile: ModelProfile | None
    command: Command | None = None
    """The last valid command."""


async def at_once(operation: Callable[[], Awaitable[T]], /) -> T:
    """Ask the server once, without the retries of a RedisRetry."""
    return await operation()


class HistoryReader:
    """Reads the `history` of a search from Redis: all of it at first, then what is new.

    Each request is sent with `ask`. Damaged entries are left out and counted, because a flipped bit, or a value set by
    hand, must not end a search.
    """

    def __init__(self, redis: Redis, keys: Keys, ask: Ask = at_once) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys, self._ask = keys, ask
        self._begin()

    async def read(self) -> bool:
        """Read new candidates and outcomes, and the counters, but no selections.

        Returns False if the search in Redis was replaced or emptied since the last read. Raises StoreError if another
        version wrote it.
        """
        keys, history = self._keys, self.history
        issued, applied, state = await self._ask(self._lengths)
        if issued < self._issued or applied < self._applied:
            self._begin()
            await self.read()
            return False
        async for id_, text in entries(
            self._redis, keys.issued, keys.candidates, start=self._issued, stop=issued, ask=self._ask
        ):
            self._issued += 1
            if candidate := read_candidate(keys, id_, text):
                history.ledger[id_] = candidate
            else:
                self._damaged += 1
        async for id_, text in entries(
            self._redis, keys.applied, keys.outcomes, start=self._applied, stop=applied, ask=self._ask
        ):
            self._applied += 1
            outcome = parse_unless_damaged(OUTCOME, text, f"{keys.outcomes} {id_}")
            if outcome and id_ in history.ledger:
                history.population.insert(history.ledger[id_], outcome)
            else:
                self._damaged += 1
        counters = read_counters(state)
        history.counters.update(counters)
        history.damaged = self._damaged + len(state) - len(counters)
        return True

    async def _lengths(self) -> Any:
        """Return the numbers of candidates and outcomes, and the counters, all of the same moment."""
        pipe = self._redis.pipeline(transaction=True)  # new for each try, because execute() clears it
        pipe.llen(self._keys.issued).llen(self._keys.applied).hgetall(self._keys.state)
        return await pipe.execute()

    def _begin(self) -> None:
        self._issued = self._applied = self._damaged = 0
        self.history = History()


async def load_history(redis: Redis, keys: Keys, ask: Ask = at_once) -> History:
    """Return the whole history of a search, with its selections. Raises StoreError if another version wrote it."""
    client: Any = redis
    reader = HistoryReader(redis, keys, ask)
    await reader.read()
    history = reader.history
    for round_, text in (await ask(lambda: client.hgetall(keys.selections))).items():
        selection = read_selection(text)
        if selection is None or not round_.isdecimal():
            history.damaged += 1
        else:
            history.selections[int(round_)] = selection
    if history.damaged:
        log.error("history_damaged", entries=history.damaged)
    return history


def read_candidate(keys: Keys, id_: str, text: str) -> Candidate | None:
    """Return the candidate `id_` from its text in the ledger; None if it is damaged.

    Raises StoreError if another version wrote it.
    """
    candidate = parse_unless_damaged(Candidate, text, f"{keys.candidates} {id_}")
    return candidate if candidate and candidate.id == id_ else None


async def entries(
    redis: Redis, order: str, hash_: str, *, start: int = 0, stop: int | None = None, ask: Ask = at_once
) -> AsyncIterator[tuple[str, str]]:
    """Yield the ids of the list `order` from index `start` to before index `stop`, each with its text in the hash.

    A missing text is "". PART entries are read at a time, so that other tasks can run.
    """
    client: Any = redis
    while stop is None or start < stop:
        last = start + PART - 1 if stop is None else min(start + PART, stop) - 1
        ids = await ask(partial(client.lrange, order, start, last))
        if not ids:
            return
        for id_, text in zip(ids, await ask(partial(client.hmget, hash_, ids)), strict=True):
            yield id_, text or ""
        start += len(ids)


def read_counters(state: Mapping[str, str]) -> dict[str, float]:
    """Return the valid counters in the hash: those that are finite and not negative."""
    counters = {}
    for name, text in state.items():
        with contextlib.suppress(ValueError):
            counters[name] = float(text)
    return {name: count for name, count in counters.items() if 0 <= count < math.inf}
