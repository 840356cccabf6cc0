"""The search's durable state in Redis: its spec, ledger, outcomes and who is in charge. A restart goes on from it."""

import asyncio
import json
import os
import socket
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog
from pydantic import BaseModel
from redis.asyncio import Redis

from daemon.workers import WorkerStatus, read_workers
from protocol.candidate import OUTCOME, Candidate, Outcome
from protocol.card import ModelCard
from protocol.card_board import CardBoard
from protocol.connection import Patience, check_server
from protocol.errors import SearchExistsError, StoreError
from protocol.keys import Keys
from protocol.spec import SearchSpec
from protocol.stored import read_stored
from protocol.streams import TAKEN_OVER, CandidateQueue, TakenOver, load_scripts

SIGN_OF_LIFE_SECONDS = 6.0
TICK_SECONDS = 2.0

log = structlog.get_logger()


@dataclass
class History:
    """What a search has done so far: every candidate issued, and the outcomes applied, both in order."""

    ledger: dict[str, Candidate] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    cursor: str = "0-0"
    counters: dict[str, float] = field(default_factory=dict)
    selections: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """The parents chosen for each round."""


@dataclass(frozen=True)
class Memory:
    """What a running daemon knows of its search; with its spec it is all that a server that lost its data needs."""

    history: History
    card: ModelCard | None


async def load_history(redis: Redis, keys: Keys) -> History:
    """Read the history of a search; StoreError where it is not this version's."""
    client: Any = redis  # its annotations cannot say that replies are str
    pipe = client.pipeline(transaction=True)  # one moment, while the search goes on
    pipe.lrange(keys.issued, 0, -1).hgetall(keys.candidates)
    pipe.lrange(keys.applied, 0, -1).hgetall(keys.outcomes).hgetall(keys.state)
    pipe.hgetall(keys.selections)
    issued, candidates, applied, outcomes, state, selections = await pipe.execute()
    try:
        return History(
            ledger={id_: Candidate.model_validate_json(candidates[id_]) for id_ in issued},
            outcomes={id_: OUTCOME.validate_json(outcomes[id_]) for id_ in applied},
            cursor=state.get("cursor", "0-0"),
            counters={name: float(value) for name, value in state.items() if name != "cursor"},
            selections={int(round_): tuple(json.loads(text)) for round_, text in selections.items()},
        )
    except (KeyError, ValueError) as error:
        raise StoreError(f"the search {keys.search!r} in Redis was written by another version: {error}") from error


class SearchStore:
    """A search that this process is in charge of."""

    def __init__(self, redis: Redis, keys: Keys, spec: SearchSpec) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._spec = spec
        self._me = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._patiently = Patience(redis, keys.state)
        self._scripts = load_scripts(redis)
        self._cards = CardBoard(redis, keys)
        self._epoch = 0
        self._unreadable: set[str] = set()

    async def take_charge(self, *, previous_is_dead: bool = False) -> CandidateQueue:
        """Become the daemon of this search. Raises SearchExistsError when another runs it or its spec differs.

        A sign of life left behind by a killed daemon is waited out (some seconds), unless `previous_is_dead`.
        """
        await self._patiently(lambda: check_server(self._redis))
        if previous_is_dead:
            await self._forget_workers()
        else:
            await self.wait_for_silence()
        await self._adopt_spec()
        self._epoch = int(await self._patiently(lambda: self._scripts["begin_epoch"]([self._keys.epoch])))
        await self._show_life()
        queue = CandidateQueue(self._redis, self._keys, epoch=self._epoch, fingerprint=self._spec.fingerprint)
        queue.issued = int(await self._patiently(lambda: self._redis.llen(self._keys.issued)))
        queue.applied = int(await self._patiently(lambda: self._redis.llen(self._keys.applied)))
        return queue

    async def history(self) -> History:
        """What the search has done so far."""
        return await self._patiently(lambda: load_history(self._redis, self._keys))

    async def repair(self, queue: CandidateQueue, history: History) -> int:
        """Put those candidates of `history` back that have no outcome and whose job or result is lost."""
        waiting = [id_ for id_ in history.ledger if id_ not in history.outcomes]
        requeued = await queue.requeue(waiting) if waiting else 0
        if requeued:
            log.warning("candidates_requeued", count=requeued)
        return requeued

    async def card(self) -> ModelCard | None:
        """The model card, once a worker has published the one of this spec."""
        return await self._cards.read(self._spec.fingerprint)

    async def workers(self) -> list[WorkerStatus]:
        """The workers that show a sign of life; of one that cannot be read, it is told once."""
        found = await self._patiently(lambda: read_workers(self._redis, self._keys))
        for consumer in found.unreadable - self._unreadable:
            log.warning("worker_unreadable", worker=consumer)
        self._unreadable |= found.unreadable
        return found.workers

    async def count(self, totals: dict[str, float]) -> None:
        """Keep the search's counters (tokens, seconds, …) over restarts. Totals, so that writing twice does no harm."""
        await self._patiently(lambda: self._redis.hset(self._keys.state, mapping=totals))

    async def stay_in_charge(self, queue: CandidateQueue, remembered: Callable[[], Memory]) -> None:
        """Show a sign of life until cancelled, and mend what the server has lost.

        Raises TakenOver when another daemon has taken over.
        """
        while True:
            await asyncio.sleep(TICK_SECONDS)
            await self._check(queue, remembered)
            await self._show_life()

    async def _check(self, queue: CandidateQueue, remembered: Callable[[], Memory]) -> None:
        """Bring back what the server has lost: data (it was flushed, or runs on an older copy), jobs and results."""
        confirmed = queue.issued, queue.applied  # before asking: what is confirmed later may not be in the answer
        epoch, spec, issued, applied, jobs, results = await self._patiently(self._lengths)
        if int(epoch or 0) < self._epoch or not spec or issued < confirmed[0] or applied < confirmed[1]:
            await self.restore(queue, remembered(), from_="the daemon's memory")
        elif jobs + results < issued - applied:
            await self.repair(queue, remembered().history)

    async def _lengths(self) -> Any:
        keys = self._keys
        pipe = self._redis.pipeline(transaction=True)  # made anew at each try, for it forgets its commands
        pipe.get(keys.epoch).exists(keys.spec).llen(keys.issued).llen(keys.applied).xlen(keys.jobs).xlen(keys.results)
        return await pipe.execute()

    async def restore(self, queue: CandidateQueue, memory: Memory, *, from_: str) -> None:
        """Bring back what the server lacks of `memory`, and say where it comes from."""
        history, keys = memory.history, self._keys
        selections = {str(round_): json.dumps(parents) for round_, parents in history.selections.items()}
        args = [
            *(self._epoch, self._spec.model_dump_json(), memory.card.model_dump_json() if memory.card else ""),
            *(len(history.ledger), len(history.outcomes), len(selections)),
            *_pairs(history.ledger),
            *_pairs(history.outcomes),
            *(part for pair in selections.items() for part in pair),
        ]
        names = [keys.epoch, keys.spec, keys.card, keys.candidates, keys.issued, keys.outcomes, keys.applied]
        names += [keys.selections, keys.state]
        answer = await self._patiently(lambda: self._scripts["restore"](names, args))
        if answer == TAKEN_OVER:
            raise TakenOver(f"another daemon has taken over the search {keys.search!r}")
        restored, queue.issued, queue.applied = answer
        log.error("redis_lost_data", restored=restored, from_=from_)
        queue.rewind()
        await self.repair(queue, history)

    async def step_down(self) -> None:
        """Withdraw the sign of life, so that a successor need not wait."""
        if await self._redis.get(self._keys.daemon) == self._me:
            await self._redis.delete(self._keys.daemon)

    async def _show_life(self) -> None:
        epoch = await self._patiently(lambda: self._redis.get(self._keys.epoch))
        if int(epoch or 0) > self._epoch:  # none, or a lower one: lost, and brought back by the next check
            raise TakenOver(f"another daemon has taken over the search {self._keys.search!r}")
        milliseconds = int(SIGN_OF_LIFE_SECONDS * 1000)
        await self._patiently(lambda: self._redis.set(self._keys.daemon, self._me, px=milliseconds))

    async def wait_for_silence(self) -> None:
        """Return when no daemon of this search shows signs of life; SearchExistsError when one goes on doing so."""
        owner, left = await self._owner()
        if not owner:
            return
        log.info("previous_daemon_waited_out", daemon=owner, seconds=SIGN_OF_LIFE_SECONDS)
        while owner:
            await asyncio.sleep(0.5)
            now_owner, now_left = await self._owner()
            if now_owner and (now_owner != owner or now_left > left):
                raise SearchExistsError(f"the search {self._keys.search!r} is already run by {now_owner}")
            owner, left = now_owner, now_left

    async def _forget_workers(self) -> None:
        """Withdraw the signs of life of workers that died with the previous process: their jobs are free sooner."""
        async for name in self._redis.scan_iter(match=self._keys.worker_prefix + "*"):
            await self._redis.delete(name)

    async def _owner(self) -> tuple[str | None, int]:
        owner = await self._patiently(lambda: self._redis.get(self._keys.daemon))
        left = await self._patiently(lambda: self._redis.pttl(self._keys.daemon))
        return owner, int(left)

    async def _adopt_spec(self) -> None:
        mine = self._spec.model_dump_json()
        if await self._patiently(lambda: self._redis.set(self._keys.spec, mine, nx=True)):
            return
        stored = await self._patiently(lambda: self._redis.get(self._keys.spec))
        theirs = read_stored(SearchSpec, stored, self._keys.spec)
        if theirs == self._spec:
            return
        # Where no candidate was proposed under it, it was a first try with a model or a text that could not be had, or
        # that were found not to go with the settings.
        keys = [self._keys.spec, self._keys.state, self._keys.issued, self._keys.epoch]
        if not await self._patiently(lambda: self._scripts["replace_spec"](keys, [stored, mine])):
            raise SearchExistsError(
                f"there is a search {self._keys.search!r} with other settings ({difference(theirs, self._spec)}); "
                "give this one another search.name"
            )


def _pairs(values: Mapping[str, BaseModel]) -> list[str]:
    return [part for id_, value in values.items() for part in (id_, value.model_dump_json())]


def difference(old: SearchSpec, new: SearchSpec) -> str:
    """The first setting in which two specs differ, for a sentence."""
    changes = [
        f"{name}: {getattr(old, name)!s} there, {getattr(new, name)!s} here"
        for name in SearchSpec.model_fields
        if getattr(old, name) != getattr(new, name)
    ]
    return changes[0]
