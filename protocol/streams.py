"""The job and result streams: enqueue, claim, beat, commit, release, apply. The only file that says XADD.

Delivery is at least once and effects are once: every step that changes something is one Lua script (protocol/lua) that
may be repeated without harm. A job belongs to the worker that claimed it while that worker beats; it is taken over
only when its lease has run out, its owner shows no sign of life, and the claimer itself has seen no outage for one
lease (idle time goes on counting while a server is down, so after an outage every owner looks dead).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from protocol.candidate import OUTCOME, Candidate, Failed, Measured, Result
from protocol.connection import BLOCK_MILLISECONDS, Patience, is_missing_group
from protocol.errors import SelfPrunerError, StoreError
from protocol.keys import GROUP, Keys

log = structlog.get_logger()


class TakenOver(SelfPrunerError):  # noqa: N818
    """Another daemon is in charge of this search now; this one must not write any more."""


@dataclass(frozen=True)
class Job:
    """A claimed candidate: `message` is its entry in the job stream, `fingerprint` the spec it was issued under."""

    message: str
    candidate: Candidate
    fingerprint: str


def load_scripts(redis: Redis) -> dict[str, Any]:
    """The Lua scripts by name, registered on `redis` (loaded again where the server has forgotten them)."""
    folder = files("protocol") / "lua"
    return {
        script.name.removesuffix(".lua"): redis.register_script(script.read_text())
        for script in folder.iterdir()
        if script.name.endswith(".lua")
    }


class CandidateQueue:
    """The daemon's end: puts candidates on the job stream and applies outcomes, fenced by its epoch."""

    def __init__(self, redis: Redis, keys: Keys, *, epoch: int, fingerprint: str) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._epoch = epoch
        self._fingerprint = fingerprint
        self._scripts = load_scripts(redis)
        self._patiently = Patience(keys.jobs)

    async def enqueue(self, candidate: Candidate) -> bool:
        """Put `candidate` on the stream; False when its id is there (or was measured) already."""
        keys = [self._keys.epoch, self._keys.candidates, self._keys.issued, self._keys.jobs]
        payload = candidate.model_dump_json()
        args = [self._epoch, candidate.id, payload, self._fingerprint]
        return self._fenced(await self._patiently(lambda: self._scripts["enqueue"](keys, args))) == 1

    async def requeue(self, candidate_id: str) -> bool:
        """Put a candidate of the ledger back whose job was lost; False when its outcome is there."""
        keys = [self._keys.epoch, self._keys.candidates, self._keys.done, self._keys.jobs]
        args = [self._epoch, candidate_id, self._fingerprint]
        return self._fenced(await self._patiently(lambda: self._scripts["requeue"](keys, args))) == 1

    async def queued(self) -> set[str]:
        """Ids now on the job stream, claimed or not."""
        entries = await self._patiently(lambda: self._redis.xrange(self._keys.jobs))
        return {fields["id"] for _, fields in entries if "id" in fields}

    async def results(self, cursor: str) -> list[Result]:
        """Outcomes behind `cursor`, waiting about a second for the first; an unreadable one has failed."""
        streams = {self._keys.results: cursor}
        reply = await self._patiently(lambda: self._redis.xread(streams, count=100, block=BLOCK_MILLISECONDS))
        results = []
        for message, fields in _entries(reply):
            if "id" in fields:
                results.append(Result(message, fields["id"], _outcome(fields.get("outcome", ""))))
            else:
                log.error("result_unreadable", entry=message)
                await self._patiently(partial(self._redis.xdel, self._keys.results, message))
        return results

    async def apply(self, result: Result) -> bool:
        """Make `result` part of the search's state; False when its id has an outcome already."""
        keys = [self._keys.epoch, self._keys.outcomes, self._keys.applied, self._keys.state, self._keys.results]
        args = [self._epoch, result.id, result.outcome.model_dump_json(), result.cursor]
        return self._fenced(await self._patiently(lambda: self._scripts["apply"](keys, args))) == 1

    def _fenced(self, answer: int) -> int:
        if answer == -1:
            raise TakenOver(f"another daemon has taken over the search {self._keys.search!r}")
        return answer


class JobQueue:
    """A worker's end: claims one job at a time, keeps its lease alive, commits its outcome."""

    def __init__(self, redis: Redis, keys: Keys, consumer: str, *, lease_seconds: float) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._consumer = consumer
        self._lease_ms = int(lease_seconds * 1000)
        self._scripts = load_scripts(redis)
        self._patiently = Patience(keys.jobs)
        self._calm_since = time.monotonic()
        self._outages_seen = 0
        self._server = ""
        self._last_beat = time.monotonic()

    async def claim(self) -> Job | None:
        """The next job, or None after about a second without one.

        First whatever is already ours but not running (a read whose reply was lost), then a new one, then one whose
        owner is dead. Nothing is taken over within one lease of a connection loss or of a gap in our own beats.
        """
        try:
            own = await self._read("0", block=None)
            entry = own or await self._read(">", block=BLOCK_MILLISECONDS) or await self._take_over()
        except ResponseError as error:
            if not is_missing_group(error):
                raise
            await self._create_group()
            return None
        return await self._decode(*entry) if entry else None

    async def beat(self, job: Job | None, status: str) -> bool:
        """Show a sign of life with `status`, and renew the lease on `job`; False when the lease is lost."""
        now = time.monotonic()
        if (now - self._last_beat) * 1000 > self._lease_ms:
            self._calm_since = now
        self._last_beat = now
        keys = [self._keys.jobs, self._keys.worker(self._consumer)]
        args = [GROUP, self._consumer, job.message if job else "", self._lease_ms, status]
        try:
            held = await self._patiently(lambda: self._scripts["beat"](keys, args))
        except ResponseError as error:
            if not is_missing_group(error):
                raise
            return False
        return bool(held == 1)

    async def commit(self, job: Job, outcome: Measured | Failed) -> bool:
        """Commit the outcome of `job`; False when another worker's was first. Waits for the server if it is away."""
        return await self._commit(job.message, job.candidate.id, outcome)

    async def _commit(self, message: str, candidate_id: str, outcome: Measured | Failed) -> bool:
        keys = [self._keys.jobs, self._keys.results, self._keys.done]
        args = [GROUP, self._consumer, message, candidate_id, outcome.model_dump_json()]
        return bool(await self._patiently(lambda: self._scripts["commit"](keys, args)) == 1)

    async def release(self, job: Job | None) -> None:
        """Give `job` back at once and sign off."""
        keys = [self._keys.jobs, self._keys.worker(self._consumer)]
        await self._scripts["release"](keys, [GROUP, self._consumer, job.message if job else "", self._lease_ms])

    async def _create_group(self) -> None:
        try:
            await self._patiently(lambda: self._redis.xgroup_create(self._keys.jobs, GROUP, id="0", mkstream=True))
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise StoreError(f"the key {self._keys.jobs} is not a stream of jobs: {error}") from error

    async def _read(self, position: str, *, block: int | None) -> tuple[str, dict[str, str]] | None:
        streams = {self._keys.jobs: position}
        reply = await self._patiently(
            lambda: self._redis.xreadgroup(GROUP, self._consumer, streams, count=1, block=block)
        )
        entries = _entries(reply)
        return entries[0] if entries else None

    async def _take_over(self) -> tuple[str, dict[str, str]] | None:
        await self._notice_outage()
        if (time.monotonic() - self._calm_since) * 1000 < self._lease_ms:
            return None
        pending = await self._patiently(
            lambda: self._redis.xpending_range(self._keys.jobs, GROUP, "-", "+", 100, idle=self._lease_ms)
        )
        for row in pending:
            owner, message = row["consumer"], row["message_id"]
            keys = [self._keys.jobs, self._keys.worker(owner)]
            args = [GROUP, owner, self._consumer, message, self._lease_ms]
            taken = await self._patiently(partial(self._scripts["take_over"], keys, args))
            if taken:
                log.warning("job_taken_over", message=message, owner=owner)
                message, flat = taken[0]
                return message, dict(zip(flat[::2], flat[1::2], strict=True))
        return None

    async def _notice_outage(self) -> None:
        """Start the calm time anew after a connection loss, and after a restart that happened between two calls."""
        server = str((await self._patiently(lambda: self._redis.info("server"))).get("run_id"))
        if self._patiently.outages != self._outages_seen or server != self._server:
            self._calm_since = time.monotonic()
        self._outages_seen, self._server = self._patiently.outages, server

    async def _decode(self, message: str, fields: dict[str, str]) -> Job | None:
        try:
            candidate = Candidate.model_validate_json(fields["candidate"])
            return Job(message, candidate, fields["fingerprint"])
        except (KeyError, ValueError) as error:
            log.error("job_unreadable", message=message, error=str(error)[:200])
        if "id" in fields:  # its search waits for an outcome
            failed = Failed(reason="invalid", detail="the worker cannot read it: it is of another version")
            await self._commit(message, fields["id"], failed)
        else:
            await self._patiently(lambda: self._redis.xack(self._keys.jobs, GROUP, message))
            await self._patiently(lambda: self._redis.xdel(self._keys.jobs, message))
        return None


def _outcome(text: str) -> Measured | Failed:
    """An outcome as committed; one that cannot be read has failed, for the search waits for it."""
    try:
        return OUTCOME.validate_json(text)
    except ValueError as error:
        log.error("outcome_unreadable", error=str(error)[:200])
        return Failed(reason="invalid", detail="its outcome cannot be read: the worker is of another version")


def _entries(reply: Any) -> Sequence[tuple[str, dict[str, str]]]:
    """The entries of the one stream in a reply to XREAD or XREADGROUP (RESP2 lists, RESP3 dicts)."""
    if not reply:
        return []
    if isinstance(reply, dict):
        (batches,) = reply.values()
        return [(message, fields or {}) for batch in batches for message, fields in batch]
    ((_, entries),) = reply
    return [(message, fields or {}) for message, fields in entries]
