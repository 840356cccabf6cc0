"""The streams on real servers: at least once delivered, once in effect."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from protocol.plans.candidate import Failed, Result
from protocol.queue.connection import connect
from protocol.queue.jobs import Job, JobQueue
from protocol.queue.keys import GROUP, Keys
from protocol.queue.streams import CandidateQueue, TakenOver
from tests.support.samples import SPEC, candidates, measured
from tests.support.servers import Server, eventually

LEASE = 0.6


@pytest.fixture
async def queue(redis: Redis, keys: Keys) -> CandidateQueue:
    await redis.set(keys.epoch, 1)
    return CandidateQueue(redis, keys, epoch=1, fingerprint=SPEC.fingerprint)


def worker(redis: Redis, keys: Keys, name: str, lease: float = LEASE) -> JobQueue:
    return JobQueue(redis, keys, name, lease_seconds=lease)


async def claimed(jobs: JobQueue) -> Job:
    """The next job; the first call only creates the group, and a read may come back empty."""
    async with asyncio.timeout(20):
        while True:
            if job := await jobs.claim():
                return job


async def queued(redis: Any, keys: Keys) -> set[str]:
    """Ids now on the job stream, claimed or not."""
    return {fields["id"] for _, fields in await redis.xrange(keys.jobs)}


async def length(redis: Any, stream: str) -> int:
    return int(await redis.xlen(stream))


async def test_a_candidate_travels_from_the_daemon_to_a_worker_and_its_outcome_back(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    (one,) = candidates(1)
    jobs = worker(redis, keys, "w1")
    assert await queue.enqueue(one)
    job = await claimed(jobs)
    assert job.candidate == one
    assert job.fingerprint == SPEC.fingerprint
    assert await jobs.commit(job, measured(12.5, one))
    (result,) = await queue.results("0-0")
    assert (result.id, result.outcome) == (one.id, measured(12.5, one))
    assert await queue.apply(result)
    assert await length(redis, keys.jobs) == await length(redis, keys.results) == 0


async def test_enqueueing_twice_leaves_one_entry(redis: Redis, keys: Keys, queue: CandidateQueue) -> None:
    (one,) = candidates(1)
    assert [await queue.enqueue(one), await queue.enqueue(one)] == [True, False]
    assert await length(redis, keys.jobs) == 1


async def test_a_daemon_that_was_replaced_can_neither_enqueue_nor_apply(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    (one,) = candidates(1)
    await redis.incr(keys.epoch)
    with pytest.raises(TakenOver):
        await queue.enqueue(one)
    with pytest.raises(TakenOver):
        await queue.apply(Result("1-1", one.id, measured(3.0, one)))
    assert not await redis.exists(keys.jobs, keys.outcomes)


async def test_the_first_outcome_of_an_id_counts_whoever_comes_later(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    (one,) = candidates(1)
    await queue.enqueue(one)
    jobs = worker(redis, keys, "w1")
    job = await claimed(jobs)
    assert await jobs.commit(job, measured(5.0, one))
    assert not await worker(redis, keys, "w2").commit(job, measured(6.0, one))
    assert [r.outcome for r in await queue.results("0-0")] == [measured(5.0, one)]


async def test_an_outcome_is_applied_once(redis: Redis, keys: Keys, queue: CandidateQueue) -> None:
    (one,) = candidates(1)
    result = Result("5-1", one.id, measured(5.0, one))
    assert [await queue.apply(result), await queue.apply(result)] == [True, False]
    client: Any = redis
    assert await client.lrange(keys.applied, 0, -1) == [one.id]


async def test_a_dead_workers_job_goes_to_another(redis: Redis, keys: Keys, queue: CandidateQueue) -> None:
    (one,) = candidates(1)
    await queue.enqueue(one)
    dead, living = worker(redis, keys, "dead"), worker(redis, keys, "living")
    job = await claimed(dead)
    await dead.beat(job, "{}")
    taken = await claimed(living)
    assert taken.candidate == one
    assert await living.commit(taken, measured(4.0, one))
    assert not await dead.commit(job, measured(9.0, one))


async def test_a_beating_workers_job_stays_its_own_for_many_leases(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    (one,) = candidates(1)
    await queue.enqueue(one)
    slow, idle = worker(redis, keys, "slow"), worker(redis, keys, "idle")
    job = await claimed(slow)
    for _ in range(12):
        assert await slow.beat(job, "{}")
        assert await asyncio.wait_for(_take_over(idle), 5) is None
        await asyncio.sleep(LEASE / 3)


async def _take_over(jobs: JobQueue) -> Any:
    return await jobs._take_over()


async def test_an_owner_with_a_sign_of_life_is_safe_even_if_its_job_looks_idle(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    (one,) = candidates(1)
    await queue.enqueue(one)
    owner, other = worker(redis, keys, "owner", lease=30), worker(redis, keys, "other")
    job = await claimed(owner)
    await owner.beat(job, "{}")
    client: Any = redis
    await client.xclaim(keys.jobs, GROUP, "owner", 0, [job.message], idle=1_000_000, justid=True)
    await asyncio.sleep(2 * LEASE)
    assert await other._take_over() is None


async def test_a_job_is_taken_over_only_after_a_lease_on_the_claimers_own_clock_too(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    """A step of the server's clock lets every lease run out, and every sign of life."""
    (one,) = candidates(1)
    await queue.enqueue(one)
    owner, other = worker(redis, keys, "owner", lease=3), worker(redis, keys, "other", lease=3)
    job = await claimed(owner)

    async def step_the_clock() -> None:
        client: Any = redis
        await client.xclaim(keys.jobs, GROUP, "owner", 0, [job.message], idle=120_000, justid=True)
        await redis.delete(keys.worker("owner"))

    for _ in range(4):  # longer than a lease, with renewals
        await owner.beat(job, "{}")
        assert await other._take_over() is None
        await asyncio.sleep(1)
        await step_the_clock()
        assert await other._take_over() is None
    assert (await claimed(other)).candidate == one  # its lease is no longer renewed


async def test_jobs_of_an_owner_whose_name_is_not_text_are_taken_over(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    (one,) = candidates(1)
    await queue.enqueue(one)
    client: Any = redis
    await client.xgroup_create(keys.jobs, GROUP, id="0")
    await client.xreadgroup(GROUP, b"\xff\xfe", {keys.jobs: ">"})
    assert (await claimed(worker(redis, keys, "w1"))).candidate == one


async def test_an_invalid_count_of_deaths_is_ignored(redis: Redis, keys: Keys, queue: CandidateQueue) -> None:
    (one,) = candidates(1)
    await queue.enqueue(one)
    client: Any = redis
    await client.hset(keys.deaths, one.id, "abc")
    jobs = worker(redis, keys, "w1", lease=30)
    assert await jobs.count_death(await claimed(jobs), "a death") == 1


async def test_a_former_owners_beat_does_not_steal_the_job_back(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    (one,) = candidates(1)
    await queue.enqueue(one)
    former, new = worker(redis, keys, "former"), worker(redis, keys, "new")
    job = await claimed(former)
    taken = await claimed(new)
    assert not await former.beat(job, "{}")
    assert await new.beat(taken, "{}")


async def test_a_released_job_is_free_at_once(redis: Redis, keys: Keys, queue: CandidateQueue) -> None:
    (one,) = candidates(1)
    await queue.enqueue(one)
    first, second = worker(redis, keys, "first", lease=30), worker(redis, keys, "second", lease=30)
    job = await claimed(first)
    await first.beat(job, "{}")
    assert await second._take_over() is None
    await first.release()
    taken = await second._take_over()
    assert taken is not None


async def test_a_job_whose_delivery_got_lost_is_found_again_by_its_worker(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    (one,) = candidates(1)
    await queue.enqueue(one)
    jobs = worker(redis, keys, "w1", lease=30)
    lost = await claimed(jobs)
    found = await claimed(jobs)
    assert found == lost


async def test_nothing_is_taken_over_within_a_lease_of_an_outage(
    redis: Redis, keys: Keys, queue: CandidateQueue, server: Server
) -> None:
    (one,) = candidates(1)
    await queue.enqueue(one)
    owner, other = worker(redis, keys, "owner", lease=2), worker(redis, keys, "other", lease=2)
    await claimed(owner)
    assert await other.claim() is None
    server.kill()
    await asyncio.sleep(2.1)
    server.start()
    assert await other._take_over() is None  # the owner's sign of life ran out while nobody could renew it
    assert await claimed(other)


async def test_a_lost_stream_and_group_heal_and_the_ledger_brings_the_jobs_back(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    one, two = candidates(2)
    await queue.enqueue(one)
    await queue.enqueue(two)
    jobs = worker(redis, keys, "w1")
    await jobs.commit(await claimed(jobs), measured(5.0, one))
    await redis.delete(keys.jobs)
    assert await queued(redis, keys) == set()
    assert await queue.requeue([one.id, two.id]) == 1
    assert await queue.requeue([one.id, two.id]) == 0
    assert (await claimed(jobs)).candidate == two


async def test_an_unreadable_job_has_failed_and_the_next_one_is_served(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    client: Any = redis
    await client.xadd(keys.jobs, {"id": "x", "candidate": "{not json", "fingerprint": "f"})
    await client.xadd(keys.jobs, {"nothing": "of ours"})
    (one,) = candidates(1)
    await queue.enqueue(one)
    assert (await claimed(worker(redis, keys, "w1"))).candidate == one
    assert await length(redis, keys.jobs) == 1
    (result,) = await queue.results("0-0")
    assert result.id == "x" and isinstance(result.outcome, Failed)


async def test_an_unreadable_result_has_failed_and_the_next_one_is_read(
    redis: Redis, keys: Keys, queue: CandidateQueue
) -> None:
    (one,) = candidates(1)
    client: Any = redis
    await client.xadd(keys.results, {"id": one.id, "outcome": '{"kind":"measured","perplexity":NaN}'})
    await client.xadd(keys.results, {"garbage": "1"})
    await client.xadd(keys.results, {"id": one.id, "outcome": Failed(reason="timeout").model_dump_json()})
    outcomes = [r.outcome for r in await queue.results("0-0")]
    assert [o.reason for o in outcomes if isinstance(o, Failed)] == ["invalid", "timeout"]
    assert await length(redis, keys.results) == 2


async def test_a_commit_waits_for_a_server_that_is_away_and_then_counts(
    redis: Redis, keys: Keys, queue: CandidateQueue, server: Server
) -> None:
    (one,) = candidates(1)
    await queue.enqueue(one)
    jobs = worker(redis, keys, "w1")
    job = await claimed(jobs)
    server.kill()
    commit = asyncio.create_task(jobs.commit(job, measured(7.0, one)))
    await asyncio.sleep(0.3)
    assert not commit.done()
    server.start()
    assert await commit
    assert len(await queue.results("0-0")) == 1


async def test_repeated_enqueues_while_connections_are_being_cut_leave_one_entry_each(
    redis: Redis, keys: Keys, queue: CandidateQueue, server: Server
) -> None:
    killer = connect(server.url)
    many = candidates(30)

    cuts = 0

    async def cut() -> None:
        nonlocal cuts
        while True:
            await killer.client_kill_filter(_type="normal", skipme=True)
            cuts += 1
            await asyncio.sleep(0.01 * 1.02**cuts)  # ever seldomer: a busy machine needs longer between two of them

    cutting = asyncio.create_task(cut())
    await asyncio.gather(*(queue.enqueue(c) for c in many for _ in range(5)))
    assert cuts > 1
    cutting.cancel()
    await asyncio.gather(cutting, return_exceptions=True)
    await killer.aclose()
    await redis.connection_pool.disconnect()  # those that the last cut has closed: from here on nobody tries again
    assert await length(redis, keys.jobs) == len(many)
    assert await queued(redis, keys) == {c.id for c in many}


async def test_results_are_read_from_the_cursor_on(redis: Redis, keys: Keys, queue: CandidateQueue) -> None:
    one, two = candidates(2)
    jobs = worker(redis, keys, "w1")
    for each in (one, two):
        await queue.enqueue(each)
        await jobs.commit(await claimed(jobs), measured(5.0, each))
    first, second = await queue.results("0-0")
    assert (first.id, second.id) == (one.id, two.id)
    assert [r.id for r in await queue.results(first.cursor)] == [two.id]


async def test_a_worker_shows_its_status_for_one_lease_only(redis: Redis, keys: Keys, queue: CandidateQueue) -> None:
    client: Any = redis
    await worker(redis, keys, "w1").beat(None, '{"stage":"idle"}')
    assert await client.get(keys.worker("w1")) == '{"stage":"idle"}'

    async def gone() -> bool:
        return not await client.exists(keys.worker("w1"))

    await eventually(gone)


async def test_a_cancellation_at_any_moment_ends_a_reading_loop(server: Server, keys: Keys) -> None:
    async def read_for_ever(client: Redis) -> None:
        queue = CandidateQueue(client, keys, epoch=1, fingerprint="")
        while True:
            await queue.results("0-0")

    for milliseconds in (0, 1, 2, 3, 5, 8, 20):
        client = connect(server.url)  # a new connection each time: the first command also says hello
        reading = asyncio.create_task(read_for_ever(client))
        await asyncio.sleep(milliseconds / 1000)
        reading.cancel()
        done, _ = await asyncio.wait({reading}, timeout=10)
        assert done and reading.cancelled()
        await client.aclose()
