"""A search's durable state on a real server, whose daemons are soon taken for dead."""

from collections.abc import Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from daemon.state import store as store_module
from daemon.state.history import Memory
from daemon.state.store import SearchStore
from protocol.plans.candidate import Candidate
from protocol.plans.spec import SearchSpec
from protocol.queue.jobs import JobQueue
from protocol.queue.keys import Keys
from protocol.queue.streams import CandidateQueue
from tests.support.samples import PROFILE, SPEC, candidates, measured
from tests.support.streams import claimed, queued


class State:
    """The durable state of one search, with its daemon and a worker."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self.redis: Any = redis
        self.keys = keys
        self.store = self.other()
        self._jobs = JobQueue(redis, keys, "w", lease_seconds=30)

    def other(self, spec: SearchSpec = SPEC) -> SearchStore:
        """The store of another daemon."""
        return SearchStore(self.redis, self.keys, spec)

    async def succeed(self, spec: SearchSpec = SPEC) -> CandidateQueue:
        """Let another daemon take charge."""
        return await self.other(spec).take_charge(previous_is_dead=True)

    async def begin(self, count: int) -> tuple[CandidateQueue, Callable[[], Memory]]:
        """Take charge and issue so many candidates; returns the queue and what the daemon remembers."""
        queue = await self.store.take_charge(previous_is_dead=True)
        for each in candidates(count) if count else ():
            await queue.enqueue(each)
        history = await self.store.history()
        return queue, lambda: Memory(history, PROFILE)

    async def commit(self, perplexity: float) -> Candidate:
        """Commit this perplexity for the next job; returns its candidate."""
        job = await claimed(self._jobs)
        assert await self._jobs.commit(job, measured(perplexity, job.candidate))
        return job.candidate

    async def queued(self) -> set[str]:
        """The ids of the candidates that wait."""
        return await queued(self.redis, self.keys)


@pytest.fixture
def it(redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> State:
    monkeypatch.setattr(store_module, "SIGN_OF_LIFE_SECONDS", 1.2)
    monkeypatch.setattr(store_module, "TICK_SECONDS", 0.3)
    return State(redis, keys)
