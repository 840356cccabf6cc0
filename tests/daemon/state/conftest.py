"""A search's durable state on a real server, whose daemons are soon taken for dead."""

from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from daemon.state import store as store_module
from daemon.state.history import Memory
from daemon.state.store import SearchStore
from protocol.plans.candidate import Candidate
from protocol.queue.jobs import JobQueue
from protocol.queue.keys import Keys
from protocol.queue.streams import CandidateQueue
from tests.protocol.queue.test_streams import claimed
from tests.support.samples import PROFILE, SPEC, candidates, measured

Begin = Callable[[int], Awaitable[tuple[CandidateQueue, Callable[[], Memory]]]]
Commit = Callable[[float], Awaitable[Candidate]]


@pytest.fixture
def _short_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SIGN_OF_LIFE_SECONDS", 1.2)
    monkeypatch.setattr(store_module, "TICK_SECONDS", 0.3)


@pytest.fixture
def store(redis: Redis, keys: Keys, _short_signs_of_life: None) -> SearchStore:
    return SearchStore(redis, keys, SPEC)


@pytest.fixture
def begin(store: SearchStore) -> Begin:
    """Take charge and issue so many candidates; returns the queue and what the daemon remembers."""

    async def begun(count: int) -> tuple[CandidateQueue, Callable[[], Memory]]:
        queue = await store.take_charge(previous_is_dead=True)
        for each in candidates(count) if count else ():
            await queue.enqueue(each)
        history = await store.history()
        return queue, lambda: Memory(history, PROFILE)

    return begun


@pytest.fixture
def commit(redis: Redis, keys: Keys) -> Commit:
    """Commit this perplexity for the next job; returns its candidate."""
    jobs = JobQueue(redis, keys, "w", lease_seconds=30)

    async def committed(perplexity: float) -> Candidate:
        job = await claimed(jobs)
        assert await jobs.commit(job, measured(perplexity, job.candidate))
        return job.candidate

    return committed
