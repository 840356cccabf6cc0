"""The workers' side of the streams: claim a job, renew its lease, commit its outcome, or hand it back.

A job belongs to the worker that claimed it as long as that worker sends heartbeats. Another worker takes the job over
only when two clocks agree that the length of a lease has passed. By the server's clock, the lease and the owner's
heartbeat have expired. By its own clock, the other worker has observed the job for the length of a lease, without
a renewal and without an outage. The server's clock alone is not enough, because it may jump and because it keeps
running while the server is down. After MOST_DEATHS workers or evaluation processes have died on a job, the job is given
up: it counts as failed and is listed in the dead-letter stream.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import structlog
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from protocol.errors import StoreError
from protocol.plans.candidate import Candidate, Failed, Outcome
from protocol.queue.connection import BLOCK_MILLISECONDS, RedisRetry, is_missing_group
from protocol.queue.keys import GROUP, Keys
from protocol.queue.streams import entries_of, load_scripts

LEAST_LEASE_SECONDS = 0.5
MOST_SECONDS = 1e8
"""Maximum of a time limit or lease (three years). A longer time is a typing error, and much longer timers overflow."""
MOST_DEATHS = 3
"""Number of unexplained deaths of workers or evaluation processes on a job after which the job is given up."""
MOST_DEAD = 1000
"""Maximum number of entries in the dead-letter stream."""
RELEASED = "released"
"""The consumer that owns the jobs that were handed back. It is no worker, so any worker may take them at once."""
RELEASED_IDLE_MS = 7 * 24 * 3600 * 1000
"""The idle time that a job gets when it is handed back. It is longer than a usual lease."""
PAGE_SIZE = 100

Entry = tuple[str, dict[str, str]]
T = TypeVar("T")
log = structlog.get_logger()


@dataclass(frozen=True)
class Job:
    """A claimed candidate. `message` is the id of its entry in the job stream, `fingerprint` identifies its spec."""

    message: str
    candidate: Candidate
    fingerprint: str


@dataclass(frozen=True)
class _ObservedJob:
    """A job of the worker `owner`, as this worker saw it first: at `since` on its own clock, idle for `idle_ms`."""

    owner: str
    idle_ms: int
    since: float


class JobQueue:
    """Claims one job at a time, keeps its lease alive, commits its outcome."""

    def __init__(self, redis: Redis, keys: Keys, consumer: str, *, lease_seconds: float) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._consumer = consumer
        self._lease_ms = int(lease_seconds * 1000)
        self._scripts = load_scripts(redis)
        self._retry = RedisRetry(redis, keys.jobs)
        self._last_beat = self._last_sweep = _now()
        self._observed: dict[str, _ObservedJob] = {}
        """For each pending job, by message: how this worker saw it first after its last claim or renewal."""
        self._outages_seen = 0
        self._server = ""
        self._may_own_more = True
        self._claim_was_undisturbed = False
        self._has_had_group = False

    async def claim(self) -> Job | None:
        """Return the next job, or None if there is none for about a second.

        Jobs are tried in this order: a job that is already ours but not running (because the reply to a read was lost),
        a new job, a job that was handed back or whose owner is dead.
        """
        outages = self._retry.outages
        try:
            own = await self._read("0", block=None) if self._may_own_more else None
            self._may_own_more = True
            entry = own or await self._read(">", block=BLOCK_MILLISECONDS) or await self._take_over()
        except ResponseError as error:
            if not is_missing_group(error):
                raise
            await self._create_group()
            return None
        self._has_had_group = True
        self._claim_was_undisturbed = own is None and outages == self._retry.outages
        if entry is None:
            self._may_own_more = not self._claim_was_undisturbed
        return await self._decode(*entry) if entry else None

    async def beat(self, job: Job | None, status: str) -> bool:
        """Send a heartbeat with `status`, and renew the lease on `job`. Returns False if the lease is lost."""
        now = _now()
        if (now - self._last_beat) * 1000 > self._lease_ms:
            self._observed.clear()
        self._last_beat = now
        keys = [self._keys.jobs, self._keys.worker(self._consumer)]
        args = [GROUP, self._consumer, job.message if job else "", self._lease_ms, status, RELEASED, RELEASED_IDLE_MS]
        try:
            held = await self._timed_retry(lambda: self._scripts["beat"](keys, args))
        except ResponseError as error:
            if not is_missing_group(error):
                raise
            return False
        return bool(held == 1)

    async def commit(self, job: Job, outcome: Outcome) -> bool:
        """Commit the outcome of `job`. Returns False if another worker was first. Waits while the server is down."""
        return await self._commit(job.message, job.candidate.id, outcome)

    async def count_death(self, job: Job, death: str) -> int:
        """Count the death of an evaluation process on `job`, identified by `death`. Returns the deaths so far."""
        keys = [self._keys.jobs, self._keys.deaths]
        args = [GROUP, self._consumer, job.message, job.candidate.id, death]
        try:
            return int(await self._retry(lambda: self._scripts["count_death"](keys, args)))
        except ResponseError as error:
            if not is_missing_group(error):
                raise
            return 0

    async def give_up(self, job: Job, detail: str) -> bool:
        """Commit `job` as failed because processes die on it, and list it in the dead-letter stream."""
        log.error("job_given_up", candidate=job.candidate.id, detail=detail)
        outcome = Failed(reason="crashed", detail=detail)
        return await self._commit(job.message, job.candidate.id, outcome, "poison", self._consumer, detail)

    async def release(self) -> None:
        """Hand back all our jobs and delete our status. Does not retry, so that shutdown waits for no server."""
        keys = [self._keys.jobs, self._keys.worker(self._consumer)]
        try:
            await self._scripts["release"](keys, [GROUP, self._consumer, RELEASED, RELEASED_IDLE_MS])
        except ResponseError as error:
            if not is_missing_group(error):
                raise

    async def _commit(self, message: str, candidate_id: str, outcome: Outcome, *dead: str) -> bool:
        keys = [self._keys.jobs, self._keys.results, self._keys.done, self._keys.outcomes]
        keys += [self._keys.deaths, self._keys.dead]
        args = [GROUP, self._consumer, message, candidate_id, outcome.model_dump_json()]
        args += [*dead, str(MOST_DEAD)] if dead else []
        first = await self._retry(lambda: self._scripts["commit"](keys, args))
        self._may_own_more = not self._claim_was_undisturbed  # a reply that was lost may have assigned us another job
        return bool(first == 1)

    async def _create_group(self) -> None:
        if self._has_had_group:
            log.warning("group_lost", stream=self._keys.jobs)
        else:
            log.info("group_created", stream=self._keys.jobs)
        try:
            await self._retry(lambda: self._redis.xgroup_create(self._keys.jobs, GROUP, id="0", mkstream=True))
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise StoreError(f"the key {self._keys.jobs} is not a stream of jobs: {error}") from error

    async def _read(self, position: str, *, block: int | None) -> Entry | None:
        streams = {self._keys.jobs: position}
        reply = await self._timed_retry(
            lambda: self._redis.xreadgroup(GROUP, self._consumer, streams, count=1, block=block), block or 0
        )
        entries = entries_of(reply)
        return entries[0] if entries else None

    async def _take_over(self) -> Entry | None:
        server_ms = await self._check_for_outage()
        await self._sweep()
        for message in await self._abandoned():
            if entry := await self._take_over_one(message, server_ms):
                return entry
        return None

    async def _abandoned(self) -> list[str]:
        """Return the jobs handed back, and those not renewed for the length of a lease by this worker's own clock."""
        asked = _now()
        rows = await self._pending()
        answered = _now()
        if self._retry.outages != self._outages_seen:
            self._observed.clear()
        observed, abandoned = {}, []
        for row in rows:
            message, owner, idle_ms = row["message_id"], row["consumer"], row["time_since_delivered"]
            seen = self._observed.get(message)
            if seen is None or seen.owner != owner or not self._is_unchanged(seen, idle_ms, asked):
                seen = _ObservedJob(owner, idle_ms, answered)
            observed[message] = seen
            if owner == RELEASED or (asked - seen.since) * 1000 >= self._lease_ms:
                abandoned.append(message)
        self._observed = observed
        return abandoned

    def _is_unchanged(self, seen: _ObservedJob, idle_ms: int, now: float) -> bool:
        """Whether a job's idle time shows that it was not renewed since it was first seen.

        A shorter idle time shows a renewal. A much longer idle time shows a jump of the server's clock, which may hide
        a renewal. Clocks and networks are inexact, so a difference from −1/6 to +1/3 of a lease is tolerated. A living
        worker renews three times within the length of a lease.
        """
        expected = seen.idle_ms + (now - seen.since) * 1000
        return expected - self._lease_ms / 6 <= idle_ms <= expected + self._lease_ms / 3

    async def _pending(self) -> list[Any]:
        rows: list[Any] = []
        start = "-"
        while True:
            page = await self._timed_retry(
                partial(self._redis.xpending_range, self._keys.jobs, GROUP, start, "+", PAGE_SIZE)
            )
            rows += page
            if len(page) < PAGE_SIZE:
                return rows
            start = f"({page[-1]['message_id']}"

    async def _take_over_one(self, message: str, server_ms: int) -> Entry | None:
        keys = [self._keys.jobs, self._keys.deaths]
        args = [GROUP, self._consumer, message, self._lease_ms, RELEASED, server_ms, self._keys.worker_prefix]
        taken = await self._retry(lambda: self._scripts["take_over"](keys, args))
        if not taken:
            return None
        (message, flat), deaths, owner = taken
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        log.warning("job_taken_over", message=message, owner=owner, deaths=deaths)
        if deaths < MOST_DEATHS:
            return message, fields
        detail = f"its workers or their evaluation processes died {deaths} times"
        log.error("job_given_up", candidate=fields["id"], detail=detail)
        await self._commit(message, fields["id"], Failed(reason="crashed", detail=detail), "poison", owner, detail)
        return None

    async def _sweep(self) -> None:
        """Delete the consumers of workers that have ended, at most once in the length of a lease."""
        if (_now() - self._last_sweep) * 1000 >= self._lease_ms:
            self._last_sweep = _now()
            args = [GROUP, self._keys.worker_prefix, self._lease_ms]
            await self._retry(lambda: self._scripts["sweep"]([self._keys.jobs], args))

    async def _check_for_outage(self) -> int:
        """Forget the observed jobs if the connection was lost or the server restarted since the last call.

        Returns the server's time in milliseconds.
        """
        info = await self._timed_retry(lambda: self._redis.info("server"))
        server = str(info.get("run_id"))
        if self._retry.outages != self._outages_seen or server != self._server:
            self._observed.clear()
        self._outages_seen, self._server = self._retry.outages, server
        return int(info["server_time_usec"]) // 1000

    async def _timed_retry(self, operation: Callable[[], Awaitable[T]], waits_ms: float = 0.0) -> T:
        """Return the reply. If it takes half a lease longer than `waits_ms`, treat the frozen server as an outage."""
        began = _now()
        reply = await self._retry(operation)
        if (_now() - began) * 1000 > waits_ms + self._lease_ms / 2:
            self._observed.clear()
        return reply

    async def _decode(self, message: str, fields: dict[str, str]) -> Job | None:
        try:
            candidate = Candidate.model_validate_json(fields["candidate"])
            return Job(message, candidate, fields["fingerprint"])
        except (KeyError, ValueError) as error:
            detail = " ".join(str(error).split())[:200]
        log.error("job_unreadable", message=message, error=detail)
        if "id" in fields:  # its search waits for an outcome
            failed = Failed(reason="invalid", detail="the worker cannot read it: another version wrote it")
            await self._commit(message, fields["id"], failed, "unreadable", self._consumer, detail)
        elif fields:
            args = [GROUP, self._consumer, message, detail, MOST_DEAD]
            await self._retry(lambda: self._scripts["discard"]([self._keys.jobs, self._keys.dead], args))
        else:  # the entry was deleted or trimmed; the daemon enqueues the candidate again
            await self._retry(lambda: self._redis.xack(self._keys.jobs, GROUP, message))
        return None


def _now() -> float:
    """Return the time in seconds, by a clock that also runs while the machine is suspended, if there is one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
