"""The durable state of a search in Redis: spec, ledger, outcomes, and which daemon is in charge."""

import asyncio
import os
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any

import structlog
from redis.asyncio import Redis

from daemon.state.history import History, Memory, entries, load_history, read_candidate
from daemon.state.restoring import Restorer
from protocol.errors import SearchExistsError
from protocol.plans.candidate import candidate_id
from protocol.plans.profile import ModelProfile
from protocol.plans.spec import SearchSpec
from protocol.queue.connection import RedisRetry, check_server
from protocol.queue.keys import Keys, parse_unless_damaged
from protocol.queue.profile_board import ProfileBoard
from protocol.queue.streams import CandidateQueue, TakenOver, load_scripts
from protocol.queue.worker_status import WorkerStatus, read_workers

SIGN_OF_LIFE_SECONDS = 6.0
TICK_SECONDS = 2.0

log = structlog.get_logger()


class SearchStore:
    """A search that this process is in charge of."""

    def __init__(self, redis: Redis, keys: Keys, spec: SearchSpec) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._spec = spec
        self._me = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._retry = RedisRetry(redis, keys.state)
        self._scripts = load_scripts(redis)
        self._profiles = ProfileBoard(redis, keys)
        self._spec_text = spec.model_dump_json()
        self._restorer = Restorer(redis, keys)
        self._epoch = 0
        self._unreadable: set[str] = set()

    async def take_charge(self, *, previous_is_dead: bool = False) -> CandidateQueue:
        """Become the daemon of this search. Raises SearchExistsError if another daemon runs it, or its spec differs.

        Waits some seconds for a killed daemon's heartbeat to expire, unless `previous_is_dead`.
        """
        await self._retry(lambda: check_server(self._redis))
        if previous_is_dead:
            await self._retry(self._forget_workers)
        else:
            await self.wait_for_silence()
        await self._adopt_spec()
        self._epoch = int(await self._retry(lambda: self._scripts["begin_epoch"]([self._keys.epoch])))
        await self._show_life()
        await self._restorer.clear()
        queue = CandidateQueue(self._redis, self._keys, epoch=self._epoch, fingerprint=self._spec.fingerprint)
        queue.issued = int(await self._retry(lambda: self._redis.llen(self._keys.issued)))
        queue.applied = int(await self._retry(lambda: self._redis.llen(self._keys.applied)))
        return queue

    async def history(self) -> History:
        """Return the history of the search."""
        return await load_history(self._redis, self._keys, self._retry)

    async def repair(self, queue: CandidateQueue, history: History) -> int:
        """Requeue candidates of `history` without an outcome whose job or result was lost. Returns their number."""
        waiting = [id_ for id_ in history.ledger if id_ not in history.population]
        requeued = await queue.requeue(waiting) if waiting else 0
        if requeued:
            log.warning("candidates_requeued", count=requeued)
        return requeued

    async def profile(self) -> ModelProfile | None:
        """Return the model profile, once a worker has published it for this spec."""
        return await self._profiles.read(self._spec.fingerprint)

    async def workers(self) -> list[WorkerStatus]:
        """Return the workers with a heartbeat. Log once each worker whose status cannot be read."""
        found = await self._retry(lambda: read_workers(self._redis, self._keys))
        for consumer in found.unreadable - self._unreadable:
            log.warning("worker_unreadable", worker=consumer)
        self._unreadable |= found.unreadable
        return found.workers

    async def count(self, totals: dict[str, float]) -> None:
        """Save the search's counters (tokens, seconds, …) as totals, so that writing twice does no harm."""
        await self._retry(lambda: self._redis.hset(self._keys.state, mapping=totals))

    async def replace_counters(self, totals: dict[str, float]) -> None:
        """Replace all counters, including damaged ones, by `totals`."""

        async def replace_all() -> None:
            pipe = self._redis.pipeline(transaction=True)
            pipe.delete(self._keys.state)
            if totals:
                pipe.hset(self._keys.state, mapping=totals)
            await pipe.execute()

        await self._retry(replace_all)

    async def show_life(self) -> None:
        """Renew the heartbeat until cancelled. Raises TakenOver if another daemon has taken over."""
        while True:
            await self._show_life()
            await asyncio.sleep(TICK_SECONDS)

    async def stay_in_charge(self, queue: CandidateQueue, remembered: Callable[[], Memory]) -> None:
        """Renew the heartbeat until cancelled. Meanwhile, restore lost data in the server, which may take a long time.

        Raises TakenOver if another daemon has taken over.
        """
        life = asyncio.ensure_future(self.show_life())
        try:
            while True:
                await asyncio.wait({life}, timeout=TICK_SECONDS)
                if life.done():
                    life.result()
                await self._check(queue, remembered)
        finally:
            life.cancel()

    async def _check(self, queue: CandidateQueue, remembered: Callable[[], Memory]) -> None:
        """Restore what the server has lost: the history (it was flushed, or loaded an older copy), jobs or results."""
        confirmed = queue.issued, queue.applied  # read before asking, because the answer may lack later confirmations
        epoch, spec, issued, applied, jobs, results = await self._retry(self._lengths)
        is_ours = _epoch(epoch) >= self._epoch and spec == self._spec_text
        if not is_ours or issued < confirmed[0] or applied < confirmed[1]:
            await self.restore(queue, remembered, from_="the daemon's memory")
        elif jobs + results < issued - applied:
            await self.repair(queue, remembered().history)

    async def _lengths(self) -> Any:
        keys = self._keys
        pipe = self._redis.pipeline(transaction=True)  # new for each try, because execute() clears it
        pipe.get(keys.epoch).get(keys.spec).llen(keys.issued).llen(keys.applied).xlen(keys.jobs).xlen(keys.results)
        return await pipe.execute()

    async def restore(self, queue: CandidateQueue, remembered: Callable[[], Memory], *, from_: str) -> None:
        """Replace the server's history by the `remembered` history, and log its source `from_`."""
        confirmed = queue.issued, queue.applied

        def now() -> Memory:
            nonlocal confirmed
            confirmed = queue.issued, queue.applied
            return remembered()

        restored, issued, applied = await self._restorer.restore(self._epoch, self._spec_text, now)
        # Add the entries confirmed since `now()`. If the server wrote one of them before restoring began, and only its
        # answer was late, the next check finds that the server has fewer entries, and restores again.
        queue.issued += issued - confirmed[0]
        queue.applied += applied - confirmed[1]
        log.error("redis_lost_data", restored=restored, from_=from_)
        queue.rewind()
        await self.repair(queue, remembered().history)

    async def step_down(self) -> None:
        """Remove the heartbeat, so that a successor need not wait."""
        if await self._redis.get(self._keys.daemon) == self._me:
            await self._redis.delete(self._keys.daemon)

    async def _show_life(self) -> None:
        epoch = await self._retry(lambda: self._redis.get(self._keys.epoch))
        if _epoch(epoch) > self._epoch:  # a missing or lower epoch means lost data, which the next check restores
            raise TakenOver(f"another daemon has taken over the search {self._keys.search!r}")
        milliseconds = int(SIGN_OF_LIFE_SECONDS * 1000)
        await self._retry(lambda: self._redis.set(self._keys.daemon, self._me, px=milliseconds))

    async def wait_for_silence(self) -> None:
        """Wait until the heartbeat of an earlier daemon expires. Raises SearchExistsError if a daemon renews it.

        A heartbeat that was not renewed for SIGN_OF_LIFE_SECONDS is ignored, even if its key expires later or never.
        """
        owner, left = await self._owner()
        if not owner:
            return
        log.info("previous_daemon_waited_out", daemon=owner, seconds=SIGN_OF_LIFE_SECONDS)
        end = time.monotonic() + SIGN_OF_LIFE_SECONDS + TICK_SECONDS
        while owner and time.monotonic() < end:
            await asyncio.sleep(0.5)
            now_owner, now_left = await self._owner()
            if now_owner and (now_owner != owner or now_left > left):
                raise SearchExistsError(f"the search {self._keys.search!r} is already run by {now_owner}")
            owner, left = now_owner, now_left

    async def _forget_workers(self) -> None:
        """Remove the heartbeats of workers that died with the previous process, so that their jobs are free sooner."""
        async for name in self._redis.scan_iter(match=self._keys.worker_prefix + "*"):
            await self._redis.delete(name)

    async def _owner(self) -> tuple[str | None, int]:
        owner = await self._retry(lambda: self._redis.get(self._keys.daemon))
        left = await self._retry(lambda: self._redis.pttl(self._keys.daemon))
        return owner, int(left)

    async def _adopt_spec(self) -> None:
        mine = self._spec_text
        if await self._retry(lambda: self._redis.set(self._keys.spec, mine, nx=True)):
            return
        stored = await self._retry(lambda: self._redis.get(self._keys.spec))
        theirs = parse_unless_damaged(SearchSpec, stored, self._keys.spec)
        if theirs is None:
            await self._replace_damaged_spec()
            return
        if theirs == self._spec:
            self._spec_text = stored  # another version may format the same spec differently
            return
        # If no candidate was issued, the stored spec comes from a first start that failed, such as one without a model.
        keys = [self._keys.spec, self._keys.state, self._keys.issued, self._keys.epoch]
        if not await self._retry(lambda: self._scripts["replace_spec"](keys, [stored, mine])):
            raise SearchExistsError(
                f"there is a search {self._keys.search!r} with other settings ({difference(theirs, self._spec)}); "
                "give this one another search.name"
            )

    async def _replace_damaged_spec(self) -> None:
        """Replace a damaged spec by ours if the id of an issued candidate, which depends on the spec, matches ours.

        Raises SearchExistsError if the id does not match, or if candidates were issued but none can be read.
        """
        async for id_, text in entries(self._redis, self._keys.issued, self._keys.candidates, ask=self._retry):
            candidate = read_candidate(self._keys, id_, text)
            if candidate is None:
                continue
            if id_ == candidate_id(candidate.plan, self._spec.fingerprint, candidate.text):
                break
            raise self._damaged_spec("its candidates belong to other settings")
        else:
            if await self._retry(lambda: self._redis.exists(self._keys.issued)):
                raise self._damaged_spec("none of its candidates can be read to check the settings")
        log.error("spec_damaged", key=self._keys.spec)
        await self._retry(lambda: self._redis.set(self._keys.spec, self._spec_text))

    def _damaged_spec(self, why: str) -> SearchExistsError:
        return SearchExistsError(
            f"{self._keys.spec} in Redis is damaged, and {why}; give this search another search.name"
        )


def _epoch(text: str | None) -> int:
    """Return the epoch from its text in Redis; 0 if it is missing or invalid (as in lua/fence.lua)."""
    return int(text) if text and len(text) <= 16 and text.isascii() and text.isdecimal() else 0


def difference(old: SearchSpec, new: SearchSpec) -> str:
    """Return the first setting in which two specs differ, for a message."""
    changes = [
        f"{name}: {getattr(old, name)!s} there, {getattr(new, name)!s} here"
        for name in SearchSpec.model_fields
        if getattr(old, name) != getattr(new, name)
    ]
    return changes[0]
