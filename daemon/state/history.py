"""The history of a search in Redis: every candidate issued and every outcome applied, read in small parts.

A long search has 100,000 candidates. Reading them at once would block the server, and parsing them the event loop, for
seconds. A daemon without a heartbeat for that long is considered dead.
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
from protocol.plans.candidate import OUTCOME, Candidate, Outcome
from protocol.plans.profile import ModelProfile
from protocol.queue.control import Command
from protocol.queue.keys import Keys, parse_unless_damaged
from protocol.queue.streams import PART, read_parents

T = TypeVar("T")
log = structlog.get_logger()


class Ask(Protocol):
    """Sends a request to the server: a RedisRetry, or `at_once`."""

    async def __call__(self, operation: Callable[[], Awaitable[T]], /) -> T:
        """Return the answer."""
        ...


@dataclass
class History:
    """The candidates issued and the outcomes applied, both in order."""

    ledger: dict[str, Candidate] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    selections: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """The parents chosen for each round."""
    damaged: int = 0
    """Number of entries that are missing or damaged, and were left out."""


@dataclass(frozen=True)
class Memory:
    """What a running daemon knows; with the spec, enough to restore a server that has lost its data."""

    history: History
    profile: ModelProfile | None
    command: Command | None = None
    """The last valid command."""


async def at_once(operation: Callable[[], Awaitable[T]], /) -> T:
    """Ask the server once, without the retries of a RedisRetry."""
    return await operation()


async def load_history(redis: Redis, keys: Keys, ask: Ask = at_once) -> History:
    """Read the history of a search, sending each request with `ask`. Raises StoreError if another version wrote it.

    Damaged entries are left out and counted: a flipped bit, or a value set by hand, must not end a search.
    """
    client: Any = redis  # its annotations cannot say that replies are str
    history = History()
    # The number of outcomes first: outcomes of candidates that are issued meanwhile are not read.
    applied = int(await ask(lambda: client.llen(keys.applied)))
    async for id_, text in entries(redis, keys.issued, keys.candidates, ask=ask):
        if candidate := read_candidate(keys, id_, text):
            history.ledger[id_] = candidate
        else:
            history.damaged += 1
    async for id_, text in entries(redis, keys.applied, keys.outcomes, stop=applied, ask=ask):
        outcome = read_outcome(keys, id_, text)
        if outcome is None or id_ not in history.ledger:
            history.damaged += 1
        else:
            history.outcomes[id_] = outcome
    state = await ask(lambda: client.hgetall(keys.state))
    history.counters = read_counters(state)
    history.damaged += len(state) - len(history.counters)
    for round_, text in (await ask(lambda: client.hgetall(keys.selections))).items():
        parents = read_parents(text)
        if parents is None or not round_.isdecimal():
            history.damaged += 1
        else:
            history.selections[int(round_)] = parents
    if history.damaged:
        log.error("history_damaged", entries=history.damaged)
    return history


def read_candidate(keys: Keys, id_: str, text: str) -> Candidate | None:
    """Return the ledger's candidate `id_`; None if it is damaged. Raises StoreError for another version's."""
    candidate = parse_unless_damaged(Candidate, text, f"{keys.candidates} {id_}")
    return candidate if candidate and candidate.id == id_ else None


def read_outcome(keys: Keys, id_: str, text: str) -> Outcome | None:
    """Return the outcome applied for `id_`; None if it is damaged. Raises StoreError for another version's."""
    return parse_unless_damaged(OUTCOME, text, f"{keys.outcomes} {id_}")


async def entries(
    redis: Redis, order: str, hash_: str, *, start: int = 0, stop: int | None = None, ask: Ask = at_once
) -> AsyncIterator[tuple[str, str]]:
    """Yield the ids of the list `order` from `start` to before `stop`, each with its text in the hash, or "".

    Reads PART of them at a time, so that other tasks can run.
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
    """Return the counters in the hash that are finite and not negative; others are damaged."""
    counters = {}
    for name, text in state.items():
        with contextlib.suppress(ValueError):
            counters[name] = float(text)
    return {name: count for name, count in counters.items() if 0 <= count < math.inf}


class RemoteHistory:
    """Keeps `ledger`, `population` and `counters` as of the last `read`, for another process."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._begin()

    async def read(self) -> bool:
        """Read what is new. Returns False if the search in Redis was replaced or emptied since.

        Damaged entries are left out, as at the next start of the daemon.
        """
        pipe = self._redis.pipeline(transaction=True)  # a consistent state, while the search continues
        pipe.llen(self._keys.issued).llen(self._keys.applied).hgetall(self._keys.state)
        issued, applied, state = await pipe.execute()
        if issued < self._issued or applied < self._applied:
            self._begin()
            await self.read()
            return False
        async for id_, text in entries(
            self._redis, self._keys.issued, self._keys.candidates, start=self._issued, stop=issued
        ):
            self._issued += 1
            if candidate := read_candidate(self._keys, id_, text):
                self.ledger[id_] = candidate
        async for id_, text in entries(
            self._redis, self._keys.applied, self._keys.outcomes, start=self._applied, stop=applied
        ):
            self._applied += 1
            outcome = read_outcome(self._keys, id_, text)
            if outcome and id_ in self.ledger and id_ not in self.population:
                self.population.insert(self.ledger[id_], outcome)
        self.counters.update(read_counters(state))
        return True

    def _begin(self) -> None:
        self._issued = self._applied = 0
        self.ledger: dict[str, Candidate] = {}
        self.population: Population = Population()
        self.counters: dict[str, float] = {}
