"""The workers' end of the streams on real servers: deaths, hand-overs and clean-up."""

from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from protocol.plans.candidate import Failed
from protocol.queue.jobs import MOST_DEAD, RELEASED
from protocol.queue.keys import GROUP, Keys
from protocol.queue.streams import CandidateQueue
from tests.protocol.queue.test_streams import LEASE, claimed, worker
from tests.support.samples import SPEC, candidates, measured
from tests.support.servers import eventually


@pytest.fixture
async def queue(redis: Redis, keys: Keys) -> CandidateQueue:
    await redis.set(keys.epoch, 1)
    return CandidateQueue(redis, keys, epoch=1, fingerprint=SPEC.fingerprint)


async def consumers(redis: Any, keys: Keys) -> set[str]:
    return {consumer["name"] for consumer in await redis.xinfo_consumers(keys.jobs, GROUP)}


async def dead(redis: Any, keys: Keys) -> list[dict[str, str]]:
    return [fields for _, fields in await redis.xrange(keys.dead)]


async def test_a_job_whose_owners_died_three_times_is_given_up_and_listed(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    one, two = candidates(2)
    await queue.enqueue(one)
    for name in ("first", "second", "third"):
        assert (await claimed(worker(redis, keys, name))).candidate == one
    await queue.enqueue(two)
    last = worker(redis, keys, "last")

    async def given_up() -> bool:
        assert await last._take_over() is None
        return bool(await dead(redis, keys))

    await eventually(given_up)
    (entry,) = await dead(redis, keys)
    assert (entry["id"], entry["reason"], entry["worker"]) == (one.id, "poison", "third")
    (result,) = await queue.results("0-0")
    assert result.id == one.id and isinstance(result.outcome, Failed) and result.outcome.reason == "crashed"
    assert (await claimed(last)).candidate == two


async def test_a_death_of_an_evaluation_process_is_counted_once_however_often_it_is_told(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    (one,) = candidates(1)
    await queue.enqueue(one)
    jobs = worker(redis, keys, "w1")
    job = await claimed(jobs)
    assert [await jobs.count_death(job, name) for name in ("a", "a")] == [1, 1]
    taken = await claimed(worker(redis, keys, "w2"))  # w1 shows no sign of life
    assert await jobs.count_death(job, "b") == 2  # no longer its own: the take-over was the second
    await jobs.commit(taken, measured(5.0, one))
    assert not await redis.exists(keys.deaths)


async def test_handing_back_is_no_death(redis: Redis, keys: Keys, queue: CandidateQueue) -> None:
    (one,) = candidates(1)
    await queue.enqueue(one)
    for name in ("w1", "w2", "w3", "w4", "w5"):
        jobs = worker(redis, keys, name, lease=30)
        assert (await claimed(jobs)).candidate == one
        await jobs.release()
    assert not await redis.exists(keys.deaths, keys.dead)
    assert await consumers(redis, keys) == {RELEASED}


async def test_a_second_pending_job_of_a_busy_worker_goes_to_another(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    running, stranded = candidates(2)
    await queue.enqueue(running)
    jobs, other = worker(redis, keys, "busy", lease=30), worker(redis, keys, "other", lease=30)
    job = await claimed(jobs)
    await queue.enqueue(stranded)
    client: Any = redis
    await client.xreadgroup(GROUP, "busy", {keys.jobs: ">"}, count=1)  # a reply that got lost
    assert await jobs.beat(job, "{}")
    assert (await claimed(other)).candidate == stranded
    assert await jobs.beat(job, "{}")
    assert await jobs.commit(job, measured(5.0, running))


async def test_dead_consumers_are_deleted_once_nothing_is_pending_with_them(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    (one,) = candidates(1)
    await queue.enqueue(one)
    gone, living = worker(redis, keys, "gone"), worker(redis, keys, "living")
    await claimed(gone)
    assert await consumers(redis, keys) == {"gone"}
    job = await claimed(living)
    await living.commit(job, measured(5.0, one))

    async def forgotten() -> bool:
        await living.beat(None, "{}")
        await living.claim()
        return "gone" not in await consumers(redis, keys)

    await eventually(forgotten)


async def test_the_list_of_the_dead_is_bounded(redis: Redis, keys: Keys, queue: CandidateQueue) -> None:
    client: Any = redis
    pipe = client.pipeline()
    for _ in range(MOST_DEAD + 5):
        pipe.xadd(keys.dead, {"id": "x"})
    await pipe.execute()
    await client.xadd(keys.jobs, {"nothing": "of ours"})
    jobs = worker(redis, keys, "w1")
    while await client.xlen(keys.jobs):
        await jobs.claim()
    entries = await dead(redis, keys)
    assert len(entries) == MOST_DEAD and entries[-1]["reason"] == "unreadable"


async def test_an_outcome_that_was_applied_long_ago_is_still_the_only_one(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    (one,) = candidates(1)
    await queue.enqueue(one)
    early, late = worker(redis, keys, "early", lease=LEASE), worker(redis, keys, "late")
    job = await claimed(early)
    taken = await claimed(late)
    assert await late.commit(taken, measured(5.0, one))
    (result,) = await queue.results("0-0")
    assert await queue.apply(result)
    assert not await redis.exists(keys.done)
    assert not await early.commit(job, measured(9.0, one))
    assert not await queue.requeue(one.id)
    assert await queue.results("0-0") == []


async def test_a_new_group_is_logged_as_info_and_a_lost_one_as_warning(redis: Redis, keys: Keys) -> None:
    claimer = worker(redis, keys, "a")
    with capture_logs() as events:
        for _ in range(2):
            await claimer.claim()
        await redis.delete(keys.jobs)
        await claimer.claim()
    told = [(event["event"], event["log_level"]) for event in events]
    assert told == [("group_created", "info"), ("group_lost", "warning")]
