"""One search's streams on a real server, from both ends."""

import asyncio
from typing import Any

from protocol.plans.candidate import Candidate
from protocol.queue.jobs import Job, JobQueue
from protocol.queue.keys import Keys
from protocol.queue.streams import CandidateQueue
from tests.support.samples import SPEC, candidates

LEASE = 0.6


class Streams:
    """The daemon's queue, and workers by name."""

    def __init__(self, redis: Any, keys: Keys) -> None:
        self.redis, self.keys = redis, keys
        self.queue = CandidateQueue(redis, keys, epoch=1, fingerprint=SPEC.fingerprint)

    async def enqueued(self) -> Candidate:
        """Enqueue a candidate and return it."""
        (one,) = candidates(1)
        await self.queue.enqueue(one)
        return one

    def worker(self, name: str = "w1", lease: float = LEASE) -> JobQueue:
        return JobQueue(self.redis, self.keys, name, lease_seconds=lease)

    async def jobs(self) -> int:
        """Return the number of jobs on the stream, claimed or not."""
        return int(await self.redis.xlen(self.keys.jobs))


async def claimed(jobs: JobQueue) -> Job:
    """Return the next job. The first call only creates the group, and a read may return nothing."""
    async with asyncio.timeout(20):
        while True:
            if job := await jobs.claim():
                return job


async def queued(redis: Any, keys: Keys) -> set[str]:
    """Return the ids on the job stream, claimed or not."""
    return {fields["id"] for _, fields in await redis.xrange(keys.jobs)}
