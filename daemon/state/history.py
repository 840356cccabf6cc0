"""The history of a search as Redis has it: every candidate issued and every outcome applied, read in small parts.

A long search has 100,000 candidates. Read in one reply they would keep the server, and parsed at once the event loop,
from everything else for seconds, and a daemon that shows no sign of life for that long is taken for dead.
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
        """The answer."""
        ...


@dataclass
class History:
    """What a search has done so far: every candidate issued, and the outcomes applied, both in order."""

    ledger: dict[str, Candidate] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    selections: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """The parents chosen for each round."""
    damaged: int = 0
    """Entries of the server that are missing or no text of ours, and are left out here."""


@dataclass(frozen=True)
class Memory:
    """What a running daemon knows of its search; with its spec it is all that a server that lost its data needs."""

    history: History
    profile: ModelProfile | None
    command: Command | None = None
    """The last command that the daemon understood."""


async def at_once(operation: Callable[[], Awaitable[T]], /) -> T:
    """Ask the server once, where a RedisRetry asks until it answers."""
    return await operation()


async def load_history(redis: Redis, keys: Keys, ask: Ask = at_once) -> History:
    """Read the history of a search; StoreError where another version wrote it.

    Entries that are damaged are left out and counted: a bit that flipped, or a value set by hand, ends no search. `ask`
    sends each request.
    """
    client: Any = redis  # its annotations cannot say that replies are str
    history = History()
    # Outcomes first: those of candidates that are issued meanwhile are not asked for.
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
    """The candidate that the ledger has under `id_`; None where it is damaged, StoreError for another version's."""
    candidate = parse_unless_damaged(Candidate, text, f"{keys.candidates} {id_}")
    return candidate if candidate and candidate.id == id_ else None


def read_outcome(keys: Keys, id_: str, text: str) -> Outcome | None:
    """The outcome that was applied for `id_`; None where it is damaged, StoreError for another version's."""
    return parse_unless_damaged(OUTCOME, text, f"{keys.outcomes} {id_}")


async def entries(
    redis: Redis, order: str, hash_: str, *, start: int = 0, stop: int | None = None, ask: Ask = at_once
) -> AsyncIterator[tuple[str, str]]:
    """The ids of the list `order`, from `start` to before `stop`, each with its text in the hash; "" where it has none.

    Reads PART of them at a time, and lets others run in between.
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
    """The counters in the hash, without those that are damaged: each is finite and not negative."""
    counters = {}
    for name, text in state.items():
        with contextlib.suppress(ValueError):
            counters[name] = float(text)
    return {name: count for name, count in counters.items() if 0 <= count < math.inf}


class RemoteHistory:
    """`ledger`, `population` and `counters` as they were at the last `read`."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._begin()

    async def read(self) -> bool:
        """Catch up; False when the search in Redis is another one than the last time, or was emptied.

        Damaged entries are left out, as the daemon does at its next start.
        """
        pipe = self._redis.pipeline(transaction=True)  # one moment, while the search goes on
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
